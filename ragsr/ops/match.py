"""Patch matching between feature maps.

The op `correlation_topk` compares the patch around every position i of `a` with the patch around every position j of
`b`:

    s(i, j) = <a_i, b_j> / ((|a_i| + eps) (|b_j| + eps))

where a_i holds the C·patch² values under the patch. `padding=1, eps=1e-12` is the search of TTSR (Sec. 3.2: both
patches L2-normalised, zeros outside the map); `padding=0, eps=1e-5` is that of C2-Matching and DATSR. A patch of zeros
scores 0. The public function, which takes several references and windows too, is in `ragsr.ops.correlation`.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ragsr.ops._library import claim, define

BLOCK = 1 << 12  # positions per block: a block of scores takes BLOCK² · 4 bytes per batch row


# ------------------------------------------------------------------ plain PyTorch


def correlation_topk_plain(a: Tensor, b: Tensor, k: int, patch: int, padding: int, eps: float) -> tuple[Tensor, Tensor]:
    """Block after block with a running top-k. The norm of a_i changes no order, so it divides only the winners."""
    a, b = padded(a, padding), padded(b, padding)
    scores, indices = [], []
    for queries in blocks(a, patch):
        a_block = patches_at(a, queries, patch)
        score = a_block.new_empty(a.shape[0], len(queries), 0)
        index = queries.new_empty(a.shape[0], len(queries), 0)
        for candidates in blocks(b, patch):
            b_block = patches_at(b, candidates, patch)
            b_block = b_block / (b_block.norm(dim=1, keepdim=True) + eps)
            block_score, block_index = topk(a_block.mT @ b_block, min(k, len(candidates)))
            score, index = _merge(score, index, block_score, block_index + candidates[0], k)
        scores.append(score / (a_block.norm(dim=1) + eps)[..., None])
        indices.append(index)
    return torch.cat(scores, dim=1), torch.cat(indices, dim=1)


def correlation_topk_backward_plain(
    grad: Tensor, a: Tensor, b: Tensor, score: Tensor, index: Tensor, patch: int, padding: int, eps: float
) -> tuple[Tensor, Tensor]:
    """ds/da_i = b_j / (u v) - s a_i / (|a_i| u) with u = |a_i| + eps, v = |b_j| + eps; likewise with a, b exchanged."""
    a_padded, b_padded = padded(a, padding), padded(b, padding)
    grad_a, grad_b = torch.zeros_like(a_padded), torch.zeros_like(b_padded)
    for queries in blocks(a_padded, patch):
        a_i = patches_at(a_padded, queries, patch)
        a_norm = a_i.norm(dim=1, keepdim=True)
        for rank in range(index.shape[2]):
            matches = index[:, queries, rank]
            g, s = grad[:, None, queries, rank], score[:, None, queries, rank]
            b_j = patches_at(b_padded, matches, patch)
            b_norm = b_j.norm(dim=1, keepdim=True)
            shared = g / ((a_norm + eps) * (b_norm + eps))
            _add_patches(grad_a, queries, shared * b_j - g * s * _over(a_i, a_norm * (a_norm + eps)), patch)
            _add_patches(grad_b, matches, shared * a_i - g * s * _over(b_j, b_norm * (b_norm + eps)), patch)
    return _unpadded(grad_a, padding).to(a.dtype), _unpadded(grad_b, padding).to(b.dtype)


def topk(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k of the last dimension, the lowest index first among equals, which `torch.topk` does not promise."""
    values, indices = [], []
    for _ in range(k):
        index = score.argmax(dim=-1, keepdim=True)
        values.append(score.gather(-1, index))
        indices.append(index)
        if k > 1:
            score.scatter_(-1, index, -torch.inf)
    return torch.cat(values, dim=-1), torch.cat(indices, dim=-1)


def _merge(score: Tensor, index: Tensor, new_score: Tensor, new_index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Earlier candidates stand first and the sort is stable, so equal scores keep the lowest index."""
    score, order = torch.cat((score, new_score), dim=-1).sort(dim=-1, descending=True, stable=True)
    index = torch.cat((index, new_index), dim=-1).gather(-1, order)
    return score[..., :k], index[..., :k]


def padded(x: Tensor, padding: int) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return F.pad(wide, (padding,) * 4).contiguous()


def _unpadded(x: Tensor, padding: int) -> Tensor:
    return x[:, :, padding : x.shape[2] - padding, padding : x.shape[3] - padding]


def blocks(padded: Tensor, patch: int, size: int | None = None) -> Iterator[Tensor]:
    """The positions of all patches, row-major, in pieces of at most `size`, or BLOCK."""
    yield from torch.arange(positions(padded, patch, 0), device=padded.device).split(size or BLOCK)


def _pixels_under(positions: Tensor, width: int, patch: int) -> Tensor:
    """The pixels under the patches at `positions` [..., n]: flat indices [..., patch², n] into a map of this width."""
    columns = width - patch + 1
    corner = positions // columns * width + positions % columns
    step = torch.arange(patch, device=positions.device)
    inside = (step[:, None] * width + step).flatten()
    return corner.unsqueeze(-2) + inside[:, None]


def patches_at(padded: Tensor, positions: Tensor, patch: int) -> Tensor:
    """Patches at `positions` ([n], or [B, n] to differ over the batch) as columns: [B, C·patch², n]."""
    batch, channels = padded.shape[:2]
    pixels = _pixels_under(positions, padded.shape[3], patch)
    if positions.ndim == 1:
        found = padded.flatten(2).index_select(2, pixels.flatten())
    else:
        found = padded.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(-1, channels, -1))
    return found.reshape(batch, channels * patch * patch, positions.shape[-1])


def _add_patches(padded: Tensor, positions: Tensor, patches: Tensor, patch: int) -> None:
    """Add columns [B, C·patch², n] into the map where `patches_at` reads them: its adjoint, in place."""
    batch, channels = padded.shape[:2]
    pixels = _pixels_under(positions, padded.shape[3], patch).flatten(-2).expand(batch, -1)
    values = patches.reshape(batch, channels, pixels.shape[1])
    padded.flatten(2).scatter_add_(2, pixels[:, None].expand(-1, channels, -1), values)


def _over(x: Tensor, divisor: Tensor) -> Tensor:
    """x / divisor, and 0 where the divisor is 0: a norm has the subgradient 0 there."""
    return torch.where(divisor > 0, x / divisor, 0)


# ------------------------------------------------------------------ checks


def check_correlation_topk(a: Tensor, b: Tensor, k: int, patch: int, padding: int, eps: float) -> None:
    check_maps(a, [b], patch, padding, eps)
    check_k(k, positions(b, patch, padding))


def check_maps(a: Tensor, references: Sequence[Tensor], patch: int, padding: int, eps: float) -> None:
    if not references:
        raise ValueError("correlation_topk: b holds no reference; give at least one map")
    if patch < 1 or padding < 0 or eps < 0:
        raise ValueError(
            f"correlation_topk: patch {patch}, padding {padding}, eps {eps}; patch >= 1 and the others >= 0"
        )
    _check_map("a", a, patch, padding)
    for number, b in enumerate(references):
        name = "b" if len(references) == 1 else f"b[{number}]"
        _check_map(name, b, patch, padding)
        _check_pair(name, a, b)


def check_k(k: int, candidates: int) -> None:
    if k < 1 or k > candidates:
        raise ValueError(
            f"correlation_topk: k is {k} with {candidates} candidates; "
            "k must lie between 1 and the number of candidates"
        )


def _check_map(name: str, x: Tensor, patch: int, padding: int) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"correlation_topk: {name} is {x.dtype}; features are floating point")
    if x.ndim != 4:
        raise ValueError(
            f"correlation_topk: {name} has shape {tuple(x.shape)}; it must be [batch, channels, height, width]"
        )
    if min(x.shape[2:]) + 2 * padding < patch:
        raise ValueError(
            f"correlation_topk: {name} is {x.shape[2]}×{x.shape[3]} with padding {padding}; "
            f"a patch of {patch} does not fit: use a larger map, more padding or a smaller patch"
        )


def _check_pair(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(
            f"correlation_topk: a is {tuple(a.shape)} and {name} {tuple(b.shape)}; batch and channels must be equal"
        )
    if a.dtype != b.dtype or a.device != b.device:
        raise TypeError(
            f"correlation_topk: a is {a.dtype} on {a.device} and {name} {b.dtype} on {b.device}; "
            "convert one to the other's"
        )


def grid_of(x: Tensor, patch: int, padding: int) -> tuple[int, int]:
    """Rows and columns of the positions of patches."""
    return x.shape[2] + 2 * padding - patch + 1, x.shape[3] + 2 * padding - patch + 1


def positions(x: Tensor, patch: int, padding: int) -> int:
    rows, columns = grid_of(x, patch, padding)
    return rows * columns


# ------------------------------------------------------------------ fake, autograd and registration


def correlation_topk_fake(a: Tensor, b: Tensor, k: int, patch: int, padding: int, eps: float) -> tuple[Tensor, Tensor]:
    check_correlation_topk(a, b, k, patch, padding, eps)
    shape = (a.shape[0], positions(a, patch, padding), k)
    score_dtype = a.dtype if a.dtype == torch.float64 else torch.float32
    return a.new_empty(shape, dtype=score_dtype), a.new_empty(shape, dtype=torch.int64)


def correlation_topk_backward_fake(
    grad: Tensor, a: Tensor, b: Tensor, score: Tensor, index: Tensor, patch: int, padding: int, eps: float
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


def correlation_topk_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    a, b, _, *ctx.settings = inputs
    ctx.save_for_backward(a, b, *output)


def correlation_topk_backward(ctx, grad_score, grad_index):  # type: ignore[no-untyped-def]
    a, b, score, index = ctx.saved_tensors
    grad_a, grad_b = torch.ops.ragsr.correlation_topk_backward(grad_score, a, b, score, index, *ctx.settings)
    return grad_a, grad_b, None, None, None, None


define(
    "correlation_topk(Tensor a, Tensor b, int k, int patch, int padding, float eps) -> (Tensor, Tensor)",
    plain=correlation_topk_plain,
    fake=correlation_topk_fake,
    setup_context=correlation_topk_setup,
    backward=correlation_topk_backward,
)
define(
    "correlation_topk_backward(Tensor grad, Tensor a, Tensor b, Tensor score, Tensor index, "
    "int patch, int padding, float eps) -> (Tensor, Tensor)",
    plain=correlation_topk_backward_plain,
    fake=correlation_topk_backward_fake,
)


def correlation_topk_triton(
    a: Tensor, b: Tensor, k: int, patch: int, padding: int, eps: float
) -> tuple[Tensor, Tensor]:
    from ragsr.kernels import match  # here, so that importing the ops does not import Triton

    if a.dtype == torch.float64:  # Triton's products are float32
        return correlation_topk_plain(a, b, k, patch, padding, eps)
    return match.correlation_topk(a, b, k, patch, padding, eps)


claim("correlation_topk", correlation_topk_triton)
