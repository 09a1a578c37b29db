"""Feature modulation at the shapes of StableSR and iRAG (SPADE, 512 px) and of SUPIR (ZeroSFT), forward and backward.

A call's bytes are those of the maps that must be read or written once: x, γ, β and the result forward; the gradient, x
and γ, and the gradients of x and γ backward (that of β is the gradient itself).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from limits import read_limit
from torch import Tensor

from . import Case, LeftOut, only_on

GROUPS = 32
REGIMES = ("block", "cluster", "grid", "split")  # of the CUDA C++ forward, csrc/cuda/sft_plan.h


def spade(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.group_norm(x, GROUPS, weight, bias) * (1 + gamma) + beta


def zero_sft(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, x2: Tensor, mix: float) -> Tensor:
    z = torch.cat((x, x2), dim=1)
    return (F.group_norm(z, GROUPS, weight, bias) * (1 + gamma) + beta) * mix + z * (1 - mix)


def composed(args: tuple[Any, ...]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """What PyTorch composes for the arguments of the forward op, and the arguments of that."""
    x, _, weight, bias, gamma, beta, _, _, _, x2, mix = args
    return (
        (spade, (x, weight, bias, gamma, beta)) if x2 is None else (zero_sft, (x, weight, bias, gamma, beta, x2, mix))
    )


def forward_peers(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[..., Callable[[], Any]]:
    def prepare(*args: Any) -> Callable[[], Any]:
        function, given = composed(args)
        run = wrap(function)
        return lambda: run(*given)

    return prepare


def backward_peers(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[..., Callable[[], Any]]:
    def prepare(grad: Tensor, x: Tensor, _: int, *parameters: Any) -> Callable[[], Any]:
        leaves = [p.detach().requires_grad_() for p in (x, *parameters[:4])]
        out = wrap(spade)(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return prepare


def in_regime(name: str) -> Callable[..., Callable[[], Any]]:
    """The CUDA C++ forward, forced; left out where it was not built, and where the device cannot do these maps so."""

    def prepare(*args: Any) -> Callable[[], Any]:
        run = getattr(torch.ops.ragsr, "group_norm_sft_forward_as", None)
        if run is None:
            raise LeftOut
        try:
            run(name, *args)
        except RuntimeError:
            raise LeftOut from None
        return lambda: run(name, *args)[0]

    return only_on("cuda", prepare)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def maps(shape: tuple[int, ...], dtype: torch.dtype, layout: str, count: int) -> list[Tensor]:
    found = torch.randn(count, *shape).to(dtype).unbind()
    return [x.contiguous(memory_format=torch.channels_last) if layout else x for x in found]


def operands(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
    """γ and β are the halves of one convolution's output, as in the layers."""
    (x,) = maps(shape, dtype, layout, 1)
    (modulation,) = maps((shape[0], 2 * shape[1], *shape[2:]), dtype, layout, 1)
    return x, GROUPS, *torch.randn(2, shape[1]).to(dtype).unbind(), *modulation.chunk(2, dim=1)


def forward(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "") -> Case:
    def make() -> tuple[Any, ...]:
        return *operands(shape, dtype, layout), 1e-5, None, None, None, None

    return case("group_norm_sft_forward", "SPADE", make, shape, dtype, layout, 4, forward_peers, REGIMES)


def concatenation(*shape: int, share: float = 0.9, dtype: torch.dtype = torch.float32) -> Case:
    def make() -> tuple[Any, ...]:
        x, *rest = operands(shape, dtype, "")
        one, two = (half.contiguous() for half in x.split((shape[1] * 2 // 3, shape[1] - shape[1] * 2 // 3), dim=1))
        return one, *rest, 1e-5, None, None, two, share

    return case("group_norm_sft_forward", "ZeroSFT", make, shape, dtype, "", 4, forward_peers)


def backward(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "") -> Case:
    def make() -> tuple[Any, ...]:
        args = operands(shape, dtype, layout)
        _, mean, rstd = torch.ops.ragsr.group_norm_sft_forward(*args)
        (grad,) = maps(shape, dtype, layout, 1)
        wanted = True, True, False  # the gradient of β is `grad`: autograd passes it on
        return grad, *args, mean, rstd, None, None, None, *wanted

    return case("group_norm_sft_backward", "SPADE", make, shape, dtype, layout, 5, backward_peers)


def case(
    op: str,
    layer: str,
    make: Callable[[], tuple[Any, ...]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    passes: int,
    peers: Callable[..., Any],
    regimes: tuple[str, ...] = (),
) -> Case:
    name = f"{layer} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {layout}".strip()
    bytes_ = float(passes * torch.Size(shape).numel() * dtype.itemsize)
    around = {"eager": peers(eager), "torch.compile": peers(compiled)}
    around |= {f"CUDA C++, {regime}": in_regime(regime) for regime in regimes}
    return Case(op, name, make, bytes_, "B", around, limit=lambda device: read_limit(device, int(bytes_)))


def alone(*shape: int) -> Case:
    def mul_add(x: Tensor, scale: Tensor, shift: Tensor) -> Callable[[], Tensor]:
        return lambda: scale * x + shift

    def addcmul(x: Tensor, scale: Tensor, shift: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.addcmul(shift, x, scale)

    name = "x".join(map(str, shape)) + " float32"
    work = 16.0 * torch.Size(shape).numel()
    peers = {"mul, add": mul_add, "addcmul": addcmul}

    def make() -> tuple[Tensor, ...]:
        return tuple(torch.randn(3, *shape).unbind())

    return Case("sft", name, make, work, "B", peers, limit=lambda device: read_limit(device, int(work)))


CASES = [
    *(forward(b, *s) for s in [(320, 64, 64), (640, 32, 32)] for b in (1, 2)),
    *(forward(2, *s, dtype=torch.bfloat16) for s in [(320, 64, 64), (640, 32, 32)]),
    forward(2, 320, 64, 64, layout="channels-last"),
    forward(1, 1280, 8, 8),
    concatenation(1, 960, 64, 64),
    *(backward(b, *s) for s in [(320, 64, 64), (640, 32, 32)] for b in (1, 2)),
    backward(2, 320, 64, 64, dtype=torch.bfloat16),
    backward(2, 320, 64, 64, layout="channels-last"),
    alone(2, 320, 64, 64),
]
