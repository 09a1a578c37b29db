"""Backward kernels of `group_norm_sft`. With g the gradient of t, s the share of the modulated features:

    dγ = g · a,  dβ = g,  h = g · (1 + γ),  db = Σ h,  dw = Σ h · ẑ
    dz = 1/σ · (h · w − m₁ − ẑ · m₂) + (1 − s) · grad         m₁, m₂: means of h · w and h · w · ẑ over the group

Both means follow from the sums A = Σ h and B = Σ h · ẑ over the positions of each channel, so two passes do it all:
the first sums A and B and writes dγ and dβ, the second writes dz. Parts are added in a fixed order, without atomics.

    fused        a program makes both passes over a group; the second reads from L1 or L2
    split        sums_kernel         a program: some channels, a part of the positions -> A, B [2, B, C, S]
                 merge_sums_kernel   a program: one group  -> A, B [2, B, C] and m₁, m₂ [2, B, groups]
                 gradient_kernel     a program: one tile; from the end
"""

import triton
import triton.language as tl

from ragsr.kernels.sft_tiles import (
    activate_backward,
    load,
    load_channel,
    load_joined,
    normalised,
    place,
    store_joined,
)


@triton.jit
def modulation_backward(
    grad, x, x2, weight, bias, gamma, beta, mean, rstd, raw_mix, channels1, batch, c, p, valid, inside,
    ACTIVATION: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """grad, g, h, ẑ and a on one tile."""
    z = load_joined(x, x2, channels1, batch, c, p, inside, POLICY)
    z_hat = normalised(z, mean, rstd)
    affine = z_hat * load_channel(weight, c, valid) + load_channel(bias, c, valid)
    slope = 1 + load(gamma, batch, c, p, inside, POLICY)
    d = load(grad, batch, c, p, inside, POLICY)
    g = d if raw_mix is None else raw_mix * d
    if ACTIVATION is not None:
        g = activate_backward(g, affine * slope + load(beta, batch, c, p, inside, POLICY), ACTIVATION)
    return d, g, g * slope, z_hat, affine


@triton.jit
def store_wanted(to, batch, c, p, inside, values):
    """Into one of the maps' gradients, if it was asked for."""
    if to is not None:
        tl.store(place(to, batch, c, p), values, mask=inside, eviction_policy="evict_first")


@triton.jit
def normalisation_backward(d, h, z_hat, w, rstd, m1, m2, raw_mix):
    dz = rstd * (h * w - m1 - z_hat * m2)
    if raw_mix is not None:
        dz += (1 - raw_mix) * d
    return dz


@triton.jit
def fused_backward_kernel(
    grad, x, x2, weight, bias, gamma, beta, means, rstds, raw_mix, channels1, dgamma, dbeta, dx, dx2,
    totals,  # [2, B, C]
    positions, groups, rows,
    ACTIVATION: tl.constexpr,
    MEMBERS: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    batch = (group // groups).to(tl.int64)
    first = (group % groups) * MEMBERS
    lane_c = tl.arange(0, CB).to(INDEX)[:, None]
    lane_p = tl.arange(0, PB).to(INDEX)[None]
    n = 1.0 * MEMBERS * positions
    mean = tl.load(means + group)
    rstd = tl.load(rstds + group)
    m1 = 0.0
    m2 = 0.0
    for c0 in range(0, MEMBERS, CB):
        c = first + c0 + lane_c
        valid = c0 + lane_c < MEMBERS
        a = tl.zeros([CB, PB], tl.float32)
        b = tl.zeros([CB, PB], tl.float32)
        for p0 in range(0, positions, PB):
            p = p0 + lane_p
            inside = valid & (p < positions)
            _, g, h, z_hat, affine = modulation_backward(
                grad, x, x2, weight, bias, gamma, beta, mean, rstd, raw_mix, channels1, batch, c, p, valid, inside,
                ACTIVATION, "evict_last",
            )  # fmt: skip
            store_wanted(dgamma, batch, c, p, inside, g * affine)
            store_wanted(dbeta, batch, c, p, inside, g)
            a += h  # zero outside, as grad is
            b += h * z_hat
        channel_a = tl.sum(a, axis=1, keep_dims=True)
        channel_b = tl.sum(b, axis=1, keep_dims=True)
        row = batch * groups * MEMBERS + c
        tl.store(totals + row, channel_a, mask=valid)
        tl.store(totals + rows + row, channel_b, mask=valid)
        w = load_channel(weight, c, valid)
        m1 += tl.sum(channel_a * w) / n
        m2 += tl.sum(channel_b * w) / n
    if dx is not None:
        across = tl.cdiv(positions, PB)
        tiles = tl.cdiv(MEMBERS, CB) * across
        for tile in range(tiles):
            back = tiles - 1 - tile  # what was read last is nearest
            c0 = (back // across) * CB
            c = first + c0 + lane_c
            p = (back % across) * PB + lane_p
            valid = c0 + lane_c < MEMBERS
            inside = valid & (p < positions)
            d, _, h, z_hat, _ = modulation_backward(
                grad, x, x2, weight, bias, gamma, beta, mean, rstd, raw_mix, channels1, batch, c, p, valid, inside,
                ACTIVATION, "evict_first",
            )  # fmt: skip
            dz = normalisation_backward(d, h, z_hat, load_channel(weight, c, valid), rstd, m1, m2, raw_mix)
            store_joined(dx, dx2, channels1, batch, c, p, inside, dz, "evict_first")


@triton.jit
def sums_kernel(
    grad, x, x2, weight, bias, gamma, beta, means, rstds, raw_mix, channels1, dgamma, dbeta,
    sums,  # [2, B, C, S]
    positions, groups, channels, members, rows, splits, span,
    ACTIVATION: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, CB)
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    batch = (block // blocks).to(tl.int64)
    c = (block % blocks) * CB + tl.arange(0, CB).to(INDEX)[:, None]
    lane_p = tl.arange(0, PB).to(INDEX)[None]
    valid = c < channels
    mean = tl.load(means + batch * groups + c // members, mask=valid, other=0.0)
    rstd = tl.load(rstds + batch * groups + c // members, mask=valid, other=0.0)
    start = split.to(INDEX) * span
    stop = tl.minimum(start + span, positions)
    a = tl.zeros([CB, PB], tl.float32)
    b = tl.zeros([CB, PB], tl.float32)
    for p0 in range(start, stop, PB):
        p = p0 + lane_p
        inside = valid & (p < stop)
        _, g, h, z_hat, affine = modulation_backward(
            grad, x, x2, weight, bias, gamma, beta, mean, rstd, raw_mix, channels1, batch, c, p, valid, inside,
            ACTIVATION, "evict_last",
        )  # fmt: skip
        store_wanted(dgamma, batch, c, p, inside, g * affine)
        store_wanted(dbeta, batch, c, p, inside, g)
        a += h
        b += h * z_hat
    at = (batch * channels + c) * splits + split
    tl.store(sums + at, tl.sum(a, axis=1, keep_dims=True), mask=valid)
    tl.store(sums + rows * splits + at, tl.sum(b, axis=1, keep_dims=True), mask=valid)


@triton.jit
def merge_sums_kernel(
    sums,  # [2, B, C, S]
    weight,
    totals,  # [2, B, C]
    shares,  # [2, B, groups]
    groups, positions, members, rows, splits,
    CB: tl.constexpr,
    SB: tl.constexpr,
):  # fmt: skip
    """A and B of the channels of one group, and the means m₁ and m₂ of the group."""
    group = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SB)[None]
    n = 1.0 * members * positions
    m1 = 0.0
    m2 = 0.0
    for c0 in range(0, members, CB):
        c = c0 + tl.arange(0, CB)[:, None]
        valid = c < members
        row = group * members + c
        inside = valid & (s < splits)
        a = tl.sum(tl.load(sums + row * splits + s, mask=inside, other=0.0), axis=1, keep_dims=True)
        b = tl.sum(tl.load(sums + (rows + row) * splits + s, mask=inside, other=0.0), axis=1, keep_dims=True)
        tl.store(totals + row, a, mask=valid)
        tl.store(totals + rows + row, b, mask=valid)
        w = load_channel(weight, (group % groups) * members + c, valid)
        m1 += tl.sum(a * w) / n
        m2 += tl.sum(b * w) / n
    tl.store(shares + group, m1)
    tl.store(shares + tl.num_programs(0) + group, m2)


@triton.jit
def gradient_kernel(
    grad, x, x2, weight, bias, gamma, beta, means, rstds, raw_mix, channels1, dx, dx2,
    shares,  # [2, B, groups]
    positions, groups, channels, members, all_groups,
    ACTIVATION: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(positions, PB)
    blocks = tl.cdiv(channels, CB)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    block = tile // across
    batch = (block // blocks).to(tl.int64)
    c = (block % blocks) * CB + tl.arange(0, CB).to(INDEX)[:, None]
    p = (tile % across).to(INDEX) * PB + tl.arange(0, PB).to(INDEX)[None]
    valid = c < channels
    inside = valid & (p < positions)
    group = batch * groups + c // members
    mean = tl.load(means + group, mask=valid, other=0.0)
    rstd = tl.load(rstds + group, mask=valid, other=0.0)
    m1 = tl.load(shares + group, mask=valid, other=0.0)
    m2 = tl.load(shares + all_groups + group, mask=valid, other=0.0)
    d, _, h, z_hat, _ = modulation_backward(
        grad, x, x2, weight, bias, gamma, beta, mean, rstd, raw_mix, channels1, batch, c, p, valid, inside,
        ACTIVATION, "evict_first",
    )  # fmt: skip
    dz = normalisation_backward(d, h, z_hat, load_channel(weight, c, valid), rstd, m1, m2, raw_mix)
    store_joined(dx, dx2, channels1, batch, c, p, inside, dz, "evict_first")
