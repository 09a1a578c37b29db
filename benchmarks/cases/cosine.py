"""Float matching: VGG-sized features of the paper's Table 6, and the sizes image embeddings have today."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ragsr.ops.cosine import cosine_topk_plain

from . import Case


def faiss_flat(queries: Tensor, refs: Tensor, k: int) -> Callable[[], Any]:
    """Rows of length one, made beforehand: faiss knows the inner product alone."""
    import faiss

    index = faiss.IndexFlatIP(refs.shape[1])
    index.add(F.normalize(refs, dim=1).cpu().numpy())
    return lambda: index.search(F.normalize(queries, dim=1).cpu().numpy(), k)


def mm_topk(queries: Tensor, refs: Tensor, k: int) -> Callable[[], Any]:
    """The way of a few lines: the whole matrix."""
    return lambda: (F.normalize(queries, dim=1) @ F.normalize(refs, dim=1).T).topk(k, dim=1)


def check_topk(queries: Tensor, refs: Tensor, k: int) -> None:
    """Scores are those of the plain form in float64, and of the rows pointed at; rounding may exchange neighbours."""
    score, index = torch.ops.ragsr.cosine_topk(queries, refs, k)
    wanted, _ = cosine_topk_plain(queries.double(), refs.double(), k)
    torch.testing.assert_close(score, wanted, rtol=0, atol=1e-5)
    for row, best, places in zip(queries, score, index, strict=True):
        pointed_at = F.cosine_similarity(row[None].double(), refs[places].double())
        torch.testing.assert_close(best.double(), pointed_at, rtol=0, atol=1e-5)


def topk(q: int, n: int, features: int, k: int) -> Case:
    return Case(
        "cosine_topk",
        f"{q} queries, {n} x {features} features, k={k}",
        lambda: (torch.randn(q, features), torch.randn(n, features), k),
        2 * q * n * features,
        "FLOP",
        {"faiss IndexFlatIP": faiss_flat, "torch mm + topk": mm_topk},
        check_topk,
    )


CASES = [
    topk(1024, 6_625, 4096, 4),  # a quarter of the paper's gallery; its 80,000 queries would take two minutes
    topk(2048, 26_500, 512, 1),
    topk(2048, 26_500, 512, 4),
    topk(2048, 26_500, 512, 100),
    topk(64, 26_500, 512, 4),
]
