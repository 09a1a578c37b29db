"""Training photos: which may be used, and sharp crops of them.

A folder with a `MANIFEST.csv` (columns file, licence, licence_class) names the licence of every photo; without one all
images below it are taken, and their rights are the user's affair. A photo is used when what is learned from it may be
given away: its own licence is stated (class `clean`) or it is free to use (`free`), and it asks for nothing in return
that weights could not keep: no share-alike, no GPL. Photos of class `repo` count when the repository's licence is a
permissive one.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ragsr.errors import InputError
from ragsr.image import find_images, load_image
from ragsr.models.resample import reduce

MANIFEST = "MANIFEST.csv"
RECIPROCAL = ("BY-SA", "GPL", "share-alike", "sharealike")
PERMISSIVE = ("BSD", "MIT", "Apache")
SIZES = (1.0, 0.7, 0.5)  # of a photo: smaller ones are sharper
TRIES = 2  # crops drawn for one that is kept, the sharpest
LEAST_SIDE = 256


@dataclass(frozen=True)
class Photo:
    path: Path
    scene: str  # photos of one scene show the same thing from several sides
    licence: str = ""  # as the manifest states it
    source: str = ""  # the collection it comes from


def find_photos(folder: Path) -> list[Photo]:
    """The photos of a folder that training may use. Raises `InputError` when there is none."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return [Photo(path, str(path)) for path in find_images([folder])]
    rows = [row for row in read_manifest(manifest) if may_train(row["licence"], row["licence_class"])]
    if not rows:
        raise InputError(f"{manifest}: none of its photos may be trained on; see ragsr train refsr --help on licences")
    return [
        Photo(folder / row["file"], row.get("scene_id") or row["file"], row["licence"], row.get("source_repo", ""))
        for row in rows
    ]


def read_manifest(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in ("file", "licence", "licence_class") if name not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{path}: lacks the columns {', '.join(missing)}; add them, or remove the file")
        return list(reader)


def may_train(licence: str, licence_class: str) -> bool:
    """Whether weights learned from a photo may be given away."""
    if any(word.casefold() in licence.casefold() for word in RECIPROCAL):
        return False
    if licence_class == "repo":
        return licence.startswith(PERMISSIVE)
    return licence_class in ("clean", "free")


def sources_of(photos: Sequence[Photo]) -> list[tuple[str, str, int]]:
    """(source, licence, number of photos), most photos first, for the card of a model."""
    often = Counter((photo.source or "not stated", photo.licence or "not stated") for photo in photos)
    return [(source, licence, count) for (source, licence), count in often.most_common()]


class Crops:
    """Sharp random crops of photos held in memory, at several sizes of each photo."""

    def __init__(self, photos: Sequence[Photo], side: int) -> None:
        self.side = side
        self.images: list[np.ndarray] = []  # uint8 [H, W, 3]
        for photo in photos:
            self.images += [np.asarray(one) for one in smaller(load_image(photo.path), max(side, LEAST_SIDE))]
        if not self.images:
            raise InputError(f"no photo has sides of {max(side, LEAST_SIDE)} pixels and more")
        weights = np.array([image.size**0.5 for image in self.images])
        self.share = weights / weights.sum()

    def draw(self, count: int, generator: np.random.Generator) -> Tensor:
        """float32 [count, 3, side, side] in [0, 1], turned and mirrored at random."""
        return torch.cat([self._draw_one(generator) for _ in range(count)])

    def _draw_one(self, generator: np.random.Generator) -> Tensor:
        image = self.images[generator.choice(len(self.images), p=self.share)]
        crop = image[sharp_square(image, self.side, generator)]
        return turned(pixels_to_tensor(crop), int(generator.integers(8)))


def smaller(image: Image.Image, least: int) -> list[Image.Image]:
    """The picture in the `SIZES` at which both sides keep `least` pixels."""
    sizes = [(round(image.width * s), round(image.height * s)) for s in SIZES]
    return [image.resize(size, Image.Resampling.LANCZOS) for size in sizes if min(size) >= least]


def sharp_square(image: np.ndarray, side: int, generator: np.random.Generator) -> tuple[slice, slice]:
    """Of `TRIES` squares drawn at random the sharpest: its rows and columns."""
    corners = [[int(generator.integers(n - side + 1)) for n in image.shape[:2]] for _ in range(TRIES)]
    squares = [(slice(top, top + side), slice(left, left + side)) for top, left in corners]
    return max(squares, key=lambda square: sharpness(image[square]))


def sharpness(crop: np.ndarray) -> float:
    """Mean difference of neighbours in green."""
    green = crop[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


def turned(x: Tensor, way: int) -> Tensor:
    """One of the eight ways to lay squares [..., S, S] down."""
    x = x.rot90(way % 4, (-2, -1))
    return x.flip(-1) if way >= 4 else x


def pixels_to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def degrade(truth: Tensor, scale: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, H/s, W/s]: bicubic as Pillow does it, in 8 bits."""
    return (reduce(truth, scale).clamp(0, 1) * 255).round() / 255
