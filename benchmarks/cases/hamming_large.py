"""Hamming search at the sizes a GPU is bought for: ten thousand queries, a hundred million codes, a billion."""

from .hamming import topk

CASES = [
    topk(10_000, 1_000_000, 64, 4, on_request=True),
    topk(10_000, 1_000_000, 256, 4, on_request=True),
    topk(1, 100_000_000, 64, 4, on_request=True),
    topk(1, 100_000_000, 64, 100, on_request=True),
    topk(64, 100_000_000, 256, 4, on_request=True),  # 3.2 GB
    topk(64, 1_000_000_000, 64, 4, on_request=True),  # 8 GB
]
