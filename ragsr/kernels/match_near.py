"""Patch correlation in windows, in Triton.

Where neighbours expect their matches near one another, their windows overlap, and the work is that of
`ragsr.kernels.match` on a small scale: the inner products of single pixels, C channels deep, by the tensor cores, then
sums along shared steps.

    a                 b
    ┌────────┐        ┌────────────────┐    G [64, pixels of the box] for every tile of 8×8 pixels, which holds
    │ 8×8    │        │ box of all the │    (9 - patch)² positions                                        (tl.dot)
    │ pixels │        │ tile's windows │    S(i, j) = Σ_d G(i + d, j + d) / |b_j| for the j in the window of i
    └────────┘        └────────────────┘

With patches of 3, 256 channels, windows of 9×9 and matches expected twice as far apart, give or take two, 36 positions
share a box of 23×23: 64·25²·C multiplications for them, 1.5 times 81·9·C each, but by units that are 8 (float16) or,
with three products for float32, some 1.5 times as fast. What limits the sums without G is reading: 81·9·C numbers for a
position from the first cache; for G it is 25²·C / 36, forty times less, and G itself is 64·25² numbers, written once
and read 81·9 times for a position: 1/C of the sums.

Nothing promises that windows are neighbours. Where a box would be too large (`ragsr.kernels.match_boxes`) no products
are made, and a lane adds up those of its candidate's patch, some channels at a time. Which of the two it is the kernels
read from the boxes: the host does not wait. For each reference there is a launch, in which the positions whose prior
names another one end at once. For k > 1 the window is gone through again, see `ragsr.kernels.match`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ragsr.kernels.match import NEVER, patch_norms, precision
from ragsr.kernels.match_boxes import SIDE, Tiling, boxes_of

CANDIDATES, DEPTH = 32, 64  # of the sums: positions of b, channels
COLUMNS, CHANNELS = 64, 32  # of the products: pixels of b, channels


@triton.jit
def window_start(centre, window, length):
    inside = tl.minimum(tl.maximum(centre, 0), length - 1)
    return tl.minimum(tl.maximum(inside - window, 0), tl.maximum(length - 2 * window - 1, 0)).to(tl.int32)


@triton.jit
def box_products_kernel(
    a,  # [B, pixels of a, C], padded
    b,  # [B, pixels of b, C], the same of one reference
    boxes,  # int32 [B, tiles, 4]: top, left, height, width in positions; no height: no products
    g,  # float32 [B, here, SIDE², capacity]
    first_tile,
    here,  # tiles of this launch
    tiles,
    across,  # tiles
    capacity,  # pixels of the largest box
    a_height,  # padded
    a_width,
    b_width,
    b_pixels,
    C,
    PATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    parts = tl.cdiv(capacity, COLUMNS)
    local, start = tl.program_id(0) // parts, tl.program_id(0) % parts * COLUMNS
    tile = first_tile + local
    box = boxes + (batch * tiles + tile) * 4
    height, wide = tl.load(box + 2), tl.load(box + 3) + PATCH - 1
    count = (height + PATCH - 1) * wide
    if (height > 0) & (start < count):
        i, n, c = tl.arange(0, SIDE * SIDE), start + tl.arange(0, COLUMNS), tl.arange(0, CHANNELS)
        y = tile // across * (SIDE - PATCH + 1) + i // SIDE
        x = tile % across * (SIDE - PATCH + 1) + i % SIDE
        inside = (y < a_height) & (x < a_width)
        left = a + (batch * a_height * a_width + y * a_width + x)[:, None] * C + c
        pixel = (tl.load(box) + n // wide).to(tl.int64) * b_width + tl.load(box + 1) + n % wide
        right = b + (batch * b_pixels + pixel) * C + c[:, None]
        total = tl.zeros([SIDE * SIDE, COLUMNS], dtype=tl.float32)
        for channel in range(0, C, CHANNELS):
            own = tl.load(left + channel, mask=inside[:, None] & (c + channel < C), other=0)
            other = tl.load(right + channel, mask=(n < count) & (c[:, None] + channel < C), other=0)
            total = tl.dot(own, other, total, input_precision=PRECISION)
        out = g + ((batch * here + local) * SIDE * SIDE + i[:, None]) * capacity + n
        tl.store(out, total, mask=n < count)


@triton.jit
def near_kernel(
    a,  # [B, pixels of a, C], padded
    b,  # [B, pixels of b, C], the same of one reference
    g,  # float32 [B, here, SIDE², capacity]
    boxes,  # int32 [B, tiles, 4]
    scale,  # float32 [B, candidates]: 1 / (|b_j| + eps)
    prior,  # int64 [B, queries, 3]: reference, row, column
    score,  # float32 [B, queries, k]
    index,  # int64 [B, queries, k]
    reference,  # the number of b
    references,  # how many there are
    window,
    first_tile,
    here,
    tiles,
    across,
    capacity,
    a_height,  # padded
    a_width,
    b_width,
    b_pixels,
    rows,  # of the positions in b
    C,
    k,
    PATCH: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,  # positions of a tile across
    CANDIDATES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    local, within = tl.program_id(0) // (STEP * STEP), tl.program_id(0) % (STEP * STEP)
    tile = first_tile + local
    i_y, i_x = tile // across * STEP + within // STEP, tile % across * STEP + within % STEP
    a_rows, a_columns = a_height - PATCH + 1, a_width - PATCH + 1
    i = i_y * a_columns + i_x
    inside_a = (i_y < a_rows) & (i_x < a_columns)
    queries = a_rows * a_columns
    expected = prior + (batch * queries + i) * 3
    named = tl.load(expected, mask=inside_a, other=-1)
    if inside_a & (tl.minimum(tl.maximum(named, 0), references - 1) == reference):
        columns = b_width - PATCH + 1
        top = window_start(tl.load(expected + 1), window, rows)
        left = window_start(tl.load(expected + 2), window, columns)
        high, wide = tl.minimum(2 * window + 1, rows), tl.minimum(2 * window + 1, columns)
        box = boxes + (batch * tiles + tile) * 4
        box_top, box_left, box_wide = tl.load(box), tl.load(box + 1), tl.load(box + 3) + PATCH - 1
        together = tl.load(box + 2) > 0
        first_pixel = within // STEP * SIDE + within % STEP
        products = g + ((batch * here + local) * SIDE * SIDE + first_pixel) * capacity
        corner = a + (batch * a_height * a_width + i_y * a_width + i_x) * C
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
                if together:
                    pixel = (y - box_top) * box_wide + x - box_left
                    for dy in range(PATCH):
                        for dx in range(PATCH):
                            row = products + (dy * SIDE + dx) * capacity
                            sum += tl.load(row + pixel + dy * box_wide + dx, mask=inside, other=0)
                else:
                    for dy in range(PATCH):
                        for dx in range(PATCH):
                            pixel_b = ((y + dy) * b_width + x + dx).to(tl.int64)
                            for first in range(0, C, DEPTH):
                                deep = c + first < C
                                own = tl.load(corner + (dy * a_width + dx) * C + first + c, mask=deep, other=0)
                                other = tl.load(
                                    plane + pixel_b[:, None] * C + first + c, mask=inside[:, None] & deep, other=0
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
    named = prior[..., 0].clamp(0, len(b) - 1)
    for number, one in enumerate(b if batch else ()):
        norm, reference = patch_norms(one, patch, padding), channels_innermost(one, padding)
        near = min(window, max(reference.shape[1:3]))
        search(pixels, reference, 1 / (norm + eps), prior, named == number, near, (score, index), number, len(b), patch)
    return score / a_norm[..., None], index, named[..., None].repeat(1, 1, k)


def search(
    a: Tensor,  # [B, H, W, C], padded
    b: Tensor,
    scale: Tensor,  # [B, rows, columns]
    prior: Tensor,
    here: Tensor,  # bool [B, N]: whose prior names this reference
    window: int,
    answer: tuple[Tensor, Tensor],
    number: int,
    references: int,
    patch: int,
) -> None:
    """The matches that lie in one reference, some tiles of `a` after the other."""
    batch, a_height, a_width, channels = a.shape
    tiling = Tiling.of(a.shape, scale.shape, window, patch)
    boxes = boxes_of(prior, here, tiling)
    b_width, b_pixels = b.shape[2], b.shape[1] * b.shape[2]
    for first, count in tiling.parts(batch):
        place = first, count, tiling.tiles, tiling.across, tiling.capacity
        g = a.new_empty(batch, count, SIDE * SIDE, tiling.capacity, dtype=torch.float32)
        if tiling.capacity:
            box_products_kernel[(count * triton.cdiv(tiling.capacity, COLUMNS), batch)](
                a, b, boxes, g, *place, a_height, a_width, b_width, b_pixels, channels,
                PATCH=patch, PRECISION=precision(a), SIDE=SIDE, COLUMNS=COLUMNS, CHANNELS=CHANNELS, num_warps=8,
            )  # fmt: skip
        near_kernel[(count * tiling.step**2, batch)](
            a, b, g, boxes, scale, prior, *answer, number, references, window, *place,
            a_height, a_width, b_width, b_pixels, scale.shape[1], channels, answer[0].shape[2],
            PATCH=patch, SIDE=SIDE, STEP=tiling.step, CANDIDATES=CANDIDATES, DEPTH=DEPTH, num_warps=4,
        )  # fmt: skip


def channels_innermost(x: Tensor, padding: int) -> Tensor:
    """[B, C, H, W] -> [B, H + 2·padding, W + 2·padding, C]"""
    return F.pad(x, (padding,) * 4).permute(0, 2, 3, 1).contiguous()
