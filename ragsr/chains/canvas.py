"""The shared canvas of ReFIR's published program, for comparison with its results.

There both images go through the network in one batch, so they are brought to one size: a reference less than half as
large is enlarged, more than twice as large is cut at its top left corner, and the smaller sides are continued by
mirroring below and to the right. Mirrored pixels take part in everything, the statistics of AdaIN and the range of the
gate included: this costs time and changes results, so nothing else here uses it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CUT, STEP = 64, 8  # the reference is cut to multiples of 64 and sized to multiples of 8


def shared_canvas(
    photo: Tensor,  # [1, 3, H, W], H and W multiples of 8, at least 32
    reference: Tensor,  # [1, 3, h, w]
) -> tuple[Tensor, Tensor]:  # both [1, 3, H', W']; the photo lies at the top left
    height, width = photo.shape[-2:]
    h, w = reference.shape[-2:]
    if 2 * w < width or 2 * h < height:
        enlarge = max(width / (2 * w), height / (2 * h))
        h, w = int(enlarge * h) + STEP, int(enlarge * w) + STEP
    h, w = h // STEP * STEP, w // STEP * STEP
    if (h, w) != tuple(reference.shape[-2:]):
        reference = F.interpolate(reference, (h, w), mode="bicubic", antialias=True).clamp(0, 1)
    reference = reference[..., : CUT * (2 * height // CUT), : CUT * (2 * width // CUT)]
    h, w = (max(sides) for sides in zip(photo.shape[-2:], reference.shape[-2:], strict=True))
    return mirrored_to(photo, h, w), mirrored_to(reference, h, w)


def mirrored_to(x: Tensor, height: int, width: int) -> Tensor:
    """`x` followed by its mirror image, edge row repeated, cut to size; one mirror image must suffice."""
    x = torch.cat((x, x.flip(2)), dim=2)[:, :, :height]
    return torch.cat((x, x.flip(3)), dim=3)[..., :width]
