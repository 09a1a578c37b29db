"""The similarity gate and the gated blend in Triton.

    m_i = ⟨ĥ_i, mean_j ĥ_ref,j⟩,   M = (m − min m) / (max m − min m + eps)

    direction_kernel   the unit vectors of a tile of a reference, added up                   [tiles, C]
    merge_kernel       the tiles added up, divided by the reference's tokens                 [R, C]
    similarity_kernel  norm and inner product of each token; least and greatest of a tile    [R, N], [R, tiles]
    stretch_kernel     least and greatest of all tiles, then M in place                      [R, N]

Sums are in float32 (float64 for float64) and always in the same order. Features are read as they lie: [B, H·W, C], or
without a copy the flattened [B, C, H, W]. A tile is read from memory once; its second pass finds it in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragsr.kernels.moments import accumulator, tile_count, wide

TOKENS = 64  # in a tile
CHANNELS = 32  # at a time: more programs fit side by side than with 64
MERGE = 128  # tiles that `merge_kernel` adds at a time
STRETCH = 1024  # tokens per program of `stretch_kernel`, and tiles it looks at together
ELEMENTS = 1024  # per program of `gated_blend_kernel`
EPS = 1e-8  # added to norms and to the range
FLAT = 1e-6  # a similarity map with no wider range says nothing

# ------------------------------------------------------------------ cosine_gate


@triton.jit
def load_block(x, first, column, x_n, x_c, N, C, ACC: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """TOKENS tokens from `first`, CHANNELS channels from `column`; the offset of the block, and no other, is 64-bit."""
    token, channel = tl.arange(0, TOKENS)[:, None], tl.arange(0, CHANNELS)[None, :]
    source = x + tl.cast(first, tl.int64) * x_n + tl.cast(column, tl.int64) * x_c + (token * x_n + channel * x_c)
    return tl.load(source, mask=(token < N - first) & (channel < C - column), other=0.0).to(ACC)


@triton.jit(do_not_specialize=["first", "M", "C", "place", "places"])
def direction_kernel(
    h_ref,  # [B, ΣM, C], of which one reference is the tokens first … first + M − 1
    sums,  # [B, places, C]; the tiles of this reference start at `place`
    first,
    M,
    C,
    place,
    places,
    h_b,
    h_n,
    h_c,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h_ref += b * h_b + tl.cast(first, tl.int64) * h_n
    square = tl.zeros([TOKENS], ACC)
    for column in range(0, C, CHANNELS):
        block = load_block(h_ref, tile * TOKENS, column, h_n, h_c, M, C, ACC, TOKENS, CHANNELS)
        square += tl.sum(block * block, 1)
    inverse = 1 / (tl.sqrt(square) + EPS)
    target = sums + (b * places + place + tile) * C
    for column in range(0, C, CHANNELS):
        channel = column + tl.arange(0, CHANNELS)
        block = load_block(h_ref, tile * TOKENS, column, h_n, h_c, M, C, ACC, TOKENS, CHANNELS)
        tl.store(target + channel, tl.sum(block * inverse[:, None], 0), mask=channel < C)


@triton.jit(do_not_specialize=["M", "C", "place", "places", "r", "R"])
def merge_kernel(
    sums,  # [B, places, C]
    directions,  # [B, R, C]
    M,
    C,
    place,
    places,
    r,
    R,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    MERGE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tiles = tl.cdiv(M, TOKENS)
    sums += (b * places + place) * C
    total = tl.zeros([CHANNELS], ACC)
    for first in range(0, tiles, MERGE):
        tile = first + tl.arange(0, MERGE)
        mask = (tile < tiles)[:, None] & (channel < C)[None, :]
        total += tl.sum(tl.load(sums + tile[:, None] * C + channel[None, :], mask=mask, other=0.0), 0)
    tl.store(directions + (b * R + r) * C + channel, total / M, mask=channel < C)


@triton.jit
def least(x, inside):
    """The least of the values inside; NaN if one of them is."""
    found = tl.min(tl.where(inside, x, float("inf")), 0)
    return tl.where(tl.max((inside & (x != x)).to(tl.int32), 0) != 0, float("nan"), found)


@triton.jit(do_not_specialize=["N", "C", "R"])
def similarity_kernel(
    h,  # [B, N, C]
    directions,  # [B, R, C]
    similarity,  # [B, R, N]
    ends,  # [B, R, tiles, 2]: the least and the negated greatest
    N,
    C,
    R,
    h_b,
    h_n,
    h_c,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)  # row = b · R + r
    token = tile * TOKENS + tl.arange(0, TOKENS)
    h += (row // R) * h_b
    square = tl.zeros([TOKENS], ACC)
    inner = tl.zeros([TOKENS], ACC)
    for column in range(0, C, CHANNELS):
        channel = column + tl.arange(0, CHANNELS)
        block = load_block(h, tile * TOKENS, column, h_n, h_c, N, C, ACC, TOKENS, CHANNELS)
        direction = tl.load(directions + row * C + channel, mask=channel < C, other=0.0)
        square += tl.sum(block * block, 1)
        inner += tl.sum(block * direction[None, :], 1)
    found = inner / (tl.sqrt(square) + EPS)
    tl.store(similarity + row * N + token, found, mask=token < N)
    place = ends + (row * tl.num_programs(0) + tile) * 2
    tl.store(place, least(found, token < N))
    tl.store(place + 1, least(-found, token < N))


@triton.jit(do_not_specialize=["N", "tiles"])
def stretch_kernel(
    similarity,  # [B·R, N], becomes the gate
    ends,  # [B·R, tiles, 2]
    N,
    tiles,
    EPS: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
    STRETCH: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    ends += row * tiles * 2
    low = tl.full([STRETCH], float("inf"), ACC)
    less = low  # the least of the negated
    for first in range(0, tiles, STRETCH):
        tile = first + tl.arange(0, STRETCH)
        a = tl.load(ends + tile * 2, mask=tile < tiles, other=float("inf"))
        z = tl.load(ends + tile * 2 + 1, mask=tile < tiles, other=float("inf"))
        low = tl.where((a < low) | (a != a), a, low)  # NaN once seen stays: nothing is less than it
        less = tl.where((z < less) | (z != z), z, less)
    everywhere = tl.arange(0, STRETCH) >= 0
    bottom = least(low, everywhere)
    spread = -least(less, everywhere) - bottom
    token = tl.program_id(0) * STRETCH + tl.arange(0, STRETCH)
    place = similarity + row * N + token
    stretched = (tl.load(place, mask=token < N, other=0.0) - bottom) / (spread + EPS)
    tl.store(place, tl.where(spread <= FLAT, 0.0, stretched), mask=token < N)


def cosine_gate(h: Tensor, h_ref: Tensor, lengths: list[int]) -> Tensor:
    """h [B, N, C], h_ref [B, ΣM, C] -> [B, R, N]; `lengths` [M_1, …, M_R] are the tokens of each reference."""
    batch, tokens, channels = h.shape
    gate = h.new_empty(batch, len(lengths), tokens, dtype=wide(h))
    if gate.numel() == 0:
        return gate
    tiles = tile_count(tokens, TOKENS)
    ends = gate.new_empty(batch, len(lengths), tiles, 2)
    options = {"EPS": EPS, "ACC": accumulator(h)}
    with torch.cuda.device_of(h):
        directions = mean_directions(h_ref, lengths)
        similarity_kernel[tiles, batch * len(lengths)](
            *(h, directions, gate, ends, tokens, channels, len(lengths), *h.stride()),
            TOKENS=TOKENS,
            CHANNELS=CHANNELS,
            **options,
        )
        stretch_kernel[tile_count(tokens, STRETCH), batch * len(lengths)](
            gate, ends, tokens, tiles, FLAT=FLAT, STRETCH=STRETCH, **options
        )
    return gate


def mean_directions(h_ref: Tensor, lengths: list[int]) -> Tensor:
    """mean_j x̂_ref,j of every reference: [B, R, C]; two launches for each, so that no length has to be copied."""
    batch, _, channels = h_ref.shape
    tiles = [tile_count(length, TOKENS) for length in lengths]
    sums = h_ref.new_empty(batch, sum(tiles), channels, dtype=wide(h_ref))
    directions = sums.new_empty(batch, len(lengths), channels)
    acc = accumulator(h_ref)
    first = place = 0
    for r, length in enumerate(lengths):
        direction_kernel[tiles[r], batch](
            *(h_ref, sums, first, length, channels, place, sum(tiles), *h_ref.stride()),
            EPS=EPS,
            ACC=acc,
            TOKENS=TOKENS,
            CHANNELS=CHANNELS,
        )
        merge_kernel[triton.cdiv(channels, CHANNELS), batch](
            *(sums, directions, length, channels, place, sum(tiles), r, len(lengths)),
            ACC=acc,
            TOKENS=TOKENS,
            MERGE=MERGE,
            CHANNELS=CHANNELS,
        )
        first, place = first + length, place + tiles[r]
    return directions


# ------------------------------------------------------------------ gated_blend


@triton.jit
def offset_of(index, n1, n2, n3, s0, s1, s2, s3):
    """Where the element `index` of a [n0, n1, n2, n3] array lies."""
    i3, index = index % n3, index // n3
    i2, index = index % n2, index // n2
    i1, i0 = index % n1, index // n1
    return i0.to(tl.int64) * s0 + i1.to(tl.int64) * s1 + i2.to(tl.int64) * s2 + i3.to(tl.int64) * s3


@triton.jit(do_not_specialize=["total", "n1", "n2", "n3"])
def gated_blend_kernel(
    own,
    ref,
    gate,
    out,
    total,
    n1,
    n2,
    n3,
    own_0,
    own_1,
    own_2,
    own_3,
    ref_0,
    ref_1,
    ref_2,
    ref_3,
    gate_0,
    gate_1,
    gate_2,
    gate_3,
    out_0,
    out_1,
    out_2,
    out_3,
    LONG: tl.constexpr,
    ACC: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    block = tl.program_id(0)
    if LONG:  # dividing 64-bit integers takes long
        block = block.to(tl.int64)
    index = block * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = index < total
    mine = tl.load(own + offset_of(index, n1, n2, n3, own_0, own_1, own_2, own_3), mask=inside).to(ACC)
    other = tl.load(ref + offset_of(index, n1, n2, n3, ref_0, ref_1, ref_2, ref_3), mask=inside).to(ACC)
    share = tl.load(gate + offset_of(index, n1, n2, n3, gate_0, gate_1, gate_2, gate_3), mask=inside).to(ACC)
    place = out + offset_of(index, n1, n2, n3, out_0, out_1, out_2, out_3)
    tl.store(place, (mine + share * (other - mine)).to(out.dtype.element_ty), mask=inside)


def gated_blend(own: Tensor, ref: Tensor, gate: Tensor) -> Tensor:
    """own + gate · (ref − own), in the layout of `own`; the gate broadcasts without being written out."""
    out = torch.empty_like(own)
    sizes, strides = joined(list(own.shape), [x.stride() for x in (own, ref, gate.expand_as(own), out)])
    if out.numel() == 0:
        return out
    if len(sizes) > 4:  # a layout no network has: dense copies join to fewer dimensions
        return out.copy_(gated_blend(own.reshape(-1), ref.reshape(-1), gate.expand_as(own).reshape(-1)).view(own.shape))
    pad = 4 - len(sizes)
    sizes, strides = [1] * pad + sizes, [[0] * pad + s for s in strides]
    with torch.cuda.device_of(own):
        gated_blend_kernel[(triton.cdiv(own.numel(), ELEMENTS),)](
            *(own, ref, gate, out, own.numel(), *sizes[1:], *(s for each in strides for s in each)),
            LONG=own.numel() > 2**31 - ELEMENTS,
            ACC=accumulator(own),
            ELEMENTS=ELEMENTS,
        )
    return out


def joined(sizes: list[int], strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """The fewest dimensions to walk all tensors in: neighbours join where every tensor steps evenly over both."""
    kept: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        if kept and all(step[-1] == stride[i] * size for step, stride in zip(steps, strides, strict=True)):
            kept[-1] *= size
            for step, stride in zip(steps, strides, strict=True):
                step[-1] = stride[i]
            continue
        kept.append(size)
        for step, stride in zip(steps, strides, strict=True):
            step.append(stride[i])
    return kept, steps
