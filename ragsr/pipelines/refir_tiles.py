"""Large latents in tiles: in each step the network predicts tile by tile, and the predictions are blended.

Each tile counts for a Gaussian around its centre, whose variance is 0.01 of its side squared; every tile sees its
references whole. The sampler then takes one step of the whole latent, so tiles agree again before the next.

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
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def latent_tiles(height: int, width: int, side: int) -> list[Place]:
    """Places that cover the latent, of at most `side` pixels a side and nearly one size."""
    tiles = plan_tiles(height, width, side, max(1, side // OVERLAP))
    return [(slice(t.rows.start, t.rows.stop), slice(t.columns.start, t.columns.stop)) for t in tiles]


def tile_boxes(height: int, width: int, tile: int | None, stride: int) -> list[Box]:
    """The same in pixels of a picture whose latent is `stride` times smaller; without `tile` there is one."""
    side = (tile or max(height, width)) // stride
    places = latent_tiles(height // stride, width // stride, side)
    return [(x.start * stride, y.start * stride, x.stop * stride, y.stop * stride) for y, x in places]


def predict_in_tiles(predict: Callable[[int], Tensor], places: Sequence[Place], pattern: Tensor) -> Tensor:
    """The blend of the predictions [1, C, h, w] of all tiles, in the shape and dtype of `pattern`."""
    if len(places) == 1:
        return predict(0)
    total = torch.zeros_like(pattern, dtype=torch.float32)
    counted = total.new_zeros(pattern.shape[-2:])
    for number, (rows, columns) in enumerate(places):
        weight = bell((rows, columns)).to(total)
        total[..., rows, columns] += weight * predict(number)
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
    """The mean over the passes of a run of each gate, on the grid of the latent; 0 in tiles without the reference."""

    def __init__(self, references: int, size: tuple[int, int]) -> None:
        self.references, self.size = references, size  # R; (h, w) of the latent
        self.clear()

    def clear(self) -> "GateMaps":
        """Forget all, for a run that begins again."""
        self.gates: dict[str, Tensor] = {}
        self.taken: dict[str, Tensor] = {}
        self.counted = torch.zeros(self.size)
        return self

    def look_at(self, place: Place, used: Sequence[int], weights: Tensor) -> None:
        """Where the gates of the next pass belong, and to which references: their numbers and weights [len(used)]."""
        self.place, self.used, self.weights = place, used, weights
        self.counted[place] += bell(place)

    def note(self, tap: str, gate: Tensor) -> None:  # float32 [B, len(used), H, W]
        """A gate of the tile at `place`: that of the conditional half, which comes last."""
        rows, columns = self.place
        size = rows.stop - rows.start, columns.stop - columns.start
        seen = bell(self.place).to(gate) * F.interpolate(gate[-1:], size, mode="bilinear")[0]
        for sums, values in ((self.gates, seen), (self.taken, seen * self.weights[:, None, None])):
            total = sums.setdefault(tap, gate.new_zeros(self.references, *self.size))
            for r, value in zip(self.used, values, strict=True):
                total[r, rows, columns] += value

    def means(self) -> dict[str, Tensor]:
        """Of the gates M_r, per tap float32 [R, h, w], on the CPU."""
        return {tap: total.cpu() / self.counted for tap, total in self.gates.items()}

    def means_taken(self) -> dict[str, Tensor]:
        """The same of strength times share times gate."""
        return {tap: total.cpu() / self.counted for tap, total in self.taken.items()}
