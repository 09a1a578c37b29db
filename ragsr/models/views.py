"""References made ready for registration: each at several zooms, as photos show the same thing at different sizes."""

from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from ragsr.errors import InputError
from ragsr.models.registration import features, luma
from ragsr.models.resample import back_project, reduce, resize

ZOOMS = tuple(2 ** (-i / 4) for i in range(-1, 7))  # 1.19 to 0.35 of the reference's own size
MAX_PIXELS = 1 << 22  # larger references are reduced to this many pixels
MIN_SIDE = 8  # pixels; nothing smaller is matched
BACK_PROJECTIONS = 3


class View:
    """One reference at one zoom. What needs work is done when first asked for, and kept for the next tile or image."""

    def __init__(self, reference: Tensor, zoom: float, scale: int) -> None:
        self.reference, self.zoom, self.scale = reference, zoom, scale
        self.coarse_features: dict[int, Tensor] = {}

    def coarse(self, reduction: int) -> Tensor:
        """Features on a grid of `reduction` output pixels."""
        if reduction not in self.coarse_features:
            size = [max(1, round(n * self.zoom / reduction)) for n in self.reference.shape[2:]]
            self.coarse_features[reduction] = features(resize(self.reference, (size[0], size[1])))
        return self.coarse_features[reduction]

    @cached_property
    def image(self) -> Tensor:
        """[1, 3, H, W], whole multiples of the scale."""
        size = [max(1, round(n * self.zoom / self.scale)) * self.scale for n in self.reference.shape[2:]]
        return resize(self.reference, (size[0], size[1]))

    @cached_property
    def low(self) -> Tensor:
        """What a low-quality photo of it would be: [1, 3, H/scale, W/scale]."""
        return reduce(self.image, self.scale)

    @cached_property
    def enlarged(self) -> Tensor:
        """Luma of `low` enlarged bicubically: what can be compared with the query at output size. [1, 1, H, W]"""
        return resize(luma(self.low), (self.image.shape[2], self.image.shape[3]))

    @cached_property
    def detail(self) -> Tensor:
        """What back-projection cannot win back, at four sub-pixel phases that stand below each other: [1, 3, 4·H, W].

        Phase (py, px) of the pixel (y, x) is the value at (y + py/2 - 1/4, x + px/2 - 1/4).
        """
        h, w = self.image.shape[2:]
        base = back_project(resize(self.low, (h, w)), self.low, BACK_PROJECTIONS)
        double = resize(self.image - base, (2 * h, 2 * w))
        return F.pixel_unshuffle(double, 2).view(1, 3, 4 * h, w)


@dataclass(frozen=True)
class PreparedReferences:
    """References with everything that depends on them alone, for any number of tiles and images."""

    views: tuple[tuple[View, ...], ...]  # per reference, its zooms


def views_of(reference: Tensor, scale: int) -> tuple[View, ...]:
    """A reference [1, 3, H, W] at every zoom."""
    reference = usable(reference)
    return tuple(View(reference, zoom, scale) for zoom in ZOOMS)


def usable(reference: Tensor) -> Tensor:
    """A reference [1, 3, H, W], checked, and reduced to `MAX_PIXELS` if it is larger."""
    check_image("a reference", reference, MIN_SIDE)
    excess = (reference.shape[2] * reference.shape[3] / MAX_PIXELS) ** 0.5
    if excess <= 1:
        return reference
    height, width = (max(MIN_SIDE, int(n / excess)) for n in reference.shape[2:])
    return resize(reference, (height, width))


def check_image(what: str, x: Tensor, least: int) -> None:
    if x.ndim != 4 or x.shape[:2] != (1, 3) or min(x.shape[2:]) < least:
        raise InputError(
            f"{what} has shape {tuple(x.shape)}; it must be [1, 3, height, width], both sides at least {least} pixels"
        )
    if not x.isfinite().all():
        raise InputError(f"{what} contains NaN or infinite values; images hold finite numbers in [0, 1]")
