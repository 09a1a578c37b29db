"""The folder of a model with a diffusion stage: what a run begins with, and what it leaves."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ragsr.errors import InputError
from ragsr.models.refnet import ASSET, RefNet, save_model
from ragsr.pipelines.diffusion import DiffusionStage
from ragsr.pipelines.refsr import REFERENCE
from ragsr.pipelines.restore import STAGES, load_diffusion
from ragsr.training.run import Settings
from ragsr.training.sizes import make_stage

WHAT = """\
# A diffusion stage for refnet

The second half of iRAG: latent diffusion, conditioned by a low-quality photo and by what the reference stage (in
`reference/`) made of it. `ragsr restore --model FOLDER --quality rich` uses both, `--quality faithful` the reference
stage alone. What it adds may look right and yet not be what was there.
"""


@dataclass(frozen=True)
class Begin:
    """What a run begins with, and what it is helped by."""

    init: Path | None = None  # the folder of a model with a diffusion stage
    reference: str | None = None  # refnet or a folder of one; default: that of `init`
    perceptual: Path | None = None  # a network for the perceptual distance
    autoencoder: Path | None = None  # the folder of a published one, where there is no `init`


def initial_stage(settings: Settings, begin: Begin) -> DiffusionStage:
    """Of random weights, or as a folder holds it."""
    init = begin.init
    if init is None:
        return make_stage(settings.size, settings.predicts, settings.seed, begin.autoencoder)
    if not (init / STAGES).is_file():
        raise InputError(f"{init}: holds no {STAGES}; name the folder model/ of a run of --stage autoencoder")
    return load_diffusion(init, torch.device("cpu"))


def reference_of(begin: Begin) -> Path:
    """The folder of the reference stage."""
    if begin.reference is not None:
        return ASSET if begin.reference == RefNet.name else Path(begin.reference)
    own = begin.init / REFERENCE if begin.init is not None else ASSET
    return own if own.is_dir() else ASSET


def save_stage(stage: DiffusionStage, reference: RefNet, folder: Path) -> None:
    """Both stages in fp16, whatever they are trained in."""
    half = DiffusionStage(
        **{name: copy.deepcopy(getattr(stage, name)).half() for name in ("vae", "unet", "structure")},
        scheduler=stage.scheduler,
        adds_detail=stage.config.adds_detail,
        detail_scale=stage.config.detail_scale,
    )
    for part in (half.vae, half.unet, half.structure):
        part.register_to_config(_name_or_path="")  # else the folder it was read from on this machine
    half.save_pretrained(folder)
    save_model(folder / REFERENCE, reference.net, torch.float16)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `path` when it is whole."""
    made = path.with_name(f".{path.name}.new")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        yield made
        shutil.rmtree(path, ignore_errors=True)
        made.rename(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)
