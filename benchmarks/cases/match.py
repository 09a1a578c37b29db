"""Patch matching and texture transfer: the maps of TTSR and of the registration, against the originals' formulas.

The originals store what they compare: `unfold + bmm + max` is TTSR's search, `unfold + gather + fold` its transfer.
A search is measured in products of channels, C for each pair of pixels, and its limit is a matrix product of PyTorch
with as many; nine times as many stand in the original. In windows the nine are done, for want of neighbours to share
them. A transfer is measured in the bytes of features, index and result, and its limit is reading as many.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from limits import product_limit, read_limit
from torch import Tensor

from . import Case, reduced


def unfold_bmm_max(a: Tensor, b: Tensor, k: int, patch: int, padding: int, eps: float) -> Callable[[], Tensor]:
    """TTSR's search: every patch normalised, all scores at once."""

    def run() -> Tensor:
        left, right = (F.normalize(F.unfold(x, patch, padding=padding), dim=1, eps=eps) for x in (a, b))
        return torch.bmm(left.mT, right).max(dim=2).indices

    return run


def unfold_gather_fold(features: Tensor, index: Tensor, patch: int, stride: int) -> Callable[[], Tensor]:
    """TTSR's transfer."""

    def run() -> Tensor:
        padding = (patch - stride) // 2
        patches = F.unfold(features, patch, padding=padding, stride=stride)
        moved = patches.gather(2, index.flatten(1)[:, None].expand(-1, patches.shape[1], -1))
        size = (index.shape[1] * stride, index.shape[2] * stride)
        return F.fold(moved, size, patch, padding=padding, stride=stride) / (patch // stride) ** 2

    return run


def search(channels: int, a: tuple[int, int], b: tuple[int, int], patch: int) -> Case:
    a, b = ((reduced(height), reduced(width)) for height, width in (a, b))
    name = f"{channels} channels, {a[0]}×{a[1]} in {b[0]}×{b[1]}, patch {patch}"

    def make() -> tuple[Tensor, Tensor, int, int, int, float]:
        return torch.randn(1, channels, *a), torch.randn(1, channels, *b), 1, patch, patch // 2, 1e-12

    products = float(channels * a[0] * a[1] * b[0] * b[1])
    peers = {"unfold + bmm + max": unfold_bmm_max}
    return Case(
        "correlation_topk",
        name,
        make,
        products,
        "products",
        peers,
        limit=lambda device: product_limit(device, 2 * products, torch.float32),
    )


def everywhere(a: Tensor, b: list[Tensor], prior: Tensor, window: int, *settings: Any) -> Callable[[], Any]:
    """What the window saves."""
    return lambda: torch.ops.ragsr.correlation_topk(a, b[0], *settings)


def windows(channels: int, side: int, wide: int, window: int) -> Case:
    """Every position is expected where the coarser search of a pyramid would have put it, with some error."""
    side, wide = reduced(side), reduced(wide)

    def make() -> tuple[Any, ...]:
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack((torch.zeros_like(y), y, x), dim=2).view(1, -1, 3) * (wide // side)
        maps = torch.randn(1, channels, side, side), [torch.randn(1, channels, wide, wide)]
        return *maps, places + torch.randint(-2, 3, places.shape), window, 1, 3, 1, 1e-12

    products = float(9 * channels * side**2 * (2 * window + 1) ** 2)
    name = f"{channels} channels, {side}×{side} in {wide}×{wide}, window {window}"
    peers = {"the search everywhere": everywhere}
    return Case(
        "correlation_topk_near",
        name,
        make,
        products,
        "products",
        peers,
        limit=lambda device: product_limit(device, 2 * products, torch.float32),
    )


def transfer(channels: int, side: int, stride: int) -> Case:
    side = reduced(side)

    def make() -> tuple[Tensor, Tensor, int, int]:
        features = torch.randn(1, channels, side * stride, side * stride)
        return features, torch.randint(0, side * side, (1, side, side)), 3 * stride, stride

    name = f"{channels} channels, {side}×{side} cells of {stride}×{stride}"
    moved = 2.0 * 4 * channels * (side * stride) ** 2 + 8 * side**2
    peers = {"unfold + gather + fold": unfold_gather_fold}
    return Case("gather_fold", name, make, moved, "B", peers, limit=lambda device: read_limit(device, int(moved)))


CASES = [
    search(3, (88, 88), (96, 144), 7),  # the registration of a tile
    search(256, (64, 64), (64, 64), 3),  # TTSR at 256² pixels
    search(256, (96, 96), (96, 96), 3),  # and at 384²
    windows(256, 48, 96, 4),
    transfer(256, 128, 1),
    transfer(128, 128, 2),
    transfer(64, 128, 4),
]
