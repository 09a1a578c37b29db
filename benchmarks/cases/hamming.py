"""Hamming search: the paper's gallery, a million codes, one query and many."""

import torch
from torch import Tensor

from . import Case


def codes(rows: int, width: int) -> Tensor:
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8)


def topk(q: int, n: int, bits: int, k: int) -> Case:
    name = f"{q} queries, {n} codes of {bits} bits, k={k}"
    return Case("hamming_topk", name, lambda: (codes(q, bits // 8), codes(n, bits // 8), k), q * n, "pairs")


CASES = [
    topk(64, 26_500, 16, 1),
    topk(64, 26_500, 64, 4),
    topk(1, 1_000_000, 64, 4),
    topk(64, 1_000_000, 64, 4),
    topk(64, 200_000, 256, 4),
    Case(
        "hamming_distance",
        "64 queries, 100000 codes of 64 bits",
        lambda: (codes(64, 8), codes(100_000, 8)),
        6.4e6,
        "pairs",
    ),
    Case("pack_bits", "100000 vectors of 256 components", lambda: (torch.randn(100_000, 256),), 2.56e7, "components"),
]
