"""PSNR and SSIM the way each project computes them.

The same two images differ by more than a decibel between projects: Y in studio range is flatter than R, G and B, some
cut a border off, some round to 8 bits first. So a number is worth something only with its preset: print both.

    PSNR = 10 log10(1 / mean((a − b)²))            pixels in [0, 1]
    SSIM = mean of (2 μa μb + C1)(2 σab + C2) / ((μa² + μb² + C1)(σa² + σb² + C2)),  C1 = 0.01², C2 = 0.03²

with the means, variances and covariance of a sliding window that stays inside the image.

Source: Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004; the
presets follow the published evaluation code of the projects they are named after.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ragsr.errors import InputError

C1, C2 = 0.01**2, 0.03**2
Picture = Tensor | Image.Image  # [1, 3, H, W] in [0, 1], or 8-bit RGB


@dataclass(frozen=True)
class Luma:
    """Y = offset + weights · (R, G, B), all in [0, 1]."""

    weights: tuple[float, float, float]
    offset: float


@dataclass(frozen=True)
class Window:
    """The sliding window of SSIM."""

    weights: tuple[float, ...]  # along each side; the window is their outer product and sums to one
    sample: bool = False  # variances with n − 1 in the denominator


@dataclass(frozen=True)
class Preset:
    """How one project compares two images."""

    source: str
    psnr_on: Luma | None  # None: R, G and B together
    ssim_on: Luma | None  # None: the mean of SSIM on R, on G and on B
    border: int  # pixels cut off on every side
    window: Window
    rounded: bool = False  # both images to 8 bits first
    ssim_rounded: bool = False  # what SSIM is taken on to 8 bits as well
    ssim_floor: bool = False  # a negative contrast-structure term counts as zero
    psnr_epsilon: float = 0.0  # added to the mean square: 1e-8 ends the scale at 80 dB


def _gaussian(size: int, sigma: float) -> tuple[float, ...]:
    weights = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return tuple(w / sum(weights) for w in weights)


STUDIO = Luma((65.481 / 255, 128.553 / 255, 24.966 / 255), 16 / 255)  # BT.601, as MATLAB's rgb2ycbcr
TTSR_LUMA = Luma((65.738 / 256, 129.057 / 256, 25.064 / 256), 0.0)
GAUSSIAN = Window(_gaussian(11, 1.5))
SQUARE = Window((1 / 7,) * 7, sample=True)

PRESETS = {
    "refir": Preset(
        "ReFIR: pyiqa, Y in studio range, border 4",
        psnr_on=STUDIO,
        ssim_on=STUDIO,
        border=4,
        window=GAUSSIAN,
        ssim_rounded=True,
        ssim_floor=True,
        psnr_epsilon=1e-8,
    ),
    "irag": Preset(
        "iRAG: scikit-image with its defaults, RGB, no border", psnr_on=None, ssim_on=None, border=0, window=SQUARE
    ),
    "c2": Preset(
        "C2-Matching and DATSR: 8 bits, Y in studio range, border 4",
        psnr_on=STUDIO,
        ssim_on=STUDIO,
        border=4,
        window=GAUSSIAN,
        rounded=True,
    ),
    "ttsr": Preset(
        "TTSR: 8 bits, PSNR on its own Y, SSIM on RGB, no border",
        psnr_on=TTSR_LUMA,
        ssim_on=None,
        border=0,
        window=GAUSSIAN,
        rounded=True,
    ),
}

# ------------------------------------------------------------------ public names


def psnr(a: Picture, b: Picture, preset: str = "refir") -> float:
    """Peak signal-to-noise ratio in dB: higher is nearer, `inf` for equal images unless the preset says otherwise.

    Images are tensors [1, 3, H, W] in [0, 1] or pictures. Raises `InputError` for different or too small sizes, for NaN
    and for an unknown preset.
    """
    rules = find_preset(preset)
    a, b = _prepared(a, b, rules)
    error = float((_channels(a, rules.psnr_on) - _channels(b, rules.psnr_on)).square().mean()) + rules.psnr_epsilon
    return -10 * math.log10(error) if error > 0 else math.inf


def ssim(a: Picture, b: Picture, preset: str = "refir") -> float:
    """Structural similarity: 1 for equal images. Input and errors as in `psnr`."""
    rules = find_preset(preset)
    a, b = (_channels(x, rules.ssim_on) for x in _prepared(a, b, rules))
    size = len(rules.window.weights)
    if min(a.shape[-2:]) < size:
        raise InputError(
            f"SSIM ({preset}) needs {size} pixels a side after a border of {rules.border} is cut off; "
            f"{a.shape[-1]}x{a.shape[-2]} are left"
        )
    if rules.ssim_rounded:
        a, b = _to_8_bits(a), _to_8_bits(b)
    return float(_ssim_map(a, b, rules).mean())


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises `InputError` with the list."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]


# ------------------------------------------------------------------ details


def _prepared(a: Picture, b: Picture, rules: Preset) -> tuple[Tensor, Tensor]:
    """Both images as float64 [1, 3, H, W] without their border."""
    x, y = as_tensor(a), as_tensor(b)
    if x.shape != y.shape:
        raise InputError(f"images of different sizes cannot be compared: {size_text(x)} and {size_text(y)}")
    if min(x.shape[-2:]) <= 2 * rules.border:
        raise InputError(f"nothing is left of {size_text(x)} when a border of {rules.border} pixels is cut off")
    if rules.rounded:
        x, y = _to_8_bits(x), _to_8_bits(y)
    inside = slice(rules.border, -rules.border or None)
    return x[..., inside, inside], y[..., inside, inside]


def as_tensor(x: Picture) -> Tensor:
    if isinstance(x, Image.Image):
        x = torch.from_numpy(np.array(x.convert("RGB"))).permute(2, 0, 1)[None] / 255
    if x.ndim != 4 or x.shape[:2] != (1, 3):
        raise InputError(f"an image tensor must be [1, 3, height, width]; this one is {list(x.shape)}")
    if not x.isfinite().all():
        raise InputError("the image tensor holds NaN or infinite values; there is nothing to measure")
    return x.detach().cpu().double()


def size_text(x: Tensor) -> str:
    return f"{x.shape[-1]}x{x.shape[-2]}"


def _to_8_bits(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round() / 255


def _channels(x: Tensor, luma: Luma | None) -> Tensor:
    """What is compared: Y [1, 1, H, W], or the image as it is."""
    if luma is None:
        return x
    weights = torch.tensor(luma.weights, dtype=x.dtype)
    return (x * weights[:, None, None]).sum(1, keepdim=True) + luma.offset


def _ssim_map(a: Tensor, b: Tensor, rules: Preset) -> Tensor:
    window = rules.window
    mean_a, mean_b = _slide(a, window), _slide(b, window)
    bessel = len(window.weights) ** 2 / (len(window.weights) ** 2 - 1) if window.sample else 1.0
    variances = bessel * (_slide(a * a, window) - mean_a**2 + _slide(b * b, window) - mean_b**2)
    covariance = bessel * (_slide(a * b, window) - mean_a * mean_b)
    structure = (2 * covariance + C2) / (variances + C2)
    if rules.ssim_floor:
        structure = structure.clamp(min=0)
    return (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1) * structure


def _slide(x: Tensor, window: Window) -> Tensor:
    """The weighted mean in every window inside `x` [1, C, H, W]: [1, C, H − n + 1, W − n + 1]."""
    weights = torch.tensor(window.weights, dtype=x.dtype)
    rows = x.transpose(0, 1)  # channels as a batch: each is filtered by itself
    rows = F.conv2d(rows, weights[None, None, :, None])
    return F.conv2d(rows, weights[None, None, None, :]).transpose(0, 1)
