"""Texture transfer: bring over the patches that an index names, and average them where they overlap.

Source: TTSR, Sec. 3.2 (hard attention). Cut the features into cells of stride × stride pixels. The match of a cell q
brings the cells around its source r(q) with it, so with patch = (2m + 1)·stride an output cell g is the mean

    out(g) = 1/(2m + 1)² · Σ_t features(r(g + t) - t),        t in [-m, m]²

where a cell outside the grid or outside the features counts as zeros. This equals unfold, gather, fold and the
division, without ever storing the patches.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ragsr.ops._library import claim, define

# ------------------------------------------------------------------ public name


def gather_fold(
    features: Tensor,  # [B, C, H', W']
    index: Tensor,  # int64 [B, h, w]: row-major over the cells of features
    patch: int = 3,
    stride: int = 1,
) -> Tensor:  # [B, C, h·stride, w·stride]
    """Bring over the patches that `index` names and average them where they overlap: [B, C, h·stride, w·stride].

    H' and W' are multiples of `stride`, and `patch` is an odd multiple of it: TTSR's levels have (patch, stride) =
    (3, 1), (6, 2) and (12, 4). The index counts cells, 0 <= index < (H'/stride)·(W'/stride). Differentiable in
    `features`. Raises `ValueError` for a wrong shape, `TypeError` for a wrong dtype, `IndexError` for an index outside
    (but the Triton kernel takes it as zeros: to look at it would be to wait for the GPU).
    """
    check_gather_fold(features, index, patch, stride)
    return torch.ops.ragsr.gather_fold(features, index, patch, stride)


# ------------------------------------------------------------------ plain PyTorch


def gather_fold_plain(features: Tensor, index: Tensor, patch: int, stride: int) -> Tensor:
    cells, grid = _cells(features, stride), (features.shape[2] // stride, features.shape[3] // stride)
    if index.numel() and not 0 <= index.min() <= index.max() < grid[0] * grid[1]:
        raise IndexError(
            f"gather_fold: index runs from {index.min()} to {index.max()}; "
            f"it must lie in 0 to {grid[0] * grid[1] - 1}, the cells of the features"
        )
    total = cells.new_zeros(*cells.shape[:2], index.shape[1] * index.shape[2])
    for source, inside in _sources(index, grid, patch // stride):
        total += cells.gather(2, source[:, None].expand(-1, cells.shape[1], -1)) * inside[:, None]
    mean = (total / (patch // stride) ** 2).to(features.dtype)
    return F.pixel_shuffle(mean.unflatten(2, index.shape[1:]), stride)


def gather_fold_backward_plain(grad: Tensor, index: Tensor, height: int, width: int, patch: int, stride: int) -> Tensor:
    grid = (height // stride, width // stride)
    cells = _cells(grad, stride) / (patch // stride) ** 2
    total = cells.new_zeros(*cells.shape[:2], grid[0] * grid[1])
    for source, inside in _sources(index, grid, patch // stride):
        total.scatter_add_(2, source[:, None].expand(-1, cells.shape[1], -1), cells * inside[:, None])
    return F.pixel_shuffle(total.unflatten(2, grid), stride).to(grad.dtype)


def _cells(x: Tensor, stride: int) -> Tensor:
    """[B, C, H, W] -> [B, C·stride², cells], at least in float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.pixel_unshuffle(wide, stride).flatten(2)


def _sources(index: Tensor, grid: tuple[int, int], side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each t of [-m, m]²: the source cell r(g + t) - t of every output cell g [B, h·w], and whether it exists."""
    (rows, columns), (h, w), m = grid, index.shape[1:], side // 2
    shifted = F.pad(index, (m, m, m, m), value=-1)
    for ty in range(-m, m + 1):
        for tx in range(-m, m + 1):
            r = shifted[:, m + ty : m + ty + h, m + tx : m + tx + w].flatten(1)
            y, x = r // columns - ty, r % columns - tx
            inside = (r >= 0) & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
            yield torch.where(inside, y * columns + x, 0), inside


# ------------------------------------------------------------------ checks


def check_gather_fold(features: Tensor, index: Tensor, patch: int, stride: int) -> None:
    if not features.dtype.is_floating_point:
        raise TypeError(f"gather_fold: features are {features.dtype}; they must be floating point")
    if index.dtype != torch.int64:
        raise TypeError(f"gather_fold: index is {index.dtype}; it must be int64, as correlation_topk returns it")
    if features.ndim != 4 or index.ndim != 3 or features.shape[0] != index.shape[0]:
        raise ValueError(
            f"gather_fold: features are {tuple(features.shape)} and index {tuple(index.shape)}; "
            "they must be [batch, channels, height, width] and [batch, h, w] with one batch size"
        )
    if features.device != index.device:
        raise ValueError(
            f"gather_fold: features are on {features.device} and index on {index.device}; move them to one device"
        )
    if stride < 1 or patch < 1 or patch % (2 * stride) != stride:
        raise ValueError(
            f"gather_fold: patch {patch} and stride {stride}; patch must be an odd multiple of stride (3·stride)"
        )
    if features.shape[2] % stride or features.shape[3] % stride:
        raise ValueError(
            f"gather_fold: features are {features.shape[2]}×{features.shape[3]} pixels; "
            f"both sides must be multiples of stride {stride}: crop or pad them"
        )


# ------------------------------------------------------------------ fake, autograd and registration


def gather_fold_fake(features: Tensor, index: Tensor, patch: int, stride: int) -> Tensor:
    check_gather_fold(features, index, patch, stride)
    return features.new_empty(*features.shape[:2], index.shape[1] * stride, index.shape[2] * stride)


def gather_fold_backward_fake(grad: Tensor, index: Tensor, height: int, width: int, patch: int, stride: int) -> Tensor:
    return grad.new_empty(*grad.shape[:2], height, width)


def gather_fold_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    features, index, *ctx.settings = inputs
    ctx.size = features.shape[2:]
    ctx.save_for_backward(index)


def gather_fold_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (index,) = ctx.saved_tensors
    return torch.ops.ragsr.gather_fold_backward(grad, index, *ctx.size, *ctx.settings), None, None, None


define(
    "gather_fold(Tensor features, Tensor index, int patch, int stride) -> Tensor",
    plain=gather_fold_plain,
    fake=gather_fold_fake,
    setup_context=gather_fold_setup,
    backward=gather_fold_backward,
)
define(
    "gather_fold_backward(Tensor grad, Tensor index, SymInt height, SymInt width, int patch, int stride) -> Tensor",
    plain=gather_fold_backward_plain,
    fake=gather_fold_backward_fake,
)


def gather_fold_triton(features: Tensor, index: Tensor, patch: int, stride: int) -> Tensor:
    from ragsr.kernels import fold  # here, so that importing the ops does not import Triton

    if features.dtype == torch.float64:  # the kernel sums in float32
        return gather_fold_plain(features, index, patch, stride)
    return fold.gather_fold(features, index, patch, stride)


def gather_fold_backward_triton(
    grad: Tensor, index: Tensor, height: int, width: int, patch: int, stride: int
) -> Tensor:
    from ragsr.kernels import fold

    if grad.dtype == torch.float64:
        return gather_fold_backward_plain(grad, index, height, width, patch, stride)
    return fold.gather_fold_backward(grad, index, height, width, patch, stride)


claim("gather_fold", gather_fold_triton)
claim("gather_fold_backward", gather_fold_backward_triton)
