"""How much of a reference each token takes, and how what it takes is blended in and aligned.

    gate    m_i = mean_j ⟨ĥ_i, ĥ_ref,j⟩ = ⟨ĥ_i, mean_j ĥ_ref,j⟩            x̂ = x / (‖x‖ + 1e-8)
            M_i = (m_i − min m) / (max m − min m + 1e-8)
    AdaIN   (x − μ_x) / σ_x · σ_s + μ_s,   σ = sqrt(unbiased variance + 1e-5)
    blend   own + gate · (ref − own)

ReFIR builds the N x M matrix of cosines and averages its rows. The mean moves inside the inner product, so one mean
direction per reference does the same in O(N·C). A map whose raw range is at most 1e-6 carries no information (the
reference is equally near everywhere, up to rounding) and becomes 0 instead of amplified noise.

Source: ReFIR, Eq. 2 (gate and blend) and Eq. 3 (alignment of the injected attention).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ragsr.ops._library import claim, define
from ragsr.ops._operands import check_gate, check_operands, check_values, like, reference_lengths, wide
from ragsr.ops.cosine import EPS, unit

FLAT = 1e-6  # a similarity map with no wider range says nothing
EPS_VARIANCE = 1e-5  # added to the variance, inside the root

# ------------------------------------------------------------------ public names


def cosine_gate(
    h: Tensor,  # [B, N, C]
    h_ref: Tensor,  # [B, ΣM, C]
    ref_lengths: Sequence[int] | None = None,
) -> Tensor:  # float32 [B, R, N]
    """How similar each token is to each reference, stretched to [0, 1] per image and reference: float32 [B, R, N].

    `ref_lengths` [M_1, …, M_R] splits the tokens of `h_ref` into references (default: one). Any floating dtype,
    computed in float32; float64 is computed and returned in float64. Views such as `x.flatten(2).transpose(1, 2)` are
    taken as they are. Differentiable in both. Raises `ValueError` for wrong shapes, `TypeError` for wrong dtypes; with
    `RAGSR_DEBUG=1` this op and the two below also refuse NaN.
    """
    check_cosine_gate(h, h_ref, ref_lengths)
    check_values("cosine_gate", h=h, h_ref=h_ref)
    return torch.ops.ragsr.cosine_gate(h, h_ref, ref_lengths)


def adain(
    x: Tensor,  # [..., N, C]
    style: Tensor,  # [..., N', C]
) -> Tensor:  # [..., N, C]
    """`x` with each channel's mean and standard deviation over the tokens replaced by those of `style`.

    Leading dimensions and channels must agree. The variance is unbiased; of one token it is 0, so N = 1 returns the
    mean of the style. Statistics in float32 for the half types. Differentiable in both.
    """
    check_adain(x, style)
    check_values("adain", x=x, style=style)
    return torch.ops.ragsr.adain(x, style)


def gated_blend(
    own: Tensor,  # [...]
    ref: Tensor,  # the shape of own
    gate: Tensor,  # broadcasts to own
) -> Tensor:  # the shape and dtype of own
    """own + gate · (ref − own): 0 keeps `own`, 1 takes `ref`. The gate is float32 or of the dtype of `own`.

    Computed in float32 for the half types. Differentiable in all three.
    """
    check_gated_blend(own, ref, gate)
    check_values("gated_blend", own=own, ref=ref, gate=gate)
    return torch.ops.ragsr.gated_blend(own, ref, gate)


# ------------------------------------------------------------------ plain PyTorch


def cosine_gate_plain(h: Tensor, h_ref: Tensor, ref_lengths: Sequence[int] | None = None) -> Tensor:
    lengths = reference_lengths("cosine_gate", h_ref.shape[1], ref_lengths)
    similarity = mean_directions(unit(h_ref), lengths) @ unit(h).transpose(1, 2)  # m [B, R, N]
    spread, low = spread_of(similarity)
    return torch.where(spread <= FLAT, 0.0, (similarity - low) / (spread + EPS))


def mean_directions(
    unit_ref: Tensor,  # [B, ΣM, C]
    lengths: list[int],
) -> Tensor:  # [B, R, C]
    """mean_j x̂_ref,j of every reference."""
    means = (tokens.mean(1, keepdim=True) for tokens in unit_ref.split(lengths, dim=1))
    return torch.cat((unit_ref[:, :0], *means), dim=1)  # the empty slice stands for no reference at all


def spread_of(similarity: Tensor) -> tuple[Tensor, Tensor]:
    low, high = similarity.aminmax(dim=-1, keepdim=True)
    return high - low, low


def adain_plain(x: Tensor, style: Tensor) -> Tensor:
    mean, std = moments(wide(x))
    style_mean, style_std = moments(wide(style))
    return like((wide(x) - mean) / std * style_std + style_mean, x)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the tokens: [..., 1, C] each."""
    mean = x.mean(-2, keepdim=True)
    variance = (x - mean).square().sum(-2, keepdim=True) / max(x.shape[-2] - 1, 1)
    return mean, (variance + EPS_VARIANCE).sqrt()


def gated_blend_plain(own: Tensor, ref: Tensor, gate: Tensor) -> Tensor:
    return like(wide(own) + wide(gate) * (wide(ref) - wide(own)), own)


# ------------------------------------------------------------------ checks


def check_cosine_gate(h: Tensor, h_ref: Tensor, ref_lengths: Sequence[int] | None) -> None:
    check_operands("cosine_gate", h=h, h_ref=h_ref)
    if h.ndim != 3 or h_ref.ndim != 3 or h.shape[0] != h_ref.shape[0] or h.shape[2] != h_ref.shape[2]:
        raise ValueError(
            f"cosine_gate: h has shape {tuple(h.shape)} and h_ref {tuple(h_ref.shape)}; they must be [batch, tokens, "
            "channels] with one batch and channel count: for [B, C, H, W] use x.flatten(2).transpose(1, 2)"
        )
    if h.shape[1] == 0:
        raise ValueError(f"cosine_gate: h has shape {tuple(h.shape)}; it needs at least one token")
    reference_lengths("cosine_gate", h_ref.shape[1], ref_lengths)


def check_adain(x: Tensor, style: Tensor) -> None:
    check_operands("adain", x=x, style=style)
    agree = x.ndim == style.ndim >= 2 and x.shape[:-2] == style.shape[:-2] and x.shape[-1] == style.shape[-1]
    if not agree or x.shape[-2] == 0 or style.shape[-2] == 0:
        raise ValueError(
            f"adain: x has shape {tuple(x.shape)} and style {tuple(style.shape)}; they must be [..., tokens, channels] "
            "with at least one token each and may differ in the number of tokens alone"
        )


def check_gated_blend(own: Tensor, ref: Tensor, gate: Tensor) -> None:
    check_operands("gated_blend", own=own, ref=ref)
    check_gate("gated_blend", gate, own)
    if own.shape != ref.shape:
        raise ValueError(
            f"gated_blend: own has shape {tuple(own.shape)} and ref {tuple(ref.shape)}; they must be equal"
        )
    trailing = own.shape[own.ndim - gate.ndim :] if gate.ndim <= own.ndim else ()
    if gate.ndim > own.ndim or any(g not in (1, n) for g, n in zip(gate.shape, trailing, strict=True)):
        raise ValueError(
            f"gated_blend: gate has shape {tuple(gate.shape)}; it must broadcast to the features {tuple(own.shape)}"
        )


# ------------------------------------------------------------------ fake


def cosine_gate_fake(h: Tensor, h_ref: Tensor, ref_lengths: Sequence[int] | None = None) -> Tensor:
    check_cosine_gate(h, h_ref, ref_lengths)
    references = len(reference_lengths("cosine_gate", h_ref.shape[1], ref_lengths))
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return h.new_empty(h.shape[0], references, h.shape[1], dtype=dtype)


def adain_fake(x: Tensor, style: Tensor) -> Tensor:
    check_adain(x, style)
    return torch.empty_like(x)


def gated_blend_fake(own: Tensor, ref: Tensor, gate: Tensor) -> Tensor:
    check_gated_blend(own, ref, gate)
    return torch.empty_like(own)


# ------------------------------------------------------------------ autograd


def cosine_gate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, h_ref, ctx.ref_lengths = inputs
    ctx.save_for_backward(h, h_ref)


def cosine_gate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    h, h_ref = ctx.saved_tensors
    lengths = reference_lengths("cosine_gate", h_ref.shape[1], ctx.ref_lengths)
    directions, tokens = mean_directions(unit(h_ref), lengths), unit(h)
    grad_similarity = stretch_backward(grad, directions @ tokens.transpose(1, 2))
    grad_directions = (grad_similarity @ tokens).unbind(1)  # R of [B, C]
    shares = (g[:, None].expand(-1, m, -1) / m for g, m in zip(grad_directions, lengths, strict=True))
    grad_ref = torch.cat((torch.zeros_like(directions[:, :0]), *shares), dim=1)
    grad_tokens = grad_similarity.transpose(1, 2) @ directions
    return unit_backward(grad_tokens, h).to(h.dtype), unit_backward(grad_ref, h_ref).to(h_ref.dtype), None


def stretch_backward(grad: Tensor, similarity: Tensor) -> Tensor:
    """Through M = (m − min m) / (max m − min m + eps); the ends pass on what scaling and shifting owe them."""
    spread, low = spread_of(similarity)
    grad = torch.where(spread <= FLAT, 0.0, grad / (spread + EPS))
    stretched = (similarity - low) / (spread + EPS)
    to_high = -(grad * stretched).sum(-1, keepdim=True)
    to_low = -(grad * (1 - stretched)).sum(-1, keepdim=True)
    grad = grad.scatter_add(-1, similarity.argmax(-1, keepdim=True), to_high)
    return grad.scatter_add(-1, similarity.argmin(-1, keepdim=True), to_low)


def unit_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Through x̂ = x / (‖x‖ + eps): the part of the gradient along x falls away, up to eps."""
    x = wide(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    along = (grad * x).sum(-1, keepdim=True) / (norm + EPS) ** 2
    return grad / (norm + EPS) - x / norm.clamp_min(EPS) * along


def adain_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def adain_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, style = ctx.saved_tensors
    grad_x, grad_style = adain_gradients(wide(grad), wide(x), wide(style))
    return grad_x.to(x.dtype), grad_style.to(style.dtype)


def adain_gradients(grad: Tensor, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
    """Through AdaIN in closed form; with one token the deviations are 0 and so is what they pass on."""
    (mean, std), (style_mean, style_std) = moments(x), moments(style)
    x_hat, style_hat = (x - mean) / std, (style - style_mean) / style_std
    along = (grad * x_hat).sum(-2, keepdim=True)
    grad_x = (grad - grad.mean(-2, keepdim=True) - x_hat * along / max(x.shape[-2] - 1, 1)) * style_std / std
    grad_style = grad.sum(-2, keepdim=True) / style.shape[-2] + style_hat * along / max(style.shape[-2] - 1, 1)
    return grad_x, grad_style


def gated_blend_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def gated_blend_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    own, ref, gate = ctx.saved_tensors
    weight, step = wide(gate), wide(ref) - wide(own)
    grad_gate = (grad * step).sum_to_size(gate.shape)
    return (grad * (1 - weight)).to(own.dtype), (grad * weight).to(ref.dtype), grad_gate.to(gate.dtype)


define(
    "cosine_gate(Tensor h, Tensor h_ref, int[]? ref_lengths=None) -> Tensor",
    plain=cosine_gate_plain,
    fake=cosine_gate_fake,
    setup_context=cosine_gate_setup,
    backward=cosine_gate_backward,
)
define(
    "adain(Tensor x, Tensor style) -> Tensor",
    plain=adain_plain,
    fake=adain_fake,
    setup_context=adain_setup,
    backward=adain_backward,
)
define(
    "gated_blend(Tensor own, Tensor ref, Tensor gate) -> Tensor",
    plain=gated_blend_plain,
    fake=gated_blend_fake,
    setup_context=gated_blend_setup,
    backward=gated_blend_backward,
)


def cosine_gate_triton(h: Tensor, h_ref: Tensor, ref_lengths: Sequence[int] | None = None) -> Tensor:
    from ragsr.kernels import gate  # here, so that importing the ops does not import Triton

    return gate.cosine_gate(h, h_ref, reference_lengths("cosine_gate", h_ref.shape[1], ref_lengths))


def adain_triton(x: Tensor, style: Tensor) -> Tensor:
    from ragsr.kernels import moments

    return moments.adain(x, style)


def gated_blend_triton(own: Tensor, ref: Tensor, gate: Tensor) -> Tensor:
    from ragsr.kernels import gate as kernels

    return kernels.gated_blend(own, ref, gate)


claim("cosine_gate", cosine_gate_triton)
claim("adain", adain_triton)
claim("gated_blend", gated_blend_triton)
