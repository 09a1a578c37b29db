"""`baseline-64`: the encoder that needs no training and no stored numbers.

It projects a fixed descriptor on 64 random hyperplanes and keeps the signs, so that the share of differing bits
estimates the angle between two descriptors, d / 64 ≈ θ / π.

Source: M. S. Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002 (the hyperplanes);
J. Ji et al., "Super-bit locality-sensitive hashing", NIPS 2012 (making them orthogonal lowers the variance of that
estimate); iRAG Sec. 3.1 (binary codes for retrieval).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ragsr.codes.encoder import ENCODERS, CodeEncoder
from ragsr.image import to_rgb
from ragsr.ops import pack_bits


class Baseline64(CodeEncoder):
    """The training-free baseline: `describe`, 64 hyperplanes, signs. Its feature is the descriptor."""

    name = "baseline-64"
    version = 1
    bits = 64
    preprocessing = "rgb, bilinear 64x64"
    # 16 of 64 bits: of independent codes one pair in 27 000 comes as near (the binomial tail), photos of a gallery do
    # so more often, but a degraded copy mostly stays within 12
    threshold = 0.7

    def __init__(self) -> None:
        self.features = DESCRIPTOR_SIZE
        self.planes = hyperplanes(self.bits, DESCRIPTOR_SIZE, seed=64)

    def describe(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        descriptors = np.array([describe(image) for image in images]).reshape(-1, DESCRIPTOR_SIZE)
        heights = (descriptors @ self.planes.T).round(9)  # the last digits belong to the machine, not to the picture
        return pack_bits(torch.from_numpy(heights)), unit(torch.from_numpy(descriptors).float())

    def score(self, distance: int, cosine: float | None = None) -> float:
        """The cosine between two descriptors, at least 0: given, or as hyperplane codes estimate it (Charikar).

        1 for equal codes; 0 from half of the bits on, where codes agree no more than by chance. Not a probability.
        """
        return max(0.0, math.cos(math.pi * distance / self.bits) if cosine is None else cosine)


ENCODERS[Baseline64.name] = Baseline64


def unit(features: Tensor) -> Tensor:
    """Rows [n, D] of length one; zero stays zero."""
    return features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)


# ------------------------------------------------------------------ the descriptor

SIDE = 64  # pixels: every picture is first squashed to SIDE x SIDE, which hides its size, noise and blur
GRID = 4  # cells per side: coarse, so that a moved camera changes little
ORIENTATIONS = 8  # bins over half a turn
DESCRIPTOR_SIZE = GRID**2 * (1 + 2 + ORIENTATIONS)
FAINT = 2 / 255  # contrast (root mean square) below which a part is noise and is not blown up to full length


def describe(image: Image.Image) -> np.ndarray:
    """A fixed descriptor of a picture: float64 [DESCRIPTOR_SIZE], three parts of length one (or less: see `_unit`).

    1. the layout of light: mean luma on a grid, less its mean, so that brightness and contrast do not count;
    2. the layout of colour: two opponent channels on a grid; gray is zero;
    3. the layout of edges: per cell, gradient magnitude by orientation, less the mean over all bins.

    Each part is zero for a picture without content of its kind and takes both signs over the pictures of the world, as
    hyperplanes through the origin need.
    """
    small = to_rgb(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)  # widens its filter when it shrinks
    red, green, blue = np.moveaxis(np.asarray(small, dtype=np.float64) / 255, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    light = _cells(luma)
    colour = np.stack([_cells(red - green), _cells((red + green) / 2 - blue)])
    edges = _edges(luma)
    parts = (light - light.mean(), FAINT), (colour, FAINT), (edges - edges.mean(), FAINT / ORIENTATIONS)
    return np.concatenate([_unit(part, faint) for part, faint in parts])


def _cells(x: np.ndarray) -> np.ndarray:
    """The means of `x` [..., SIDE, SIDE] over the grid: [..., GRID, GRID]."""
    step = SIDE // GRID
    return x.reshape(*x.shape[:-2], GRID, step, GRID, step).mean((-3, -1))


def _edges(luma: np.ndarray) -> np.ndarray:
    """Mean gradient magnitude by orientation and cell: [ORIENTATIONS, GRID, GRID].

    An angle between two bins counts for both, by nearness, so that a small turn makes a small change.
    """
    dy, dx = np.gradient(luma)
    position = np.arctan2(dy, dx) / np.pi * ORIENTATIONS  # a line has no direction: half a turn is a whole circle
    lower = np.floor(position)
    share, first = position - lower, lower.astype(int) % ORIENTATIONS
    bins = np.arange(ORIENTATIONS)[:, None, None]
    weight = (bins == first) * (1 - share) + (bins == (first + 1) % ORIENTATIONS) * share
    return _cells(weight * np.hypot(dx, dy))


def _unit(part: np.ndarray, faint: float) -> np.ndarray:
    """Flat and of length one; shorter where the root mean square of the part is below `faint`."""
    part = part.ravel()
    return part / max(float(np.linalg.norm(part)), faint * part.size**0.5)


# ------------------------------------------------------------------ the hyperplanes


def hyperplanes(count: int, size: int, seed: int) -> np.ndarray:
    """Normal vectors of random hyperplanes, at right angles to each other: float64 [count, size], count <= size.

    The same on every machine and for ever: `coins`, made orthonormal row by row (Gram and Schmidt).
    """
    planes = coins(count, size, seed)
    for i, row in enumerate(planes):
        row -= planes[:i].T @ (planes[:i] @ row)
        row /= np.linalg.norm(row)
    return planes


def coins(count: int, size: int, seed: int) -> np.ndarray:
    """Nearly normal random integers: float64 [count, size].

    Number i, row by row from 1, is popcount(w_i) − 32, where w_i is output i of the SplitMix64 generator started at
    `seed`: the heads of 64 fair coins less their mean.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        w = np.uint64(seed) + np.arange(1, count * size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        w = (w ^ (w >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        w = (w ^ (w >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        w = w ^ (w >> np.uint64(31))
    heads = np.unpackbits(w.view(np.uint8).reshape(count, size, 8), axis=-1).sum(-1)
    return heads.astype(np.float64) - 32
