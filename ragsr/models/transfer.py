"""`transfer`: reference-based ×4 super-resolution without training, the baseline every learned model has to beat.

The low-quality image is enlarged bicubically and back-projected. Every reference is brought into line with it
(`ragsr.models.alignment`), and where several show the same pixel the most trusted one counts:

    restored = base + trust · detail

and a last back-projection keeps the result consistent with the input. The trust rests on two judgements: how well
query and reference correlate in the band that both have, and the evidence that this is a match at all. Where a
reference shows something else it is zero, and so is the harm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ragsr.errors import InputError
from ragsr.models.alignment import CONTEXT, align, enlarge_low
from ragsr.models.resample import back_project
from ragsr.models.views import BACK_PROJECTIONS, PreparedReferences, check_image, views_of


class Transfer:
    """The model `transfer`: ×4, training-free, deterministic; every image [1, 3, H, W] float32 in [0, 1]."""

    name = "transfer"
    context = CONTEXT

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
        base = enlarge_low(low, self.scale)
        detail, weight = torch.zeros_like(base), torch.zeros_like(base[:, :1])
        for one in align(low, prepared, self.scale):
            better = one.trust > weight
            detail = torch.where(better, one.detail, detail)
            weight = torch.where(better, one.trust, weight)
        restored = back_project(base + weight * detail, low, BACK_PROJECTIONS) if weight.any() else base
        return restored.clamp(0, 1), weight
