"""Patch correlation with top-k in Triton.

The inner product of two patches is the sum of inner products of single pixels along a shared step, so the tensor cores
multiply C channels instead of C·patch²:

    products   G [pixels of a, pixels of b], a band of both maps at a time            (tl.dot, float32 sums)
    matches    S(i, j) = Σ_d G(i + d, j + d) / |b_j|, and of every i the k best j     (reads G from the caches)

A program of the second kernel keeps the best candidate of every lane; the lanes are compared at the end. For k > 1 it
goes over its band again and takes only what comes after the last match in the order (score, index): exact for any k,
meant for a few. Nothing waits for the host, and nothing depends on the order in which programs run.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

SCRATCH = 1 << 28  # numbers of G held at a time: 1 GiB
ROWS, COLUMNS, DEPTH = 64, 64, 32  # tile of the products; DEPTH channels at a time
QUERIES, CANDIDATES = 8, 128  # tile of the search for matches
NEVER = tl.constexpr(1 << 30)  # an index behind all others


@triton.jit
def products_kernel(
    a,  # [B, rows, C], a band of pixels; batches are a_batch apart
    b,  # [B, columns, C]
    g,  # float32 [B, rows, columns]
    a_batch,
    b_batch,
    rows,
    columns,
    C,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(columns, COLUMNS)
    i = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.arange(0, DEPTH)
    left = a + batch * a_batch + i[:, None] * C + c
    right = b + batch * b_batch + j * C + c[:, None]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, C, DEPTH):
        x = tl.load(left + first, mask=(i[:, None] < rows) & (c + first < C), other=0)
        y = tl.load(right + first, mask=(j < columns) & (c[:, None] + first < C), other=0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    out = g + (batch * rows + i[:, None]) * columns + j
    tl.store(out, total, mask=(i[:, None] < rows) & (j < columns))


@triton.jit
def matches_kernel(
    g,  # float32 [B, rows of a · a_width, rows of b · b_width]
    scale,  # float32 [B, candidates of all bands]: 1 / (|b_j| + eps)
    score,  # float32 [B, queries, k]
    index,  # int64 [B, queries, k]
    queries,  # positions of this band of a
    candidates,  # and of this band of b, from `first` on
    first,
    total,  # candidates of all bands
    a_width,  # padded
    b_width,
    g_batch,  # numbers of G per batch
    g_columns,
    k,
    PATCH: tl.constexpr,
    QUERIES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    a_columns, b_columns = a_width - PATCH + 1, b_width - PATCH + 1
    row = g + batch * g_batch + (i // a_columns * a_width + i % a_columns).to(tl.int64) * g_columns
    lane = tl.arange(0, CANDIDATES)
    last_score = tl.full([QUERIES], float("inf"), dtype=tl.float32)
    last_index = tl.full([QUERIES], -1, dtype=tl.int32)
    for rank in range(k):
        best = tl.full([QUERIES, CANDIDATES], float("-inf"), dtype=tl.float32)
        place = tl.full([QUERIES, CANDIDATES], NEVER, dtype=tl.int32)
        for start in range(0, candidates, CANDIDATES):
            j = start + lane
            inside = (i[:, None] < queries) & (j < candidates)
            pixel = j // b_columns * b_width + j % b_columns
            sum = tl.zeros([QUERIES, CANDIDATES], dtype=tl.float32)
            for dy in range(PATCH):
                for dx in tl.static_range(PATCH):
                    step = (dy * a_width + dx).to(tl.int64) * g_columns + dy * b_width + dx
                    sum += tl.load(row[:, None] + pixel + step, mask=inside, other=0)
            found = sum * tl.load(scale + batch * total + first + j, mask=j < candidates, other=0)
            later = (found < last_score[:, None]) | ((found == last_score[:, None]) & (j > last_index[:, None]))
            better = inside & later & (found > best)
            best = tl.where(better, found, best)
            place = tl.where(better, j, place)
        last_score = tl.max(best, axis=1)
        last_index = tl.min(tl.where(best == last_score[:, None], place, NEVER), axis=1)
        last_index = tl.where(last_index == NEVER, 0, last_index)  # features that are not finite have no best match
        out = (batch * queries + i) * k + rank
        tl.store(score + out, last_score, mask=i < queries)
        tl.store(index + out, first + last_index.to(tl.int64), mask=i < queries)


def correlation_topk(a: Tensor, b: Tensor, k: int, patch: int, padding: int, eps: float) -> tuple[Tensor, Tensor]:
    """a [B, C, H, W], b [B, C, H', W'], up to float32 -> float32 [B, N, k], int64 [B, N, k], of equal scores the lowest
    index first."""
    a_norm, b_norm = (patch_norms(x, patch, padding).flatten(1) + eps for x in (a, b))
    a, b = (F.pad(x, (padding,) * 4).permute(0, 2, 3, 1).contiguous() for x in (a, b))  # [B, H, W, C]
    scores, indices = [], []
    a_rows, b_rows = band_rows(a, b, patch)
    for top in range(0, a.shape[1] - patch + 1, a_rows):
        band = a[:, top : top + a_rows + patch - 1]
        best = None
        for b_top in range(0, b.shape[1] - patch + 1, b_rows):
            first = b_top * (b.shape[2] - patch + 1)
            found = matches(band, b[:, b_top : b_top + b_rows + patch - 1], 1 / b_norm, first, k, patch)
            best = found if best is None else merge(best, found, k)
        assert best is not None  # a patch fits into b
        scores.append(best[0])
        indices.append(best[1])
    return torch.cat(scores, dim=1) / a_norm[..., None], torch.cat(indices, dim=1)


def matches(a: Tensor, b: Tensor, scale: Tensor, first: int, k: int, patch: int) -> tuple[Tensor, Tensor]:
    """Between two bands [B, h, w, C]: the best k, or all that the band of b has, not yet divided by |a_i|."""
    batch, a_height, a_width, channels = a.shape
    b_height, b_width = b.shape[1:3]
    rows, columns = a_height * a_width, b_height * b_width
    queries = (a_height - patch + 1) * (a_width - patch + 1)
    candidates = (b_height - patch + 1) * (b_width - patch + 1)
    k = min(k, candidates)
    score = a.new_empty(batch, queries, k, dtype=torch.float32)
    index = a.new_empty(batch, queries, k, dtype=torch.int64)
    if batch == 0:
        return score, index
    g = a.new_empty(batch, rows, columns, dtype=torch.float32)
    products_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS), batch)](
        a, b, g, a.stride(0), b.stride(0), rows, columns, channels,
        PRECISION=precision(a), ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=8,
    )  # fmt: skip
    matches_kernel[(triton.cdiv(queries, QUERIES), batch)](
        g, scale, score, index, queries, candidates, first, scale.shape[1],
        a_width, b_width, rows * columns, columns, k,
        PATCH=patch, QUERIES=QUERIES, CANDIDATES=CANDIDATES, num_warps=8,
    )  # fmt: skip
    return score, index


def precision(x: Tensor) -> str:
    """Three products of 10 + 10 bits come as near as float32; half types are multiplied exactly anyway."""
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


def band_rows(a: Tensor, b: Tensor, patch: int) -> tuple[int, int]:
    """How many rows of positions of each map are compared at a time, so that G stays within `SCRATCH`.

    A band multiplies patch - 1 rows that its neighbour multiplies too; all of b and a good band of a waste least.
    """
    halo = patch - 1
    room = SCRATCH // max(1, a.shape[0] * a.shape[2] * b.shape[2])  # rows of a times rows of b
    if room // b.shape[1] >= 9 * halo + 1:
        return min(a.shape[1] - halo, room // b.shape[1] - halo), b.shape[1] - halo
    side = max(halo + 1, int(room**0.5))
    return min(a.shape[1] - halo, side - halo), min(b.shape[1] - halo, side - halo)


def merge(best: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """What was found earlier stands first and the sort is stable, so equal scores keep the lowest index."""
    score, order = torch.cat((best[0], found[0]), dim=-1).sort(dim=-1, descending=True, stable=True)
    return score[..., :k], torch.cat((best[1], found[1]), dim=-1).gather(-1, order)[..., :k]


def patch_norms(x: Tensor, patch: int, padding: int) -> Tensor:
    """The norm of the patch at every position: float32 [B, h, w]."""
    squares = F.pad(x.float().square().sum(1), (padding,) * 4)
    return F.avg_pool2d(squares[:, None], patch, stride=1, divisor_override=1)[:, 0].sqrt()
