"""Forward kernels of `group_norm_sft`.

    fused        a program reads a group for its statistics, then again (from L1 or L2 by then) and writes the result;
                 a group of one tile it keeps
    split        statistics_kernel   a program: some channels, a part of the positions  -> mean, m2  [B, C, S]
                 merge_kernel        a program: one group, its channels and parts in order -> mean, rstd [B, groups]
                 apply_kernel        a program: one tile; from the end, where L2 still holds what was read last

x is asked to stay in the caches for its second read; γ, β, the residual and the result pass through them.
"""

import triton
import triton.language as tl

from ragsr.kernels.sft_tiles import (
    activate,
    load,
    load_channel,
    load_joined,
    merge_lanes,
    normalised,
    place,
    welford_step,
)


@triton.jit
def load_maps(gamma, beta, residual, batch, c, p, inside):
    """γ, β and the residual (0 where there is none) on one tile."""
    slope = load(gamma, batch, c, p, inside, "evict_first")
    shift = load(beta, batch, c, p, inside, "evict_first")
    skip = 0.0 if residual is None else load(residual, batch, c, p, inside, "evict_first")
    return slope, shift, skip


@triton.jit
def modulate(z, mean, rstd, w, b, maps, raw_mix, ACTIVATION: tl.constexpr):
    """Everything after the statistics, on one tile."""
    affine = normalised(z, mean, rstd) * w + b
    y = activate(affine * (1 + maps[0]) + maps[1], ACTIVATION)
    if raw_mix is not None:
        y = raw_mix * y + (1 - raw_mix) * z
    return y + maps[2]


@triton.jit
def fused_kernel(
    x, x2, weight, bias, gamma, beta, residual, out,
    means,  # [B, groups]
    rstds,  # [B, groups]
    raw_mix, channels1, positions, groups, eps,
    ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr,  # the group is one tile
    MEMBERS: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """A program does one group of MEMBERS channels. CB divides them, or is larger than they are."""
    group = tl.program_id(0)
    batch = (group // groups).to(tl.int64)
    first = (group % groups) * MEMBERS
    lane_c = tl.arange(0, CB).to(INDEX)[:, None]
    lane_p = tl.arange(0, PB).to(INDEX)[None]
    n = 1.0 * MEMBERS * positions
    valid_c = lane_c < MEMBERS
    if WHOLE:
        inside = valid_c & (lane_p < positions)
        c = first + lane_c
        z = load_joined(x, x2, channels1, batch, c, lane_p, inside, "evict_first")
        maps = load_maps(gamma, beta, residual, batch, c, lane_p, inside)  # on their way while z is summed
        w, b = load_channel(weight, c, valid_c), load_channel(bias, c, valid_c)
        mean = tl.sum(z) / n
        mean += tl.sum(tl.where(inside, z - mean, 0.0)) / n  # what the first sum rounded away
        deviation = tl.where(inside, z - mean, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(deviation * deviation) / n + eps)
        y = modulate(z, mean, rstd, w, b, maps, raw_mix, ACTIVATION)
        tl.store(place(out, batch, c, lane_p), y, mask=inside, eviction_policy="evict_first")
    else:
        across = tl.cdiv(positions, PB)
        tiles = tl.cdiv(MEMBERS, CB) * across
        count = tl.zeros([1, PB], tl.float32)
        lane_mean = tl.zeros([CB, PB], tl.float32)
        lane_m2 = tl.zeros([CB, PB], tl.float32)
        for tile in tl.range(tiles, num_stages=3):
            c = first + (tile // across) * CB + lane_c
            p = (tile % across) * PB + lane_p
            inside = valid_c & (p < positions)
            z = load_joined(x, x2, channels1, batch, c, p, inside, "evict_last")
            count += (p < positions).to(tl.float32)
            lane_mean, lane_m2 = welford_step(z, inside, count, lane_mean, lane_m2)
        counts = tl.where(valid_c, count, 0.0)
        flat: tl.constexpr = [1, CB * PB]
        mean, m2 = merge_lanes(tl.reshape(counts, flat), tl.reshape(lane_mean, flat), tl.reshape(lane_m2, flat), n, 1)
        rstd = 1 / tl.sqrt(m2 / n + eps)
        for tile in range(tiles):
            back = tiles - 1 - tile  # what was read last is nearest
            c = first + (back // across) * CB + lane_c
            p = (back % across) * PB + lane_p
            inside = valid_c & (p < positions)
            z = load_joined(x, x2, channels1, batch, c, p, inside, "evict_first")
            maps = load_maps(gamma, beta, residual, batch, c, p, inside)
            w, b = load_channel(weight, c, valid_c), load_channel(bias, c, valid_c)
            y = modulate(z, mean, rstd, w, b, maps, raw_mix, ACTIVATION)
            tl.store(place(out, batch, c, p), y, mask=inside, eviction_policy="evict_first")
        mean = tl.sum(mean)  # [1, 1] -> scalar
        rstd = tl.sum(rstd)
    tl.store(means + group, mean)
    tl.store(rstds + group, rstd)


@triton.jit
def statistics_kernel(
    x, x2,
    means,  # [B, C, S]
    m2s,  # [B, C, S]
    channels1, channels, positions, splits, span,
    CB: tl.constexpr,
    PB: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of each of CB channels over the positions of one of the S parts."""
    blocks = tl.cdiv(channels, CB)
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    batch = (block // blocks).to(tl.int64)
    c = (block % blocks) * CB + tl.arange(0, CB).to(INDEX)[:, None]
    lane_p = tl.arange(0, PB).to(INDEX)[None]
    valid = c < channels
    start = split.to(INDEX) * span
    stop = tl.minimum(start + span, positions)
    count = tl.zeros([1, PB], tl.float32)
    mean = tl.zeros([CB, PB], tl.float32)
    m2 = tl.zeros([CB, PB], tl.float32)
    for p0 in range(start, stop, PB):
        p = p0 + lane_p
        inside = valid & (p < stop)
        z = load_joined(x, x2, channels1, batch, c, p, inside, "evict_last")
        count += (p < stop).to(tl.float32)
        mean, m2 = welford_step(z, inside, count, mean, m2)
    mean, m2 = merge_lanes(tl.broadcast_to(count, [CB, PB]), mean, m2, (stop - start).to(tl.float32), 1)
    at = (batch * channels + c) * splits + split
    tl.store(means + at, mean, mask=valid)
    tl.store(m2s + at, m2, mask=valid)


@triton.jit
def merge_kernel(
    part_means,  # [B, C, S]
    part_m2s,  # [B, C, S]
    means,  # [B, groups]
    rstds,  # [B, groups]
    eps, positions, members, splits, span,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The members · S parts of a group lie side by side: lanes stride over them, then the lanes are merged."""
    group = tl.program_id(0).to(tl.int64)
    parts = members * splits
    lane = tl.arange(0, BLOCK)[None]
    count = tl.zeros([1, BLOCK], tl.float32)
    mean = tl.zeros([1, BLOCK], tl.float32)
    m2 = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        part = (start + lane).to(tl.int64)
        inside = part < parts
        at = group * parts + part
        more = tl.where(inside, tl.minimum(span, positions - (part % splits) * span), 0).to(tl.float32)
        delta = tl.load(part_means + at, mask=inside, other=0.0) - mean
        share = more / tl.maximum(count + more, 1.0)
        m2 += tl.load(part_m2s + at, mask=inside, other=0.0) + delta * delta * count * share
        mean += delta * share
        count += more
    n = 1.0 * members * positions
    mean, m2 = merge_lanes(count, mean, m2, n, 1)
    tl.store(means + group, tl.sum(mean))
    tl.store(rstds + group, tl.sum(1 / tl.sqrt(m2 / n + eps)))


@triton.jit
def apply_kernel(
    x, x2, weight, bias, gamma, beta, residual, out, means, rstds, raw_mix,
    channels1, positions, groups, channels, members,
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
    z = load_joined(x, x2, channels1, batch, c, p, inside, "evict_first")
    at = batch * groups + c // members
    mean = tl.load(means + at, mask=valid, other=0.0)
    rstd = tl.load(rstds + at, mask=valid, other=0.0)
    maps = load_maps(gamma, beta, residual, batch, c, p, inside)
    w, b = load_channel(weight, c, valid), load_channel(bias, c, valid)
    y = modulate(z, mean, rstd, w, b, maps, raw_mix, ACTIVATION)
    tl.store(place(out, batch, c, p), y, mask=inside, eviction_policy="evict_first")
