"""Patch matching and texture transfer: the maps of TTSR and of the registration, against the originals' formulas.

The originals store what they compare: `unfold + bmm + max` is TTSR's search, `unfold + gather + fold` its transfer.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Case


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
    name = f"{channels} channels, {a[0]}×{a[1]} in {b[0]}×{b[1]}, patch {patch}"

    def make() -> tuple[Tensor, Tensor, int, int, int, float]:
        return torch.randn(1, channels, *a), torch.randn(1, channels, *b), 1, patch, patch // 2, 1e-12

    pairs = a[0] * a[1] * b[0] * b[1]
    return Case("correlation_topk", name, make, pairs, "pairs", {"unfold + bmm + max": unfold_bmm_max})


def transfer(channels: int, side: int, stride: int) -> Case:
    def make() -> tuple[Tensor, Tensor, int, int]:
        features = torch.randn(1, channels, side * stride, side * stride)
        return features, torch.randint(0, side * side, (1, side, side)), 3 * stride, stride

    name = f"{channels} channels, {side}×{side} cells of {stride}×{stride}"
    work = channels * (side * stride) ** 2
    return Case("gather_fold", name, make, work, "numbers", {"unfold + gather + fold": unfold_gather_fold})


CASES = [
    search(3, (88, 88), (96, 144), 7),  # the registration of a tile
    search(256, (64, 64), (64, 64), 3),  # TTSR at 256² pixels
    search(256, (96, 96), (96, 96), 3),  # and at 384²
    transfer(256, 128, 1),
    transfer(128, 128, 2),
    transfer(64, 128, 4),
]
