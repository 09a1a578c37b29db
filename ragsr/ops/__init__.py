from ragsr.ops.fold import gather_fold
from ragsr.ops.hamming import hamming_distance, hamming_topk, pack_bits
from ragsr.ops.match import correlation_topk

__all__ = ["correlation_topk", "gather_fold", "hamming_distance", "hamming_topk", "pack_bits"]
