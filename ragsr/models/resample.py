"""Bicubic resampling as Pillow does it (a = -0.5, antialiased), and iterative back-projection on top of it."""

import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic [B, C, H, W] -> [B, C, *size]; averages over the covered pixels when it reduces."""
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True)


def reduce(x: Tensor, scale: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H/scale, W/scale], at least one pixel."""
    return resize(x, (max(1, round(x.shape[2] / scale)), max(1, round(x.shape[3] / scale))))


def back_project(x: Tensor, low: Tensor, steps: int) -> Tensor:
    """Pull x [1, C, H, W] towards the images that reduce to `low` [1, C, h, w]: x <- x + up(low - down(x)).

    Source: Irani and Peleg, Improving resolution by image registration, 1991, Sec. 3.
    """
    size = (x.shape[2], x.shape[3])
    for _ in range(steps):
        x = x + resize(low - resize(x, (low.shape[2], low.shape[3])), size)
    return x
