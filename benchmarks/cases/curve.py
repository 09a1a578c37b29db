"""Time against the number of codes, for the picture in docs/retrieval.md."""

from .hamming import topk

CASES = [
    topk(64, n, bits, 4, on_request=True)
    for bits in (16, 64)
    for n in (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)
]
