"""Separate attention in one kernel: own tokens, then each reference, on the same accumulators.

A program takes a tile of queries of one head. It keeps the running soft-max (peak m, total l, weighted sum of values)
in registers and goes through all keys, one soft-max after the other, over the same code:

    own keys                    -> O_own;  its mean and M2 over the tile leave for AdaIN;  blend = (1 − Σ g) · O_own
    keys of reference 1 … R     -> O_r;    blend += g_r · O_r          (skipped where the tile's gate is 0)
                                   blend and its mean and M2 leave

Where the blend has no room in the registers during the loops it is parked in memory (PARK), once per reference that the
tile uses. Nothing of size tokens × tokens or references × tokens is stored. `moments.affine` merges the tiles in a
fixed order and `moments.align` applies AdaIN in place; it leaves a batch row alone whose gate is 0 throughout, so there
the result is O_own, bit for bit, and the decision is made on the device.

A head dim is held in two parts, the largest power of two in it and the rest (40 = 32 + 8, 80 = 64 + 16,
160 = 128 + 32): a part is padded to a power of two, in registers alone, where padding the whole would double the work.
The scores are base-2 exponents: scale · log2(e) is multiplied into the queries once.
"""

import triton
import triton.language as tl

from ragsr.kernels import moments


@triton.jit
def load_part(
    x,
    token,  # [n]
    x_n,
    x_d,
    count,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Channels FIRST … FIRST + WIDTH − 1 of the tokens, [n, WIDTH]; 0 past the head dim and past `count` tokens."""
    channel = FIRST + tl.arange(0, WIDTH)
    source = x + token[:, None] * x_n + channel[None, :] * x_d
    if TAIL and FIRST + WIDTH > D:
        part = tl.load(source, mask=(token < count)[:, None] & (channel < D)[None, :], other=0.0)
    elif TAIL:
        part = tl.load(source, mask=(token < count)[:, None], other=0.0)
    elif FIRST + WIDTH > D:
        part = tl.load(source, mask=(channel < D)[None, :], other=0.0)
    else:
        part = tl.load(source)
    return part


@triton.jit
def fold_keys(
    peak,
    total,
    sum1,
    sum2,
    q1,
    q2,
    k,
    v,
    left,
    k_n,
    k_d,
    v_n,
    v_d,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BN: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys into the running soft-max. `k` and `v` point to its first token; `left` are still to come."""
    token = tl.arange(0, BN)
    scores = tl.dot(q1, load_part(k, token, k_n, k_d, left, D, 0, D1, TAIL).T, input_precision=PRECISION)
    if D2 > 0:
        rest = load_part(k, token, k_n, k_d, left, D, D1, D2, TAIL).T
        scores = tl.dot(q2, rest, scores, input_precision=PRECISION)
    if TAIL:
        scores = tl.where((token < left)[None, :], scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v.dtype.element_ty)
    part = load_part(v, token, v_n, v_d, left, D, 0, D1, TAIL)
    sum1 = tl.dot(weights, part, sum1 * shrink[:, None], input_precision=PRECISION)
    if D2 > 0:
        part = load_part(v, token, v_n, v_d, left, D, D1, D2, TAIL)
        sum2 = tl.dot(weights, part, sum2 * shrink[:, None], input_precision=PRECISION)
    return higher, total, sum1, sum2


@triton.jit
def fold_all(
    peak,
    total,
    sum1,
    sum2,
    q1,
    q2,
    k,
    v,
    count,
    k_n,
    k_d,
    v_n,
    v_d,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`count` keys: whole blocks without any mask, then what is left over."""
    whole = count // BN * BN
    for start in range(0, whole, BN):
        k_block = k + tl.cast(start, tl.int64) * k_n
        v_block = v + tl.cast(start, tl.int64) * v_n
        peak, total, sum1, sum2 = fold_keys(
            peak, total, sum1, sum2, q1, q2, k_block, v_block, BN, k_n, k_d, v_n, v_d, D, D1, D2, BN, False, PRECISION
        )
    if whole < count:
        k_block = k + tl.cast(whole, tl.int64) * k_n
        v_block = v + tl.cast(whole, tl.int64) * v_n
        left = count - whole
        peak, total, sum1, sum2 = fold_keys(
            peak, total, sum1, sum2, q1, q2, k_block, v_block, left, k_n, k_d, v_n, v_d, D, D1, D2, BN, True, PRECISION
        )
    return peak, total, sum1, sum2


@triton.jit
def store_part(x, token, x_n, x_d, value, count, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    channel = FIRST + tl.arange(0, WIDTH)
    place = x + token[:, None] * x_n + channel[None, :] * x_d
    tl.store(place, value.to(x.dtype.element_ty), mask=(token < count)[:, None] & (channel < D)[None, :])


@triton.jit
def add_parked(parked, token, value, count, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Add to what the program has parked; a thread may hold other elements here than where they were stored."""
    tl.debug_barrier()
    so_far = load_part(parked, token, D, 1, count, D, FIRST, WIDTH, True)
    tl.debug_barrier()
    store_part(parked, token, D, 1, so_far + value, count, D, FIRST, WIDTH)


@triton.jit(do_not_specialize=["H", "N", "L", "M", "R"])
def separate_attention_kernel(
    q,  # [B, H, N, D]
    k,  # [B, H, L, D]
    v,
    k_ref,  # [B, H, ΣM, D]
    v_ref,
    gate,  # [B, R, N]
    ends,  # int32 [R]: the token after the last of each reference; None: all have M tokens
    out,  # [B, H, N, D]
    parked,  # float32 [B, H, N, D], dense: where the blend waits during the loops if PARK
    own_moments,  # [B·H, tiles, 2, D]
    out_moments,
    touched,  # int32 [B·H, tiles]: whether the tile's gate is not 0 throughout
    H,
    N,
    L,
    M,
    R,
    scale,  # times log2(e)
    q_b,  # strides: those of batch, head and token in units of ALIGN
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    k_ref_b,
    k_ref_h,
    k_ref_n,
    k_ref_d,
    v_ref_b,
    v_ref_h,
    v_ref_n,
    v_ref_d,
    gate_b,
    gate_r,
    gate_n,
    out_b,
    out_h,
    out_n,
    out_d,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ALIGN: tl.constexpr,
    BLEND: tl.constexpr,
    CONCAT: tl.constexpr,
    MOMENTS: tl.constexpr,
    PARK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(N, BM)
    tile, row = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = row // H, row % H
    first = tile.to(tl.int64) * BM
    token = tl.arange(0, BM)
    count = tl.minimum(BM, N - tile * BM)
    inside = token < count

    q += b * (q_b * ALIGN) + h * (q_h * ALIGN) + first * (q_n * ALIGN)
    k += b * (k_b * ALIGN) + h * (k_h * ALIGN)
    v += b * (v_b * ALIGN) + h * (v_h * ALIGN)
    k_ref += b * (k_ref_b * ALIGN) + h * (k_ref_h * ALIGN)
    v_ref += b * (v_ref_b * ALIGN) + h * (v_ref_h * ALIGN)
    out += b * (out_b * ALIGN) + h * (out_h * ALIGN) + first * (out_n * ALIGN)

    q1 = load_part(q, token, q_n * ALIGN, q_d, count, D, 0, D1, True)
    q1 = (q1.to(tl.float32) * scale).to(q.dtype.element_ty)
    q2 = q1
    if D2 > 0:
        q2 = load_part(q, token, q_n * ALIGN, q_d, count, D, D1, D2, True)
        q2 = (q2.to(tl.float32) * scale).to(q.dtype.element_ty)

    nothing = tl.full([BM], float("-inf"), tl.float32)
    zero = tl.zeros([BM], tl.float32)
    zero1 = tl.zeros([BM, D1], tl.float32)
    zero2 = tl.zeros([BM, D2 if D2 > 0 else 1], tl.float32)
    peak, total, own1, own2 = fold_all(
        nothing, zero, zero1, zero2, q1, q2, k, v, L, k_n * ALIGN, k_d, v_n * ALIGN, v_d, D, D1, D2, BN, PRECISION
    )
    if CONCAT:  # one soft-max over both
        peak, total, own1, own2 = fold_all(
            *(peak, total, own1, own2, q1, q2, k_ref, v_ref, M),
            *(k_ref_n * ALIGN, k_ref_d, v_ref_n * ALIGN, v_ref_d, D, D1, D2, BN, PRECISION),
        )
    blend1 = own1 / total[:, None]
    blend2 = own2 / total[:, None]

    if MOMENTS:
        place = own_moments + (row * tiles + tile) * 2 * D
        moments.store_moments(place, blend1, inside, count, D, 0, D1)
        if D2 > 0:
            moments.store_moments(place, blend2, inside, count, D, D1, D2)

    if BLEND:
        gate += b * gate_b + first * gate_n
        shares = token.to(tl.int64) * gate_n
        taken = zero
        for r in range(R):
            taken += tl.load(gate + r * gate_r + shares, mask=inside, other=0.0).to(tl.float32)
        blend1 *= (1 - taken)[:, None]
        blend2 *= (1 - taken)[:, None]
        if PARK:  # leave the registers to the loop over the keys
            parked += (row * N + first) * D
            store_part(parked, token, D, 1, blend1, count, D, 0, D1)
            if D2 > 0:
                store_part(parked, token, D, 1, blend2, count, D, D1, D2)
        any_gate = 0
        start = 0
        for r in range(R):
            share = tl.load(gate + r * gate_r + shares, mask=inside, other=0.0).to(tl.float32)
            length = M
            if ends is not None:
                length = tl.load(ends + r) - start
            if tl.max((share != 0).to(tl.int32), 0) != 0:  # NaN counts as a gate
                any_gate = 1
                skipped = tl.cast(start, tl.int64)
                peak, total, ref1, ref2 = fold_all(
                    *(nothing, zero, zero1, zero2, q1, q2),
                    *(k_ref + skipped * (k_ref_n * ALIGN), v_ref + skipped * (v_ref_n * ALIGN), length),
                    *(k_ref_n * ALIGN, k_ref_d, v_ref_n * ALIGN, v_ref_d, D, D1, D2, BN, PRECISION),
                )
                share = share / total
                if PARK:
                    add_parked(parked, token, ref1 * share[:, None], count, D, 0, D1)
                    if D2 > 0:
                        add_parked(parked, token, ref2 * share[:, None], count, D, D1, D2)
                else:
                    blend1 += ref1 * share[:, None]
                    blend2 += ref2 * share[:, None]
            start += length
        if PARK:
            tl.debug_barrier()
            blend1 = load_part(parked, token, D, 1, count, D, 0, D1, True)
            if D2 > 0:
                blend2 = load_part(parked, token, D, 1, count, D, D1, D2, True)
        if MOMENTS:
            place = out_moments + (row * tiles + tile) * 2 * D
            moments.store_moments(place, blend1, inside, count, D, 0, D1)
            if D2 > 0:
                moments.store_moments(place, blend2, inside, count, D, D1, D2)
            tl.store(touched + row * tiles + tile, any_gate)

    store_part(out, token, out_n * ALIGN, out_d, blend1, count, D, 0, D1)
    if D2 > 0:
        store_part(out, token, out_n * ALIGN, out_d, blend2, count, D, D1, D2)
