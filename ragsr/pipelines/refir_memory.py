"""How much memory a run will take, before it begins, and which tile fits.

    total = weights + max(network + records, picture)

    weights    of all parts, or of the largest where they wait on the CPU
    records    keys and values of all references at one step: known exactly
    network    what a pass holds at its peak, at most WIDE widths of the first level for each half of the guidance
    picture    what the auto-encoder's decoder holds, DEEP widths of its last level over the whole picture

Counted on the real networks: 26 widths for Stable Diffusion 1.5 and 2, 16 for XL, 6 for their decoder. What the cache
keeps beyond one step has its own budget.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ragsr.chains import ChainPlan, Host, chosen_layers

GB = 1 << 30
WIDE, DEEP = 28, 6.5
SIDES = (2048, 1536, 1280, 1024, 768, 512)  # pixels of a tile, if the whole picture does not fit
ROOM = 0.9  # of the free memory that a run may plan with

Size = tuple[int, int]  # height, width in pixels


class MemoryEstimate(NamedTuple):
    """Bytes."""

    weights: int
    network: int
    records: int
    picture: int

    @property
    def total(self) -> int:
        return self.weights + max(self.network + self.records, self.picture)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GB:.2f}" for name, value in self._asdict().items())
        return f"{self.total / GB:.2f} GB ({parts})"


def estimate_memory(
    host: Host, plan: ChainPlan, result: Size, references: Sequence[Size], rows: int, tile: int | None
) -> MemoryEstimate:
    """For pictures of these sizes; `rows` is 2 with guidance and 1 without, `tile` the side of tiles in pixels."""
    parameter = next(host.network.parameters())
    nbytes = parameter.element_size()
    seen = [min(side, tile or side) for side in result]
    largest = max([area(seen, host), *(area(size, host) for size in references)])
    width, deep = first_width(host.network), first_width(host.parts().get("vae"))
    return MemoryEstimate(
        weights=weight_bytes(host),
        network=WIDE * rows * width * largest * nbytes,
        records=sum(record_bytes(host, plan, size, rows) for size in references),
        picture=int(DEEP * deep * result[0] * result[1] * max(nbytes, 4)),
    )


def record_bytes(host: Host, plan: ChainPlan, size: Size, rows: int) -> int:
    """Keys and values that one reference of this size leaves at one step."""
    total = 0
    for layer, _ in plan.weigh(chosen_layers(host, plan)):
        tokens = 1
        for side in size:
            tokens *= -(-side // (host.latent_stride * layer.stride))
        weight = layer.attention.to_k.weight
        total += 2 * rows * tokens * weight.shape[0] * weight.element_size()
    return total


def area(size: Sequence[int], host: Host) -> int:
    return -(-size[0] // host.latent_stride) * -(-size[1] // host.latent_stride)


def first_width(model: Any) -> int:
    """Channels of the first level; 0 for no model."""
    widths = getattr(getattr(model, "config", None), "block_out_channels", None)
    return widths[0] if widths else 0


def weight_bytes(host: Host) -> int:
    device = next(host.network.parameters()).device
    sizes = [sum(p.numel() * p.element_size() for p in part.parameters()) for part in host.parts().values()]
    offloaded = device.type == "cpu" and torch.cuda.is_available()
    return max(sizes) if offloaded else sum(sizes)


def free_bytes(device: torch.device) -> int | None:
    """What a run could still get on a GPU, besides the weights that are there; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def fitting_tile(
    host: Host, plan: ChainPlan, result: Size, references: Sequence[Size], rows: int, device: torch.device
) -> int | None:
    """The largest tile, in pixels, with which a run fits; None is the whole picture. Without a GPU it is None."""
    free = free_bytes(device)
    if free is None:
        return None
    for tile in (None, *(side for side in SIDES if side < max(result))):
        estimate = estimate_memory(host, plan, result, references, rows, tile)
        if estimate.network + estimate.records <= ROOM * free:
            return tile
    return SIDES[-1]


def next_smaller(tile: int | None, result: Size) -> int | None:
    """The tile to try after running out of memory; None if there is none."""
    present = max(result) if tile is None else tile
    return next((side for side in SIDES if side < present), None)
