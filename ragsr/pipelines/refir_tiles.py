"""Large latents in tiles: in each step the network predicts tile by tile, and the predictions are blended.

Each tile counts for a Gaussian around its centre, whose variance is 0.01 of its side squared; every tile sees the whole
reference. The sampler then takes one step of the whole latent, so tiles agree again before the next.

Source: the latent tiling of StableSR and SeeSR.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ragsr.tiling import plan_tiles

VARIANCE = 0.01
OVERLAP = 8  # a tile shares at least this part, an eighth, of its side with its neighbour

Place = tuple[slice, slice]  # rows and columns of the latent


def latent_tiles(height: int, width: int, side: int) -> list[Place]:
    """Places that cover the latent, of at most `side` pixels a side and nearly one size."""
    tiles = plan_tiles(height, width, side, max(1, side // OVERLAP))
    return [(slice(t.rows.start, t.rows.stop), slice(t.columns.start, t.columns.stop)) for t in tiles]


def predict_in_tiles(predict: Callable[[Place], Tensor], tiles: Sequence[Place], pattern: Tensor) -> Tensor:
    """The blend of the predictions [1, C, h, w] of all tiles, in the shape and dtype of `pattern`."""
    if len(tiles) == 1:
        return predict(tiles[0])
    total = torch.zeros_like(pattern, dtype=torch.float32)
    counted = total.new_zeros(pattern.shape[-2:])
    for rows, columns in tiles:
        weight = bell((rows, columns)).to(total)
        total[..., rows, columns] += weight * predict((rows, columns))
        counted[rows, columns] += weight
    return (total / counted).to(pattern.dtype)


def bell(place: Place) -> Tensor:
    """What a tile counts for: [rows, columns]."""
    down, across = (gaussian(part.stop - part.start) for part in place)
    return down[:, None] * across


def gaussian(length: int) -> Tensor:
    x = (torch.arange(length) - (length - 1) / 2) / length
    return torch.exp(-x.square() / (2 * VARIANCE))


class GateMaps:
    """The mean over the passes of a run of each gate, on the grid of the latent."""

    def __init__(self) -> None:
        self.place: Place = (slice(0, 0), slice(0, 0))
        self.size = (0, 0)
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def clear(self) -> "GateMaps":
        """Forget all, for a run that begins again."""
        self.sums.clear()
        self.counts.clear()
        return self

    def note(self, tap: str, gate: Tensor) -> None:  # float32 [B, R, H, W]
        """A gate of the tile at `place`: that of the conditional half, which comes last."""
        rows, columns = self.place
        weight = bell(self.place).to(gate)
        size = rows.stop - rows.start, columns.stop - columns.start
        total = self.sums.setdefault(tap, gate.new_zeros(gate.shape[1], *self.size))
        total[:, rows, columns] += weight * F.interpolate(gate[-1:], size, mode="bilinear")[0]
        self.counts.setdefault(tap, gate.new_zeros(self.size))[rows, columns] += weight

    def means(self) -> dict[str, Tensor]:
        """Per tap float32 [R, h, w], on the CPU."""
        return {tap: (total / self.counts[tap]).cpu() for tap, total in self.sums.items()}
