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

from . import Case, LeftOut, only_on, reduced

GROUPS = 32
REGIMES = ("block", "cluster", "grid", "split")  # of the CUDA C++ forward, csrc/cuda/sft_plan.h


# ------------------------------------------------------------------ what PyTorch composes

Layer = Callable[..., Tensor]  # of the map, weight, bias, γ and β


def modulated(z: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.group_norm(z, GROUPS, weight, bias) * (1 + gamma) + beta


def with_addcmul(z: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return torch.addcmul(beta, F.group_norm(z, GROUPS, weight, bias), 1 + gamma)


def normalised(z: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Less than the op does."""
    return F.group_norm(z, GROUPS, weight, bias)


def compiled(function: Layer) -> Layer:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def eager(function: Layer) -> Layer:
    return function


PEERS = {
    "eager": (eager, modulated),
    "addcmul": (eager, with_addcmul),
    "torch.compile": (compiled, modulated),
    "F.group_norm": (eager, normalised),
}


def zero_sft(modulate: Layer) -> Layer:
    def layer(x: Tensor, x2: Tensor, mix: float, *modulation: Tensor) -> Tensor:
        z = torch.cat((x, x2), dim=1)
        return modulate(z, *modulation) * mix + z * (1 - mix)

    return layer


def forward_peer(wrap: Callable[[Layer], Layer], modulate: Layer) -> Callable[..., Callable[[], Any]]:
    def prepare(x: Tensor, _: int, *args: Any) -> Callable[[], Any]:
        modulation, x2, mix = args[:4], args[-2], args[-1]
        run = wrap(modulate if x2 is None else zero_sft(modulate))
        given = (x, *modulation) if x2 is None else (x, x2, mix, *modulation)
        return lambda: run(*given)

    return prepare


def backward_peer(wrap: Callable[[Layer], Layer], modulate: Layer) -> Callable[..., Callable[[], Any]]:
    def prepare(grad: Tensor, x: Tensor, _: int, *args: Any) -> Callable[[], Any]:
        leaves = [p.detach().requires_grad_() for p in (x, *args[:4])]
        out = wrap(modulate)(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True, allow_unused=True)

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


# ------------------------------------------------------------------ the cases


def in_size(size: tuple[int, ...]) -> tuple[int, ...]:
    return (*size[:2], *(reduced(side) for side in size[2:]))


def maps(shape: tuple[int, ...], dtype: torch.dtype, layout: str, count: int) -> list[Tensor]:
    found = torch.randn(count, *shape).to(dtype).unbind()
    return [x.contiguous(memory_format=torch.channels_last) if layout else x for x in found]


def operands(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
    """γ and β are the halves of one convolution's output, as in the layers."""
    (x,) = maps(shape, dtype, layout, 1)
    (modulation,) = maps((shape[0], 2 * shape[1], *shape[2:]), dtype, layout, 1)
    return x, GROUPS, *torch.randn(2, shape[1]).to(dtype).unbind(), *modulation.chunk(2, dim=1)


def forward(*size: int, dtype: torch.dtype = torch.float32, layout: str = "") -> Case:
    shape = in_size(size)

    def make() -> tuple[Any, ...]:
        return *operands(shape, dtype, layout), 1e-5, None, None, None, None

    return case("group_norm_sft_forward", "SPADE", make, shape, dtype, layout, 4, forward_peer, REGIMES)


def concatenation(*size: int, share: float = 0.9, dtype: torch.dtype = torch.float32) -> Case:
    shape = in_size(size)

    def make() -> tuple[Any, ...]:
        x, *rest = operands(shape, dtype, "")
        one, two = (half.contiguous() for half in x.split((shape[1] * 2 // 3, shape[1] - shape[1] * 2 // 3), dim=1))
        return one, *rest, 1e-5, None, None, two, share

    return case("group_norm_sft_forward", "ZeroSFT", make, shape, dtype, "", 4, forward_peer)


def backward(*size: int, dtype: torch.dtype = torch.float32, layout: str = "") -> Case:
    shape = in_size(size)

    def make() -> tuple[Any, ...]:
        args = operands(shape, dtype, layout)
        _, mean, rstd = torch.ops.ragsr.group_norm_sft_forward(*args)
        (grad,) = maps(shape, dtype, layout, 1)
        wanted = True, True, False  # the gradient of β is `grad`: autograd passes it on
        return grad, *args, mean, rstd, None, None, None, *wanted

    return case("group_norm_sft_backward", "SPADE", make, shape, dtype, layout, 5, backward_peer)


def case(
    op: str,
    layer: str,
    make: Callable[[], tuple[Any, ...]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    passes: int,
    peer: Callable[..., Any],
    regimes: tuple[str, ...] = (),
) -> Case:
    name = f"{layer} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {layout}".strip()
    bytes_ = float(passes * torch.Size(shape).numel() * dtype.itemsize)
    peers = {who: peer(*how) for who, how in PEERS.items()}
    peers |= {f"CUDA C++, {regime}": in_regime(regime) for regime in regimes}
    return Case(op, name, make, bytes_, "B", peers, limit=lambda device: read_limit(device, int(bytes_)))


def alone(*size: int) -> Case:
    shape = in_size(size)

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
