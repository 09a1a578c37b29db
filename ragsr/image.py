"""Images: files, PIL pictures and tensors.

Files and galleries speak PIL (`RGB`, 8 bits, upright); models speak tensors [1, 3, H, W], float32 in [0, 1].

What a file holds becomes RGB by fixed rules: the first frame; turned as EXIF says; alpha over white; 16 bits divided by
257; integers beyond 16 bits and floats beyond 1 divided by their largest value; negative values are black. Colour
profiles are not applied.
"""

import math
import os
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ragsr.errors import InputError
from ragsr.files import replacing

MAX_PIXELS = 500_000_000
SPARE = 2  # times the wanted sides that a JPEG keeps: its own reduction is coarser than Pillow's
# formats that Pillow recognises but cannot decode, or only with an outside program run on the user's file
UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
WHITE = (255, 255, 255, 255)
OPENING = threading.Lock()

# ------------------------------------------------------------------ files


def load_image(path: str | Path) -> Image.Image:
    """Read a file of any format Pillow decodes: RGB, 8 bits, upright. Raises `InputError` naming the file."""
    return _load(path)[0]


def load_reduced(path: str | Path, pixels: int) -> tuple[Image.Image, tuple[int, int]]:
    """Like `load_image`, where `pixels` pixels are enough: the picture, and the width and height it has in full.

    A JPEG with 16 times as many or more is decoded at a half, a quarter or an eighth of its sides, at least `SPARE`
    times those wanted. Its full size is never in memory and may lie beyond `MAX_PIXELS`. Other files come in full.
    """
    return _load(path, pixels)


def decode_image(file: BinaryIO, name: str | Path) -> Image.Image:
    """Like `load_image`, from an open file; `name` is for the error message."""
    return _decode_named(file, name)[0]


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture; the suffix names the format. JPEG and WebP at quality 95. Nothing half-written is ever seen."""
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise InputError(f"{path}: cannot write an image with the suffix {path.suffix!r}; use .png, .jpg or .webp")
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    with replacing(path) as temporary:
        image.save(temporary, format=kind, **options)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among `paths`: files as named, folders searched to the bottom. Sorted, without duplicates.

    In folders only names with a suffix that Pillow reads count, hidden files and folders do not, and links to folders
    are not followed. Raises `InputError` for a path that is not there and when no image is found at all.
    """
    named = [Path(path) for path in paths]
    found: list[Path] = []
    for path in named:
        if path.is_dir():
            found += _images_below(path)
        elif path.exists():
            found.append(path)
        else:
            raise InputError(f"{path}: there is no such file or folder")
    if not found:
        raise InputError(
            f"no images in {', '.join(map(str, named)) or 'an empty list'}; name image files, or folders of them"
        )
    first = {path.resolve(): path for path in sorted(found, reverse=True)}
    return sorted(first.values())


@cache
def readable_formats() -> tuple[str, ...]:
    """The formats this Pillow decodes by itself."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - UNREADABLE_FORMATS))


@cache
def readable_suffixes() -> frozenset[str]:
    """The suffixes of those formats, in lower case and with the dot."""
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in readable_formats())


# ------------------------------------------------------------------ pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit RGB, by the rules at the head of this file."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_gray_bytes(np.asarray(image), deep=image.mode != "F")).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), colours).convert("RGB")
    return image.convert("RGB")


def image_to_tensor(image: Image.Image) -> Tensor:
    """A picture as a tensor: [1, 3, H, W], float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(to_rgb(image)))  # uint8 [H, W, 3]
    return pixels.permute(2, 0, 1)[None].to(torch.float32, memory_format=torch.contiguous_format) / 255


def tensor_to_image(x: Tensor) -> Image.Image:
    """A tensor [1, 3, H, W] as a picture: clamped to [0, 1], rounded to 8 bits. `InputError` for NaN and infinity."""
    if x.ndim != 4 or x.shape[:2] != (1, 3) or 0 in x.shape:
        raise InputError(f"an image tensor must be [1, 3, height, width], with pixels; this one is {list(x.shape)}")
    if not x.isfinite().all():
        raise InputError("the image tensor holds NaN or infinite values; check the input and the model's number type")
    pixels = (x[0].detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


# ------------------------------------------------------------------ details


def _load(path: str | Path, enough: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    try:
        with open(path, "rb") as file:
            return _decode_named(file, path, enough)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decode_named(file: BinaryIO, name: str | Path, enough: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    try:
        return _decode(file, enough)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image, or of a format Pillow does not read") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged data, from zlib.error to IndexError
        raise InputError(f"{name}: damaged or cut off ({error})") from error


def _decode(file: BinaryIO, enough: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture, and its width and height in full; with more than `enough` pixels it may come smaller."""
    with _open(file) as image:
        full = image.size
        if enough is not None:
            _ask_for_less(image, enough)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InputError(
                f"{width}x{height} is {width * height / 1e6:.0f} megapixels; at most {MAX_PIXELS / 1e6:.0f} are taken: "
                "scale it down or cut it up first"
            )
        upright = _upright(image)
        return to_rgb(upright), full if upright.size == image.size else full[::-1]


def _open(file: BinaryIO) -> Image.Image:
    """Read the header only, without Pillow's own size limit: it lies lower, and it is a global, hence the lock."""
    with OPENING:
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=readable_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = theirs


def _ask_for_less(image: Image.Image, pixels: int) -> None:
    """Have the decoder leave out what `pixels` pixels do not need; only JPEG's can."""
    shrink = SPARE * math.sqrt(pixels / (image.width * image.height))
    if shrink < 1:
        image.draft(None, (math.ceil(image.width * shrink), math.ceil(image.height * shrink)))


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF beside good pixels: show them as they lie, as every viewer does
        return image


def _gray_bytes(values: np.ndarray, deep: bool) -> np.ndarray:
    """Integer (`deep`) or float gray values [H, W] as uint8."""
    values = values.astype(np.float64)
    largest = values.max()
    if not np.isfinite(values).all():
        raise InputError("holds NaN or infinite values")
    full = max(largest, 65535.0 if deep else 1.0) if largest > 0 else 1.0
    return np.rint(values.clip(0) * 255 / full).astype(np.uint8)


def _images_below(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if _counts(name)]
    return found


def _counts(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in readable_suffixes()
