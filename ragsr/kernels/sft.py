"""`group_norm_sft` in Triton: the launchers of forward and backward. They write into results that the caller allocates.

Features are read where they lie: any strides of batch and channel, one stride for the positions (NCHW, channels-last,
the halves of `chunk(2, dim=1)`, repeated γ and β). Statistics and arithmetic are float32.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragsr.kernels.sft_backward import fused_backward_kernel, gradient_kernel, merge_sums_kernel, sums_kernel
from ragsr.kernels.sft_forward import apply_kernel, fused_kernel, merge_kernel, statistics_kernel
from ragsr.kernels.sft_launch import FUSED_TILE, Plan, chip, needs_64_bits, plan, power_of_2, view_of
from ragsr.kernels.sft_tiles import View

MERGE = 1024  # partial results that a program reads at a time


def group_norm_sft_forward(
    results: tuple[Tensor, Tensor, Tensor],  # out [B, C, *]; float32 mean and rstd [B, groups]
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    x2: Tensor | None,
    raw_mix: float | None,
) -> None:
    out, mean, rstd = results
    shape, (b, c, p) = out.shape, flat_shape(out)
    z, z2, result = view_of(x), optional_view(x2), view_of(out)
    maps = view_of(gamma, shape), view_of(beta, shape), optional_view(residual)
    how = plan(chip(x.device), z, (b, c, p), groups, x.element_size(), FUSED_TILE)
    tile = tile_constants(how, (b, c, p), z, z2, result, *maps)
    given = z, z2, weight.contiguous(), bias.contiguous(), *maps, result, mean, rstd, raw_mix, x.shape[1]
    sizes = {"positions": p, "groups": groups, "ACTIVATION": activation, **tile}
    with torch.cuda.device_of(x):
        if how.fused:
            fused_kernel[(b * groups,)](*given, eps=eps, MEMBERS=c // groups, WHOLE=how.whole, **sizes)
            return
        parts = torch.empty(2, b, c, how.splits, dtype=torch.float32, device=x.device)
        split = {"splits": how.splits, "span": how.span}
        statistics_kernel[(programs(how, b, c),)](z, z2, *parts, x.shape[1], c, p, **split, **tile)
        merge_kernel[(b * groups,)](*parts, mean, rstd, eps, p, c // groups, **split, BLOCK=MERGE)
        apply_kernel[(tiles(how, b, c, p),)](*given, channels=c, members=c // groups, **sizes)


def group_norm_sft_backward(
    results: tuple[Tensor, ...],  # of x, weight, bias, gamma, beta and x2 (no channels where it is absent), as wanted
    grad: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    x2: Tensor | None,
    raw_mix: float | None,
    of_x: bool,
    of_gamma: bool,
    of_beta: bool,
) -> None:
    dx, dweight, dbias, dgamma, dbeta, dx2 = results
    shape, (b, c, p) = grad.shape, flat_shape(grad)
    z, z2 = view_of(x), optional_view(x2)
    dz, dz2 = (view_of(d) if of_x and source is not None else None for d, source in ((dx, x), (dx2, x2)))
    maps = view_of(gamma, shape), view_of(beta, shape)
    full_gamma = full_map(dgamma, shape) if of_gamma else None
    full_beta = full_map(dbeta, shape) if of_beta else None
    d_maps = optional_view(full_gamma), optional_view(full_beta)
    how = plan(chip(x.device), z, (b, c, p), groups, x.element_size(), FUSED_TILE // 2)
    d = view_of(grad)
    tile = tile_constants(how, (b, c, p), d, z, z2, dz, dz2, *maps, *d_maps)
    vectors = weight.contiguous(), bias.contiguous()
    given = d, z, z2, *vectors, *maps, mean.contiguous(), rstd.contiguous(), raw_mix, x.shape[1]
    sizes = {"positions": p, "groups": groups, "ACTIVATION": activation, **tile}
    totals = torch.empty(2, b, c, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if how.fused:
            grid = (b * groups,)
            fused_backward_kernel[grid](*given, *d_maps, dz, dz2, totals, rows=b * c, MEMBERS=c // groups, **sizes)
        else:
            sizes |= {"channels": c, "members": c // groups}
            sums = torch.empty(2, b, c, how.splits, dtype=torch.float32, device=x.device)
            shares = torch.empty(2, b, groups, dtype=torch.float32, device=x.device)
            split = {"splits": how.splits, "span": how.span}
            sums_kernel[(programs(how, b, c),)](*given, *d_maps, sums, rows=b * c, **split, **sizes)
            SB = power_of_2(how.splits)
            counts = groups, p, c // groups, b * c, how.splits
            merge_sums_kernel[(b * groups,)](sums, vectors[0], totals, shares, *counts, CB=MERGE // SB, SB=SB)
            if of_x:
                gradient_kernel[(tiles(how, b, c, p),)](*given, dz, dz2, shares, all_groups=b * groups, **sizes)
    over_batch = totals.sum(1)
    dbias.copy_(over_batch[0])
    dweight.copy_(over_batch[1])
    for narrow, full in ((dgamma, full_gamma), (dbeta, full_beta)):
        if full is not None and narrow is not full:
            narrow.copy_(full.sum_to_size(narrow.shape))


def full_map(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Where the gradient of a map goes: there, or, if the map was repeated, into all its copies first, in float32."""
    return gradient if gradient.shape == shape else gradient.new_empty(shape, dtype=torch.float32)


def flat_shape(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def optional_view(x: Tensor | None) -> View | None:
    return None if x is None else view_of(x)


def tile_constants(how: Plan, shape: tuple[int, int, int], *views: View | None) -> dict[str, Any]:
    wide = needs_64_bits(shape, *views)
    return {"CB": how.CB, "PB": how.PB, "INDEX": tl.int64 if wide else tl.int32, "num_warps": how.warps}


def programs(how: Plan, batch: int, channels: int) -> int:
    """Of the kernels that sum: one per sample, block of channels and part of the positions."""
    return batch * triton.cdiv(channels, how.CB) * how.splits


def tiles(how: Plan, batch: int, channels: int, positions: int) -> int:
    return batch * triton.cdiv(channels, how.CB) * triton.cdiv(positions, how.PB)
