"""Photos made bad at random, as photos become bad: blur, resizing, noise and JPEG, twice over, and then once more.

Everything drawn comes from the generator that is given, so a seed makes the same bad photo for ever (with the same
versions of Pillow and NumPy). Pictures are PIL or tensors; what comes back is of the same kind, and smaller.

Source: Wang et al., "Real-ESRGAN: training real-world blind super-resolution with pure synthetic data", ICCVW 2021,
Sec. 3 (the two orders, the kernels, the last sinc filter); ranges are ours, chosen for factors of 2 to 8 and for photos
that people still keep.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ragsr.image import image_to_tensor, tensor_to_image

FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
LEAST = 16  # pixels: no side becomes shorter


@dataclass(frozen=True)
class Recipe:
    """How bad: ranges that a degradation draws from. `probability` is of each step of the second order and the sinc."""

    scale: tuple[float, float] = (2.0, 8.0)  # the photo becomes this many times smaller, drawn evenly in its logarithm
    blur: tuple[float, float] = (0.2, 2.5)  # sigma in pixels of the photo as it is at that step
    noise: tuple[float, float] = (0.0, 18.0)  # standard deviation in 8-bit steps
    jpeg: tuple[int, int] = (35, 95)  # quality
    probability: float = 0.6

    def weaker(self, strength: float) -> "Recipe":
        """From nothing but the change of size at 0 to the whole at 1."""
        least, most = self.jpeg
        return replace(
            self,
            blur=(strength * self.blur[0], strength * self.blur[1]),
            noise=(strength * self.noise[0], strength * self.noise[1]),
            jpeg=(round(most - strength * (most - least)), most),
            probability=strength * self.probability,
        )


STRONG = Recipe()
PLAIN = Recipe(blur=(0.0, 0.8), noise=(0.0, 0.0), jpeg=(90, 96), probability=0.0)  # little more than made smaller


def degrade_image(image: Image.Image, generator: np.random.Generator, recipe: Recipe = STRONG) -> Image.Image:
    """The picture made bad and smaller by a factor of `recipe.scale`."""
    low, high = np.log(recipe.scale)
    scale = float(np.exp(generator.uniform(low, high)))
    size = [max(LEAST, round(side / scale)) for side in image.size]
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    between = scale ** generator.uniform(0.2, 1.0)  # the first order goes part of the way
    first = [max(LEAST, round(side / between)) for side in image.size]
    pixels = blurred(pixels, random_kernel(generator, recipe.blur))
    pixels = resized(pixels, first, generator)
    pixels = jpeg(noisy(pixels, generator, recipe.noise), generator, recipe.jpeg)
    if generator.random() < recipe.probability:
        pixels = blurred(pixels, random_kernel(generator, [0.6 * sigma for sigma in recipe.blur]))
    pixels = resized(pixels, size, generator)
    if generator.random() < recipe.probability:
        pixels = noisy(pixels, generator, [0.6 * sigma for sigma in recipe.noise])
    if generator.random() < recipe.probability:
        pixels = blurred(pixels, sinc_kernel(float(generator.uniform(math.pi / 3, math.pi))))
    if generator.random() < recipe.probability:
        pixels = jpeg(pixels, generator, recipe.jpeg)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def degrade_tensor(x: Tensor, generator: np.random.Generator, recipe: Recipe = STRONG) -> Tensor:
    """The same for [1, 3, H, W] in [0, 1]; through 8 bits, on the CPU."""
    return image_to_tensor(degrade_image(tensor_to_image(x), generator, recipe)).to(x.device, x.dtype)


# ------------------------------------------------------------------ blur


def random_kernel(generator: np.random.Generator, sigmas: Sequence[float]) -> np.ndarray:
    """A Gaussian, round or drawn out along any direction: float32 [k, k], sum 1."""
    low, high = sigmas
    one, other, angle = generator.uniform(low, high), generator.uniform(low, high), generator.uniform(0, math.pi)
    if generator.random() < 0.5:
        other = one
    return gaussian_kernel(max(float(one), 1e-2), max(float(other), 1e-2), float(angle))


def gaussian_kernel(along: float, across: float, angle: float) -> np.ndarray:
    """Standard deviations along `angle` and across it: float32 [k, k], sum 1; k reaches three of the larger."""
    radius = max(1, math.ceil(3 * max(along, across)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = np.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
    return (kernel / kernel.sum()).astype(np.float32)


def sinc_kernel(cutoff: float, radius: int = 5) -> np.ndarray:
    """The round low-pass filter that rings as sharpening and JPEG do: float32 [k, k], sum 1.

    cutoff / (2 π r) · J1(cutoff · r) (Real-ESRGAN Eq. 6), J1 by its integral, for which 64 places are exact enough.
    """
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    r = np.hypot(x, y)
    t = (np.arange(64) + 0.5) / 64 * math.pi
    bessel = np.cos(t - (cutoff * r)[..., None] * np.sin(t)).mean(-1)
    kernel = cutoff * bessel / (2 * math.pi * np.where(r == 0, 1, r))
    kernel[radius, radius] = cutoff**2 / (4 * math.pi)
    return (kernel / kernel.sum()).astype(np.float32)


def blurred(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3] with the borders repeated."""
    radius = len(kernel) // 2
    x = torch.from_numpy(np.pad(pixels, ((radius, radius), (radius, radius), (0, 0)), mode="edge")).permute(2, 0, 1)
    return torch.nn.functional.conv2d(x[:, None], torch.from_numpy(kernel)[None, None])[:, 0].permute(1, 2, 0).numpy()


# ------------------------------------------------------------------ size, noise, JPEG


def resized(pixels: np.ndarray, size: list[int], generator: np.random.Generator) -> np.ndarray:
    """To (width, height) with a filter drawn at random."""
    picture = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    return np.asarray(picture.resize((size[0], size[1]), FILTERS[generator.integers(len(FILTERS))]), dtype=np.float32)


def noisy(pixels: np.ndarray, generator: np.random.Generator, sigmas: Sequence[float]) -> np.ndarray:
    """With noise of every pixel's own: of the sensor (stronger where it is bright) or even; in colour or gray."""
    sigma = float(generator.uniform(sigmas[0], sigmas[1]))
    channels = 3 if generator.random() < 0.6 else 1
    noise = generator.standard_normal((*pixels.shape[:2], channels), dtype=np.float32) * sigma
    if generator.random() < 0.5:
        noise = noise * np.sqrt(pixels.clip(0, 255) / 127.5)
    return pixels + noise


def jpeg(pixels: np.ndarray, generator: np.random.Generator, qualities: tuple[int, int]) -> np.ndarray:
    """Through JPEG at a quality drawn at random."""
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    picture.save(buffer, "JPEG", quality=int(generator.integers(qualities[0], qualities[1] + 1)))
    return np.asarray(Image.open(buffer), dtype=np.float32)
