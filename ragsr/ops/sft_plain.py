"""The plain PyTorch form of `group_norm_sft`, forward and backward: the definition (sft.py has it in letters)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ragsr.ops._operands import like, wide


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


# ------------------------------------------------------------------ backward


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
    of_x: bool = True,
    of_gamma: bool = True,
    of_beta: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, gamma, beta and x2 (no channels where it is absent); the residual's is `grad`.

    Those of x and x2, of gamma and of beta may be left out: no elements take their place.
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
    none = x.new_empty(0)
    return (
        arranged(grad_x, x) if of_x else none,
        like((grad_affine * z_hat).sum(over_positions), weight),
        like(grad_affine.sum(over_positions), bias),
        arranged((grad_t * affine).sum_to_size(gamma.shape), gamma) if of_gamma else none.clone(),
        arranged(grad_t.sum_to_size(beta.shape), beta) if of_beta else none.clone(),
        arranged(grad_x2, x[:, :0] if x2 is None else x2) if of_x else none.clone(),
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
