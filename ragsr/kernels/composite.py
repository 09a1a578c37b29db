"""Separate attention from parts: whole attentions by PyTorch (or xformers), one kernel that blends and counts.

    own, other = attend(…), attend(…)          PyTorch's fused attention, any head dim and dtype
    out, statistics = blend(own, other, gate)  one pass; with R references R passes over one float32 buffer
    out = align(out)                           one pass, in place: moments.align

Nothing of size tokens × tokens or references × tokens is stored. Which backend PyTorch takes is left to PyTorch and the
user's `torch.nn.attention.sdpa_kernel`: those switches belong to the process, not to one call of a library.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ragsr.kernels import attention_table, moments
from ragsr.kernels.moments import CHANNELS, ROWS


@triton.jit(do_not_specialize=["H", "N", "C", "R", "r"])
def blend_kernel(
    own,  # [B, H, N, C]
    other,  # [B, H, N, C], the attention to reference r
    gate,  # [B, R, N]
    partial,  # [B, H, N, C], dense: what references 0 … r − 1 have given
    out,  # [B, H, N, C]
    own_moments,  # [B·H, tiles, 2, C]
    out_moments,
    touched,  # int32 [B·H, tiles]
    H,
    N,
    C,
    R,
    r,
    own_b,
    own_h,
    own_n,
    own_c,
    other_b,
    other_h,
    other_n,
    other_c,
    gate_b,
    gate_r,
    gate_n,
    out_b,
    out_h,
    out_n,
    out_c,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    MOMENTS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(N, ROWS)
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    b, h = row // H, row % H
    token = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = token < N
    mask = inside[:, None] & (channel < C)[None, :]
    line, column = token.to(tl.int64)[:, None], channel.to(tl.int64)[None, :]

    shares = gate + b * gate_b + token.to(tl.int64) * gate_n
    taken = tl.zeros([ROWS], ACC)
    any_gate = 0
    for i in range(R):
        share = tl.load(shares + i * gate_r, mask=inside, other=0.0).to(ACC)
        taken += share
        any_gate = tl.maximum(any_gate, tl.max((share != 0).to(tl.int32), 0))  # NaN counts as a gate
    share = tl.load(shares + r * gate_r, mask=inside, other=0.0).to(ACC)

    mine = tl.zeros([ROWS, CHANNELS], ACC)
    if FIRST or LAST:
        mine = tl.load(own + b * own_b + h * own_h + line * own_n + column * own_c, mask=mask, other=0.0).to(ACC)
    kept = partial + row * N * C + line * C + column
    blended = mine * (1 - taken)[:, None] if FIRST else tl.load(kept, mask=mask, other=0.0)
    if tl.max((share != 0).to(tl.int32), 0) != 0:
        source = other + b * other_b + h * other_h + line * other_n + column * other_c
        blended += share[:, None] * tl.load(source, mask=mask, other=0.0).to(ACC)
    if LAST:
        place = out + b * out_b + h * out_h + line * out_n + column * out_c
        tl.store(place, blended.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(kept, blended, mask=mask)
    if MOMENTS and LAST:
        count = tl.minimum(ROWS, N - tile * ROWS)
        place = (row * tiles + tile) * 2 * C
        mean, spread = moments.tile_moments(mine, inside, count)
        tl.store(own_moments + place + channel, mean, mask=channel < C)
        tl.store(own_moments + place + C + channel, spread, mask=channel < C)
        mean, spread = moments.tile_moments(blended, inside, count)
        tl.store(out_moments + place + channel, mean, mask=channel < C)
        tl.store(out_moments + place + C + channel, spread, mask=channel < C)
        tl.store(touched + row * tiles + tile, any_gate)


def composite_blend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor,
    lengths: list[int],
    scale: float,
    *,
    statistics: bool,
) -> moments.Blended:
    """(1 − Σ g) · O_own + Σ g_r · O_r, not aligned, with the statistics that aligning it takes."""
    own, out = attend(q, k, v, scale), torch.empty_like(q)
    found = moments.empty_blended(out, ROWS, statistics=statistics)
    if not lengths:
        out.copy_(own)
    partial = own.new_empty(q.shape, dtype=moments.wide(q)) if len(lengths) > 1 else None
    parts = zip(k_ref.split(lengths, dim=2), v_ref.split(lengths, dim=2), strict=True)
    for r, (keys, values) in enumerate(parts):
        blend(own, attend(q, keys, values, scale), gate, r, partial, found)
    return found


def blend(own: Tensor, other: Tensor, gate: Tensor, r: int, partial: Tensor | None, found: moments.Blended) -> None:
    """Reference r into the blend: into `partial`, or at the last one into `found`."""
    batch, heads, tokens, channels = own.shape
    references = gate.shape[1]
    grid = (batch * heads * moments.tile_count(tokens, ROWS), triton.cdiv(channels, CHANNELS))
    tiles = (None, None) if found.own is None or found.fused is None else (found.own.tiles, found.fused.tiles)
    with torch.cuda.device_of(own):
        blend_kernel[grid](
            *(own, other, gate, found.out if partial is None else partial, found.out, *tiles, found.touched),
            *(heads, tokens, channels, references, r),
            *(*own.stride(), *other.stride(), *gate.stride(), *found.out.stride()),
            FIRST=r == 0,
            LAST=r == references - 1,
            MOMENTS=found.own is not None,
            ACC=moments.accumulator(own),
            ROWS=ROWS,
            CHANNELS=CHANNELS,
        )


def composite_attention(
    q: Tensor, k: Tensor, v: Tensor, k_more: Tensor | None, v_more: Tensor | None, scale: float
) -> Tensor:
    """One soft-max over the keys, and over more keys where there are any."""
    if k_more is not None and v_more is not None:
        k, v = torch.cat((k, k_more), dim=2), torch.cat((v, v_more), dim=2)
    return torch.empty_like(q).copy_(attend(q, k, v, scale))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:  # [B, H, N, D]
    """softmax(scale · q kᵀ) v, by PyTorch's fused attention or xformers', which need dense rows."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if attention_table.FORCED == "xformers":
        from xformers.ops import memory_efficient_attention

        tokens_first = (x.transpose(1, 2) for x in (q, k, v))
        return memory_efficient_attention(*tokens_first, scale=scale).transpose(1, 2)
    with torch.autocast(q.device.type, enabled=False):  # in the dtype of q, whatever surrounds the op
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
