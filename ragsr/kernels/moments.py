"""Mean and spread of each channel over the tokens, in two levels of fixed order, and AdaIN from them.

A tile of tokens gives, per channel, its mean and M2 = Σ (x − mean)²: deviations are summed, never squares, so a large
common mean costs no digits. `affine_kernel` merges the tiles (Chan: M2 = Σ M2_t + Σ n_t (mean_t − mean)²), always in
the same order, and gives for every channel what AdaIN needs:

    out = (x − centre) · gain + target,   gain = σ_style / σ_x

Or, folded for a linear layer that follows, out = x · gain + shift: then centre is 0 and target holds the shift.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # tokens in a tile of `moments_kernel` and `align_kernel`
CHANNELS = 64  # channels at a time; 64 of two bytes are a line of 128 bytes
TILES = 32  # tiles that `affine_kernel` merges at a time
EPS_VARIANCE = 1e-5  # added to the variance, inside the root


class Moments(NamedTuple):
    """Per-tile statistics of [rows, tokens, channels]: tiles of `size` tokens, the last one shorter."""

    tiles: Tensor  # [rows, tiles, 2, C]: mean, M2
    tokens: int
    size: int


class Affine(NamedTuple):
    """out = (x − centre) · gain + target, each [rows, C]; a row that is not `used` stays as it is."""

    gain: Tensor
    centre: Tensor
    target: Tensor
    used: Tensor  # int32 [rows]


class Blended(NamedTuple):
    """An attention blended from several, not aligned yet; without statistics where nobody will align it."""

    out: Tensor  # [B, H, N, D]
    own: Moments | None  # of the image's own attention
    fused: Moments | None  # of `out`
    touched: Tensor | None  # int32 [B·H, tiles]: whether the tile's gate is not 0 throughout


# ------------------------------------------------------------------ on the device


@triton.jit
def tile_moments(x, inside, count):
    """Mean and M2 over the rows of a tile [rows, C] of which `count` are `inside`: [C] each."""
    mean = tl.sum(tl.where(inside[:, None], x, 0.0), 0) / count
    deviation = tl.where(inside[:, None], x - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@triton.jit
def store_moments(pointer, x, inside, count, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Channels FIRST … FIRST + WIDTH − 1 of a tile into [2, D]."""
    mean, spread = tile_moments(x, inside, count)
    channel = FIRST + tl.arange(0, WIDTH)
    tl.store(pointer + channel, mean, mask=channel < D)
    tl.store(pointer + D + channel, spread, mask=channel < D)


@triton.jit(do_not_specialize=["H", "N", "C"])
def moments_kernel(
    x, moments, H, N, C, x_b, x_h, x_n, x_c, ACC: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """x [B, H, N, C] -> moments [B·H, tiles, 2, C]; a program takes a tile of tokens and a block of channels."""
    tiles = tl.cdiv(N, ROWS)
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    token = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = token < N
    source = x + (row // H) * x_b + (row % H) * x_h
    source += token.to(tl.int64)[:, None] * x_n + channel.to(tl.int64)[None, :] * x_c
    values = tl.load(source, mask=inside[:, None] & (channel < C)[None, :], other=0.0).to(ACC)
    mean, spread = tile_moments(values, inside, tl.minimum(ROWS, N - tile * ROWS))
    target = moments + (row * tiles + tile) * 2 * C + channel
    tl.store(target, mean, mask=channel < C)
    tl.store(target + C, spread, mask=channel < C)


@triton.jit
def merged(moments, tiles, tokens, SIZE: tl.constexpr, channel, C, ACC: tl.constexpr, TILES: tl.constexpr):
    """Mean and unbiased variance of all tokens from the tiles [tiles, 2, C] of one row."""
    inside = (channel < C)[None, :]
    total = tl.zeros([channel.shape[0]], ACC)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        count = tl.maximum(tl.minimum(SIZE, tokens - tile * SIZE), 0)  # 0 past the last tile
        mean = tl.load(
            moments + tile[:, None] * 2 * C + channel[None, :], mask=(count > 0)[:, None] & inside, other=0.0
        )
        total += tl.sum(mean * count[:, None], 0)
    centre = total / tokens
    spread = tl.zeros([channel.shape[0]], ACC)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        count = tl.maximum(tl.minimum(SIZE, tokens - tile * SIZE), 0)
        source = moments + tile[:, None] * 2 * C + channel[None, :]
        mask = (count > 0)[:, None] & inside
        distance = tl.load(source, mask=mask, other=0.0) - centre[None, :]
        spread += tl.sum(tl.load(source + C, mask=mask, other=0.0) + distance * distance * count[:, None], 0)
    return centre, spread / tl.maximum(tokens - 1, 1)


@triton.jit(do_not_specialize=["x_tiles", "x_tokens", "style_tiles", "style_tokens", "C"])
def affine_kernel(
    x,  # [rows, x_tiles, 2, C]
    style,  # [rows, style_tiles, 2, C]
    touched,  # int32 [rows, x_tiles], or None: whether a tile differs from the style at all
    gain,  # [rows, C], and so are
    centre,
    target,
    used,  # int32 [rows]
    x_tiles,
    x_tokens,
    style_tiles,
    style_tokens,
    C,
    EPS: tl.constexpr,
    X_SIZE: tl.constexpr,
    STYLE_SIZE: tl.constexpr,
    FOLD: tl.constexpr,
    ACC: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mean, variance = merged(x + row * x_tiles * 2 * C, x_tiles, x_tokens, X_SIZE, channel, C, ACC, TILES)
    style_mean, style_variance = merged(
        style + row * style_tiles * 2 * C, style_tiles, style_tokens, STYLE_SIZE, channel, C, ACC, TILES
    )
    factor = tl.sqrt(style_variance + EPS) / tl.sqrt(variance + EPS)
    any_touched = 1
    if touched is not None:
        any_touched = 0
        for first in range(0, x_tiles, TILES):
            tile = first + tl.arange(0, TILES)
            flags = tl.load(touched + row * x_tiles + tile, mask=tile < x_tiles, other=0)
            any_touched = tl.maximum(any_touched, tl.max(flags, 0))
    if FOLD:
        style_mean -= factor * mean
        mean = mean * 0.0
        factor = tl.where(any_touched != 0, factor, 1.0)
        style_mean = tl.where(any_touched != 0, style_mean, 0.0)
    place = row * C + channel
    tl.store(gain + place, factor, mask=channel < C)
    tl.store(centre + place, mean, mask=channel < C)
    tl.store(target + place, style_mean, mask=channel < C)
    tl.store(used + row, any_touched)


@triton.jit(do_not_specialize=["H", "N", "C"])
def align_kernel(
    x,  # [B, H, N, C]
    out,  # [B, H, N, C], may be x itself
    gain,  # [B·H, C], and so are
    centre,
    target,
    used,  # int32 [B·H]
    H,
    N,
    C,
    x_b,
    x_h,
    x_n,
    x_c,
    out_b,
    out_h,
    out_n,
    out_c,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(N, ROWS)
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    if tl.load(used + row) != 0:
        token = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        inside = channel < C
        factor = tl.load(gain + row * C + channel, mask=inside, other=0.0)[None, :]
        away = tl.load(centre + row * C + channel, mask=inside, other=0.0)[None, :]
        goal = tl.load(target + row * C + channel, mask=inside, other=0.0)[None, :]
        mask = (token < N) & inside[None, :]
        column = channel.to(tl.int64)[None, :]
        source = x + (row // H) * x_b + (row % H) * x_h + token * x_n + column * x_c
        aligned = (tl.load(source, mask=mask, other=0.0).to(ACC) - away) * factor + goal
        place = out + (row // H) * out_b + (row % H) * out_h + token * out_n + column * out_c
        tl.store(place, aligned.to(out.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------ launchers


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def tile_count(tokens: int, size: int) -> int:
    return -(-tokens // size)


def empty_moments(x: Tensor, size: int) -> Moments:  # x [B, H, N, C]
    batch, heads, tokens, channels = x.shape
    shape = (batch * heads, tile_count(tokens, size), 2, channels)
    return Moments(x.new_empty(shape, dtype=wide(x)), tokens, size)


def moments(x: Tensor) -> Moments:  # x [B, H, N, C]
    found = empty_moments(x, ROWS)
    rows, tiles, _, channels = found.tiles.shape
    grid = (rows * tiles, triton.cdiv(channels, CHANNELS))
    sizes = (x.shape[1], x.shape[2], channels, *x.stride())
    with torch.cuda.device_of(x):
        moments_kernel[grid](x, found.tiles, *sizes, ACC=accumulator(x), ROWS=ROWS, CHANNELS=CHANNELS)
    return found


def affine(x: Moments, style: Moments, touched: Tensor | None = None, *, fold: bool = False) -> Affine:
    """What turns x into the statistics of the style. A row of `touched` [rows, tiles of x] that is all 0 stays."""
    rows, tiles, _, channels = x.tiles.shape
    gain, centre, target = (x.tiles.new_empty(rows, channels) for _ in range(3))
    used = torch.empty(rows, dtype=torch.int32, device=gain.device)
    with torch.cuda.device_of(gain):
        affine_kernel[rows, triton.cdiv(channels, CHANNELS)](
            *(x.tiles, style.tiles, touched, gain, centre, target, used),
            *(tiles, x.tokens, style.tiles.shape[1], style.tokens, channels),
            EPS=EPS_VARIANCE,
            X_SIZE=x.size,
            STYLE_SIZE=style.size,
            FOLD=fold,
            ACC=accumulator(gain),
            TILES=TILES,
            CHANNELS=CHANNELS,
        )
    return Affine(gain, centre, target, used)


def align(x: Tensor, by: Affine, out: Tensor) -> Tensor:  # [B, H, N, C] each
    """(x − centre) · gain + target into `out`, which may be x; rows that are not used are left as they are."""
    batch, heads, tokens, channels = x.shape
    grid = (batch * heads * tile_count(tokens, ROWS), triton.cdiv(channels, CHANNELS))
    with torch.cuda.device_of(x):
        align_kernel[grid](
            *(x, out, *by, heads, tokens, channels, *x.stride(), *out.stride()),
            ACC=accumulator(x),
            ROWS=ROWS,
            CHANNELS=CHANNELS,
        )
    return out


def empty_blended(out: Tensor, size: int, *, statistics: bool) -> Blended:
    if not statistics:
        return Blended(out, None, None, None)
    own, fused = empty_moments(out, size), empty_moments(out, size)
    return Blended(out, own, fused, own.tiles.new_empty(own.tiles.shape[:2], dtype=torch.int32))


def affine_of(blended: Blended, *, fold: bool = False) -> Affine:
    """What turns the blend into the statistics of the own attention."""
    assert blended.own is not None  # whoever aligns has asked for statistics
    assert blended.fused is not None
    return affine(blended.fused, blended.own, blended.touched, fold=fold)


def adain(x: Tensor, style: Tensor) -> Tensor:
    """x [..., N, C] with the channel statistics of style [..., N', C], in the layout of x."""
    out = torch.empty_like(x)
    if x.numel():
        _adain_into(out, x, style)
    return out


def _adain_into(out: Tensor, x: Tensor, style: Tensor) -> None:
    if x.ndim > 4:  # views of one leading index each: reshaping could copy
        for one in zip(out, x, style, strict=True):
            _adain_into(*one)
        return
    out, x, style = (y[(None,) * (4 - y.ndim)] for y in (out, x, style))
    align(x, affine(moments(x), moments(style)), out)
