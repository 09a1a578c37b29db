"""What goes into a run of ReFIR: the photo at its final size, references no larger than is of use, checked settings."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ragsr.chains import MODES, ChainPlan, Host, chain_plan, reference_weights, shared_canvas
from ragsr.colour import METHODS
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.image import image_to_tensor, tensor_to_image, to_rgb
from ragsr.pipelines.refsr import Reference, as_picture, check_low, named, read_reference
from ragsr.tiling import reflect_to

Photo = str | Path | Image.Image
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
LEAST = 8  # pixels of a latent: fewer leave a U-Net nothing to look at
USEFUL = 512 * 512  # pixels that a reference may have beside however small a photo


def load_photo(photo: Photo | Tensor, scale: int) -> Tensor:
    """The photo, bicubically enlarged `scale` times on each side: float32 [1, 3, H, W] in [0, 1], on the CPU."""
    if scale < 1:
        raise InputError(f"scale is {scale}; the result is 1, 2, 3, ... times as large on each side")
    low = photo if isinstance(photo, Tensor) else image_to_tensor(as_picture(photo))
    check_low(low, scale)
    low = low.detach().float().cpu()
    return low if scale == 1 else F.interpolate(low, scale_factor=scale, mode="bicubic").clamp(0, 1)


class Chosen(NamedTuple):
    """A reference that will be used."""

    reference: Reference
    picture: Photo
    weight: float  # strength times share


def choose_references(
    given: Photo | Sequence[Photo],
    gallery: Gallery | None,
    photo: Tensor,
    k: int,
    scale: float,
    threshold: float,
    temperature: float,
    otherwise: str,
) -> tuple[list[Chosen], list[Chosen]]:
    """The user's references, or those of the k nearest of the gallery that are relevant; warns if none is.

    If none is, the second list holds what was found nevertheless; `otherwise` says what will be done.
    """
    found, pictures = find_references(given, gallery, photo, k)

    def chosen(least: float) -> list[Chosen]:
        weights = reference_weights([one.score for one in found], scale, least, temperature)
        return [Chosen(*one) for one in zip(found, pictures, weights, strict=True) if one[2] > 0]

    relevant = chosen(threshold)
    if gallery is None or relevant or scale == 0:
        return relevant, []
    best = max((one.score or 0.0 for one in found), default=0.0)
    warnings.warn(
        f"no reference is relevant enough (the best scores {best:.2f}, the threshold is {threshold:g}); {otherwise}",
        stacklevel=4,
    )
    return [], chosen(0.0)


def find_references(
    given: Photo | Sequence[Photo], gallery: Gallery | None, photo: Tensor, k: int
) -> tuple[list[Reference], list[Photo]]:
    pictures: list[Photo] = [given] if isinstance(given, Photo) else list(given)
    if gallery is None:
        return named(pictures), pictures
    if pictures:
        raise InputError("references and a gallery were both given; give one of them, or neither")
    hits = gallery.search(tensor_to_image(photo), k)
    return [Reference(hit.path, hit.distance, hit.score) for hit in hits], [hit.path for hit in hits]


def load_reference(reference: Photo, number: int, host: Host, pixels: int) -> tuple[Tensor, str | None]:
    """A reference of at most about so many pixels, continued to the host's multiple, and a note if it shrank.

    Raises `InputError` for one that is too small, or so narrow that it would be.
    """
    picture, note = read_reference(reference, number)
    name = f"reference {number}" if isinstance(reference, Image.Image) else str(reference)
    width, height = picture.size
    shrink = min(1.0, math.sqrt(max(pixels, USEFUL) / (width * height)))
    if shrink < 1:
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        picture = to_rgb(picture).resize(size, Image.Resampling.BICUBIC)
        note = f"reduced from {width}x{height} to {size[0]}x{size[1]}: a reference is used no larger than the result"
    least = LEAST * host.latent_stride
    if min(picture.size) < least:
        raise InputError(
            f"{name}: {width}x{height} pixels, used as {picture.width}x{picture.height}; {host.name} needs {least} on "
            "both sides: crop it to the part that matters, or find it larger"
        )
    return fit(image_to_tensor(picture), host), note


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


def check_sizes(mode: str, photo: Tensor, references: Sequence[Tensor]) -> None:
    for reference in references:
        if mode == "batched" and reference.shape != photo.shape:
            h, w = reference.shape[-2:]
            raise InputError(
                f'mode "batched" needs references of the result\'s size {photo.shape[-1]}x{photo.shape[-2]}, not '
                f"{w}x{h}; every other mode takes any size"
            )
