"""Feature extractors: pictures to float vectors, by which pictures are compared through the cosine.

Encoders stand on them: a trained head turns a feature into bits (`hashing.py`), and any extractor becomes an encoder
without training by hyperplanes (`FloatEncoder`). Extractors of other people's networks are in `vgg.py` and `hub.py`.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ragsr.codes.baseline import hyperplanes, unit
from ragsr.codes.encoder import CodeEncoder
from ragsr.image import to_rgb
from ragsr.ops import pack_bits

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureExtractor(Protocol):
    """Pictures of any sizes and modes to features: float32 [n, size]. May be called from several threads at once."""

    name: str
    size: int
    preprocessing: str  # names exactly how pixels are prepared

    def __call__(self, images: Sequence[Image.Image]) -> Tensor: ...


class FloatEncoder(CodeEncoder):
    """Any extractor as an encoder without training: the signs of its features at random hyperplanes.

    Made for ranking by the float features. Features that are never negative, as after a ReLU, lie in a narrow cone, and
    few bits tell them apart badly.
    """

    version = 1
    threshold = 0.6  # ReFIR warns below it, for features of VGG16; it is not calibrated for any of these

    def __init__(self, extractor: FeatureExtractor) -> None:
        bits = min(64, extractor.size // 8 * 8)  # no more planes than dimensions stand at right angles
        self.extractor = extractor
        self.name, self.features, self.bits = extractor.name, extractor.size, bits
        self.preprocessing = extractor.preprocessing
        self.planes = torch.from_numpy(hyperplanes(bits, extractor.size, seed=bits)).float()

    def describe(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        features = unit(torch.cat([self.extractor(images[i : i + 1]) for i in range(len(images))] or [self._none()]))
        return pack_bits(features @ self.planes.T), features

    def score(self, distance: int, cosine: float | None = None) -> float:
        """The cosine between the two features, at least 0, or what the codes estimate of it. Not a probability."""
        return max(0.0, math.cos(math.pi * distance / self.bits) if cosine is None else cosine)

    def _none(self) -> Tensor:
        return torch.empty(0, self.features)


def squashed(images: Sequence[Image.Image], side: int) -> Tensor:
    """Pictures as one batch [n, 3, side, side] in [0, 1], square by a bilinear filter that widens as it shrinks."""
    pixels = [np.asarray(to_rgb(image).resize((side, side), Image.Resampling.BILINEAR)) for image in images]
    stack = np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8)
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255


def normalised(
    x: Tensor, mean: Sequence[float] = IMAGENET_MEAN, deviation: Sequence[float] = IMAGENET_DEVIATION
) -> Tensor:
    """[n, 3, H, W], less the mean and by the standard deviation of every colour."""
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
