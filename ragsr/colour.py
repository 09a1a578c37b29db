"""Colour fix: give a restored image the colours of the picture it was made from.

    adain     each channel takes the mean and standard deviation of the style's channel
    wavelet   content + low(style − content): the content's details on the style's slow colours

`low` is what an à-trous decomposition leaves after five levels: a 3x3 binomial blur whose taps move apart, 1, 2, 4, 8
and 16 pixels. As it is linear, high(content) + low(style) needs only one decomposition.

Source: the colour fixes of ReFIR's two hosts, SeeSR (AdaIN) and SUPIR (wavelet).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ragsr.errors import InputError
from ragsr.ops import adain

METHODS = ("adain", "wavelet", "none")
LEVELS = 5


def match_colour(
    content: Tensor,  # [B, C, H, W]
    style: Tensor,  # [B, C, H', W']
    method: str = "adain",
) -> Tensor:  # [B, C, H, W]
    """`content` in the colours of `style`; values may leave [0, 1], clamping is the caller's.

    "adain" takes a style of any size, "wavelet" one of the content's size; "none" returns the content as it is.
    """
    check_match_colour(content, style, method)
    match method:
        case "adain":
            return adain(content.flatten(2)[..., None], style.flatten(2)[..., None]).view_as(content)
        case "wavelet":
            return content + low_frequencies(style - content)
        case _:
            return content


def low_frequencies(x: Tensor) -> Tensor:
    """What five blurs with taps 1, 2, 4, 8 and 16 pixels apart leave of `x` [B, C, H, W]; edges are repeated."""
    channels = x.shape[1]
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = (taps[:, None] * taps).expand(channels, 1, 3, 3)
    for level in range(LEVELS):
        apart = 1 << level
        x = F.conv2d(F.pad(x, [apart] * 4, mode="replicate"), kernel, dilation=apart, groups=channels)
    return x


def check_match_colour(content: Tensor, style: Tensor, method: str) -> None:
    if method not in METHODS:
        raise InputError(f'match_colour: method is "{method}"; it must be one of {", ".join(METHODS)}')
    if content.ndim != 4 or style.ndim != 4 or content.shape[:2] != style.shape[:2]:
        raise InputError(
            f"match_colour: content has shape {tuple(content.shape)} and style {tuple(style.shape)}; "
            "both must be [batch, channels, height, width] with one batch and channel count"
        )
    if method == "wavelet" and content.shape != style.shape:
        raise InputError(
            f"match_colour: wavelet needs a style of the content's size {tuple(content.shape[2:])}, "
            f"not {tuple(style.shape[2:])}; resize it first"
        )
