"""`transfer`: reference-based ×4 super-resolution without training, the baseline every learned model has to beat.

The low-quality image is enlarged bicubically and back-projected. Every reference is registered with it
(`ragsr.models.registration`), and what the reference shows above the band of the low-quality image is brought over by
`ops.gather_fold`, as much of it as the match deserves:

    restored = base + weight · contrast · detail(reference, at p + field(p))

and a last back-projection keeps the result consistent with the input. The weight rests on two judgements: how well
query and reference correlate in the band that both have, and the evidence that this is a match at all. Where a
reference shows something else the weight is zero, and so is the harm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ragsr.errors import InputError
from ragsr.models.registration import (
    Likeness,
    enlarge,
    evidence,
    features,
    fill,
    global_match,
    grid,
    luma,
    moments,
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
CONVINCING = 0.3  # evidence from which on a coarse match counts as one


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


@dataclass(frozen=True)
class Match:
    """Where the patches of an image find themselves again in one view, on the coarse grid [h, w]."""

    view: View
    field: Tensor  # [1, 2, h, w]
    evidence: Tensor  # [1, 1, h, w]

    @cached_property
    def share(self) -> float:
        """The share of convincing positions: up to 0.02 for photos without common content, mostly above 0.2 with it."""
        return float((self.evidence >= CONVINCING).float().mean())

    @property
    def reliability(self) -> float:
        return min(1.0, max(0.0, (self.share - 0.02) / 0.06))


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
        likeness = Likeness(luma(enlarged), WINDOW)
        detail, weight = torch.zeros_like(base), torch.zeros_like(base[:, :1])
        for match in self._matches(low, prepared):
            field = self._register(low, luma(enlarged), match)
            found = warp(match.view.enlarged, field)
            trust = judge(likeness(found), match) * inside(field, match.view.image)
            contrast = (likeness.variance / moments(found, WINDOW)[1]).sqrt().clamp(0.5, 2)
            better = trust > weight
            detail = torch.where(better, contrast * bring_over(match.view.detail, field), detail)
            weight = torch.where(better, trust, weight)
        restored = back_project(base + weight * detail, low, BACK_PROJECTIONS) if weight.any() else base
        return restored.clamp(0, 1), weight

    def _views(self, reference: Tensor) -> tuple[View, ...]:
        check_image("a reference", reference, MIN_SIDE)
        excess = (reference.shape[2] * reference.shape[3] / MAX_PIXELS) ** 0.5
        if excess > 1:
            size = [max(MIN_SIDE, int(n / excess)) for n in reference.shape[2:]]
            reference = resize(reference, (size[0], size[1]))
        return tuple(View(reference, zoom, self.scale) for zoom in ZOOMS)

    def _matches(self, low: Tensor, prepared: PreparedReferences) -> list[Match]:
        """Every reference at the zoom with the most evidence, if that convinces; the best first."""
        reduction = 2
        while low.shape[2] * low.shape[3] > MAX_POSITIONS * reduction**2:
            reduction *= 2
        query = features(reduce(low, reduction))
        matches = [
            max((match_view(query, view, reduction * self.scale) for view in views), key=lambda match: match.share)
            for views in prepared.views
        ]
        matches.sort(key=lambda match: match.share, reverse=True)
        return [match for match in matches[:MAX_REFERENCES] if match.reliability > 0]

    def _register(self, low: Tensor, enlarged: Tensor, match: Match) -> Tensor:
        """Sharpen a coarse field, first on the low-resolution grid and then at output size: [1, 2, H, W]."""
        field = fill(match.field, match.evidence * (match.evidence >= CONVINCING))
        coarseness = round(max(low.shape[2:]) / max(field.shape[2:]))
        steps = [coarseness / 2**i for i in range(coarseness.bit_length())] + [1]
        field = enlarge(field, (low.shape[2], low.shape[3]))
        field = refine(features(low), features(match.view.low), field, steps, window=9)
        field = enlarge(field, (enlarged.shape[2], enlarged.shape[3]))
        return refine(enlarged, match.view.enlarged, field, (2, 1, 1, 0.5), WINDOW)


def match_view(query: Tensor, view: View, reduction: int) -> Match:
    reference = view.coarse(reduction)
    field = global_match(query, reference)
    return Match(view, field, evidence(field, positions=reference.shape[2] * reference.shape[3]))


def judge(correlation: Tensor, match: Match) -> Tensor:
    """How much of the found detail is likely to be true, in [0, 1], from the correlation of what is known [1, 1, H, W]: [1, 1, H, W].

    The curve follows the least-squares gain of the detail, measured on pairs of photos with and without common content:
    q^1.5 with the correlation q counted from 0.6, and down to q^4.5 where the coarse match has no evidence of its own.
    """
    q = ((correlation - 0.6) / 0.4).clamp(0, 1)
    proof = F.interpolate((match.evidence / CONVINCING).clamp(max=1), size=correlation.shape[2:], mode="bilinear")
    return match.reliability * q ** (1.5 + 3 * (1 - proof))


def inside(field: Tensor, image: Tensor) -> Tensor:
    """1 where the field points at least a pixel inside the image: [1, 1, h, w]."""
    last = field.new_tensor(image.shape[2:]).view(1, 2, 1, 1) - 2
    target = grid(field) + field
    return ((target >= 1) & (target <= last)).all(1, keepdim=True).float()


def bring_over(detail: Tensor, field: Tensor) -> Tensor:
    """`View.detail` where the field points, at the nearest phase (a quarter of a pixel away at most): [1, 3, h, w]."""
    h, w = detail.shape[2] // 4, detail.shape[3]
    twice = ((grid(field) + field + 0.25) * 2).round().long()
    y, x = twice[:, 0].clamp(0, 2 * h - 1), twice[:, 1].clamp(0, 2 * w - 1)
    phase = y % 2 * 2 + x % 2
    return gather_fold(detail, (phase * h + y // 2) * w + x // 2, patch=3)


def check_image(what: str, x: Tensor, least: int) -> None:
    if x.ndim != 4 or x.shape[:2] != (1, 3) or min(x.shape[2:]) < least:
        raise InputError(
            f"{what} has shape {tuple(x.shape)}; it must be [1, 3, height, width], both sides at least {least} pixels"
        )
    if not x.isfinite().all():
        raise InputError(f"{what} contains NaN or infinite values; images hold finite numbers in [0, 1]")
