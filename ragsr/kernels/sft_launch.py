"""How `group_norm_sft` is cut into programs: pure functions of shapes, and one table per architecture.

Nothing is tuned on the user's machine, nothing is read back from the GPU: the same call always launches the same
programs, which a CUDA graph may record.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ragsr.kernels.sft_tiles import View


class Tuning(NamedTuple):
    fused_few: int  # largest group, in bytes, for one program, where there are fewer groups than multiprocessors
    fused_many: int  # … where every multiprocessor has one
    programs: int  # per multiprocessor, where statistics are split


# Compute capability -> numbers; the next lower one serves a chip that is not listed. None was measured yet: the limits
# say that a multiprocessor alone reads some 50 KB in the time of the two extra launches, and that all groups in work
# together should fit in L2.
TUNING = {
    80: Tuning(fused_few=96 << 10, fused_many=256 << 10, programs=8),
    90: Tuning(fused_few=128 << 10, fused_many=256 << 10, programs=8),
    100: Tuning(fused_few=128 << 10, fused_many=512 << 10, programs=8),
    120: Tuning(fused_few=96 << 10, fused_many=256 << 10, programs=6),
}
TILE = 2048  # elements of a tile
FUSED_TILE = 8192  # of one program that has a multiprocessor to itself: loads in flight are what it needs
WHOLE = 8192  # largest group, in padded elements, that a program holds in registers
LANES = 512  # elements of a tile that a warp takes: sixteen per thread, two vectors of float16
WIDEST = 64  # channels of a channels-last tile: 128 bytes of float16
MIN_TILES = 4  # tiles of a part, so that partial results stay few beside what they sum
MAX_SPLITS = 512


class Chip(NamedTuple):
    multiprocessors: int
    tuning: Tuning


@functools.cache
def chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(132, TUNING[90])  # the interpreter
    found = torch.cuda.get_device_properties(device)
    capability = 10 * found.major + found.minor
    return Chip(found.multi_processor_count, TUNING[max(k for k in TUNING if k <= max(capability, min(TUNING)))])


class Plan(NamedTuple):
    CB: int  # channels of a tile
    PB: int  # positions of a tile
    fused: bool
    whole: bool = False  # fused, and a group is one tile
    splits: int = 1  # parts of the positions
    span: int = 0  # positions of a part
    warps: int = 4


def plan(chip: Chip, z: View, shape: tuple[int, int, int], groups: int, itemsize: int, fused_tile: int) -> Plan:
    """For features [batch, channels, positions], whose strides `z` tells."""
    batch, channels, positions = shape
    members = channels // groups
    limit = chip.tuning.fused_few if batch * groups < chip.multiprocessors else chip.tuning.fused_many
    if members * positions * itemsize <= limit:
        return fused_plan(z, members, positions, fused_tile)
    CB, PB = tile_of(z, channels, positions)
    blocks = batch * math.ceil(channels / CB)
    tiles = math.ceil(positions / PB)
    wanted = math.ceil(chip.multiprocessors * chip.tuning.programs / blocks)
    splits = max(1, min(wanted, tiles // MIN_TILES, MAX_SPLITS))
    span = math.ceil(tiles / splits) * PB
    return Plan(CB, PB, fused=False, splits=math.ceil(positions / span), span=span)


def fused_plan(z: View, members: int, positions: int, tile: int) -> Plan:
    """Channels of a tile divide the group's, so that no lane idles, or one tile covers them all."""
    padded = power_of_2(members) * power_of_2(positions)
    if padded <= WHOLE:
        return Plan(power_of_2(members), power_of_2(positions), fused=True, whole=True, warps=warps_of(padded))
    if dense_channels(z):
        CB = power_of_2(members) if members <= 2 * WIDEST else members & -members
        PB = min(power_of_2(positions), max(1, tile // CB))
    else:
        PB = min(power_of_2(positions), tile)
        CB = math.gcd(members, tile // PB)
    return Plan(CB, PB, fused=True, warps=warps_of(CB * PB))


def tile_of(z: View, channels: int, positions: int) -> tuple[int, int]:
    """The dense dimension first, as wide as it is useful; the other one fills the tile."""
    if dense_channels(z):
        CB = min(power_of_2(channels), WIDEST)
        return CB, min(power_of_2(positions), TILE // CB)
    PB = min(power_of_2(positions), TILE)
    return min(power_of_2(channels), TILE // PB), PB


def dense_channels(z: View) -> bool:
    return z.channel == 1 and z.position != 1


def warps_of(elements: int) -> int:
    return min(16, max(1, elements // LANES))


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


# ------------------------------------------------------------------ tensors as views


def view_of(x: Tensor, shape: torch.Size | None = None) -> View:
    """[B, C, *] with one stride for all positions; read in place wherever it has one, else copied."""
    x = x if shape is None else x.expand(shape)
    position = position_stride(x)
    if position is None:
        x = x.contiguous()
        position = 1
    return View(x, x.stride(0), x.stride(1), position)


def position_stride(x: Tensor) -> int | None:
    """The stride s with which position 0, 1, 2, … lie at 0, s, 2s, …, if there is one."""
    dims = [(size, stride) for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size != 1]
    if not dims:
        return 1
    for (_, outer), (size, inner) in itertools.pairwise(dims):
        if outer != size * inner:
            return None
    return dims[-1][1]


def needs_64_bits(shape: tuple[int, int, int], *views: View | None) -> bool:
    """Whether an offset inside a sample, or one tile past it, overflows 32 bits."""
    _, channels, positions = shape
    room = (1 << 31) - (1 << 24)
    return any((channels * v.channel + positions * v.position) > room for v in views if v is not None)
