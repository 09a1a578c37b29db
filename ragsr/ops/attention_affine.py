"""Separate attention for a layer whose next step is linear: AdaIN moves into that layer's weights, without a pass.

AdaIN is affine in each channel, out = O · gain + shift, with gain = σ_own / σ_O and shift = μ_own − gain · μ_O. So a
linear layer W, b after the heads have been joined gives

    W (O · gain + shift) + b = W' O + b',      W' = W diag(gain),   b' = b + W shift        per batch row

    o, gain, shift = separate_attention_affine(q, k, v, k_ref, v_ref, gate)
    weight, bias = fold_into_linear(to_out.weight, to_out.bias, gain, shift)
    out = torch.baddbmm(bias[:, None], o.transpose(1, 2).flatten(2), weight.mT)

Where the gate of a batch row is zero throughout, gain is 1, shift 0 and O the plain attention, so W' and b' are W and b
bit for bit. Source: ReFIR, Eq. 2 and 3.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ragsr.ops._library import claim, define
from ragsr.ops._operands import check_values, like, reference_lengths, wide
from ragsr.ops.attention import attend, blend, check_separate_attention, looks, references
from ragsr.ops.gate import moments

# ------------------------------------------------------------------ public names


def separate_attention_affine(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, L, D]
    v: Tensor,  # [B, H, L, D]
    k_ref: Tensor,  # [B, H, ΣM, D]
    v_ref: Tensor,  # [B, H, ΣM, D]
    gate: Tensor,  # [B, R, N]
    ref_lengths: Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, H, N, D], [B, H, D], [B, H, D]
    """O, gain and shift, so that O · gain + shift (over the tokens) is `separate_attention` of the same arguments.

    O has the dtype and layout of `q`; gain and shift are float32 (float64 for float64). For inference: a gradient is
    refused. Raises `ValueError` and `TypeError` as `separate_attention` does.
    """
    check_separate_attention(q, k, v, k_ref, v_ref, gate, ref_lengths, "separate")
    check_values("separate_attention_affine", q=q, k=k, v=v, k_ref=k_ref, v_ref=v_ref, gate=gate)
    out, gain, shift = torch.ops.ragsr.separate_attention_affine(q, k, v, k_ref, v_ref, gate, ref_lengths, scale)
    return out, gain, shift


def fold_into_linear(
    weight: Tensor,  # [E, H·D]
    bias: Tensor | None,  # [E]
    gain: Tensor,  # [B, H, D]
    shift: Tensor,  # [B, H, D]
) -> tuple[Tensor, Tensor]:  # [B, E, H·D], [B, E]
    """W diag(gain) and b + W shift for every batch row, computed in float32, in the dtype of `weight`."""
    if (
        weight.ndim != 2
        or gain.ndim != 3
        or gain.shape != shift.shape
        or weight.shape[1] != gain.shape[1] * gain.shape[2]
    ):
        raise ValueError(
            f"fold_into_linear: weight has shape {tuple(weight.shape)}, gain {tuple(gain.shape)} and shift "
            f"{tuple(shift.shape)}; they must be [outputs, heads · head dim] and twice [batch, heads, head dim]"
        )
    matrix = wide(weight)
    folded = matrix * gain.flatten(1)[:, None].to(matrix.dtype)
    moved = shift.flatten(1).to(matrix.dtype) @ matrix.T
    if bias is not None:
        moved = moved + wide(bias)
    return folded.to(weight.dtype), moved.to(weight.dtype)


# ------------------------------------------------------------------ plain PyTorch


def separate_attention_affine_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor,
    ref_lengths: Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    own = attend(q, k, v, scale)
    fused = blend(own, (attend(q, *ref, scale) for ref in references(k_ref, v_ref, ref_lengths)), gate)
    (mean, std), (own_mean, own_std) = moments(fused), moments(wide(own))
    used = looks(gate)
    gain = (own_std / std).squeeze(2)
    shift = own_mean.squeeze(2) - gain * mean.squeeze(2)
    out = torch.where(used, fused.to(own.dtype), own)
    return like(out, q), torch.where(used[..., 0], gain, 1.0), torch.where(used[..., 0], shift, 0.0)


# ------------------------------------------------------------------ fake, autograd and registration


def separate_attention_affine_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor,
    ref_lengths: Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_separate_attention(q, k, v, k_ref, v_ref, gate, ref_lengths, "separate")
    gain = wide(q).new_empty(q.shape[0], q.shape[1], q.shape[3])
    return torch.empty_like(q), gain, torch.empty_like(gain)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "separate_attention_affine: there is no gradient; use separate_attention, which is differentiable"
    )


define(
    "separate_attention_affine(Tensor q, Tensor k, Tensor v, Tensor k_ref, Tensor v_ref, Tensor gate, "
    "int[]? ref_lengths=None, float? scale=None) -> (Tensor, Tensor, Tensor)",
    plain=separate_attention_affine_plain,
    fake=separate_attention_affine_fake,
    setup_context=setup_context,
    backward=backward,
)


def separate_attention_affine_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor,
    ref_lengths: Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from ragsr.kernels import attention  # here, so that importing the ops does not import Triton

    lengths = reference_lengths("separate_attention", k_ref.shape[2], ref_lengths)
    return attention.separate_attention_affine(q, k, v, k_ref, v_ref, gate, lengths, scale)


claim("separate_attention_affine", separate_attention_affine_triton)
