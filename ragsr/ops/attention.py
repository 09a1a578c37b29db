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

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ragsr.ops._library import build_on, claim, define
from ragsr.ops._operands import check_gate, check_operands, check_values, like, reference_lengths, wide, wide_dtype
from ragsr.ops.gate import adain_plain

MODES = ("separate", "concat", "replace")

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
    Differentiable in all tensors, in memory that grows with the tokens as PyTorch's own attention does; the gradient is
    that of the formula, also where the gate is zero.

    Raises `ValueError` for wrong shapes, lengths or modes, `TypeError` for wrong dtypes.
    """
    check_separate_attention(q, k, v, k_ref, v_ref, gate, ref_lengths, mode)
    check_values("separate_attention", q=q, k=k, v=v, k_ref=k_ref, v_ref=v_ref, gate=gate)
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
    if mode != "separate":
        return like(one_softmax(q, k, v, k_ref, v_ref, scale, mode), q)
    assert gate is not None  # checked
    own = attend(q, k, v, scale)
    others = (attend(q, *ref, scale) for ref in references(k_ref, v_ref, ref_lengths))  # one at a time
    fused = aligned_blend(own, others, gate, align)
    return like(torch.where(looks(gate), fused.to(own.dtype), own), q)


def one_softmax(
    q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, scale: float | None, mode: str
) -> Tensor:
    """The modes for comparison: own and reference keys together, or the reference keys alone."""
    if mode == "concat":
        k_ref, v_ref = torch.cat((k, k_ref), dim=2), torch.cat((v, v_ref), dim=2)
    return attend(q, k_ref, v_ref, scale)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """softmax(scale · q kᵀ) v. PyTorch's fused attention, which does not store the weights [N, L], needs dense rows."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):  # the result has the dtype of q, whatever surrounds the op
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def references(k_ref: Tensor, v_ref: Tensor, ref_lengths: Sequence[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each reference: R views [B, H, M_r, D]."""
    lengths = reference_lengths("separate_attention", k_ref.shape[2], ref_lengths)
    return zip(k_ref.split_with_sizes(lengths, dim=2), v_ref.split_with_sizes(lengths, dim=2), strict=True)


def aligned_blend(own: Tensor, others: Iterable[Tensor], gate: Tensor, align: bool) -> Tensor:
    fused = blend(own, others, gate)
    return adain_plain(fused, wide(own)) if align else fused


def blend(own: Tensor, others: Iterable[Tensor], gate: Tensor) -> Tensor:
    """(1 − Σ_r g_r) · O_own + Σ_r g_r · O_r in float32 (float64 for float64): [B, H, N, D]."""
    weights = wide(gate)[:, :, None, :, None]  # [B, R, 1, N, 1]
    fused = (1 - weights.sum(dim=1)) * wide(own)
    for weight, other in zip(weights.unbind(1), others, strict=True):
        fused = fused + weight * wide(other)
    return fused


def looks(gate: Tensor) -> Tensor:
    """Which batch rows look at a reference at all, [B, 1, 1, 1]."""
    return (gate != 0).flatten(1).any(dim=1)[:, None, None, None]


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
    """PyTorch's attention for the matrix part; each reference is blended in and forgotten before the next one comes."""
    if mode != "separate" or gate is None:
        return separate_attention_plain(q, k, v, k_ref, v_ref, gate, ref_lengths, scale, align, mode)
    own = attend(q, k, v, scale)
    if k_ref.shape[2] == 0:
        return like(own, q)
    fused = torch.empty_like(q, dtype=wide_dtype(q.dtype))
    *others, last = references(k_ref, v_ref, ref_lengths)
    for r, ref in enumerate(others):
        torch.ops.ragsr.blend_reference(fused, own, attend(q, *ref, scale), gate, r)
    other = attend(q, *last, scale)
    out = fused if fused.dtype == q.dtype else torch.empty_like(q)
    torch.ops.ragsr.finish_attention(out, fused, own, other, gate, align)
    return out


def blend_reference_plain(fused: Tensor, own: Tensor, other: Tensor, gate: Tensor, reference: int) -> None:
    """Into `fused`, float32 or float64: the share of one reference, and with the first that of the own attention."""
    weights = wide(gate)[:, :, None, :, None]  # [B, R, 1, N, 1]
    if reference == 0:
        fused.copy_((1 - weights.sum(dim=1)) * wide(own))
    fused += weights[:, reference] * wide(other)


def finish_attention_plain(out: Tensor, fused: Tensor, own: Tensor, other: Tensor, gate: Tensor, align: bool) -> None:
    """The last reference into `fused`; into `out`, which may be `fused`, the blend aligned, or `own` where unused."""
    blend_reference_plain(fused, own, other, gate, gate.shape[1] - 1)
    result = adain_plain(fused, wide(own)) if align else fused
    out.copy_(torch.where(looks(gate), result.to(own.dtype), own))


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
    "blend_reference(Tensor(a!) fused, Tensor own, Tensor other, Tensor gate, int reference) -> ()",
    plain=blend_reference_plain,
    fake=lambda *_: None,
)
define(
    "finish_attention(Tensor(a!) out, Tensor(b!) fused, Tensor own, Tensor other, Tensor gate, bool align) -> ()",
    plain=finish_attention_plain,
    fake=lambda *_: None,
)
build_on("blend_reference", "separate_attention", "CPU", separate_attention_cpu)


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
