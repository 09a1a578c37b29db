"""Who computes separate attention on a GPU, and in what blocks: the tables of `attention.py`, without Triton.

Nothing here was measured on a GPU yet. The owners follow from the work there is, the blocks from what compiles without
spilling a register (tests/kernels/ahead/attention.json). `make gpu` measures both owners beside each other; whoever
has its numbers should change these tables.

`RAGSR_ATTENTION`, read at import, takes one wherever it can: to compare them, and to step around a kernel that is wrong
or slow on a GPU nobody tried. It is `fused`, `composite` or `xformers`, the composite from xformers' attention.
"""

import importlib.util
import os
from typing import NamedTuple

import torch

FORCED = os.environ.get("RAGSR_ATTENTION") or None
LARGEST = 256  # head dim of the fused kernel
COMFORTABLE = 160  # head dim up to which its blocks are of a good size


class Owner(NamedTuple):
    name: str  # fused or composite
    reason: str


class Blocks(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int
    park: bool  # the blend waits in memory while the keys go by, for it has no room in the registers


FUSED = "one pass over the keys, no attention stored twice; not measured yet"
WIDE = "wide heads leave the registers room for small blocks only; not measured yet"
OWNERS = {
    torch.float16: Owner("fused", FUSED),
    torch.bfloat16: Owner("fused", FUSED),
}


# compute capability -> largest padded head dim -> blocks
BLOCKS: dict[int, dict[int, Blocks]] = {
    8: {
        96: Blocks(128, 64, 8, 3, False),
        128: Blocks(128, 16, 8, 3, False),
        160: Blocks(128, 16, 8, 3, True),
        256: Blocks(32, 32, 8, 2, True),
    },
    9: {
        64: Blocks(128, 64, 8, 3, False),
        128: Blocks(128, 32, 8, 3, False),
        160: Blocks(128, 32, 8, 3, True),
        256: Blocks(32, 32, 8, 2, True),
    },
    10: {
        96: Blocks(128, 64, 8, 3, False),
        128: Blocks(64, 64, 8, 2, True),
        160: Blocks(64, 32, 8, 2, True),
        256: Blocks(32, 32, 8, 2, True),
    },
    0: {
        64: Blocks(128, 32, 8, 3, False),
        96: Blocks(128, 32, 8, 3, False),
        128: Blocks(64, 32, 8, 2, True),
        160: Blocks(64, 16, 8, 1, True),
        256: Blocks(32, 32, 8, 2, True),
    },
}


def owner_of(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> Owner:
    """Who computes separate attention for these tensors, and why."""
    if FORCED not in (None, "fused", "composite", "xformers"):
        raise ValueError(f"RAGSR_ATTENTION is '{FORCED}'; it must be fused, composite or xformers, or not be set")
    if FORCED == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ValueError("RAGSR_ATTENTION is xformers, which is not installed: pip install xformers, or unset it")
    refusal = why_not_fused(dtype, head_dim, capability)
    if FORCED == "fused" and refusal:
        raise ValueError(f"RAGSR_ATTENTION is fused, but {refusal}")
    if FORCED:
        return Owner("fused" if FORCED == "fused" else "composite", f"RAGSR_ATTENTION={FORCED}")
    if refusal or head_dim > COMFORTABLE:
        return Owner("composite", refusal or WIDE)
    return OWNERS[dtype]


def why_not_fused(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> str | None:
    """The reason the fused kernel refuses, or None."""
    if dtype not in OWNERS:
        return f"the fused kernel takes float16 and bfloat16, as the tensor cores do; q is {dtype}"
    if head_dim % 8 or not 0 < head_dim <= LARGEST:
        return f"the fused kernel takes head dims that are multiples of 8 up to {LARGEST}; q has {head_dim}"
    if capability < (8, 0):
        return f"the fused kernel needs compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
    return None


def blocks_for(capability: tuple[int, int], head_dim: int) -> Blocks:
    """The blocks for the padded head dim; GPUs with 99 KB of shared memory (8.6, 8.9, 12.x) share a column."""
    column = capability[0] if capability in ((8, 0), (9, 0)) or capability[0] == 10 else 0
    padded = sum(parts_of(head_dim))
    return next(blocks for limit, blocks in BLOCKS[column].items() if padded <= limit)


def parts_of(head_dim: int) -> tuple[int, int]:
    """The head dim as two powers of two, at least 16 for the tensor cores: 80 -> (64, 16); 128 -> (128, 0)."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    second = max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0
    return (2 * first, 0) if second == first else (first, second)


def owners(capability: tuple[int, int]) -> dict[str, str]:
    """For `ragsr env`: who computes separate attention in which dtype on a GPU of this capability, and why."""
    found = {str(dtype).removeprefix("torch."): owner_of(dtype, 64, capability) for dtype in (*OWNERS, torch.float32)}
    return {name: f"{owner.name} ({owner.reason})" for name, owner in found.items()}
