"""Hamming search: the paper's gallery, a million codes, one query and many, 16 to 1024 bits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
from limits import scan_limit
from torch import Tensor

from . import Case, Prepare, first_rows, only_on

PLAIN_PAIRS = 2 * 10**7  # what the plain form compares in a quarter of a second


def codes(rows: int, width: int) -> Tensor:
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8)


def same_distances(ours: tuple[Tensor, Tensor], theirs: Any) -> None:
    found = torch.as_tensor(theirs).cpu().int()
    assert torch.equal(ours[0][: len(found)].cpu(), found), "the distances differ"


def rivals(n: int, bits: int) -> dict[str, Prepare]:
    """The peers by name; slow ones answer as many queries as they can in half a second or so."""

    def some(peer: Callable[[Tensor, int], peers.Ask], pairs: float) -> Prepare:
        return first_rows(lambda queries, codes, k: partial(peer(codes, k), queries), max(1, int(pairs / n)))

    found = {
        "faiss-cpu": only_on("cpu", some(peers.faiss_codes, 5e8)),
        "usearch exact": only_on("cpu", some(peers.usearch_codes, 2e7)),
        "NumPy": only_on("cpu", some(peers.numpy_codes, 2e7)),
        "±1 matmul, topk": some(peers.matmul_codes, 1e8),
        "popcount, topk": only_on("cuda", some(peers.popcount_codes, 1e9)),
    }
    if n * bits > 1 << 32:  # ±1 would take more than 8 GiB, in half precision
        del found["±1 matmul, topk"]
    return found


def topk(q: int, n: int, bits: int, k: int, *, on_request: bool = False) -> Case:
    from_table = bits <= 16  # the answers of all possible queries: not always a scan, and no limit is known
    return Case(
        "hamming_topk",
        f"{q} queries, {n} codes of {bits} bits, k={k}",
        lambda: (codes(q, bits // 8), codes(n, bits // 8), k),
        q * n,
        "pairs",
        peers=rivals(n, bits),
        same=same_distances,
        limit=None if from_table else lambda device: scan_limit(device, q, n, bits // 8),
        few=max(1, PLAIN_PAIRS // n),
        on_request=on_request,
    )


CASES = [
    topk(
        80_000, 26_500, 16, 1
    ),  # the paper's Table 6, its table of answers kept; test_retrieval.py builds it every time
    topk(80_000, 26_500, 16, 4),
    topk(64, 26_500, 16, 1),  # its batches
    topk(64, 26_500, 16, 4),
    topk(64, 26_500, 64, 4),
    topk(4096, 26_500, 64, 4),
    topk(1, 1_000_000, 64, 4),
    topk(64, 1_000_000, 64, 4),
    topk(64, 1_000_000, 64, 100),
    topk(1, 1_000_000, 256, 4),
    topk(64, 1_000_000, 256, 4),
    topk(64, 200_000, 1024, 4),
    Case(
        "hamming_distance",
        "64 queries, 100000 codes of 64 bits",
        lambda: (codes(64, 8), codes(100_000, 8)),
        6.4e6,
        "pairs",
    ),
    Case("pack_bits", "100000 vectors of 256 components", lambda: (torch.randn(100_000, 256),), 2.56e7, "components"),
]
