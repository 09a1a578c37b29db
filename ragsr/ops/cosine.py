"""Float matching: the k references of highest cosine similarity, streamed.

    cos(a, b) = ⟨â, b̂⟩,   x̂ = x / (‖x‖ + 1e-8)

The scores are float32 and the order is (score downwards, index upwards), so ties go to the lowest index. A zero vector
has similarity 0 to everything; a similarity that is NaN ranks below every number. The [Q, N] matrix is never stored:

    rows of queries ──▶ unit_rows ──┐
                                    ├──▶ scores [rows, columns] ──▶ keep_best ──▶ keys [rows, k]
    columns of refs ──▶ unit_rows ──┘                                  ▲   next block   │
                                                                       └────────────────┘

The product is PyTorch's own; kernels do the two steps around it.

Source: the retrieval of ReFIR (VGG16 and CLIP features), and iRAG's comparison with float features (Table 6).
"""

import platform
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ragsr.ops._library import build_on, claim, define
from ragsr.ops._operands import check_operands, wide
from ragsr.ops.hamming import check_k

EPS = 1e-8  # added to the norm
ROWS, COLUMNS = 256, 8192  # queries and references that the plain form compares at once: 100 MB of working memory
NEGATIVE_NAN = -0x400000  # its bits as an integer: in the order of the keys it lies below -inf
OPS = torch.ops.ragsr
ONEDNN = platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")

# ------------------------------------------------------------------ public name


def cosine_topk(
    queries: Tensor,  # [Q, D]
    refs: Tensor,  # [N, D]
    k: int,
) -> tuple[Tensor, Tensor]:  # float32 [Q, k], int64 [Q, k]
    """The k references most similar to every query, best first: cosines float32 [Q, k], indices int64 [Q, k].

    1 <= k <= N; any floating dtype, computed in float32 (float64 for float64). Scores carry no gradient. Raises
    `ValueError` for a wrong shape or k, `TypeError` for a wrong dtype.
    """
    check_cosine_topk(queries, refs, k)
    score, index = torch.ops.ragsr.cosine_topk(queries.detach(), refs.detach(), k)
    return score, index


# ------------------------------------------------------------------ plain PyTorch


class Steps(NamedTuple):
    """How many queries and references are compared at once, and what does each step."""

    rows: int
    columns: int
    unit_rows: Callable[[Tensor], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]
    keep_best: Callable[[Tensor, Tensor, int, int], Tensor]


def cosine_topk_plain(queries: Tensor, refs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return stream(queries, refs, k, Steps(ROWS, COLUMNS, unit, product, keep_best_plain))


def stream(queries: Tensor, refs: Tensor, k: int, steps: Steps) -> tuple[Tensor, Tensor]:
    """Every block of queries meets every block of references and takes along the best so far."""
    nearest = [queries.new_empty(0, k, dtype=torch.int64)]
    for rows in queries.split(steps.rows):
        directions = steps.unit_rows(rows)
        best = queries.new_empty(len(rows), 0, dtype=torch.int64)
        for first in range(0, len(refs), steps.columns):
            scores = steps.product(directions, steps.unit_rows(refs[first : first + steps.columns]))
            best = steps.keep_best(best, scores, first, k)
        nearest.append(best)
    return read_keys(torch.cat(nearest))


def unit(x: Tensor) -> Tensor:
    """x̂ = x / (‖x‖ + 1e-8) over the last dimension, in float32 (float64 for float64)."""
    x = wide(x)
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + EPS)


def product(
    queries: Tensor,  # [q, D]
    refs: Tensor,  # [n, D]
) -> Tensor:  # [q, n]
    return queries @ refs.T


def keep_best_plain(
    best: Tensor,  # int64 [q, kept], kept <= k: the best keys so far, best first
    scores: Tensor,  # [q, n], of references first … first + n - 1
    first: int,
    k: int,
) -> Tensor:  # int64 [q, min(k, kept + n)]
    """The k largest keys: a key holds score and index in one integer, so no two are equal."""
    index = torch.arange(first, first + scores.shape[1], device=scores.device)
    keys = torch.cat((best, order_keys(scores, index)), dim=1)
    return keys.topk(min(k, keys.shape[1]), dim=1).values


def order_keys(score: Tensor, index: Tensor) -> Tensor:
    """int64 keys in the order of (score, -index): the score's bits above, the complement of the index below."""
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one score
    bits = bits.where(score == score, NEGATIVE_NAN)
    return (ascending(bits).long() << 32) | (0xFFFFFFFF - index)


def read_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    return ascending((keys >> 32).int()).view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def ascending(bits: Tensor) -> Tensor:
    """The bits of floats as integers in the floats' order, and back: negative floats count downwards, so turn them."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


# ------------------------------------------------------------------ around PyTorch's product


def cosine_topk_cpu(queries: Tensor, refs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Blocks of 64 MB of queries, 16 MB of references and 16 MB of scores at most, for k up to some thousands."""
    rows = max(1, min(4096, len(queries), max(256, (1 << 24) // max(1, refs.shape[1])), (1 << 24) // k))
    columns = max(1024, min(4096, (1 << 22) // rows, (1 << 22) // max(1, refs.shape[1])))
    return stream(queries, refs, k, Steps(rows, columns, OPS.unit_rows, product_cpu, OPS.keep_best))


def product_cpu(queries: Tensor, refs: Tensor) -> Tensor:
    """oneDNN's product is 10 to 20 % faster than BLAS' on x86; PyTorch has it for float32 under this name alone."""
    if ONEDNN and queries.dtype == torch.float32 and queries.shape[1]:
        return torch.ops.mkldnn._linear_pointwise(queries, refs, None, "none", [], "")
    return product(queries, refs)


def cosine_topk_cuda(queries: Tensor, refs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Blocks large enough that a launch costs nothing: 256 MB of scores at most."""
    rows = max(1, min(8192, (1 << 24) // k))
    return stream(queries, refs, k, Steps(rows, 8192, unit, product, OPS.keep_best))


# ------------------------------------------------------------------ checks, fakes and registration


def check_cosine_topk(queries: Tensor, refs: Tensor, k: int) -> None:
    check_operands("cosine_topk", queries=queries, refs=refs)
    if queries.ndim != 2 or refs.ndim != 2 or queries.shape[1] != refs.shape[1]:
        raise ValueError(
            f"cosine_topk: queries have shape {tuple(queries.shape)} and refs {tuple(refs.shape)}; "
            "they must be [rows, features] with equally many features"
        )
    check_k("cosine_topk", k, refs.shape[0])


def cosine_topk_fake(queries: Tensor, refs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_cosine_topk(queries, refs, k)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def unit_rows_fake(x: Tensor) -> Tensor:
    return wide(x).new_empty(x.shape)


def keep_best_fake(best: Tensor, scores: Tensor, first: int, k: int) -> Tensor:
    return best.new_empty(best.shape[0], min(k, best.shape[1] + scores.shape[1]))


define(
    "cosine_topk(Tensor queries, Tensor refs, int k) -> (Tensor, Tensor)",
    plain=cosine_topk_plain,
    fake=cosine_topk_fake,
)
define("unit_rows(Tensor x) -> Tensor", plain=unit, fake=unit_rows_fake)
define("keep_best(Tensor best, Tensor scores, int first, int k) -> Tensor", plain=keep_best_plain, fake=keep_best_fake)


def keep_best_triton(best: Tensor, scores: Tensor, first: int, k: int) -> Tensor:
    from ragsr.kernels import cosine  # here, so that importing the ops does not import Triton

    return cosine.keep_best(best, scores, first, k)


claim("keep_best", keep_best_triton)
build_on("keep_best", "cosine_topk", "CPU", cosine_topk_cpu)
build_on("keep_best", "cosine_topk", "CUDA", cosine_topk_cuda)
