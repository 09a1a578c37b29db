"""Float matching: the k references of highest cosine similarity, streamed.

    cos(a, b) = ⟨â, b̂⟩,   x̂ = x / (‖x‖ + 1e-8)

The scores are float32 and the order is (score downwards, index upwards), so ties go to the lowest index. A zero vector
has similarity 0 to everything. The [Q, N] matrix is never stored.

Source: the retrieval of ReFIR (VGG16 and CLIP features), and iRAG's comparison with float features (Table 6).
"""

import torch
from torch import Tensor

from ragsr.ops._library import define
from ragsr.ops._operands import check_operands, wide
from ragsr.ops.hamming import check_k

EPS = 1e-8  # added to the norm
ROWS, COLUMNS = 256, 8192  # queries and references that the plain form compares at once: 100 MB of working memory

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


def cosine_topk_plain(queries: Tensor, refs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep the k largest keys, block after block: a key holds score and index in one integer, so no two are equal."""
    indices = torch.arange(refs.shape[0], device=refs.device)
    nearest = [queries.new_empty(0, k, dtype=torch.int64)]
    for rows in queries.split(ROWS):
        best = queries.new_empty(len(rows), 0, dtype=torch.int64)
        for columns, index in zip(refs.split(COLUMNS), indices.split(COLUMNS), strict=True):
            best = torch.cat((best, order_keys(unit(rows) @ unit(columns).T, index)), dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        nearest.append(best)
    return read_keys(torch.cat(nearest))


def unit(x: Tensor) -> Tensor:
    """x̂ = x / (‖x‖ + 1e-8) over the last dimension, in float32 (float64 for float64)."""
    x = wide(x)
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + EPS)


def order_keys(score: Tensor, index: Tensor) -> Tensor:
    """int64 keys in the order of (score, -index): the score's bits above, the complement of the index below."""
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one score
    return (ascending(bits).long() << 32) | (0xFFFFFFFF - index)


def read_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    return ascending((keys >> 32).int()).view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def ascending(bits: Tensor) -> Tensor:
    """The bits of floats as integers in the floats' order, and back: negative floats count downwards, so turn them."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


# ------------------------------------------------------------------ checks, fake and registration


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


define(
    "cosine_topk(Tensor queries, Tensor refs, int k) -> (Tensor, Tensor)",
    plain=cosine_topk_plain,
    fake=cosine_topk_fake,
)
