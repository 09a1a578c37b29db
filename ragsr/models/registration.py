"""Dense registration of a low-quality image with a reference that shows some of the same things, without training.

1. `global_match`: on a coarse grid every patch looks for its nearest patch anywhere in the reference
   (`ops.correlation_topk`).
2. `evidence`: neighbours of a true match agree on where they go, although their patches hardly overlap; neighbours of a
   chance match do not. Everything later rests on this share of agreeing neighbours.
3. `fill`: positions without evidence take the displacement of those around them that have it.
4. `refine`: on finer grids the field moves in shrinking steps to the best windowed correlation, down to half a pixel.

A displacement field [1, 2, h, w] holds (y, x): the pixel p of the query lies at p + field(p) in the reference.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ragsr.ops import correlation_topk

PATCH = 7  # side of the patches of the global search
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
    """Luma and two colour differences without their local mean, so that light does not matter: [1, 3, h, w]."""
    y = luma(image)
    mixed = torch.cat((y, image[:, :1] - y, image[:, 2:] - y), dim=1)
    return mixed - box(mixed, 2 * PATCH + 1)


def grid(like: Tensor) -> Tensor:
    """The (y, x) of every pixel of a map: [1, 2, h, w]."""
    y, x = (torch.arange(n, device=like.device, dtype=torch.float32) for n in like.shape[2:])
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]


def global_match(query: Tensor, reference: Tensor) -> Tensor:
    """The field [1, 2, h, w] from every position to its best match anywhere, given the `features` of both."""
    _, index = correlation_topk(query, reference, patch=PATCH, padding=PATCH // 2)
    columns = reference.shape[3]
    target = torch.cat((index // columns, index % columns), dim=2).mT.view(1, 2, *query.shape[2:])
    return target - grid(query)


def evidence(field: Tensor, spacing: int = 3, reach: int = 2) -> Tensor:
    """The share of the neighbours `spacing` and more pixels away that go the same way, within a pixel: [1, 1, h, w]."""
    h, w = field.shape[2:]
    far = spacing * reach
    around = F.pad(field, (far,) * 4, value=torch.inf)
    offsets = [(y, x) for y in range(0, 2 * far + 1, spacing) for x in range(0, 2 * far + 1, spacing)]
    agreeing = [
        ((around[:, :, y : y + h, x : x + w] - field).abs().amax(1, keepdim=True) <= 1).float()
        for y, x in offsets
        if (y, x) != (far, far)
    ]
    return torch.stack(agreeing).mean(0)


def fill(field: Tensor, confidence: Tensor) -> Tensor:
    """Blur with the confidence as weight, ever wider where little of it is near (normalised convolution)."""
    filled = torch.zeros_like(field)
    missing = torch.ones_like(confidence)
    side = 3
    while True:
        weight = box(confidence, side)
        sure = (weight / FULL_CONFIDENCE).clamp(max=1)
        filled += missing * sure * box(field * confidence, side) / weight.clamp(min=1e-9)
        missing = missing * (1 - sure)
        if side > 2 * max(field.shape[2:]):
            return filled + missing * (field * confidence).mean((2, 3), keepdim=True) / confidence.mean().clamp(
                min=1e-9
            )
        side = 2 * side + 1


FULL_CONFIDENCE = 0.1  # mean confidence of a window from which on it need not be widened


def enlarge(field: Tensor, size: tuple[int, int]) -> Tensor:
    """The field on a finer grid [*size], with displacements in pixels of that grid."""
    ratio = field.new_tensor([size[0] / field.shape[2], size[1] / field.shape[3]]).view(1, 2, 1, 1)
    return F.interpolate(field, size=size, mode="bilinear", align_corners=False) * ratio


def warp(reference: Tensor, field: Tensor) -> Tensor:
    """Read the reference [1, C, H, W] where the field points, bilinearly, with the border held: [1, C, h, w]."""
    size = field.new_tensor(reference.shape[2:]).view(1, 2, 1, 1)
    target = ((grid(field) + field + 0.5) / size * 2 - 1).flip(1).permute(0, 2, 3, 1)
    return F.grid_sample(reference, target, mode="bilinear", padding_mode="border", align_corners=False)


def correlation(a: Tensor, b: Tensor, window: int) -> Tensor:
    """Correlation of a and b [1, C, h, w] over a window, without the means, all channels together: [1, 1, h, w]."""
    c = a.shape[1]
    means = box(torch.cat((a, b, a * a, b * b, a * b), dim=1), window)
    mean_a, mean_b, aa, bb, ab = means.split(c, dim=1)
    covariance = (ab - mean_a * mean_b).sum(1, keepdim=True)
    variance_a, variance_b = ((aa - mean_a**2).sum(1, keepdim=True), (bb - mean_b**2).sum(1, keepdim=True))
    return covariance / ((variance_a.clamp(min=0) + NOISE) * (variance_b.clamp(min=0) + NOISE)).sqrt()


NOISE = 1e-5  # variance below which a window holds no texture to compare (0.8 of 255, squared)


def refine(query: Tensor, reference: Tensor, field: Tensor, steps: Iterable[float], window: int) -> Tensor:
    """Move every displacement by up to one step in 8 directions to the best correlation, then smooth; for each step."""
    for step in steps:
        best = correlation(query, warp(reference, field), window)
        moved = field
        for y in (-step, 0, step):
            for x in (-step, 0, step):
                if y or x:
                    candidate = field + field.new_tensor([y, x]).view(1, 2, 1, 1)
                    score = correlation(query, warp(reference, candidate), window)
                    better = score > best
                    best = torch.where(better, score, best)
                    moved = torch.where(better, candidate, moved)
        confidence = best.clamp(min=0.01) ** 4
        field = box(moved * confidence, window // 2 | 1) / box(confidence, window // 2 | 1)
    return field


def register(query: Tensor, reference: Tensor, field: Tensor, steps: Iterable[float], window: int) -> Tensor:
    """`refine` on the grid of `query`, from a field on a coarser grid."""
    return refine(query, reference, enlarge(field, (query.shape[2], query.shape[3])), steps, window)
