"""Patch matching where a match is expected: `correlation_topk` with a prior and a window.

For every position i of `a` the prior names a reference, a row and a column. The candidates are the positions of that
reference at most `window` rows and columns away; a window that reaches over the edge is moved inside, and cut where the
reference is smaller, so that it always has min(2·window + 1, rows) · min(2·window + 1, columns) candidates. Scores are
those of `ragsr.ops.match`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ragsr.ops._library import claim, define
from ragsr.ops.match import blocks, check_k, check_maps, grid_of, padded, patches_at, positions, topk

# ------------------------------------------------------------------ plain PyTorch


def correlation_topk_near_plain(
    a: Tensor,  # [B, C, H, W]
    b: Sequence[Tensor],  # [B, C, H_r, W_r]
    prior: Tensor,  # int64 [B, N, 3]: reference, row, column
    window: int,
    k: int,
    patch: int,
    padding: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # score, index, image [B, N, k]
    """Every position's window in every reference, then the one that its prior names."""
    image, row, column = prior.unbind(2)
    found = [search_windows(a, one, row, column, window, k, patch, padding, eps) for one in b]
    image = image.clamp(0, len(b) - 1)[..., None].repeat(1, 1, k)
    score, index = (torch.stack(parts).gather(0, image[None])[0] for parts in zip(*found, strict=True))
    return score, index, image


def search_windows(
    a: Tensor, b: Tensor, row: Tensor, column: Tensor, window: int, k: int, patch: int, padding: int, eps: float
) -> tuple[Tensor, Tensor]:
    a, b = padded(a, padding), padded(b, padding)
    rows, columns = grid_of(b, patch, 0)
    scores, indices = [], []
    for queries in blocks(a, patch, max(1, BLOCK // window_size(b, window, patch, 0))):
        y, x = span(row[:, queries], window, rows), span(column[:, queries], window, columns)
        candidates = (y[..., :, None] * columns + x[..., None, :]).flatten(2)  # [B, n, m], row-major
        a_i = patches_at(a, queries, patch)
        b_j = patches_at(b, candidates.flatten(1), patch).unflatten(2, candidates.shape[1:])
        score = (a_i[..., None] * b_j).sum(1) / (b_j.norm(dim=1) + eps)
        score, place = topk(score, k)
        scores.append(score / (a_i.norm(dim=1) + eps)[..., None])
        indices.append(candidates.gather(2, place))
    return torch.cat(scores, dim=1), torch.cat(indices, dim=1)


BLOCK = 1 << 12  # candidates whose patches are in memory at a time


def span(centre: Tensor, window: int, length: int) -> Tensor:
    """The window along one side: [..., candidates]."""
    first = (centre.clamp(0, length - 1) - window).clamp(0, max(0, length - 2 * window - 1))
    return first[..., None] + torch.arange(min(2 * window + 1, length), device=centre.device)


def window_size(b: Tensor, window: int, patch: int, padding: int) -> int:
    """Candidates in a window."""
    rows, columns = (min(2 * window + 1, length) for length in grid_of(b, patch, padding))
    return rows * columns


# ------------------------------------------------------------------ checks


def check_near(references: Sequence[Tensor], window: int, k: int, patch: int, padding: int) -> None:
    if window < 0:
        raise ValueError(f"correlation_topk: window is {window}; it is a number of positions from 0 on")
    check_k(k, min(window_size(b, window, patch, padding) for b in references))


# ------------------------------------------------------------------ fake, autograd and registration


def correlation_topk_near_fake(
    a: Tensor, b: Sequence[Tensor], prior: Tensor, window: int, k: int, patch: int, padding: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_maps(a, b, patch, padding, eps)
    check_near(b, window, k, patch, padding)
    shape = (a.shape[0], positions(a, patch, padding), k)
    score = a.new_empty(shape, dtype=a.dtype if a.dtype == torch.float64 else torch.float32)
    return score, a.new_empty(shape, dtype=torch.int64), a.new_empty(shape, dtype=torch.int64)


def correlation_topk_near_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    a, b, _, _, _, *ctx.settings = inputs
    ctx.save_for_backward(a, *b, *output)


def correlation_topk_near_backward(ctx, grad_score, grad_index, grad_image):  # type: ignore[no-untyped-def]
    """That of the search everywhere, for each reference with the matches that lie in it."""
    a, *b, score, index, image = ctx.saved_tensors
    grad_a, grad_b = torch.zeros_like(a), []
    for number, one in enumerate(b):
        here = image == number
        part_a, part_b = torch.ops.ragsr.correlation_topk_backward(
            torch.where(here, grad_score, 0), a, one, score, torch.where(here, index, 0), *ctx.settings
        )
        grad_a = grad_a + part_a
        grad_b.append(part_b)
    return grad_a, grad_b, None, None, None, None, None, None


define(
    "correlation_topk_near(Tensor a, Tensor[] b, Tensor prior, int window, int k, int patch, int padding, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    plain=correlation_topk_near_plain,
    fake=correlation_topk_near_fake,
    setup_context=correlation_topk_near_setup,
    backward=correlation_topk_near_backward,
)


def correlation_topk_near_triton(
    a: Tensor, b: Sequence[Tensor], prior: Tensor, window: int, k: int, patch: int, padding: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from ragsr.kernels import match_near  # here, so that importing the ops does not import Triton

    if a.dtype == torch.float64:  # the kernel sums in float32
        return correlation_topk_near_plain(a, b, prior, window, k, patch, padding, eps)
    return match_near.correlation_topk_near(a, b, prior, window, k, patch, padding, eps)


claim("correlation_topk_near", correlation_topk_near_triton)
