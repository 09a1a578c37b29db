"""The front door: from the user's choices to a pipeline, and from a photo to a restored one."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.models import DEFAULT, REAL_NAME, load_model
from ragsr.models.refnet import RICH, RefNet
from ragsr.pipelines.refir_restorer import ReFIROptions, ReFIRRestorer, load_refir
from ragsr.pipelines.refsr import REFERENCE, RefSRPipeline, Restored

if TYPE_CHECKING:  # diffusers takes seconds to import, and few need it
    from ragsr.pipelines.diffusion import DiffusionStage

Photo = str | Path | Image.Image
STAGES = "model_index.json"  # what a folder with a diffusion stage holds
STEPS = 10  # of the diffusion, where the model does not say


def restore(
    photo: Photo | Tensor,
    *,
    references: Photo | Sequence[Photo] | None = None,
    gallery: str | Path | Gallery | None = None,
    k: int = 1,
    threshold: float | None = None,
    pipeline: str = "refsr",
    model: str | Path = DEFAULT,
    quality: str = "faithful",
    scale: int = 4,
    steps: int | None = None,
    tile: int | str = "auto",
    seed: int = 0,
    device: str | torch.device | None = None,
    **options: Any,
) -> Restored:
    """Restore one low-quality photo with the help of good ones.

        restored = ragsr.restore("small.jpg", references="good.jpg")
        restored = ragsr.restore("small.jpg", gallery="photos.ragsr", k=2)
        restored.image.save("big.png")
        restored = ragsr.restore("small.jpg", references="good.jpg", pipeline="refir", model="PATH or hub name")

    photo       a file, a PIL picture, or a tensor [1, 3, h, w] in [0, 1]
    references  files or pictures to take texture from; without them and a gallery, the photo is restored by itself.
                Sides from 8 pixels; beyond 4 megapixels they are reduced, and `Reference.note` says so
    gallery     a `Gallery` or its folder: the k nearest images are the references
    threshold   images of the gallery with a lower score are not used; None: the threshold of its encoder
    pipeline    "refsr", or "refir": a diffusion model that looks at the references while it denoises
    model       refsr: "auto", which takes "refnet" for a photo that was only reduced, "refnet-real" for one with noise
                and compression, and a mean of both in between; one of these; "transfer", the folder of a trained
                model, or the file of a TTSR checkpoint;
                refir: the folder, file or hub name of a diffusion model that `ragsr.hosts` knows
    quality     of refsr: "faithful" keeps to what is in the photo and its references; "rich" may add detail: by the
                diffusion stage that ships, or by that of a model's folder, as
                `ragsr train refsr --stage diffusion` writes it. It needs diffusers
    scale       how many times larger the result is on each side
    steps       of the diffusion, for "rich" and refir; None: as many as the model was made for
    tile        "auto", or the side of the tiles in pixels of the photo: smaller needs less memory
    seed        for models that draw random numbers
    device      "cpu", "cuda", or None: cuda where there is one
    options     of refir: see `ragsr.pipelines.ReFIROptions`

    Raises `InputError` for input that cannot be used. For many photos, make one pipeline with `load_pipeline` and call
    it: it remembers what it prepared for the references.
    """
    if references is not None and gallery is not None:
        raise InputError("references and a gallery were both given; give one of them, or neither")
    chosen = {"quality": quality, "scale": scale, "steps": steps, "tile": tile, "seed": seed, "device": device}
    run = load_pipeline(pipeline, model, **chosen, **options)  # type: ignore[arg-type]
    if isinstance(gallery, str | Path):
        with Gallery.open(gallery) as opened:
            return run(photo, gallery=opened, k=k, threshold=threshold)
    return run(photo, _sequence(references), gallery, k, threshold)


def load_pipeline(
    pipeline: str = "refsr",
    model: str | Path = DEFAULT,
    *,
    quality: str = "faithful",
    scale: int = 4,
    steps: int | None = None,
    tile: int | str = "auto",
    seed: int = 0,
    device: str | torch.device | None = None,
    **options: Any,
) -> RefSRPipeline | ReFIRRestorer:
    """The pipeline of that name with its model loaded. Parameters and errors as in `restore`."""
    if pipeline == "refir":
        options |= {} if steps is None else {"steps": steps}
        return load_refir(model, ReFIROptions.of(options), scale, tile, seed, find_device(device))
    if pipeline != "refsr":
        raise InputError(f"there is no pipeline {pipeline!r}; there are: refsr, refir")
    if options:
        raise InputError(f"refsr has no option {next(iter(options))!r}: those of a diffusion model are refir's")
    if quality not in ("faithful", "rich"):
        raise InputError(f"quality is {quality!r}; it is faithful or rich")
    if steps is not None and quality == "faithful":
        raise InputError("steps are of a diffusion, and quality faithful has none; leave them out, or ask for rich")
    if steps is not None and not 1 <= steps <= 1000:
        raise InputError(f"steps is {steps}; it must lie between 1 and 1000")
    ships = quality == "rich" and model in (DEFAULT, RefNet.name, REAL_NAME)
    folder, place = RICH if ships else Path(model), find_device(device)
    has_diffusion = (folder / STAGES).is_file()
    loaded = load_model(reference_stage(folder) if has_diffusion else model, scale)
    if quality == "faithful":
        return RefSRPipeline(loaded, place, tile, seed)
    if not has_diffusion:
        raise InputError(
            f"the model {loaded.name} has no rich mode; use {DEFAULT}, or the folder of a model with a diffusion stage"
        )
    return RefSRPipeline(loaded, place, tile, seed, load_diffusion(folder, place), steps or usual_steps(folder))


def reference_stage(folder: Path) -> str | Path:
    """The first stage of a model with a diffusion stage: its own, or the `refnet` that ships."""
    return folder / REFERENCE if (folder / REFERENCE).is_dir() else RefNet.name


def load_diffusion(folder: Path, device: torch.device) -> "DiffusionStage":
    """The second stage that `DiffusionStage.save_pretrained` wrote to a folder."""
    try:
        from ragsr.pipelines.diffusion import DiffusionStage
    except ImportError as error:
        raise InputError(f'quality rich needs diffusers ({error}): pip install "ragsr[diffusion]"') from None
    try:
        with without_bars():
            stage: DiffusionStage = DiffusionStage.from_pretrained(folder, local_files_only=True)
    except InputError:
        raise
    except Exception as error:  # of diffusers, and of many kinds: a file is missing, damaged or of another model
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: is no diffusion stage that ragsr can load ({reason}); save it again") from error
    stage.set_progress_bar_config(disable=True)
    return stage.to(device)


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, diffusers does not show how it loads."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def usual_steps(folder: Path) -> int:
    """As many steps as the model was trained to be sampled with, as its card says."""
    try:
        steps = json.loads((folder / "training.json").read_text())["sampling_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return STEPS
    return steps if isinstance(steps, int) and steps > 0 else STEPS


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, if it is here; None is cuda where there is one, else cpu."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"there is no device {device!r}; use cpu or cuda") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{device} was asked for and PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return found


def _sequence(references: Photo | Sequence[Photo] | None) -> Sequence[Photo]:
    if references is None:
        return ()
    return [references] if isinstance(references, Photo) else references
