"""References brought into line with a low-quality image: what the restoration models know of them.

Every reference is registered with the image (`ragsr.models.registration`), and what it shows above the band of the
low-quality image is brought over by `ops.gather_fold`. With it come the clues by which a model judges how much of it
is likely to be true.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ragsr.models.registration import (
    Likeness,
    enlarge,
    evidence,
    features,
    fill,
    global_match,
    grid,
    interpolate,
    luma,
    moments,
    refine,
    warp,
)
from ragsr.models.resample import back_project, reduce, resize
from ragsr.models.views import BACK_PROJECTIONS, PreparedReferences, View
from ragsr.ops import gather_fold

MAX_POSITIONS = 1 << 14  # of the grid of the global search
MAX_REFERENCES = 4  # registered per image, those with the most evidence
WINDOW = 15  # pixels of the output over which a match is judged
CONVINCING = 0.3  # evidence from which on a coarse match counts as one
CONTEXT = 48  # pixels of the low-quality image around a tile, so that the search sees the same surroundings


@dataclass(frozen=True)
class Match:
    """Where the patches of an image find themselves again in one view, on the coarse grid [h, w]."""

    view: View
    coarse: Tensor  # the features of the view that were searched: [1, 3, h', w']
    field: Tensor  # [1, 2, h, w]
    evidence: Tensor  # [1, 1, h, w]

    @cached_property
    def share(self) -> float:
        """The share of convincing positions: up to 0.02 for photos without common content, mostly above 0.2 with it."""
        return float((self.evidence >= CONVINCING).float().mean())

    @property
    def ratio(self) -> tuple[float, float]:
        """How much finer the low-quality version of the view is than the grid of the search."""
        return self.view.low.shape[2] / self.coarse.shape[2], self.view.low.shape[3] / self.coarse.shape[3]

    @property
    def reliability(self) -> float:
        return min(1.0, max(0.0, (self.share - 0.02) / 0.06))


@dataclass(frozen=True)
class Aligned:
    """One reference, pixel by pixel in line with the enlarged image."""

    detail: Tensor  # [1, 3, H, W]: what it shows above the band of the low-quality image, at the image's contrast
    difference: Tensor  # [1, 1, H, W]: luma of the image less that of the reference, in the band both have
    likeness: Tensor  # [1, 1, H, W] in [-1, 1]: their correlation around each pixel
    trust: Tensor  # [1, 1, H, W] in [0, 1]: how much of the detail is likely to be true, see `judge`

    @property
    def clues(self) -> Tensor:
        """All of it: [1, 6, H, W]."""
        return torch.cat((self.detail, self.difference, self.likeness, self.trust), dim=1)


def enlarge_low(low: Tensor, scale: int = 4) -> Tensor:
    """[B, 3, h, w] -> [B, 3, s·h, s·w]: bicubic, then back-projected, so that it reduces to `low` again."""
    return back_project(resize(low, (low.shape[2] * scale, low.shape[3] * scale)), low, BACK_PROJECTIONS)


def align(low: Tensor, prepared: PreparedReferences, scale: int = 4, least: float = 0.0) -> list[Aligned]:
    """The references in line with low [1, 3, h, w], the most evident first, at most `MAX_REFERENCES`.

    References whose reliability is not above `least` are left out; a negative value keeps all.
    """
    found = matches(low, prepared, scale, least)
    if not found:
        return []
    enlarged = luma(resize(low, (low.shape[2] * scale, low.shape[3] * scale)))
    likeness = Likeness(enlarged, WINDOW)
    return [align_one(low, likeness, match, scale) for match in found]


def align_one(low: Tensor, likeness: Likeness, match: Match, scale: int) -> Aligned:
    """One reference, given the likeness to the enlarged image."""
    field = register(low, likeness.image, match, scale)
    shown = warp(match.view.enlarged, field)
    mean, variance = moments(shown, WINDOW)
    contrast = (likeness.variance / variance).sqrt().clamp(0.5, 2)
    correlation = likeness(shown)
    return Aligned(
        detail=contrast * bring_over(match.view.detail, field),
        difference=likeness.image - likeness.mean - contrast * (shown - mean),
        likeness=correlation,
        trust=judge(correlation, match) * inside(field, match.view.image),
    )


def matches(low: Tensor, prepared: PreparedReferences, scale: int, least: float = 0.0) -> list[Match]:
    """Every reference at the zoom with the most evidence, if that convinces; the best first."""
    reduction = 2
    while low.shape[2] * low.shape[3] > MAX_POSITIONS * reduction**2:
        reduction *= 2
    query = features(reduce(low, reduction))
    found = [
        max((match_view(query, view, reduction * scale) for view in views), key=lambda match: match.share)
        for views in prepared.views
    ]
    found.sort(key=lambda match: match.share, reverse=True)
    return [match for match in found[:MAX_REFERENCES] if match.reliability > least]


def match_view(query: Tensor, view: View, reduction: int) -> Match:
    coarse = view.coarse(reduction)
    field = global_match(query, coarse)
    return Match(view, coarse, field, evidence(field, positions=coarse.shape[2] * coarse.shape[3]))


def register(low: Tensor, enlarged: Tensor, match: Match, scale: int) -> Tensor:
    """Sharpen a coarse field, first on the low-resolution grid and then at output size: [1, 2, H, W]."""
    field = fill(match.field, match.evidence * (match.evidence >= CONVINCING))
    coarseness = round(max(low.shape[2:]) / max(field.shape[2:]))
    steps = [coarseness / 2**i for i in range(coarseness.bit_length())] + [1]
    field = enlarge(field, (low.shape[2], low.shape[3]), match.ratio)
    field = refine(features(low), features(match.view.low), field, steps, window=9, smoothing=5)
    field = refine(enlarged, match.view.enlarged, scale * field, (2, 1, 1, 0.5), window=16, smoothing=3)
    return interpolate(field, (enlarged.shape[2], enlarged.shape[3]))


def judge(correlation: Tensor, match: Match) -> Tensor:
    """How much of the found detail is likely to be true, in [0, 1], given the correlation of what both show.

    The curve follows the least-squares gain of the detail, measured on pairs of photos with and without common content:
    q^1.5 with the correlation q counted from 0.6, and down to q^4.5 where the coarse match has no evidence of its own.
    """
    q = ((correlation - 0.6) / 0.4).clamp(0, 1)
    proof = (match.evidence / CONVINCING).clamp(max=1)
    proof = F.interpolate(proof, size=correlation.shape[2:], mode="bilinear", align_corners=False)
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
