"""`transfer`: reference-based ×4 super-resolution without training, the baseline every learned model has to beat.

The low-quality image is enlarged bicubically and back-projected. Every reference is registered with it
(`ragsr.models.registration`), and what the reference shows above the band of the low-quality image is brought over by
`ops.gather_fold`, as much of it as the match deserves:

    restored = base + weight · contrast · detail(reference, at p + field(p))

and a last back-projection keeps the result consistent with the input. The weight is the product of two judgements: the
correlation of query and reference in the band both have, and the evidence that the match is one at all. Where a reference
shows something else the weight is zero, and so is what it can spoil.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ragsr.errors import InputError
from ragsr.models.registration import (
    box,
    correlation,
    enlarge,
    evidence,
    features,
    fill,
    global_match,
    grid,
    luma,
    refine,
    warp,
)
from ragsr.models.resample import back_project, reduce, resize
from ragsr.ops import gather_fold

ZOOMS = tuple(2 ** (-i / 4) for i in range(-1, 7))  # sizes at which a reference is tried: 1.19 to 0.35 of its own
MAX_PIXELS = 1 << 22  # larger references are reduced to this many pixels
MIN_SIDE = 8  # pixels; nothing smaller is matched
MAX_POSITIONS = 1 << 14  # of the grid of the global search
MAX_REFERENCES = 4  # registered per image, those with the most evidence
BACK_PROJECTIONS = 3
WINDOW = 15  # pixels of the output over which a match is judged


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
        """What back-projection cannot win back, read at four sub-pixel phases that stand below each other: [1, 3, 4·H, W].

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


class Transfer:
    """The model `transfer`: ×4, training-free, deterministic; every image [1, 3, H, W] float32 in [0, 1]."""

    name = "transfer"
    context = 48  # pixels of the low-quality image around a tile, so that the search sees the same surroundings

    def __init__(self, scale: int = 4) -> None:
        if scale != 4:
            raise InputError(f"model 'transfer' enlarges 4 times, not {scale} times; use scale 4")
        self.scale = scale

    def prepare(self, references: Sequence[Tensor]) -> PreparedReferences:
        """References of any sizes from 8 × 8 pixels, each [1, 3, H, W]; more than 4 megapixels are reduced to 4."""
        return PreparedReferences(tuple(self._views(reference) for reference in references))

    @torch.no_grad()
    def __call__(self, low: Tensor, prepared: PreparedReferences) -> tuple[Tensor, Tensor]:
        """Restore low [1, 3, h, w]: the image [1, 3, 4h, 4w], and how much came from the references [1, 1, 4h, 4w]."""
        check_image("the low-quality image", low, 1)
        enlarged = resize(low, (low.shape[2] * self.scale, low.shape[3] * self.scale))
        base = back_project(enlarged, low, BACK_PROJECTIONS)
        detail, weight = torch.zeros_like(base), torch.zeros_like(base[:, :1])
        for view, field, trust in self._matches(low, prepared):
            field = self._register(low, luma(enlarged), view, field)
            quality, contrast = judge(luma(enlarged), warp(view.enlarged, field))
            found = quality * enlarge_map(trust, base) * inside(field, view.image)
            better = found > weight
            detail = torch.where(better, contrast * bring_over(view.detail, field), detail)
            weight = torch.where(better, found, weight)
        if weight.any():
            base = back_project(base + weight * detail, low, BACK_PROJECTIONS)
        return base.clamp(0, 1), weight

    def _views(self, reference: Tensor) -> tuple[View, ...]:
        check_image("a reference", reference, MIN_SIDE)
        excess = (reference.shape[2] * reference.shape[3] / MAX_PIXELS) ** 0.5
        if excess > 1:
            reference = resize(reference, (int(reference.shape[2] / excess), int(reference.shape[3] / excess)))
        return tuple(View(reference, zoom, self.scale) for zoom in ZOOMS)

    def _matches(self, low: Tensor, prepared: PreparedReferences) -> list[tuple[View, Tensor, Tensor]]:
        """The zoom of each reference that has the most evidence, its field on the coarse grid, and the trust in it."""
        reduction = 2
        while low.shape[2] * low.shape[3] > MAX_POSITIONS * reduction**2:
            reduction *= 2
        query = features(reduce(low, reduction))
        matches = []
        for views in prepared.views:
            fields = [global_match(query, view.coarse(reduction * self.scale)) for view in views]
            found = [evidence(field) for field in fields]
            share = [float((e >= CONVINCED).float().mean()) for e in found]
            best = max(range(len(views)), key=share.__getitem__)
            if share[best] >= MIN_SHARE:
                matches.append((share[best], views[best], fields[best], found[best]))
        matches.sort(key=lambda match: -match[0])
        return [(view, fill(field, e * (e >= CONVINCED)), e) for _, view, field, e in matches[:MAX_REFERENCES]]

    def _register(self, low: Tensor, enlarged: Tensor, view: View, field: Tensor) -> Tensor:
        """Sharpen a coarse field, first on the low-resolution grid and then at output size."""
        size = (low.shape[2], low.shape[3])
        coarseness = round(max(size) / max(field.shape[2:]))
        steps = [coarseness / 2**i for i in range(coarseness.bit_length())] + [1]
        field = refine(features(low), features(view.low), enlarge(field, size), steps, window=9)
        field = enlarge(field, (enlarged.shape[2], enlarged.shape[3]))
        return refine(enlarged, view.enlarged, field, (2, 1, 1, 0.5), WINDOW)


CONVINCED = 0.2  # evidence from which on a coarse match counts as one
MIN_SHARE = 0.02  # share of convinced positions below which a reference is left alone


def judge(query: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """How well the match deserves trust in [0, 1], and the ratio of contrasts, both [1, 1, H, W], from the common band."""
    quality = ((correlation(query, found, WINDOW) - 0.6) / 0.4).clamp(0, 1)
    contrast = (deviation(query) / deviation(found)).clamp(0.5, 2)
    return quality, contrast


def deviation(x: Tensor) -> Tensor:
    return ((box(x * x, WINDOW) - box(x, WINDOW) ** 2).clamp(min=0) + 1e-5).sqrt()


def enlarge_map(x: Tensor, like: Tensor) -> Tensor:
    size = (like.shape[2], like.shape[3])
    return F.interpolate((x * 4).clamp(0, 1), size=size, mode="bilinear", align_corners=False)


def inside(field: Tensor, image: Tensor) -> Tensor:
    """1 where the field points at least a pixel inside the image: [1, 1, h, w]."""
    last = field.new_tensor(image.shape[2:]).view(1, 2, 1, 1) - 2
    target = grid(field) + field
    return ((target >= 1) & (target <= last)).all(1, keepdim=True).float()


def bring_over(detail: Tensor, field: Tensor) -> Tensor:
    """`View.detail` where the field points, to the nearest phase (a quarter of a pixel): [1, 3, h, w]."""
    h, w = detail.shape[2] // 4, detail.shape[3]
    twice = ((grid(field) + field + 0.25) * 2).round().long()
    y, x = twice[:, 0].clamp(0, 2 * h - 1), twice[:, 1].clamp(0, 2 * w - 1)
    phase = y % 2 * 2 + x % 2
    return gather_fold(detail, (phase * h + y // 2) * w + x // 2, patch=3)


def check_image(what: str, x: Tensor, least: int) -> None:
    if x.ndim != 4 or x.shape[:2] != (1, 3) or min(x.shape[2:]) < least:
        raise InputError(
            f"{what} has shape {tuple(x.shape)}; it must be [1, 3, height, width] of at least {least} pixels"
        )
    if not x.isfinite().all():
        raise InputError(f"{what} contains NaN or infinite values; images hold finite numbers in [0, 1]")
