"""What the float ops share: the precision they compute in, the layout of results, the checks on operands."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wide(x: Tensor) -> Tensor:
    """`x` in the precision ops compute in: float32 for the half types, its own for float32 and float64."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


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
    present = {name: x for name, x in operands.items() if x is not None}
    first, pattern = next(iter(present.items()))
    for name, x in present.items():
        if x.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} is {x.dtype}; it must be float16, bfloat16, float32 or float64")
        if x.dtype != pattern.dtype:
            raise TypeError(f"{op}: {name} is {x.dtype} and {first} {pattern.dtype}; convert them to one dtype")
        if x.device != pattern.device:
            raise ValueError(f"{op}: {name} is on {x.device} and {first} on {pattern.device}; move them to one device")


def check_gate(op: str, gate: Tensor, pattern: Tensor) -> None:
    """A gate is float32, as `cosine_gate` gives it, or of the features' own dtype."""
    if gate.dtype not in (torch.float32, pattern.dtype):
        raise TypeError(f"{op}: gate is {gate.dtype}; it must be float32 or, like the features, {pattern.dtype}")
    if gate.device != pattern.device:
        raise ValueError(
            f"{op}: gate is on {gate.device} and the features on {pattern.device}; move them to one device"
        )
