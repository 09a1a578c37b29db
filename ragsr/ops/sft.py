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

from typing import Any

import torch
from torch import Tensor

from ragsr.ops._library import below_autograd, claim, define
from ragsr.ops._operands import check_operands, wide
from ragsr.ops.sft_plain import empty_arranged, group_norm_sft_backward_plain, group_norm_sft_forward_plain

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
    args = x, groups, weight, bias, gamma, beta, eps, activation, residual, x2, raw_mix
    op = torch.ops.ragsr.group_norm_sft_forward.default
    if torch.compiler.is_compiling():
        return op(*args)[0]
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return Differentiable.apply(*args)[0]
    with below_autograd():
        return op(*args)[0]


# ------------------------------------------------------------------ plain PyTorch


def sft_plain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The op everywhere: it reads and writes each element once, which leaves a kernel of ours nothing to save."""
    return torch.addcmul(shift, x, scale)


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
    shape = tuple(x.shape)
    if x2 is not None:
        if x2.ndim != x.ndim or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"{op}: x has shape {shape} and x2 {tuple(x2.shape)}; they may differ in the channels alone"
            )
        shape = (shape[0], shape[1] + x2.shape[1], *shape[2:])
    channels = shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{op}: groups is {groups} with {channels} channels; it must divide the channels")
    if activation not in ACTIVATIONS:
        raise ValueError(f'{op}: activation is "{activation}"; it must be None, "silu" or "relu"')
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (channels,):
            raise ValueError(f"{op}: {name} has shape {tuple(vector.shape)}; it must be ({channels},), one per channel")
    for name, map_ in (("gamma", gamma), ("beta", beta)):
        if map_.shape == shape:
            continue
        matches = map_.ndim == x.ndim and map_.shape[1] == channels
        if not matches or any(m not in (1, n) for m, n in zip(map_.shape, shape, strict=True)):
            raise ValueError(
                f"{op}: {name} has shape {tuple(map_.shape)}; it must be {shape}; batch and positions may be 1"
            )
    if residual is not None and residual.shape != shape:
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
    of_x: bool = True,
    of_gamma: bool = True,
    of_beta: bool = True,
) -> tuple[Tensor, ...]:
    def empty(map_: Tensor, wanted: bool) -> Tensor:
        return empty_arranged(map_.shape, map_) if wanted else map_.new_empty(0)

    dx, dx2 = empty(x, of_x), empty(x[:, :0] if x2 is None else x2, of_x)
    return dx, torch.empty_like(weight), torch.empty_like(bias), empty(gamma, of_gamma), empty(beta, of_beta), dx2


# ------------------------------------------------------------------ autograd


def sft_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift = inputs
    ctx.shift_shape = shift.shape
    ctx.save_for_backward(x, scale)


def sft_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, scale = ctx.saved_tensors
    return (grad * scale).sum_to_size(x.shape), (grad * x).sum_to_size(scale.shape), grad.sum_to_size(ctx.shift_shape)


def group_norm_sft_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, gamma, beta, _, ctx.activation, _, x2, ctx.raw_mix = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, gamma, beta, mean, rstd, x2)


def needs_gradient(ctx: Any, i: int) -> bool:
    """Of input i; the dispatcher leaves out the last ones where they have their defaults."""
    return i < len(ctx.needs_input_grad) and ctx.needs_input_grad[i]


def group_norm_sft_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, gamma, beta, mean, rstd, x2 = ctx.saved_tensors
    of_x, of_gamma, of_beta, of_residual, of_x2 = (needs_gradient(ctx, i) for i in (0, 4, 5, 8, 9))
    # added last: its gradient is that of the result
    beta_is_added = ctx.activation is None and ctx.raw_mix is None and beta.shape == grad.shape
    wanted = of_x or of_x2, of_gamma, of_beta and not beta_is_added
    dx, dweight, dbias, dgamma, dbeta, dx2 = torch.ops.ragsr.group_norm_sft_backward(
        grad, x, ctx.groups, weight, bias, gamma, beta, mean, rstd, ctx.activation, x2, ctx.raw_mix, *wanted
    )
    return (
        dx if of_x else None,
        None,
        dweight,
        dbias,
        dgamma if of_gamma else None,
        (grad if beta_is_added else dbeta) if of_beta else None,
        None,
        None,
        grad if of_residual else None,
        dx2 if of_x2 else None,
        None,
    )


class Differentiable(torch.autograd.Function):
    """The op for eager mode, without what `torch.library` does on the way to its autograd: it helps small layers."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with below_autograd():
            output = torch.ops.ragsr.group_norm_sft_forward.default(*args)
        group_norm_sft_setup(ctx, args, output)
        return output

    backward = staticmethod(group_norm_sft_backward)


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
    "Tensor mean, Tensor rstd, str? activation, Tensor? x2, float? raw_mix, "
    "bool of_x=True, bool of_gamma=True, bool of_beta=True) "
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
    of_x: bool = True,
    of_gamma: bool = True,
    of_beta: bool = True,
) -> tuple[Tensor, ...]:
    args = grad, x, groups, weight, bias, gamma, beta, mean, rstd, activation, x2, raw_mix
    wanted = of_x, of_gamma, of_beta
    if left_to_plain(x, grad):
        return group_norm_sft_backward_plain(*args, *wanted)
    results = group_norm_sft_backward_fake(*args, *wanted)
    from ragsr.kernels import sft

    sft.group_norm_sft_backward(results, *args, *wanted)
    return results


def left_to_plain(x: Tensor, result: Tensor) -> bool:
    """What the kernels do not do: float64, and nothing at all."""
    return x.dtype == torch.float64 or result.numel() == 0


# Where _cuda was built, its C++ forward holds the op already and `claim` leaves it there: nothing to compile in the
# user's session, a cheaper launch, and a group that fits in shared memory is read once. Neither was measured yet.
claim("group_norm_sft_forward", group_norm_sft_forward_triton)
claim("group_norm_sft_backward", group_norm_sft_backward_triton)
