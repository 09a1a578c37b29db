"""NIQE: how far an image is from natural photos, without a truth to compare it with. Lower is better.

Pixels, made to local mean zero and local deviation one, have a distribution that is nearly the same in all undistorted
photos. Its shape, and those of the products of neighbours, are the 18 features of a patch at each of two scales. A
multivariate normal distribution over the patches of good photos is the model; another one over the patches of the image
is compared with it:

    NIQE = √((μ − μ′)ᵀ ((Σ + Σ′) / 2)⁻¹ (μ − μ′))

The model that ships was fitted to photos of our own, so that values do not equal those of other programs; they compare
images with each other.

Source: A. Mittal et al., "Making a 'completely blind' image quality analyzer", IEEE Signal Processing Letters 20, 2013;
the moment-matching fit: N. Lasmar et al., "Multiscale skewed heavy tailed model for texture analysis", ICIP 2009.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ragsr.errors import InputError
from ragsr.files import replacing
from ragsr.metrics.fidelity import Picture, as_tensor, size_text

PATCH = 96  # pixels a side, at the finer scale
SHARP = 0.75  # of the sharpest patch: only patches this sharp of a good photo make the model
SIGMA, RADIUS = 7 / 6, 3  # of the local window
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
LUMA = (0.299, 0.587, 0.114)
SHIPPED = Path(__file__).parents[1] / "assets" / "niqe" / "model.safetensors"


@dataclass(frozen=True)
class NaturalModel:
    """The distribution of the features of good photos."""

    mean: Tensor  # float64 [36]
    covariance: Tensor  # float64 [36, 36]

    @classmethod
    def load(cls, path: str | Path = SHIPPED) -> Self:
        """From a file that `save` wrote."""
        try:
            return cls(**load_file(path))
        except (OSError, TypeError) as error:
            raise InputError(f"{path}: no model of natural photos ({error}); fit one with fit_niqe") from error

    def save(self, path: str | Path) -> None:
        with replacing(Path(path)) as temporary:
            save_file({"mean": self.mean, "covariance": self.covariance}, temporary)


def niqe(image: Picture, model: NaturalModel | None = None) -> float:
    """The distance of an image from natural photos; 0 would be as natural as they are.

    A tensor [1, 3, H, W] in [0, 1] or a picture, with sides of at least 96 pixels; borders that do not fill a patch do
    not count. `model`: what ships, or one of your own. Raises `InputError` for smaller images.
    """
    natural = model or shipped_model()
    features, _ = patch_features(as_tensor(image))
    difference = natural.mean - features.mean(0)
    covariance = (natural.covariance + covariance_of(features)) / 2
    return float((difference @ torch.linalg.pinv(covariance, hermitian=True) @ difference).clamp(min=0).sqrt())


def fit_niqe(photos: Iterable[Picture]) -> NaturalModel:
    """The model of good photos, from their sharp patches. Raises `InputError` for fewer than 100 of those."""
    chosen = []
    for photo in photos:
        features, sharpness = patch_features(as_tensor(photo))
        chosen.append(features[sharpness > SHARP * sharpness.max()])
    patches = torch.cat(chosen) if chosen else torch.empty(0, 36)
    if len(patches) < 100:
        raise InputError(f"{len(patches)} sharp patches are too few to fit the 36 features; give more photos")
    return NaturalModel(patches.mean(0), covariance_of(patches))


@cache
def shipped_model() -> NaturalModel:
    return NaturalModel.load()


# ------------------------------------------------------------------ features


def patch_features(image: Tensor) -> tuple[Tensor, Tensor]:  # [1, 3, H, W] -> [patches, 36], [patches]
    """The features of every whole patch of an image, and how sharp it is: the mean local deviation."""
    height, width = (side // PATCH * PATCH for side in image.shape[-2:])
    if not height or not width:
        raise InputError(f"NIQE needs sides of at least {PATCH} pixels; this image is {size_text(image)}")
    luma = 255 * torch.einsum("c,bchw->bhw", torch.tensor(LUMA).to(image), image)[:, None, :height, :width]
    luma = luma.round()
    scales, sharpness = [], None
    for scale in (1, 2):
        normal, deviation = normalised(luma)
        side = PATCH // scale
        scales.append(features_of(patches_of(normal, side)))
        if sharpness is None:
            sharpness = patches_of(deviation, side).mean((-2, -1))
        luma = F.interpolate(luma, scale_factor=0.5, mode="bicubic", antialias=True)
    assert sharpness is not None
    return torch.cat(scales, dim=1), sharpness


def patches_of(x: Tensor, side: int) -> Tensor:
    """[1, 1, H, W] -> [patches, side, side]."""
    return x[0, 0].unfold(0, side, side).unfold(1, side, side).flatten(0, 1)


def normalised(luma: Tensor) -> tuple[Tensor, Tensor]:
    """(I − μ) / (σ + 1) and σ, with local means and deviations under a Gaussian; edges are repeated."""
    distance = torch.arange(-RADIUS, RADIUS + 1, dtype=luma.dtype)
    weights = torch.exp(-(distance**2) / (2 * SIGMA**2))
    weights /= weights.sum()

    def local(x: Tensor) -> Tensor:
        """One direction after the other, by shifted sums: a convolution with one channel is slow in double."""
        x = F.pad(x, [RADIUS] * 4, mode="replicate")
        for dim in (-2, -1):
            length = x.shape[dim] - 2 * RADIUS
            x = torch.stack([w * x.narrow(dim, i, length) for i, w in enumerate(weights.tolist())]).sum(0)
        return x

    mean = local(luma)
    deviation = (local(luma * luma) - mean * mean).abs().sqrt()
    return (luma - mean) / (deviation + 1), deviation


def features_of(patches: Tensor) -> Tensor:  # [P, S, S] -> [P, 18]
    """The shape of the distribution of each patch, and of the products of neighbours in four directions."""
    shape, left, right = skewed_fit(patches)
    features = [shape, (left + right) / 2]
    for shift in NEIGHBOURS:
        shape, left, right = skewed_fit(patches * patches.roll(shift, (1, 2)))
        offset = (right - left) * (torch.lgamma(2 / shape) - torch.lgamma(1 / shape)).exp()
        features += [shape, offset, left, right]
    return torch.stack(features, dim=1)


def skewed_fit(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [P, S, S] -> 3 x [P]
    """The asymmetric generalised normal distribution with the moments of each patch: shape, left and right scale."""
    x = patches.flatten(1)
    squares = x.square()
    left, right = ((squares * side).sum(1) / side.sum(1).clamp(min=1) for side in (x < 0, x > 0))
    left, right = left.sqrt(), right.sqrt()
    skew = torch.where(right > 0, left / right.clamp(min=1e-12), 1.0)
    ratio = x.abs().mean(1) ** 2 / squares.mean(1).clamp(min=1e-12)
    ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shapes, ratios = shape_table()
    shape = shapes[torch.searchsorted(ratios, ratio).clamp(max=len(shapes) - 1)]
    stretch = ((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2).exp()
    return shape, left * stretch, right * stretch


@cache
def shape_table() -> tuple[Tensor, Tensor]:
    """Shapes, and what E|x|² / E x² is for each: Γ(2/α)² / (Γ(1/α) Γ(3/α))."""
    shapes = torch.arange(200, 10_001, dtype=torch.float64) / 1000
    logs = 2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)
    return shapes, logs.exp()


def covariance_of(features: Tensor) -> Tensor:
    """[n, 36] -> [36, 36]; of a single patch there is none."""
    return torch.cov(features.T) if len(features) > 1 else features.new_zeros(36, 36)
