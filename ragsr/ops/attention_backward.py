"""The gradient of separate_attention: every attention is computed again, and PyTorch differentiates it.

ReFIR itself is inference only, so there is no kernel of our own here. PyTorch's fused attention keeps one number per
query instead of the weights [N, L], and its backward works them out again block by block; blend and AdaIN are the
formulas of the plain form. The gradient is as deterministic as PyTorch's attention is on the device: on CUDA
`torch.use_deterministic_algorithms(True)` asks for that.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ragsr.ops._library import define
from ragsr.ops._operands import like
from ragsr.ops.attention import aligned_blend, attend, one_softmax, references


def separate_attention_backward_plain(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor | None,
    ref_lengths: Sequence[int] | None,
    scale: float | None,
    align: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, k_ref, v_ref and gate; 0 for what has no influence, of no element for a gate of None."""
    inputs = (q, k, v, k_ref, v_ref, q.new_empty(0) if gate is None else gate)
    with recording():
        leaves = q, k, v, k_ref, v_ref, gate = tuple(x.detach().requires_grad_() for x in inputs)
        if mode == "separate":
            own = attend(q, k, v, scale)
            others = (attend(q, *ref, scale) for ref in references(k_ref, v_ref, ref_lengths))
            out = aligned_blend(own, others, gate, align)
        else:
            out = one_softmax(q, k, v, k_ref, v_ref, scale, mode)
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype), materialize_grads=True)
    dq, dk, dv, dk_ref, dv_ref, dgate = (like(g, x) for g, x in zip(grads, inputs, strict=True))
    return dq, dk, dv, dk_ref, dv_ref, dgate


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """PyTorch records gradients here, also below a mode of the dispatcher (a FLOP counter), which switches that off."""
    with contextlib.ExitStack() as stack:
        for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def separate_attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, gate: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    gate = q.new_empty(0) if gate is None else gate
    return tuple(torch.empty_like(x) for x in (q, k, v, k_ref, v_ref, gate))


define(
    "separate_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor k_ref, Tensor v_ref, Tensor? gate, "
    "int[]? ref_lengths, float? scale, bool align, str mode) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    plain=separate_attention_backward_plain,
    fake=separate_attention_backward_fake,
)
