"""Dense registration of a low-quality image with a reference that shows some of the same things, without training.

1. `global_match`: on a coarse grid every patch looks for its nearest patch anywhere in the reference
   (`ops.correlation_topk`). Neighbours of a true match agree on where they go; those of a chance match do not, and that
   agreement is the evidence everything later rests on.
2. `regularise`: every position takes over the displacement of a neighbour when more of its neighbours agree with it.
3. `refine`: at output resolution the field moves in small steps to the best windowed correlation.

A displacement field [1, 2, h, w] holds (y, x): the pixel p of the query lies at p + field(p) in the reference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ragsr.models.resample import low_pass
from ragsr.ops import correlation_topk

PATCH = 7  # side of the patches compared on the low-resolution grids
LUMA = (0.299, 0.587, 0.114)


def luma(x: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]."""
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def box(x: Tensor, side: int) -> Tensor:
    """Mean over a window of side × side pixels, of which only those inside the image count."""
    half = side // 2
    rows = F.avg_pool2d(x, (side, 1), 1, (half, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, side), 1, (0, half), count_include_pad=False)


def features(image: Tensor) -> Tensor:
    """[1, 3, h, w] -> [1, 3, h, w]: luma and two colour differences without their local mean, so light does not matter."""
    y = luma(image)
    mixed = torch.cat((y, image[:, :1] - y, image[:, 2:] - y), dim=1)
    return mixed - box(mixed, 2 * PATCH + 1)


def global_match(query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The best match anywhere of every position, from `features` of both: score [1, 1, h, w] and field [1, 2, h, w]."""
    h, w = query.shape[2:]
    score, index = correlation_topk(query, reference, patch=PATCH, padding=PATCH // 2)
    target = torch.cat((index // reference.shape[3], index % reference.shape[3]), dim=2).mT.view(1, 2, h, w)
    return score.view(1, 1, h, w), target - grid(h, w, query.device)


def grid(h: int, w: int, device: torch.device) -> Tensor:
    """The (y, x) of every pixel: [1, 2, h, w]."""
    return torch.stack(torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"))[None]


def agreement(field: Tensor, centre: Tensor, tolerance: float, reach: int = 2) -> Tensor:
    """The share of neighbours in `field`, up to `reach` pixels away, that go where `centre` goes: [1, 1, h, w]."""
    h, w = field.shape[2:]
    side = 2 * reach + 1
    around = F.unfold(F.pad(field.float(), (reach,) * 4, value=1e6), side).view(1, 2, side * side, h, w)
    agree = ((around - centre[:, :, None]).abs().amax(1) <= tolerance).float()
    agree[:, side * side // 2] = 0
    return agree.sum(1, keepdim=True) / (side * side - 1)
