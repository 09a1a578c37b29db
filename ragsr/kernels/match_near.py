"""Patch correlation in windows, in Triton.

A program takes one position of `a` and the window that its prior asks for; for each reference there is a launch, and
programs whose prior names another one end at once. Windows of neighbours need not overlap, so nothing is shared and
nothing stored: a lane adds up the products of its candidate's patch, some channels at a time. For k > 1 the window is
gone through again, see `ragsr.kernels.match`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ragsr.kernels.match import NEVER, patch_norms

CANDIDATES, DEPTH = 32, 64  # tile of a program: positions of b, channels


@triton.jit
def window_start(centre, window, length):
    inside = tl.minimum(tl.maximum(centre, 0), length - 1)
    return tl.minimum(tl.maximum(inside - window, 0), tl.maximum(length - 2 * window - 1, 0)).to(tl.int32)


@triton.jit
def near_kernel(
    a,  # [B, pixels of a, C], padded
    b,  # [B, pixels of b, C], the same of one reference
    scale,  # float32 [B, candidates]: 1 / (|b_j| + eps)
    prior,  # int64 [B, queries, 3]: reference, row, column
    score,  # float32 [B, queries, k]
    index,  # int64 [B, queries, k]
    reference,  # the number of b
    references,  # how many there are
    window,
    queries,
    a_width,  # padded
    a_pixels,
    b_width,
    b_pixels,
    rows,  # of the positions in b
    C,
    k,
    PATCH: tl.constexpr,
    CANDIDATES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    batch, i = tl.program_id(1).to(tl.int64), tl.program_id(0)
    expected = prior + (batch * queries + i) * 3
    if tl.minimum(tl.maximum(tl.load(expected), 0), references - 1) == reference:
        columns = b_width - PATCH + 1
        top = window_start(tl.load(expected + 1), window, rows)
        left = window_start(tl.load(expected + 2), window, columns)
        high, wide = tl.minimum(2 * window + 1, rows), tl.minimum(2 * window + 1, columns)
        a_columns = a_width - PATCH + 1
        corner = a + (batch * a_pixels + i // a_columns * a_width + i % a_columns) * C
        plane = b + batch * b_pixels * C
        lane, c = tl.arange(0, CANDIDATES), tl.arange(0, DEPTH)
        last_score, last_index = float("inf"), -1
        for rank in range(k):
            best = tl.full([CANDIDATES], float("-inf"), dtype=tl.float32)
            place = tl.full([CANDIDATES], NEVER, dtype=tl.int32)
            for start in range(0, high * wide, CANDIDATES):
                n = start + lane
                y, x = top + n // wide, left + n % wide
                inside = n < high * wide
                sum = tl.zeros([CANDIDATES], dtype=tl.float32)
                for dy in range(PATCH):
                    for dx in range(PATCH):
                        pixel = ((y + dy) * b_width + x + dx).to(tl.int64)
                        for first in range(0, C, DEPTH):
                            deep = c + first < C
                            own = tl.load(corner + (dy * a_width + dx) * C + first + c, mask=deep, other=0)
                            other = tl.load(
                                plane + pixel[:, None] * C + first + c, mask=inside[:, None] & deep, other=0
                            )
                            sum += tl.sum(own.to(tl.float32) * other.to(tl.float32), axis=1)
                j = y * columns + x
                found = sum * tl.load(scale + batch * rows * columns + j, mask=inside, other=0)
                later = (found < last_score) | ((found == last_score) & (j > last_index))
                better = inside & later & (found > best)
                best = tl.where(better, found, best)
                place = tl.where(better, j, place)
            last_score = tl.max(best, axis=0)
            last_index = tl.min(tl.where(best == last_score, place, NEVER), axis=0)
            last_index = tl.where(last_index == NEVER, 0, last_index)  # features that are not finite have no best match
            out = (batch * queries + i) * k + rank
            tl.store(score + out, last_score)
            tl.store(index + out, last_index.to(tl.int64))


def correlation_topk_near(
    a: Tensor, b: Sequence[Tensor], prior: Tensor, window: int, k: int, patch: int, padding: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """a [B, C, H, W], b [B, C, H_r, W_r], up to float32, prior int64 [B, N, 3] -> score, index, image [B, N, k]."""
    batch, queries = prior.shape[:2]
    a_norm = patch_norms(a, patch, padding).flatten(1) + eps
    pixels = channels_innermost(a, padding)
    prior = prior.contiguous()
    score = a.new_empty(batch, queries, k, dtype=torch.float32)
    index = a.new_empty(batch, queries, k, dtype=torch.int64)
    image = prior[..., :1].clamp(0, len(b) - 1).repeat(1, 1, k)
    for number, one in enumerate(b):
        norm = patch_norms(one, patch, padding)
        reference = channels_innermost(one, padding)
        if batch:
            near_kernel[(queries, batch)](
                pixels, reference, 1 / (norm + eps), prior, score, index, number, len(b),
                min(window, max(reference.shape[1:3])), queries, pixels.shape[2], pixels.shape[1] * pixels.shape[2],
                reference.shape[2], reference.shape[1] * reference.shape[2], norm.shape[1], a.shape[1], k,
                PATCH=patch, CANDIDATES=CANDIDATES, DEPTH=DEPTH, num_warps=4,
            )  # fmt: skip
    return score / a_norm[..., None], index, image


def channels_innermost(x: Tensor, padding: int) -> Tensor:
    """[B, C, H, W] -> [B, H + 2·padding, W + 2·padding, C]"""
    return F.pad(x, (padding,) * 4).permute(0, 2, 3, 1).contiguous()
