"""Attention that looks at an image and its references, each with a soft-max of its own.

    O_own = Attn(Q, K, V),   O_r = Attn(Q, K_ref,r, V_ref,r),   Attn(Q, K, V) = softmax(scale · Q Kᵀ) V
    O     = (1 − Σ_r g_r) · O_own + Σ_r g_r · O_r
    out   = AdaIN(O, O_own)                                        per batch row, head and channel, over the tokens

The gate g_r already holds strength, layer weight, similarity and the reference's share (s · w · M_r · a_r). Where the
gate of a batch row is zero throughout, AdaIN would return O_own up to rounding; there the result is O_own itself, bit
for bit, so a reference that is switched off changes nothing. That choice is made on the device.

Two more modes serve comparison, both without gate and AdaIN: "concat" is one soft-max over own and reference keys,
"replace" attends to the reference keys alone.

Source: ReFIR, Eq. 1 to 3. Its Eq. 4 (several references) exchanges O_intra and O_inter against Eq. 2 and names a single
O_inter; here every reference has its own, in the roles of Eq. 2.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ragsr.ops._library import build_on, claim, define
from ragsr.ops._operands import check_gate, check_operands, like, reference_lengths, wide
from ragsr.ops.gate import adain_gradients, adain_plain

MODES = ("separate", "concat", "replace")
BLOCK = 1 << 22  # attention weights that the backward holds at once
DEBUG = os.environ.get("RAGSR_DEBUG", "0") not in ("", "0")  # also look at values, which waits for the device

# ------------------------------------------------------------------ public name


def separate_attention(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, L, D], L = N in self-attention
    v: Tensor,  # [B, H, L, D]
    k_ref: Tensor,  # [B, H, ΣM, D]
    v_ref: Tensor,  # [B, H, ΣM, D]
    gate: Tensor | None,  # [B, R, N]
    ref_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    align: bool = True,
    mode: str = "separate",
) -> Tensor:  # [B, H, N, D]
    """Blend the attention to an image's own tokens with that to its references: [B, H, N, D] in the layout of `q`.

    `ref_lengths` [M_1, …, M_R] splits the tokens of `k_ref` into references (default: one). No reference (0 tokens, a
    gate [B, 0, N]) is plain attention. `scale` multiplies the scores (default D^-½); `align=False` leaves AdaIN out.
    `mode` is "separate", "concat" or "replace"; the latter two ignore the gate, which may then be None.

    The gate lies in [0, 1], float32 or of q's dtype; `RAGSR_DEBUG=1` checks its values and looks for NaN. Tensors may
    have any strides, also 0 to share one reference among a batch. Blended and aligned in float32 for the half types.
    Differentiable in all tensors; the gradient is that of the formula, also where the gate is zero.

    Raises `ValueError` for wrong shapes, lengths or modes, `TypeError` for wrong dtypes.
    """
    check_separate_attention(q, k, v, k_ref, v_ref, gate, ref_lengths, mode)
    if DEBUG and not torch.compiler.is_compiling():
        check_values(q=q, k=k, v=v, k_ref=k_ref, v_ref=v_ref, gate=gate)
    return torch.ops.ragsr.separate_attention(q, k, v, k_ref, v_ref, gate, ref_lengths, scale, align, mode)


# ------------------------------------------------------------------ plain PyTorch


def separate_attention_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor | None,
    ref_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    align: bool = True,
    mode: str = "separate",
) -> Tensor:
    if mode == "concat":
        return like(attend(q, torch.cat((k, k_ref), dim=2), torch.cat((v, v_ref), dim=2), scale), q)
    if mode == "replace":
        return like(attend(q, k_ref, v_ref, scale), q)
    assert gate is not None  # checked
    own = attend(q, k, v, scale)
    others = (attend(q, *ref, scale) for ref in references(k_ref, v_ref, ref_lengths))  # one at a time
    return blend_attention_plain(q, own, others, gate, align)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """softmax(scale · q kᵀ) v. PyTorch's fused attention, which does not store the weights [N, L], needs dense rows."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def references(k_ref: Tensor, v_ref: Tensor, ref_lengths: Sequence[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each reference: R views [B, H, M_r, D]."""
    lengths = reference_lengths("separate_attention", k_ref.shape[2], ref_lengths)
    return zip(k_ref.split(lengths, dim=2), v_ref.split(lengths, dim=2), strict=True)


def blend_attention_plain(pattern: Tensor, own: Tensor, others: Iterable[Tensor], gate: Tensor, align: bool) -> Tensor:
    """What follows the matrix products: blend, AdaIN and the bits of `own` where the gate of a batch row is zero."""
    fused = blend(own, others, gate)
    if align:
        fused = adain_plain(fused, wide(own))
    used = (gate != 0).flatten(1).any(dim=1)  # [B]
    return like(torch.where(used[:, None, None, None], fused.to(own.dtype), own), pattern)


def blend(own: Tensor, others: Iterable[Tensor], gate: Tensor) -> Tensor:
    """(1 − Σ_r g_r) · O_own + Σ_r g_r · O_r in float32 (float64 for float64): [B, H, N, D]."""
    weights = wide(gate)[:, :, None, :, None]  # [B, R, 1, N, 1]
    fused = (1 - weights.sum(dim=1)) * wide(own)
    for weight, other in zip(weights.unbind(1), others, strict=True):
        fused = fused + weight * wide(other)
    return fused


# ------------------------------------------------------------------ around PyTorch's fused attention


def separate_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor | None,
    ref_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    align: bool = True,
    mode: str = "separate",
) -> Tensor:
    """PyTorch's attention for the matrix part, one kernel for all that follows."""
    if mode != "separate" or gate is None:
        return separate_attention_plain(q, k, v, k_ref, v_ref, gate, ref_lengths, scale, align, mode)
    own = attend(q, k, v, scale)
    others = [attend(q, *ref, scale) for ref in references(k_ref, v_ref, ref_lengths)]
    return torch.ops.ragsr.blend_attention(q, own, others, gate, align)


# ------------------------------------------------------------------ backward, plain PyTorch


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
    """Gradients of q, k, v, k_ref, v_ref and gate, in float32 for the half types, from recomputed attention.

    A gate that is absent or unused gets zeros of its own size (of size 0 where it is absent).
    """
    inputs = (q, k, v, k_ref, v_ref, q.new_empty(0) if gate is None else gate)
    grad, q, k, v, k_ref, v_ref, gate = (wide(x) for x in (grad, *inputs))
    if mode == "concat":
        both = torch.cat((k, k_ref), dim=2), torch.cat((v, v_ref), dim=2)
        grad_q, grad_k, grad_v = attend_backward(grad, q, *both, scale)
        sizes = [k.shape[2], k_ref.shape[2]]
        (own_k, ref_k), (own_v, ref_v) = grad_k.split(sizes, dim=2), grad_v.split(sizes, dim=2)
        grads = (grad_q, own_k, own_v, ref_k, ref_v, torch.zeros_like(gate))
    elif mode == "replace":
        grad_q, ref_k, ref_v = attend_backward(grad, q, k_ref, v_ref, scale)
        grads = (grad_q, torch.zeros_like(k), torch.zeros_like(v), ref_k, ref_v, torch.zeros_like(gate))
    else:
        grads = blend_backward(grad, q, k, v, list(references(k_ref, v_ref, ref_lengths)), gate, scale, align)
    dq, dk, dv, dk_ref, dv_ref, dgate = (like(g, x) for g, x in zip(grads, inputs, strict=True))
    return dq, dk, dv, dk_ref, dv_ref, dgate


def blend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    refs: list[tuple[Tensor, Tensor]],
    gate: Tensor,
    scale: float | None,
    align: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Back through AdaIN, then through the blend into each attention."""
    own = attend(q, k, v, scale)
    others = [attend(q, *ref, scale) for ref in refs]
    weights = gate[:, :, None, :, None]  # [B, R, 1, N, 1]
    grad_own = torch.zeros_like(own)
    if align:
        grad, grad_own = adain_gradients(grad, blend(own, others, gate), own)
    grad_q, grad_k, grad_v = attend_backward(grad_own + (1 - weights.sum(dim=1)) * grad, q, k, v, scale)
    grad_gate = torch.empty_like(gate)
    grad_refs = [(k[:, :, :0], v[:, :, :0])]  # so that no reference at all can be concatenated
    for r, (weight, other, ref) in enumerate(zip(weights.unbind(1), others, refs, strict=True)):
        grad_gate[:, r] = (grad * (other - own)).sum(dim=(1, 3))
        part_q, *part = attend_backward(weight * grad, q, *ref, scale)
        grad_q = grad_q + part_q
        grad_refs.append((part[0], part[1]))
    ref_k, ref_v = (torch.cat(parts, dim=2) for parts in zip(*grad_refs, strict=True))
    return grad_q, grad_k, grad_v, ref_k, ref_v, grad_gate


def attend_backward(
    grad: Tensor,  # [B, H, N, D]
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, L, D]
    v: Tensor,  # [B, H, L, D]
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Through softmax(scale · q kᵀ) v, a block of queries at a time: the weights p [n, L] are recomputed."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
    rows = max(1, BLOCK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for q_rows, grad_rows in zip(q.split(rows, dim=2), grad.split(rows, dim=2), strict=True):
        p = torch.softmax(scale * q_rows @ k.transpose(2, 3), dim=3)
        grad_p = grad_rows @ v.transpose(2, 3)
        grad_scores = scale * p * (grad_p - (p * grad_p).sum(dim=3, keepdim=True))
        grad_q.append(grad_scores @ k)
        grad_k += grad_scores.transpose(2, 3) @ q_rows
        grad_v += p.transpose(2, 3) @ grad_rows
    return torch.cat(grad_q, dim=2), grad_k, grad_v


# ------------------------------------------------------------------ checks


def check_separate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor | None,
    ref_lengths: Sequence[int] | None,
    mode: str,
) -> None:
    op = "separate_attention"
    check_operands(op, q=q, k=k, v=v, k_ref=k_ref, v_ref=v_ref)
    if mode not in MODES:
        raise ValueError(f'{op}: mode is "{mode}"; it must be one of {", ".join(MODES)}')
    for name, x in (("q", q), ("k", k), ("v", v), ("k_ref", k_ref), ("v_ref", v_ref)):
        if x.ndim != 4 or x.shape[:2] != q.shape[:2] or x.shape[3] != q.shape[3]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)} beside q {tuple(q.shape)}; all must be "
                "[batch, heads, tokens, head dim] and differ in the tokens alone (expand() shares one among a batch)"
            )
    for keys, values, name in ((k, v, ""), (k_ref, v_ref, "_ref")):
        if keys.shape != values.shape:
            raise ValueError(
                f"{op}: k{name} has {keys.shape[2]} tokens and v{name} {values.shape[2]}; give each key a value"
            )
    if k.shape[2] == 0 or (mode == "replace" and k_ref.shape[2] == 0):
        name = "k" if k.shape[2] == 0 else "k_ref"
        raise ValueError(f"{op}: {name} has no tokens; there must be at least one to attend to")
    lengths = reference_lengths(op, k_ref.shape[2], ref_lengths)
    if mode == "separate":
        check_blend(op, q, gate, len(lengths))


def check_blend(op: str, q: Tensor, gate: Tensor | None, n_references: int) -> None:
    if gate is None:
        raise ValueError(f'{op}: gate is None; mode "separate" needs one of shape [batch, references, tokens]')
    check_gate(op, gate, q)
    wanted = (q.shape[0], n_references, q.shape[2])
    if tuple(gate.shape) != wanted:
        raise ValueError(
            f"{op}: gate has shape {tuple(gate.shape)}; it must be [batch, references, tokens], here {wanted}"
        )


def check_values(**operands: Tensor | None) -> None:
    """What only `RAGSR_DEBUG=1` looks at, because it makes the device answer: NaN anywhere, a gate outside [0, 1]."""
    for name, x in operands.items():
        if x is not None and x.isnan().any():
            raise ValueError(f"separate_attention: {name} holds NaN; find the layer that made it")
    gate = operands["gate"]
    if gate is not None and gate.numel() and (gate.min() < 0 or gate.max() > 1):
        raise ValueError(
            f"separate_attention: gate lies in [{gate.min().item():g}, {gate.max().item():g}]; it must lie in [0, 1]"
        )


# ------------------------------------------------------------------ fake, autograd and registration


def separate_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor | None,
    ref_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    align: bool = True,
    mode: str = "separate",
) -> Tensor:
    check_separate_attention(q, k, v, k_ref, v_ref, gate, ref_lengths, mode)
    return torch.empty_like(q)


def separate_attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, gate: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    gate = q.new_empty(0) if gate is None else gate
    return tuple(torch.empty_like(x) for x in (q, k, v, k_ref, v_ref, gate))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ref_lengths, ctx.scale, ctx.align, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *_, gate = ctx.saved_tensors
    options = (ctx.ref_lengths, ctx.scale, ctx.align, ctx.mode)
    *grads, grad_gate = torch.ops.ragsr.separate_attention_backward(grad, *ctx.saved_tensors, *options)
    return (*grads, None if gate is None else grad_gate, None, None, None, None)


define(
    "separate_attention(Tensor q, Tensor k, Tensor v, Tensor k_ref, Tensor v_ref, Tensor? gate, "
    'int[]? ref_lengths=None, float? scale=None, bool align=True, str mode="separate") -> Tensor',
    plain=separate_attention_plain,
    fake=separate_attention_fake,
    setup_context=setup_context,
    backward=backward,
)
define(
    "separate_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor k_ref, Tensor v_ref, Tensor? gate, "
    "int[]? ref_lengths, float? scale, bool align, str mode) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    plain=separate_attention_backward_plain,
    fake=separate_attention_backward_fake,
)
define(
    "blend_attention(Tensor pattern, Tensor own, Tensor[] others, Tensor gate, bool align) -> Tensor",
    plain=blend_attention_plain,
    fake=lambda pattern, own, others, gate, align: torch.empty_like(pattern),
)
build_on("blend_attention", "separate_attention", "CPU", separate_attention_cpu)


def separate_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor | None,
    ref_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    align: bool = True,
    mode: str = "separate",
) -> Tensor:
    from ragsr.kernels import attention  # here, so that importing the ops does not import Triton

    lengths = reference_lengths("separate_attention", k_ref.shape[2], ref_lengths)
    return attention.separate_attention(q, k, v, k_ref, v_ref, gate, lengths, scale, align, mode)


claim("separate_attention", separate_attention_triton)
