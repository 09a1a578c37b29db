"""Boxes around the windows of neighbouring positions, for `ragsr.kernels.match_near`.

The positions of `a` are cut into tiles whose patches lie in 8×8 pixels. A box may be `SPARE` steps of the tile larger
than a window: room for matches that are expected three times as far apart as the positions are, or twice and uncertain.
Beyond that more and more of what is multiplied is in nobody's window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 8  # pixels of a tile across
SPARE = 3
SCRATCH = 1 << 26  # products held at a time: 256 MiB


@dataclass(frozen=True)
class Tiling:
    """How the positions of `a` are cut into tiles, and how large a box may be."""

    grid: tuple[int, int]  # positions of a
    length: tuple[int, int]  # and of b
    window: int
    step: int  # positions of a tile across
    most: tuple[int, int]  # positions of a box
    capacity: int  # pixels of a box; 0: no products at all

    @staticmethod
    def of(a: Sequence[int], b: Sequence[int], window: int, patch: int) -> "Tiling":
        """`a` [B, H, W, C], padded; `b` [B, rows, columns] are positions."""
        step = max(1, SIDE - patch + 1)
        height, width = (min(2 * window + 1 + SPARE * step, n) for n in b[1:])
        pixels = (height + patch - 1) * (width + patch - 1)
        pays = 4 * step**2 >= SIDE**2 and a[0] * SIDE**2 * pixels <= SCRATCH  # else few share what much is made for
        grid = a[1] - patch + 1, a[2] - patch + 1
        return Tiling(grid, (b[1], b[2]), window, step, (height, width), pixels if pays else 0)

    @property
    def down(self) -> int:
        return -(-self.grid[0] // self.step)

    @property
    def across(self) -> int:
        return -(-self.grid[1] // self.step)

    @property
    def tiles(self) -> int:
        return self.down * self.across

    def parts(self, batch: int) -> Iterator[tuple[int, int]]:
        """The first tile and how many there are, so that their products stay within `SCRATCH`."""
        count = SCRATCH // (batch * SIDE**2 * self.capacity) if self.capacity else self.tiles
        for first in range(0, self.tiles, count):
            yield first, min(count, self.tiles - first)

    def smallest(self, values: Tensor, nothing: int) -> Tensor:
        """Of the positions of every tile: [B, N] -> [B, tiles]."""
        rows, columns = self.grid
        spare = 0, self.across * self.step - columns, 0, self.down * self.step - rows
        grid = F.pad(values.unflatten(1, self.grid), spare, value=nothing)
        return grid.unflatten(2, (self.across, self.step)).unflatten(1, (self.down, self.step)).amin((2, 4)).flatten(1)


def boxes_of(prior: Tensor, here: Tensor, tiling: Tiling) -> Tensor:
    """Around the windows that the priors [B, N, 3] of every tile ask for, of those that are `here` [B, N]: int32
    [B, tiles, 4]: top, left, height and width in positions. One that is too large, or empty, has no height."""
    first, side = zip(*(extent(prior[..., 1 + d], here, tiling, d) for d in (0, 1)), strict=True)
    fits = (first[0] < tiling.length[0]) & (side[0] <= tiling.most[0]) & (side[1] <= tiling.most[1])
    height = torch.where(fits, side[0], 0) if tiling.capacity else torch.zeros_like(side[0])
    return torch.stack((*first, height, side[1]), dim=2).int()


def extent(centre: Tensor, here: Tensor, tiling: Tiling, d: int) -> tuple[Tensor, Tensor]:
    """Where the windows of a tile begin along dimension `d`, and how far they reach together."""
    length, side = tiling.length[d], min(2 * tiling.window + 1, tiling.length[d])
    start = (centre.clamp(0, length - 1) - tiling.window).clamp(0, length - side)
    first = tiling.smallest(torch.where(here, start, length), length)  # `length` where none is here
    last = -tiling.smallest(torch.where(here, -start, length), length)
    return first, last - first + side
