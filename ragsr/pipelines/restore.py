"""The front door: from the user's choices to a pipeline, and from a photo to a restored one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.models import DEFAULT, load_model
from ragsr.pipelines.refsr import RefSRPipeline, Restored

Photo = str | Path | Image.Image


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
    tile: int | str = "auto",
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Restored:
    """Restore one low-quality photo with the help of good ones.

        restored = ragsr.restore("small.jpg", references="good.jpg")
        restored = ragsr.restore("small.jpg", gallery="photos.ragsr", k=2)
        restored.image.save("big.png")

    photo       a file, a PIL picture, or a tensor [1, 3, h, w] in [0, 1]
    references  files or pictures to take texture from; without them and a gallery, the photo is restored by itself.
                Sides from 8 pixels; beyond 4 megapixels they are reduced, and `Reference.note` says so
    gallery     a `Gallery` or its folder: the k nearest images are the references
    threshold   images of the gallery with a lower score are not used; None: the threshold of its encoder
    model       "refnet", "transfer", the folder of a trained model, or the file of a TTSR checkpoint
    quality     "faithful" keeps to what is in the photo and its references; "rich" may add detail (diffusion models)
    scale       how many times larger the result is on each side
    tile        "auto", or the side of the tiles in pixels of the photo: smaller needs less memory
    seed        for models that draw random numbers
    device      "cpu", "cuda", or None: cuda where there is one

    Raises `InputError` for input that cannot be used. For many photos, make one pipeline with `load_pipeline` and call
    it: it remembers what it prepared for the references.
    """
    if references is not None and gallery is not None:
        raise InputError("references and a gallery were both given; give one of them, or neither")
    run = load_pipeline(pipeline, model, quality=quality, scale=scale, tile=tile, seed=seed, device=device)
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
    tile: int | str = "auto",
    seed: int = 0,
    device: str | torch.device | None = None,
) -> RefSRPipeline:
    """The pipeline of that name with its model loaded. Parameters and errors as in `restore`."""
    if pipeline == "refir":
        raise InputError("refir restores with a diffusion model and this version has no host for one; use refsr")
    if pipeline != "refsr":
        raise InputError(f"there is no pipeline {pipeline!r}; there are: refsr, refir")
    if quality not in ("faithful", "rich"):
        raise InputError(f"quality is {quality!r}; it is faithful or rich")
    loaded = load_model(model, scale)
    if quality == "rich":
        raise InputError(f"the model {loaded.name} has no rich mode; it comes with diffusion models")
    return RefSRPipeline(loaded, find_device(device), tile, seed)


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
