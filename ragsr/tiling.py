"""Tiles: restore an image of any size in parts, without seams.

                    start                          stop
    ────────────────┼──────────────────────────────┼────────────────
          context   │ fade in │          │ fade out│   context
                    └─ a tile owns this part of the low-quality image

A tile is restored together with `context` pixels of the image around it, which are then thrown away: where a model
looks no further than its context, every tile agrees with the whole image. Neighbours share `OVERLAP` pixels or a little
more, over which one fades into the other along a raised cosine; the weights of all tiles add up to one at every pixel.

Memory: the model sees (tile + 2 · context)² low-quality pixels at a time; the result takes 16 bytes per output pixel.
All lengths are low-quality pixels.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ragsr.errors import InputError

AUTO = 256  # a side of a tile when nobody says otherwise: 1024² output pixels at scale 4
OVERLAP = 16
SMALLEST = 4 * OVERLAP  # room for a tile to fade in and out without the two meeting
LEAST = 16  # a smaller side is continued by reflection before a model sees it

ModelCall = Callable[[Tensor], tuple[Tensor, Tensor]]  # [1, 3, h, w] -> [1, 3, h·scale, w·scale], [1, 1, same]
PartCall = Callable[["Part"], tuple[Tensor, Tensor]]  # the same


@dataclass(frozen=True)
class Span:
    """A tile's part along one side."""

    start: int
    stop: int
    fade_in: int  # pixels shared with the tile before
    fade_out: int  # pixels shared with the tile after

    def weights(self, scale: int) -> Tensor:
        """What the tile counts for: float32 [(stop − start) · scale]."""
        weights = torch.ones((self.stop - self.start) * scale)
        if self.fade_in:
            weights[: self.fade_in * scale] = _rise(self.fade_in * scale)
        if self.fade_out:
            weights[-self.fade_out * scale :] = _rise(self.fade_out * scale).flip(0)
        return weights


@dataclass(frozen=True)
class Tile:
    rows: Span
    columns: Span


@dataclass(frozen=True)
class Part:
    """What a model is given of an image: a tile together with the context that is thrown away afterwards."""

    pixels: Tensor  # [1, 3, h, w]
    rows: slice  # where they lie in the image
    columns: slice
    margins: tuple[int, int, int, int]  # how many of them are context: left, right, top, bottom


def tile_size(tile: int | str) -> int:
    """`tile` as a number of pixels: "auto" is 256. Raises `InputError` for anything but that and numbers from 64 on."""
    if tile == "auto":
        return AUTO
    try:
        size = int(tile)
    except ValueError:
        size = 0
    if size < SMALLEST:
        raise InputError(f'tile is {tile!r}; it is "auto" or a number of low-quality pixels from {SMALLEST} on')
    return size


def plan_tiles(height: int, width: int, tile: int, overlap: int = OVERLAP) -> list[Tile]:
    """Cover height x width with tiles of at most `tile` pixels a side and of nearly one size, row by row."""
    columns = _plan_spans(width, tile, overlap)
    return [Tile(down, across) for down in _plan_spans(height, tile, overlap) for across in columns]


def restore_tiled(
    model_call: ModelCall,
    low: Tensor,  # [1, 3, h, w]
    scale: int,
    tile: int,
    context: int,
) -> tuple[Tensor, Tensor]:  # [1, 3, h·scale, w·scale] and [1, 1, h·scale, w·scale]
    """Restore `low` tile by tile and blend: the restored image and the weight of the references, where `low` lies."""
    return restore_parts(lambda part: model_call(part.pixels), low, scale, tile, context)


def restore_parts(part_call: PartCall, low: Tensor, scale: int, tile: int, context: int) -> tuple[Tensor, Tensor]:
    """`restore_tiled` for a model that asks where a part lies. What it answers for the margins counts for nothing."""
    height, width = low.shape[-2:]
    low = at_least(low)
    rows, columns = low.shape[-2:]
    blended = [low.new_zeros(1, channels, rows * scale, columns * scale) for channels in (3, 1)]
    for one in plan_tiles(rows, columns, tile):
        part = _part(low, one, context)
        kept = _slice(one.rows, scale, part.rows.start), _slice(one.columns, scale, part.columns.start)
        place = _slice(one.rows, scale), _slice(one.columns, scale)
        weights = one.rows.weights(scale)[:, None] * one.columns.weights(scale)
        for total, piece in zip(blended, part_call(part), strict=True):
            total[..., place[0], place[1]] += piece.to(low)[..., kept[0], kept[1]] * weights.to(low)
    restored, weight = (total[..., : height * scale, : width * scale] for total in blended)
    return restored, weight


def at_least(low: Tensor) -> Tensor:
    """`low` as models see it, continued by reflection to sides of `LEAST`."""
    return reflect_to(low, max(low.shape[-2], LEAST), max(low.shape[-1], LEAST))


def reflect_to(x: Tensor, height: int, width: int) -> Tensor:
    """Continue `x` [..., h, w] downwards and to the right by reflection, as often as needed; one row is repeated."""
    for dim, length in ((-2, height), (-1, width)):
        size = x.shape[dim]
        if length > size:
            period = max(1, 2 * (size - 1))
            position = torch.arange(length, device=x.device) % period
            x = x.index_select(dim, torch.minimum(position, period - position).clamp(max=size - 1))
    return x


# ------------------------------------------------------------------ details


def _plan_spans(length: int, tile: int, overlap: int) -> list[Span]:
    if length <= tile:
        return [Span(0, length, 0, 0)]
    count = ceil((length - overlap) / (tile - overlap))
    size = ceil((length - overlap) / count) + overlap
    starts = [i * (length - size) // (count - 1) for i in range(count)]
    shared = [0, *(before + size - after for before, after in itertools.pairwise(starts)), 0]
    return [Span(start, start + size, shared[i], shared[i + 1]) for i, start in enumerate(starts)]


def _part(low: Tensor, tile: Tile, context: int) -> Part:
    rows, columns = _widen(tile.rows, context, low.shape[-2]), _widen(tile.columns, context, low.shape[-1])
    margins = (
        tile.columns.start - columns.start,
        columns.stop - tile.columns.stop,
        tile.rows.start - rows.start,
        rows.stop - tile.rows.stop,
    )
    return Part(low[..., rows, columns], rows, columns, margins)


def _widen(span: Span, context: int, length: int) -> slice:
    return slice(max(0, span.start - context), min(length, span.stop + context))


def _slice(span: Span, scale: int, origin: int = 0) -> slice:
    return slice((span.start - origin) * scale, (span.stop - origin) * scale)


def _rise(length: int) -> Tensor:
    """From 0 to 1 along half a cosine; with its mirror image it adds up to one."""
    return 0.5 - 0.5 * torch.cos(torch.pi * (torch.arange(length) + 0.5) / length)
