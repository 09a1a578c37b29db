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
ENOUGH = 0.1  # mean confidence of a window from which on `fill` looks no further
DIRECTIONS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
NOISE = 1e-5  # variance of a window without texture: (0.8 / 255)²


def luma(x: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]."""
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def box(x: Tensor, side: int, stride: int = 1) -> Tensor:
    """Mean over a window of side × side pixels, of which only those inside the image count.

    One window around the middle of every block of stride × stride pixels; side and stride are both odd or both even.
    """
    margin = (side - stride) // 2
    rows = F.avg_pool2d(x, (side, 1), (stride, 1), (margin, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, side), (1, stride), (0, margin), count_include_pad=False)


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


def evidence(field: Tensor, positions: int, spacing: int = 3, reach: int = 2) -> Tensor:
    """The share of the neighbours `spacing` and more pixels away that go the same way within a pixel: [1, 1, h, w].

    A field that picks one of `positions` by chance hits the 3 × 3 around the right one 9 / positions of the time; that
    much does not count.
    """
    h, w = field.shape[2:]
    far = spacing * reach
    around = F.pad(field, (far,) * 4, value=torch.inf)
    steps = range(0, 2 * far + 1, spacing)
    agree = [
        ((around[:, :, y : y + h, x : x + w] - field).abs().amax(1, keepdim=True) <= 1).float()
        for y in steps
        for x in steps
        if (y, x) != (far, far)
    ]
    chance = min(1.0, 9 / positions)
    return ((torch.stack(agree).mean(0) - chance) / max(1 - chance, 1e-6)).clamp(min=0)


def fill(field: Tensor, confidence: Tensor) -> Tensor:
    """Normalised convolution: the mean field, weighted by confidence, over ever wider windows where little is near."""
    filled, missing = torch.zeros_like(field), torch.ones_like(confidence)
    side = 1
    while side <= 2 * max(field.shape[2:]):
        side = 2 * side + 1
        weight = box(confidence, side)
        sure = (weight / ENOUGH).clamp(max=1)
        filled += missing * sure * box(field * confidence, side) / weight.clamp(min=1e-9)
        missing *= 1 - sure
    everywhere = confidence.mean().clamp(min=1e-9)
    return filled + missing * (field * confidence).mean((2, 3), keepdim=True) / everywhere


def enlarge(field: Tensor, size: tuple[int, int], reference_ratio: tuple[float, float]) -> Tensor:
    """The field on a finer grid [*size], when the reference's grid becomes finer by `reference_ratio`.

    With u = p + 1/2 the positions of the query grow by r, those of the reference by s: s (u + field) - r u in pixels of
    the finer grids. Rounded sizes make r and s differ, which counts far from the origin.
    """
    s = field.new_tensor(reference_ratio).view(1, 2, 1, 1)
    r = field.new_tensor([size[0] / field.shape[2], size[1] / field.shape[3]]).view(1, 2, 1, 1)
    finer = interpolate(field, size)
    return s * finer + (s / r - 1) * (grid(finer) + 0.5)


def warp(reference: Tensor, field: Tensor) -> Tensor:
    """Read the reference [1, C, H, W] where the field points, bilinearly, with the border held: [1, C, h, w]."""
    size = field.new_tensor(reference.shape[2:]).view(1, 2, 1, 1)
    target = ((grid(field) + field + 0.5) / size * 2 - 1).flip(1).permute(0, 2, 3, 1)
    return F.grid_sample(reference, target, mode="bilinear", padding_mode="border", align_corners=False)


class Likeness:
    """The correlation of one image with others over windows, without the means.

    With stride 1 there is one odd window around every pixel. A larger stride asks for even windows, each around the
    middle of a block of stride × stride pixels: what is smooth anyway need not be computed everywhere.
    """

    def __init__(self, image: Tensor, window: int, stride: int = 1) -> None:
        self.image, self.window, self.stride = image, window, stride  # [1, C, H, W]
        self.mean, self.variance = moments(image, window, stride)

    def __call__(self, other: Tensor) -> Tensor:
        """All channels together: [1, C, H, W] -> [1, 1, H/stride, W/stride] in [-1, 1]."""
        mean, variance = moments(other, self.window, self.stride)
        covariance = (box(self.image * other, self.window, self.stride) - self.mean * mean).sum(1, keepdim=True)
        return covariance / (self.variance * variance).sqrt()


def moments(x: Tensor, window: int, stride: int = 1) -> tuple[Tensor, Tensor]:
    """Mean [1, C, h, w] and variance [1, 1, h, w] over windows; the variance, at least `NOISE`, sums the channels."""
    mean, squares = box(torch.cat((x, x * x), dim=1), window, stride).split(x.shape[1], dim=1)
    return mean, (squares - mean**2).sum(1, keepdim=True).clamp(min=0) + NOISE


def refine(
    query: Tensor,  # [1, C, s·h, s·w]
    reference: Tensor,  # [1, C, H, W]
    field: Tensor,  # [1, 2, h, w], in pixels of the query
    steps: Iterable[float],
    window: int,
    smoothing: int,
) -> Tensor:
    """For each step: move every displacement by one step in the best of 8 directions, or none, and smooth the field.

    The field may be coarser than the query by a whole factor s; in between it is interpolated.
    """
    likeness = Likeness(query, window, query.shape[2] // field.shape[2])
    for step in steps:
        dense = interpolate(field, (query.shape[2], query.shape[3]))
        best = likeness(warp(reference, dense))
        moved = field
        for direction in DIRECTIONS:
            move = step * field.new_tensor(direction).view(1, 2, 1, 1)
            score = likeness(warp(reference, dense + move))
            better = score > best
            best = torch.where(better, score, best)
            moved = torch.where(better, field + move, moved)
        confidence = best.clamp(min=0.01) ** 4
        field = box(moved * confidence, smoothing) / box(confidence, smoothing)
    return field


def interpolate(field: Tensor, size: tuple[int, int]) -> Tensor:
    """The same displacements on a finer grid."""
    return F.interpolate(field, size=size, mode="bilinear", align_corners=False)
