"""Separate attention and its gate at the sizes of real decoders, beside what one would write without us.

A decoder self-attention sees [target, source] twice (with and without the prompt): 2 rows of N tokens, H heads. Work is
counted in FLOP, 4 · D per query, key and head; the limit is what large matrix products reach on the device. A gate has
to read its features once.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from limits import product_limit, read_limit
from torch import Tensor
from torch.nn import attention as backends
from torch.nn import functional as F

from ragsr.ops.gate import adain_plain

from . import Case

Run = Callable[[], Any]

# ------------------------------------------------------------------ peers of separate_attention


def epilogue(own: Tensor, other: Tensor, gate: Tensor) -> Tensor:
    """Blend and AdaIN as PyTorch operations, one after the other."""
    share = gate[:, 0, None, :, None]
    return adain_plain(((1 - share) * own + share * other), own.float()).to(own.dtype)


def two_calls(finish: Callable[[Tensor, Tensor, Tensor], Tensor], backend: Any = None) -> Callable[..., Any]:
    """PyTorch's attention twice, then the epilogue; on a given backend, or on the one PyTorch chooses."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, gate: Tensor, *_: Any) -> Run:
        def run() -> Tensor:
            with backends.sdpa_kernel(backend) if backend else contextlib.nullcontext():
                own = F.scaled_dot_product_attention(q, k, v)
                return finish(own, F.scaled_dot_product_attention(q, k_ref, v_ref), gate)

        return tried(run)

    return prepare


def tried(run: Run) -> Run:
    """Warm, or left out: a backend may not exist on this device or for this shape."""
    try:
        run()
    except RuntimeError as error:
        raise ImportError(str(error)) from error
    return run


def compiled(*args: Any, backend: Any = None) -> Run:
    return two_calls(torch.compile(epilogue), backend)(*args)


def original(q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, gate: Tensor, *_: Any) -> Run:
    """As the public code does: copies of the stacked [target, source] tensors, and the gate laid out for every head."""
    stack = [torch.stack(pair, 1).flatten(0, 1) for pair in ((q, q), (k, k_ref), (v, v_ref))]

    def run() -> Tensor:
        (q1, _), (k1, k2), (v1, v2) = ((x[0::2].contiguous(), x[1::2].contiguous()) for x in stack)
        own, other = F.scaled_dot_product_attention(q1, k1, v1), F.scaled_dot_product_attention(q1, k2, v2)
        share = gate[:, 0, None, :, None].expand_as(own).contiguous().to(own.dtype)
        fused = (1 - share) * own + share * other
        mean, std = fused.mean(2, keepdim=True), (fused.var(2, keepdim=True) + 1e-5).sqrt()
        return (fused - mean) / std * (own.var(2, keepdim=True) + 1e-5).sqrt() + own.mean(2, keepdim=True)

    return run


def flex(q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, gate: Tensor, *_: Any) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    if not q.is_cuda:
        raise ImportError("FlexAttention is measured on GPUs")
    attend: Any = torch.compile(flex_attention)
    finish = torch.compile(epilogue)
    return tried(lambda: finish(attend(q, k, v), attend(q, k_ref, v_ref), gate))


def xformers(q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, gate: Tensor, *_: Any) -> Run:
    from xformers.ops import memory_efficient_attention

    q, k, v, k_ref, v_ref = (x.transpose(1, 2) for x in (q, k, v, k_ref, v_ref))

    def run() -> Tensor:
        own, other = memory_efficient_attention(q, k, v), memory_efficient_attention(q, k_ref, v_ref)
        return epilogue(own.transpose(1, 2), other.transpose(1, 2), gate)

    return tried(run)


def owner(name: str) -> Callable[..., Any]:
    """Our own two ways, whichever the table takes."""

    def prepare(*args: Any) -> Run:
        if not args[0].is_cuda:
            raise ImportError("our kernels run on GPUs")
        from ragsr.kernels import attention, composite, moments

        blend = {"fused": attention.fused_blend, "composite": composite.composite_blend}[name]
        scale, length = args[0].shape[3] ** -0.5, args[3].shape[2]

        def run() -> Tensor:
            found = blend(*args[:6], [length], scale, statistics=True)
            return moments.align(found.out, moments.affine_of(found), found.out)

        return tried(run)

    return prepare


PEERS = {
    "2 SDPA, eager epilogue": two_calls(epilogue),
    "2 SDPA, compiled epilogue": compiled,
    "2 SDPA flash, eager": two_calls(epilogue, backends.SDPBackend.FLASH_ATTENTION),
    "2 SDPA cuDNN, eager": two_calls(epilogue, backends.SDPBackend.CUDNN_ATTENTION),
    "2 SDPA efficient, eager": two_calls(epilogue, backends.SDPBackend.EFFICIENT_ATTENTION),
    "2 SDPA cuDNN, compiled": lambda *args: two_calls(torch.compile(epilogue), backends.SDPBackend.CUDNN_ATTENTION)(
        *args
    ),
    "FlexAttention, compiled": flex,
    "xformers, eager": xformers,
    "the original's way": original,
    "our fused kernel": owner("fused"),
    "our composite": owner("composite"),
}

# ------------------------------------------------------------------ the gate's peer


def materialised(h: Tensor, h_ref: Tensor, *_: Any) -> Run:
    """The N x M matrix of cosines, then its row means."""

    def run() -> Tensor:
        a, b = (x / (x.norm(dim=2, keepdim=True) + 1e-8) for x in (h, h_ref))
        mean = (a @ b.transpose(1, 2)).mean(2)
        low, high = mean.aminmax(dim=1, keepdim=True)
        return (mean - low) / (high - low + 1e-8)

    return tried(run)


# ------------------------------------------------------------------ cases


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def attention(batch: int, heads: int, tokens: int, head_dim: int, references: int = 1) -> Case:
    def make() -> tuple[Any, ...]:
        shape = (batch, tokens, heads, head_dim)  # heads inside the channels, as a layer has them
        q, k, v = (torch.randn(shape, dtype=dtype()).transpose(1, 2) for _ in range(3))
        many = (batch, tokens * references, heads, head_dim)
        k_ref, v_ref = (torch.randn(many, dtype=dtype()).transpose(1, 2) for _ in range(2))
        gate = torch.rand(batch, references, tokens) / references
        return q, k, v, k_ref, v_ref, gate, [tokens] * references

    name = f"{batch} x {heads} heads of {head_dim}, {tokens} tokens" + (f", {references} references" * (references > 1))
    work = 4.0 * head_dim * tokens * tokens * (1 + references) * batch * heads
    peers = PEERS if references == 1 else {}
    return Case(
        "separate_attention", name, make, work, "FLOP", peers, limit=lambda device: product_limit(device, work, dtype())
    )


def gate(batch: int, tokens: int, channels: int) -> Case:
    def make() -> tuple[Any, ...]:
        maps = (torch.randn(batch, channels, tokens, dtype=dtype()) + 0.5 for _ in range(2))  # [B, C, H · W]
        return tuple(x.transpose(1, 2) for x in maps)

    name = f"{batch} x {tokens} tokens of {channels} channels"
    features = 2 * batch * tokens * channels
    return Case(
        *("cosine_gate", name, make, float(features), "features", {"the matrix": materialised}),
        limit=lambda device: read_limit(device, features * dtype().itemsize),
    )


ON_GPU = [
    attention(2, 20, 256, 64),
    attention(2, 20, 1024, 64),
    attention(2, 10, 4096, 64),
    attention(1, 5, 16384, 64),  # one row: the comparison in float64 stores the scores
    attention(2, 8, 4096, 40),
    attention(2, 8, 1024, 80),
    attention(2, 8, 1024, 160),
    attention(2, 8, 4096, 128),
    attention(2, 10, 4096, 64, references=4),
    gate(2, 4096, 640),
    gate(2, 16384, 640),
    gate(1, 65536, 320),
]
ON_CPU = [attention(2, 5, 1024, 64), attention(2, 8, 1024, 40), gate(1, 4096, 320)]
CASES = ON_GPU if torch.cuda.is_available() else ON_CPU
