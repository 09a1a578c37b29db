"""Texture transfer in Triton, forward and backward.

Forward: a pixel of the output gathers its sources. Backward: the matches are sorted by the cell they name, so that a
pixel of the features finds everything that took from it, and gathers too: no atomics, the same bits on every run.

An index outside the features, which the CPU refuses, counts as zeros here: to look would mean to wait for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS, PIXELS = 16, 128  # tile of a program


@triton.jit
def gather_fold_kernel(
    features,  # [B, C, rows·S, columns·S]
    index,  # int64 [B, h, w]
    out,  # [B, C, h·S, w·S]
    C,
    h,
    w,
    rows,
    columns,
    SIDE: tl.constexpr,
    S: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // (w * S), pixel % (w * S)
    pixels, source_pixels = h * w * S * S, rows * columns * S * S
    plane = features + (batch * C + c[:, None]) * source_pixels
    total = tl.zeros([CHANNELS, PIXELS], dtype=tl.float32)
    for ty in tl.static_range(-(SIDE // 2), SIDE // 2 + 1):
        for tx in tl.static_range(-(SIDE // 2), SIDE // 2 + 1):
            gy, gx = y // S + ty, x // S + tx
            known = (pixel < pixels) & (gy >= 0) & (gy < h) & (gx >= 0) & (gx < w)
            r = tl.load(index + batch * h * w + gy * w + gx, mask=known, other=-1)
            known = known & (r >= 0) & (r < rows * columns)
            ry, rx = r // columns - ty, r % columns - tx
            known = known & (ry >= 0) & (ry < rows) & (rx >= 0) & (rx < columns)
            source = (ry * S + y % S) * (columns * S) + rx * S + x % S
            total += tl.load(plane + source, mask=known & (c[:, None] < C), other=0).to(tl.float32)
    to = out + (batch * C + c[:, None]) * pixels + pixel
    tl.store(to, (total / (SIDE * SIDE)).to(out.dtype.element_ty), mask=(c[:, None] < C) & (pixel < pixels))


@triton.jit
def gather_fold_backward_kernel(
    grad,  # [B, C, h·S, w·S]
    order,  # int64 [B, h·w]: the cells of the output, sorted by their match
    starts,  # int64 [B, rows·columns + 1]: where in `order` the cells of each match begin
    out,  # [B, C, rows·S, columns·S]
    C,
    h,
    w,
    rows,
    columns,
    SIDE: tl.constexpr,
    S: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // (columns * S), pixel % (columns * S)
    pixels, source_pixels = h * w * S * S, rows * columns * S * S
    plane = grad + (batch * C + c[:, None]) * pixels
    total = tl.zeros([CHANNELS, PIXELS], dtype=tl.float32)
    for ty in range(-(SIDE // 2), SIDE // 2 + 1):
        for tx in range(-(SIDE // 2), SIDE // 2 + 1):
            ry, rx = y // S + ty, x // S + tx
            known = (pixel < source_pixels) & (ry >= 0) & (ry < rows) & (rx >= 0) & (rx < columns)
            cell = starts + batch * (rows * columns + 1) + ry * columns + rx
            first = tl.load(cell, mask=known, other=0)
            count = (tl.load(cell + 1, mask=known, other=0) - first).to(tl.int32)
            for n in range(tl.max(count, axis=0)):
                q = tl.load(order + batch * h * w + first + n, mask=n < count, other=0)
                gy, gx = q // w - ty, q % w - tx
                taken = (n < count) & (gy >= 0) & (gy < h) & (gx >= 0) & (gx < w)
                source = (gy * S + y % S) * (w * S) + gx * S + x % S
                total += tl.load(plane + source, mask=taken & (c[:, None] < C), other=0).to(tl.float32)
    to = out + (batch * C + c[:, None]) * source_pixels + pixel
    tl.store(to, (total / (SIDE * SIDE)).to(out.dtype.element_ty), mask=(c[:, None] < C) & (pixel < source_pixels))


def gather_fold(features: Tensor, index: Tensor, patch: int, stride: int) -> Tensor:
    """features [B, C, H', W'] up to float32, index int64 [B, h, w] -> [B, C, h·stride, w·stride]."""
    batch, channels, height, width = features.shape
    h, w = index.shape[1:]
    out = features.new_empty(batch, channels, h * stride, w * stride)
    if out.numel():
        gather_fold_kernel[grid_of(out)](
            features.contiguous(), index.contiguous(), out, channels, h, w, height // stride, width // stride,
            SIDE=patch // stride, S=stride, CHANNELS=CHANNELS, PIXELS=PIXELS,
        )  # fmt: skip
    return out


def gather_fold_backward(grad: Tensor, index: Tensor, height: int, width: int, patch: int, stride: int) -> Tensor:
    """grad [B, C, h·stride, w·stride] up to float32 -> [B, C, height, width]."""
    batch, channels = grad.shape[:2]
    h, w = index.shape[1:]
    out = grad.new_empty(batch, channels, height, width)
    if out.numel():
        matches, order = index.flatten(1).sort(dim=1, stable=True)
        cells = torch.arange((height // stride) * (width // stride) + 1, device=index.device).expand(batch, -1)
        starts = torch.searchsorted(matches, cells.contiguous())
        gather_fold_backward_kernel[grid_of(out)](
            grad.contiguous(), order, starts, out, channels, h, w, height // stride, width // stride,
            SIDE=patch // stride, S=stride, CHANNELS=CHANNELS, PIXELS=PIXELS,
        )  # fmt: skip
    return out


def grid_of(out: Tensor) -> tuple[int, int, int]:
    batch, channels, height, width = out.shape
    return triton.cdiv(height * width, PIXELS), triton.cdiv(channels, CHANNELS), batch
