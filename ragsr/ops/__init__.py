"""The ops: drop-in functions of tensors that need PyTorch alone.

Each is defined by its plain PyTorch form in the module of its family, and owned on a device by a faster kernel where
there is one; `ragsr env` shows by which. `RAGSR_PLAIN=1` takes the plain forms.
"""

from ragsr.ops import attention_backward  # noqa: F401  defines the op that the next one's autograd calls
from ragsr.ops.attention import separate_attention
from ragsr.ops.attention_affine import fold_into_linear, separate_attention_affine
from ragsr.ops.correlation import correlation_topk
from ragsr.ops.cosine import cosine_topk
from ragsr.ops.fold import gather_fold
from ragsr.ops.gate import adain, cosine_gate, gated_blend
from ragsr.ops.hamming import hamming_distance, hamming_topk, pack_bits
from ragsr.ops.sft import group_norm_sft, sft

__all__ = [
    "adain",
    "correlation_topk",
    "cosine_gate",
    "cosine_topk",
    "fold_into_linear",
    "gated_blend",
    "gather_fold",
    "group_norm_sft",
    "hamming_distance",
    "hamming_topk",
    "pack_bits",
    "separate_attention",
    "separate_attention_affine",
    "sft",
]
