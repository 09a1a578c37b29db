"""Metrics with learned weights, as pyiqa computes them: LPIPS, DISTS, CLIP-IQA, MUSIQ and FID.

pyiqa comes with an extra of its own, `pip install "ragsr[metrics]"`: it needs torchvision, and its licence (PolyForm
Noncommercial) and those of its weights are not ours. It downloads the weights of a metric when that is first used. What
is measured are whole images, with pyiqa's own choices: LPIPS with AlexNet, MUSIQ of KonIQ, FID after clean-fid.

FID compares sets. With the hundred photos of a usual test set it says little; it is here to be set beside a paper's.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from ragsr.errors import InputError
from ragsr.metrics.fidelity import Picture, as_tensor, size_text

INSTALL = 'pip install "ragsr[metrics]"'
FID = "fid"
LEAST_OF_A_SET = 2  # pictures: one has no covariance


@dataclass(frozen=True)
class Metric:
    """What a reader must know of a metric's numbers."""

    title: str
    higher: bool  # is better
    compares: bool  # with the truth; otherwise it looks at the image alone
    unit: str = ""
    digits: int = 4


EXTRA = {
    "lpips": Metric("LPIPS", higher=False, compares=True),
    "dists": Metric("DISTS", higher=False, compares=True),
    "clipiqa": Metric("CLIP-IQA", higher=True, compares=False),
    "musiq": Metric("MUSIQ", higher=True, compares=False, unit="of 100", digits=2),
    FID: Metric("FID", higher=False, compares=True, digits=2),
}


class ExtraMeasure:
    """One metric of pyiqa on pairs of pictures: the image and the truth. `name` is of `EXTRA`, other than FID."""

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        self.name, self.about = name, EXTRA[name]
        self.model = create(name, device)

    @torch.no_grad()
    def __call__(self, image: Picture, truth: Picture) -> float:
        """Raises `InputError` for images of different sizes, and for NaN."""
        x = as_tensor(image).float()
        if not self.about.compares:
            return float(self.model(x))
        y = as_tensor(truth).float()
        if x.shape != y.shape:
            raise InputError(
                f"{self.about.title} compares images of one size; these are {size_text(x)} and {size_text(y)}"
            )
        return float(self.model(x, y))


class FIDMeasure:
    """The Fréchet distance between the pictures of two folders."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.model = create(FID, device)

    def __call__(self, images: Path, truths: Path) -> float:
        """Raises `InputError` for folders with fewer than two pictures."""
        for folder in (images, truths):
            if sum(1 for _ in folder.glob("*.png")) < LEAST_OF_A_SET:
                raise InputError(f"FID compares two sets of at least {LEAST_OF_A_SET} pictures; give more photos")
        return float(self.model(str(images), str(truths), num_workers=0, verbose=False))


def save_for_fid(picture: Image.Image, folder: Path, number: int) -> None:
    """One more picture of a set."""
    folder.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").save(folder / f"{number:05}.png", compress_level=1)


# ------------------------------------------------------------------ pyiqa


def create(name: str, device: str | torch.device) -> Any:
    """pyiqa's model of a metric, with its weights. Raises `InputError` where pyiqa or its weights cannot be had."""
    pyiqa = import_pyiqa(name)
    try:
        model = pyiqa.create_metric(name, device=torch.device(device))
    except (OSError, RuntimeError) as error:  # a download that failed, or a damaged file
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"pyiqa cannot load {name} ({reason}); it downloads weights at first use, so it needs the network once"
        ) from error
    if bool(model.lower_better) == EXTRA[name].higher:
        raise InputError(f"this pyiqa reads {name} the other way around than ragsr does; use pyiqa 0.1.16")
    return model


def import_pyiqa(name: str) -> ModuleType:
    """pyiqa, for the metric of that name. Raises `InputError` with the command that installs it."""
    try:
        import pyiqa
    except (ImportError, RuntimeError) as error:  # the latter where torchvision and torch do not fit
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{EXTRA[name].title} needs pyiqa ({reason}): {INSTALL}") from None
    return pyiqa
