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
from ragsr.models.views import BACK_PROJECTIONS, PreparedReferences, View, check_image, views_of
from ragsr.ops import gather_fold

MAX_POSITIONS = 1 << 14  # of the grid of the global search
MAX_REFERENCES = 4  # registered per image, those with the most evidence
WINDOW = 15  # pixels of the output over which a match is judged
CONVINCING = 0.3  # evidence from which on a coarse match counts as one


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
        return PreparedReferences(tuple(views_of(reference, self.scale) for reference in references))

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
        field = enlarge(field, (low.shape[2], low.shape[3]), match.ratio)
        field = refine(features(low), features(match.view.low), field, steps, window=9)
        field = enlarge(field, (enlarged.shape[2], enlarged.shape[3]), (self.scale, self.scale))
        return refine(enlarged, match.view.enlarged, field, (2, 1, 1, 0.5), WINDOW)


def match_view(query: Tensor, view: View, reduction: int) -> Match:
    coarse = view.coarse(reduction)
    field = global_match(query, coarse)
    return Match(view, coarse, field, evidence(field, positions=coarse.shape[2] * coarse.shape[3]))


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
