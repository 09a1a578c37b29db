"""What the float ops share: the precision they compute in, the layout of results, the checks on operands."""

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEBUG = os.environ.get("RAGSR_DEBUG", "0") not in ("", "0")  # also look at values, which waits for the device


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What ops compute in: float32 for the half types, float32 and float64 for themselves."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def wide(x: Tensor) -> Tensor:
    """`x` in the precision ops compute in."""
    return x.to(wide_dtype(x.dtype))


def like(result: Tensor, pattern: Tensor) -> Tensor:
    """`result` in the dtype and memory layout of `pattern`: what a fake that says `torch.empty_like` promises."""
    return torch.empty_like(pattern).copy_(result)


def reference_lengths(op: str, tokens: int, ref_lengths: Sequence[int] | None) -> list[int]:
    """[M_1, …, M_R], the tokens of each reference; None means one reference, or none where there are no tokens."""
    if ref_lengths is None:
        return [tokens] if tokens else []
    if any(length < 1 for length in ref_lengths) or sum(ref_lengths) != tokens:
        raise ValueError(
            f"{op}: ref_lengths is {list(ref_lengths)} and the references have {tokens} tokens together; "
            "give one positive length per reference, adding up to the tokens"
        )
    return list(ref_lengths)


def check_operands(op: str, **operands: Tensor | None) -> None:
    """All operands that are there must be floating point, of one dtype and on one device."""
    if alike(operands.values()):
        return
    present = {name: x for name, x in operands.items() if x is not None}
    first, pattern = next(iter(present.items()))
    for name, x in present.items():
        if x.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} is {x.dtype}; it must be float16, bfloat16, float32 or float64")
        if x.dtype != pattern.dtype:
            raise TypeError(f"{op}: {name} is {x.dtype} and {first} {pattern.dtype}; convert them to one dtype")
        if x.device != pattern.device:
            raise ValueError(f"{op}: {name} is on {x.device} and {first} on {pattern.device}; move them to one device")


def alike(operands: Iterable[Tensor | None]) -> bool:
    """Whether those that are there are floats of one dtype on one device. Every call asks: in a microsecond or two."""
    dtype = device = None
    for x in operands:
        if x is None:
            continue
        if dtype is None:
            dtype, device = x.dtype, x.device
        elif x.dtype != dtype or x.device != device:
            return False
    return dtype in FLOATS


def check_gate(op: str, gate: Tensor, pattern: Tensor) -> None:
    """A gate is float32, as `cosine_gate` gives it, or of the features' own dtype."""
    if gate.dtype not in (torch.float32, pattern.dtype):
        raise TypeError(f"{op}: gate is {gate.dtype}; it must be float32 or, like the features, {pattern.dtype}")
    if gate.device != pattern.device:
        raise ValueError(
            f"{op}: gate is on {gate.device} and the features on {pattern.device}; move them to one device"
        )


def check_values(op: str, *, gate: Tensor | None = None, **operands: Tensor | None) -> None:
    """What only `RAGSR_DEBUG=1` looks at, because it makes the device answer: NaN anywhere, a gate outside [0, 1]."""
    if not DEBUG or torch.compiler.is_compiling():
        return
    for name, x in (*operands.items(), ("gate", gate)):
        if x is not None and x.isnan().any():
            raise ValueError(f"{op}: {name} holds NaN; find the layer that made it")
    if gate is not None and gate.numel() and (gate.min() < 0 or gate.max() > 1):
        raise ValueError(f"{op}: gate lies in [{gate.min().item():g}, {gate.max().item():g}]; it must lie in [0, 1]")
