"""The selection of cosine top-k in Triton, for a GPU whose owner has no CUDA toolkit.

One program reads the scores of one query once and keeps the k best keys in registers, in any order: while a tile holds
a key better than the worst kept, it takes that one's place. Most tiles hold none. Keys are distinct, so exactly one
place changes. For a large k a kernel writes all keys and `torch.topk` keeps the best.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # scores per tile
LARGEST_K = 64  # above, most tiles hold something to keep
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def keys_of(score, index):
    """Order of the score above, complement of the index below; as `ragsr.ops.cosine.order_keys`."""
    score = score.to(tl.float32)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 and 0.0 are one score
    bits = tl.where(score == score, bits, -0x400000)  # NaN, of either sign, below every number
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - index)


@triton.jit
def keep_best_kernel(
    best,  # int64 [Q, kept]
    scores,  # [Q, n], references first … first + n - 1
    out,  # int64 [Q, k]
    kept,
    n,
    first,
    k,
    PLACES: tl.constexpr,  # a power of two >= k
    BLOCK: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    keys = tl.load(best + query * kept + place, mask=place < kept, other=0)
    keys = tl.where(place < kept, keys, LOWEST + place.to(tl.int64))  # below every key, and distinct
    keys = tl.where(place < k, keys, 0x7FFFFFFFFFFFFFFF)  # never the worst
    worst = tl.min(keys, 0)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        score = tl.load(scores + query * n + column, mask=column < n, other=0)
        found = tl.where(column < n, keys_of(score, (first + column).to(tl.int64)), LOWEST)
        top = tl.max(found, 0)
        while top > worst:
            keys = tl.where(keys == worst, top, keys)
            found = tl.where(found == top, LOWEST, found)
            worst = tl.min(keys, 0)
            top = tl.max(found, 0)
    tl.store(out + query * k + place, keys, mask=place < k)


@triton.jit
def keys_kernel(scores, keys, n, first, BLOCK: tl.constexpr):
    """scores [Q, n] -> int64 keys [Q, n]"""
    blocks = tl.cdiv(n, BLOCK)
    query = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + query * n + column, mask=column < n, other=0)
    tl.store(keys + query * n + column, keys_of(score, (first + column).to(tl.int64)), mask=column < n)


def keep_best(best: Tensor, scores: Tensor, first: int, k: int) -> Tensor:
    """The k largest of the keys `best` int64 [Q, kept] and those of `scores` [Q, n]: int64 [Q, min(k, kept + n)]."""
    best, scores = best.contiguous(), scores.contiguous()
    (q, kept), n = best.shape, scores.shape[1]
    k = min(k, kept + n)
    if q == 0 or n == 0:
        return best[:, :k].clone()
    if k > LARGEST_K:
        keys = best.new_empty(q, n)
        keys_kernel[(q * triton.cdiv(n, BLOCK),)](scores, keys, n, first, BLOCK=BLOCK)
        return torch.cat((best, keys), dim=1).topk(k, dim=1).values
    out = best.new_empty(q, k)
    keep_best_kernel[(q,)](best, scores, out, kept, n, first, k, PLACES=triton.next_power_of_2(k), BLOCK=BLOCK)
    return out.sort(dim=1, descending=True).values
