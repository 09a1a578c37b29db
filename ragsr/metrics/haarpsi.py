"""HaarPSI: how similar two images look, from the coefficients of Haar wavelets. It needs no learned weights.

Of luma, the magnitudes of the two finest scales are compared place by place, and places count by the largest
coefficient of the third scale; of the two chroma channels, local means are compared.

    HaarPSI = l⁻¹(Σ l(similarity) · weight / Σ weight)²        l(x) = 1 / (1 + exp(−α x))

1 for equal images, down to 0. It follows what people say about pairs of images more closely than PSNR and SSIM do.

Source: R. Reisenhofer et al., "A Haar wavelet-based perceptual similarity index for image quality assessment", Signal
Processing: Image Communication 61, 2018, Eq. 9 to 13; its constants C = 30 and α = 4.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ragsr.errors import InputError
from ragsr.metrics.fidelity import Picture, as_tensor, size_text

C, ALPHA = 30.0, 4.2  # for pixels in [0, 255]
SMALLEST = 16  # pixels: the coarsest wavelet covers eight of an image that was halved first
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def haarpsi(a: Picture, b: Picture) -> float:
    """Perceptual similarity in [0, 1]: 1 for equal images.

    Images are tensors [1, 3, H, W] in [0, 1] or pictures, of one size with sides of at least 16 pixels. Raises
    `InputError` otherwise.
    """
    x, y = as_tensor(a), as_tensor(b)
    if x.shape != y.shape or min(x.shape[-2:]) < SMALLEST:
        raise InputError(
            f"HaarPSI compares images of one size with sides of {SMALLEST} pixels and more; these are {size_text(x)} "
            f"and {size_text(y)}"
        )
    one, other = (halved(255 * torch.einsum("ic,bchw->bihw", torch.tensor(YIQ).to(z), z)) for z in (x, y))
    similarities, weights = [], []
    for transpose in (False, True):
        fine, coarse = zip(*(wavelets(z[:, :1], transpose) for z in (one, other)), strict=True)
        similarities.append(similarity(fine[0], fine[1]).mean(1, keepdim=True))
        weights.append(torch.maximum(coarse[0], coarse[1]))
    chroma_of_one, chroma_of_other = (box(z[:, 1:], 2).abs() for z in (one, other))
    similarities.append(similarity(chroma_of_one, chroma_of_other).mean(1, keepdim=True))
    weights.append((weights[0] + weights[1]) / 2)
    value, weight = torch.cat(similarities), torch.cat(weights)
    if not weight.any():  # two flat images: places cannot be told apart
        weight = torch.ones_like(weight)
    share = (torch.sigmoid(ALPHA * value) * weight).sum() / weight.sum()
    return float((torch.logit(share) / ALPHA).square())


def similarity(a: Tensor, b: Tensor) -> Tensor:
    return (2 * a * b + C) / (a * a + b * b + C)


def halved(x: Tensor) -> Tensor:
    return box(x, 2)[..., ::2, ::2]


def box(x: Tensor, size: int) -> Tensor:
    """The mean of every `size` x `size` window, where `x` lies; outside there is nothing."""
    before = (size - 1) // 2
    padded = F.pad(x, (before, size - 1 - before, before, size - 1 - before))
    return F.avg_pool2d(padded, size, stride=1)


def wavelets(luma: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    """Magnitudes of the two finest scales [1, 2, H, W] and of the third [1, 1, H, W], along one direction."""
    x = luma.transpose(-1, -2) if transpose else luma
    scales = []
    for level in (1, 2, 3):
        side = 2**level
        kernel = x.new_full((1, 1, side, side), 2.0**-level)
        kernel[..., : side // 2, :] *= -1
        padded = F.pad(x, (side // 2 - 1, side // 2, side // 2 - 1, side // 2))
        coefficient = F.conv2d(padded, kernel).abs()
        scales.append(coefficient.transpose(-1, -2) if transpose else coefficient)
    return torch.cat(scales[:2], dim=1), scales[2]
