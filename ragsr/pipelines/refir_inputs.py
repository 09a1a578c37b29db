"""What goes into a run of ReFIR: the photo at its final size, checked settings. References: refir_references.py."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ragsr.chains import MODES, ChainPlan, Host, chain_plan, shared_canvas
from ragsr.colour import METHODS
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.image import image_to_tensor
from ragsr.pipelines.refsr import as_picture, check_low
from ragsr.tiling import reflect_to

Photo = str | Path | Image.Image
REFERENCES_PER = ("image", "tile")
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
LEAST = 8  # pixels of a latent: fewer leave a U-Net nothing to look at


def load_photo(photo: Photo | Tensor, scale: int) -> Tensor:
    """The photo, bicubically enlarged `scale` times on each side: float32 [1, 3, H, W] in [0, 1], on the CPU."""
    if scale < 1:
        raise InputError(f"scale is {scale}; the result is 1, 2, 3, ... times as large on each side")
    low = photo if isinstance(photo, Tensor) else image_to_tensor(as_picture(photo))
    check_low(low, scale)
    low = low.detach().float().cpu()
    return low if scale == 1 else F.interpolate(low, scale_factor=scale, mode="bicubic").clamp(0, 1)


def fit(picture: Tensor, host: Host) -> Tensor:
    """[1, 3, H, W] continued by reflection, below and to the right, to multiples the host can work with."""
    sides = (max(side, LEAST * host.latent_stride) for side in picture.shape[-2:])
    return reflect_to(picture, *(-(-side // host.multiple) * host.multiple for side in sides))


def plan_of(plan: str | ChainPlan | None, reference_strength: float | None, host: Host) -> ChainPlan:
    found = chain_plan(host.defaults.plan if plan is None else plan)
    return found if reference_strength is None else replace(found, scale=reference_strength)


def seed_of(generator: torch.Generator | int | None) -> int:
    """The seed alone counts, not how often a generator was used: what was restored before must not matter."""
    if isinstance(generator, torch.Generator):
        return generator.initial_seed() % (1 << 63)
    return 0 if generator is None else generator


def check_settings(mode: str, output_type: str, colour: str, steps: int, strength: float, guidance: float) -> None:
    for name, value, allowed in (
        ("mode", mode, MODES),
        ("output_type", output_type, OUTPUT_TYPES),
        ("colour", colour, METHODS),
    ):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; it is one of {', '.join(allowed)}")
    if steps < 1:
        raise InputError(f"num_inference_steps is {steps}; it must be at least 1")
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}; it is the share of the noise levels that is run, above 0 up to 1")
    if guidance < 0:
        raise InputError(f"guidance_scale is {guidance}; it is 1 (no guidance) or larger")


def check_references_per(per: str, references: Photo | Sequence[Photo], gallery: Gallery | None) -> None:
    if per not in REFERENCES_PER:
        raise InputError(f"references_per is {per!r}; it is one of {', '.join(REFERENCES_PER)}")
    if per == "tile" and gallery is None and references:
        raise InputError(
            'references_per is "tile": tiles find theirs in a gallery; what you name serves the whole photo'
        )


def checked_tile(tile: int | str, host: Host) -> int:
    least = LEAST * host.latent_stride
    if not isinstance(tile, int) or tile < least:
        raise InputError(f'tile is {tile!r}; it is "auto", None, or a number of pixels from {least} on')
    return tile


def tile_of_result(tile: int | str, scale: int) -> int | str:
    """The front door's tile, "auto" or pixels of the photo, in pixels of the result."""
    if tile == "auto":
        return tile
    if not str(tile).isdecimal():
        raise InputError(f'tile is {tile!r}; it is "auto" or a number of pixels of the photo')
    return int(tile) * scale


def one_canvas(photo: Tensor, references: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Photo and reference as the published program shows them to the network."""
    if len(references) != 1:
        raise InputError(f"compat takes one reference, as the original did; {len(references)} were found: give one")
    photo, reference = shared_canvas(photo, references[0])
    return photo, [reference]


def check_sizes(mode: str, size: tuple[int, int], references: Sequence[Tensor]) -> None:
    """`size` is what is restored at once: that of the result, or of its tiles."""
    for reference in references:
        h, w = reference.shape[-2:]
        if mode == "batched" and (h, w) != size:
            raise InputError(
                f'mode "batched" needs references of the size that is restored at once, {size[1]}x{size[0]}, not '
                f"{w}x{h}; every other mode takes any size"
            )
