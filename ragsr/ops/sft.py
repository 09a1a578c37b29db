"""Spatial feature transform: a condition scales and shifts features, alone or on top of a group normalisation.

    sft              α ⊙ F + β
    group_norm_sft   z = [x, x2],  ẑ = (z − μ_g) / sqrt(σ_g² + eps),  t = (ẑ · w + b) · (1 + γ) + β
                     out = s · act(t) + (1 − s) · z + residual                        (s = 1 unless raw_mix is given)

The statistics run over the channels of a group and all positions (biased variance); groups may straddle the seam
between x and x2. γ and β are maps, or constants of a channel ([B, C, 1, 1]).

Two ops do the work, each with kernels of its own: `group_norm_sft_forward` also returns μ and 1/σ, which is all that is
kept beside the inputs for `group_norm_sft_backward`.

StableSR and iRAG end each residual block with this layer (SPADE) and add the skip: that is `residual`. SUPIR's ZeroSFT
normalises z = [d, h + c] of decoder state d, skip h and control c = zero_conv(control), but mixes in [d, h], the skip
*before* c was added. `raw_mix=s` mixes in z itself, so the exact ZeroSFT adds the difference back through `residual`:

    group_norm_sft(d, 32, w, b, γ, β, x2=h + c, raw_mix=s, residual=(s − 1) · [0, c])

At s = 1 the two agree and no residual is needed.

Source: iRAG, Sec. 3.3.1 (SFT); SPADE; SUPIR's ZeroSFT.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ragsr.ops._library import claim, define
from ragsr.ops._operands import check_operands, like, wide

ACTIVATIONS = (None, "silu", "relu")

# ------------------------------------------------------------------ public names


def sft(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale · x + shift, the three broadcast against each other; one floating dtype, one device. Differentiable."""
    check_sft(x, scale, shift)
    return torch.ops.ragsr.sft(x, scale, shift)


def group_norm_sft(
    x: Tensor,  # [B, C1, *]
    groups: int,
    weight: Tensor,  # [C], C = C1 + C2
    bias: Tensor,  # [C]
    gamma: Tensor,  # [B, C, *]; B and * may be 1
    beta: Tensor,  # [B, C, *]; B and * may be 1
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,  # [B, C, *]
    x2: Tensor | None = None,  # [B, C2, *]
    raw_mix: float | None = None,
) -> Tensor:  # [B, C, *]
    """Group-normalise, modulate, activate, mix with the input and add the residual.

    `groups` divides C; `activation` is None, "silu" or "relu"; `x2` is concatenated after `x` in the channels;
    `raw_mix=s` gives s · out + (1 − s) · [x, x2]; `residual` is added last. Computed in float32 for the half types.
    The result [B, C, *] is channels-last where x and x2 are, else contiguous.
    Differentiable in all tensors. Raises `ValueError` for wrong shapes, `TypeError` for wrong dtypes.
    """
    check_group_norm_sft(x, groups, weight, bias, gamma, beta, activation, residual, x2)
    out, _, _ = torch.ops.ragsr.group_norm_sft_forward(
        x, groups, weight, bias, gamma, beta, eps, activation, residual, x2, raw_mix
    )
    return out


# ------------------------------------------------------------------ plain PyTorch


def sft_plain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The op everywhere: it reads and writes each element once, which leaves a kernel of ours nothing to save."""
    return torch.addcmul(shift, x, scale)


def group_norm_sft_forward_plain(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    x2: Tensor | None = None,
    raw_mix: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and 1/σ of every group: [B, groups], float32 (float64 for float64)."""
    z = joined(x, x2)
    mean, rstd = group_statistics(wide(z), groups, eps)
    z_hat = normalise_groups(wide(z), mean, rstd)
    affine = z_hat * per_channel(weight, z) + per_channel(bias, z)
    out = activate(affine * (1 + wide(gamma)) + wide(beta), activation)
    if raw_mix is not None:
        out = raw_mix * out + (1 - raw_mix) * wide(z)
    if residual is not None:
        out = out + wide(residual)
    return arranged(out, x, x2), mean, rstd


def joined(x: Tensor, x2: Tensor | None) -> Tensor:
    return x if x2 is None else torch.cat((x, x2), dim=1)


def arranged(result: Tensor, *patterns: Tensor | None) -> Tensor:
    """`result` in the dtype of the patterns, in memory as `empty_arranged` has it."""
    return empty_arranged(result.shape, *patterns).copy_(result)


def empty_arranged(shape: Sequence[int], *patterns: Tensor | None) -> Tensor:
    """Fresh [B, C, *]: the channels of a position side by side where all patterns have them so, else contiguous."""
    present = [p for p in patterns if p is not None]
    if all(channels_last(p) for p in present):
        return present[0].new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return present[0].new_empty(shape)


def channels_last(x: Tensor) -> bool:
    return x.ndim > 2 and x.stride(1) == 1 and x.stride(-1) != 1


def group_statistics(z: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """μ and 1/σ of every group, [B, groups]."""
    members = group_members(z, groups)
    mean = members.mean(2)
    variance = (members - mean[..., None]).square().mean(2)
    return mean, (variance + eps).rsqrt()


def normalise_groups(z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """ẑ [B, C, *]."""
    members = group_members(z, mean.shape[1])
    return ((members - mean[..., None]) * rstd[..., None]).view(z.shape)


def group_members(z: Tensor, groups: int) -> Tensor:
    """[B, C, *] as [B, groups, C/groups · *]: a row holds what shares its statistics."""
    return z.unflatten(1, (groups, z.shape[1] // groups)).flatten(2).contiguous()


def per_channel(x: Tensor, z: Tensor) -> Tensor:
    """`x` [C] against `z` [B, C, *]."""
    return wide(x).view(-1, *[1] * (z.ndim - 2))


def activate(t: Tensor, activation: str | None) -> Tensor:
    match activation:
        case "silu":
            return t * torch.sigmoid(t)
        case "relu":
            return t.clamp_min(0)
        case _:
            return t


# ------------------------------------------------------------------ backward, plain PyTorch


def group_norm_sft_backward_plain(
    grad: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,  # [B, groups], as the forward gave it
    rstd: Tensor,  # [B, groups]
    activation: str | None,
    x2: Tensor | None,
    raw_mix: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, gamma, beta and x2 (no channels where it is absent); the residual's is `grad`.

    Backwards through out = s · act(t) + (1 − s) · z, t = a · (1 + γ) + β, a = ẑ · w + b and ẑ, recomputed from μ, 1/σ.
    """
    z, grad, slope = wide(joined(x, x2)), wide(grad), 1 + wide(gamma)
    z_hat = normalise_groups(z, mean, rstd)
    affine = z_hat * per_channel(weight, z) + per_channel(bias, z)
    share = 1.0 if raw_mix is None else raw_mix

    grad_t = activate_backward(share * grad, affine * slope + wide(beta), activation)
    grad_affine = grad_t * slope
    grad_z = normalise_groups_backward(grad_affine * per_channel(weight, z), z_hat, rstd)
    grad_x, grad_x2 = (grad_z + (1 - share) * grad).split([x.shape[1], z.shape[1] - x.shape[1]], dim=1)
    over_positions = [0, *range(2, z.ndim)]
    return (
        arranged(grad_x, x),
        like((grad_affine * z_hat).sum(over_positions), weight),
        like(grad_affine.sum(over_positions), bias),
        arranged((grad_t * affine).sum_to_size(gamma.shape), gamma),
        arranged(grad_t.sum_to_size(beta.shape), beta),
        arranged(grad_x2, x[:, :0] if x2 is None else x2),
    )


def activate_backward(grad: Tensor, t: Tensor, activation: str | None) -> Tensor:
    match activation:
        case "silu":
            gate = torch.sigmoid(t)
            return grad * gate * (1 + t * (1 - gate))
        case "relu":
            return grad * (t > 0)
        case _:
            return grad


def normalise_groups_backward(grad: Tensor, z_hat: Tensor, rstd: Tensor) -> Tensor:
    """Through the normalisation: what a group shares (its mean and its spread) takes its part of the gradient away."""
    g, n = group_members(grad, rstd.shape[1]), group_members(z_hat, rstd.shape[1])
    g = g - g.mean(2, keepdim=True) - n * (g * n).mean(2, keepdim=True)
    return (rstd[..., None] * g).view(z_hat.shape)


# ------------------------------------------------------------------ checks


def check_sft(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    check_operands("sft", x=x, scale=scale, shift=shift)
    try:
        torch.broadcast_shapes(x.shape, scale.shape, shift.shape)
    except RuntimeError:
        shapes = f"{tuple(x.shape)}, {tuple(scale.shape)} and {tuple(shift.shape)}"
        raise ValueError(
            f"sft: x, scale and shift have shapes {shapes}; they must broadcast against each other"
        ) from None


def check_group_norm_sft(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    activation: str | None,
    residual: Tensor | None,
    x2: Tensor | None,
) -> None:
    op = "group_norm_sft"
    check_operands(op, x=x, weight=weight, bias=bias, gamma=gamma, beta=beta, residual=residual, x2=x2)
    if x.ndim < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; it must be [batch, channels, ...]")
    if x2 is not None and (x2.ndim != x.ndim or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]):
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and x2 {tuple(x2.shape)}; they may differ in the channels alone"
        )
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    shape = (x.shape[0], channels, *x.shape[2:])
    if groups < 1 or channels % groups:
        raise ValueError(f"{op}: groups is {groups} with {channels} channels; it must divide the channels")
    if activation not in ACTIVATIONS:
        raise ValueError(f'{op}: activation is "{activation}"; it must be None, "silu" or "relu"')
    for name, vector in (("weight", weight), ("bias", bias)):
        if tuple(vector.shape) != (channels,):
            raise ValueError(f"{op}: {name} has shape {tuple(vector.shape)}; it must be ({channels},), one per channel")
    for name, map_ in (("gamma", gamma), ("beta", beta)):
        matches = map_.ndim == x.ndim and map_.shape[1] == channels
        if not matches or any(m not in (1, n) for m, n in zip(map_.shape, shape, strict=True)):
            raise ValueError(
                f"{op}: {name} has shape {tuple(map_.shape)}; it must be {shape}; batch and positions may be 1"
            )
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; it must have that of the result, {shape}")


# ------------------------------------------------------------------ fake


def sft_fake(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    check_sft(x, scale, shift)
    return torch.addcmul(shift, x, scale)


def group_norm_sft_forward_fake(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    x2: Tensor | None = None,
    raw_mix: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_group_norm_sft(x, groups, weight, bias, gamma, beta, activation, residual, x2)
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    out = empty_arranged((x.shape[0], channels, *x.shape[2:]), x, x2)
    mean, rstd = (wide(x.new_empty(x.shape[0], groups)) for _ in range(2))
    return out, mean, rstd


def group_norm_sft_backward_fake(
    grad: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    x2: Tensor | None,
    raw_mix: float | None,
) -> tuple[Tensor, ...]:
    maps = (gamma, beta, x[:, :0] if x2 is None else x2)
    dgamma, dbeta, dx2 = (empty_arranged(m.shape, m) for m in maps)
    return empty_arranged(x.shape, x), torch.empty_like(weight), torch.empty_like(bias), dgamma, dbeta, dx2


# ------------------------------------------------------------------ autograd


def sft_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift = inputs
    ctx.shift_shape = shift.shape
    ctx.save_for_backward(x, scale)


def sft_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, scale = ctx.saved_tensors
    return (grad * scale).sum_to_size(x.shape), (grad * x).sum_to_size(scale.shape), grad.sum_to_size(ctx.shift_shape)


def group_norm_sft_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, gamma, beta, _, ctx.activation, residual, x2, ctx.raw_mix = inputs
    _, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, gamma, beta, mean, rstd, x2)


def group_norm_sft_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, gamma, beta, mean, rstd, x2 = ctx.saved_tensors
    dx, dweight, dbias, dgamma, dbeta, dx2 = torch.ops.ragsr.group_norm_sft_backward(
        grad, x, ctx.groups, weight, bias, gamma, beta, mean, rstd, ctx.activation, x2, ctx.raw_mix
    )
    dresidual = grad if ctx.has_residual else None
    return dx, None, dweight, dbias, dgamma, dbeta, None, None, dresidual, None if x2 is None else dx2, None


define(
    "sft(Tensor x, Tensor scale, Tensor shift) -> Tensor",
    plain=sft_plain,
    fake=sft_fake,
    setup_context=sft_setup,
    backward=sft_backward,
)
define(
    "group_norm_sft_forward(Tensor x, int groups, Tensor weight, Tensor bias, Tensor gamma, Tensor beta, "
    "float eps=1e-05, str? activation=None, Tensor? residual=None, Tensor? x2=None, float? raw_mix=None) "
    "-> (Tensor out, Tensor mean, Tensor rstd)",
    plain=group_norm_sft_forward_plain,
    fake=group_norm_sft_forward_fake,
    setup_context=group_norm_sft_setup,
    backward=group_norm_sft_backward,
)
define(
    "group_norm_sft_backward(Tensor grad, Tensor x, int groups, Tensor weight, Tensor bias, Tensor gamma, Tensor beta, "
    "Tensor mean, Tensor rstd, str? activation, Tensor? x2, float? raw_mix) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dgamma, Tensor dbeta, Tensor dx2)",
    plain=group_norm_sft_backward_plain,
    fake=group_norm_sft_backward_fake,
)


# ------------------------------------------------------------------ CUDA


def group_norm_sft_forward_triton(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    x2: Tensor | None = None,
    raw_mix: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    args = x, groups, weight, bias, gamma, beta, eps, activation, residual, x2, raw_mix
    results = group_norm_sft_forward_fake(*args)
    if left_to_plain(x, results[0]):
        return group_norm_sft_forward_plain(*args)
    from ragsr.kernels import sft

    sft.group_norm_sft_forward(results, *args)
    return results


def group_norm_sft_backward_triton(
    grad: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    x2: Tensor | None,
    raw_mix: float | None,
) -> tuple[Tensor, ...]:
    args = grad, x, groups, weight, bias, gamma, beta, mean, rstd, activation, x2, raw_mix
    if left_to_plain(x, grad):
        return group_norm_sft_backward_plain(*args)
    results = group_norm_sft_backward_fake(*args)
    from ragsr.kernels import sft

    sft.group_norm_sft_backward(results, *args)
    return results


def left_to_plain(x: Tensor, result: Tensor) -> bool:
    """What the kernels do not do: float64, and nothing at all."""
    return x.dtype == torch.float64 or result.numel() == 0


# Where _cuda was built, its C++ forward holds the op already and `claim` leaves it there: nothing to compile in the
# user's session, a cheaper launch, and a group that fits in shared memory is read once. Neither was measured yet.
claim("group_norm_sft_forward", group_norm_sft_forward_triton)
claim("group_norm_sft_backward", group_norm_sft_backward_triton)
