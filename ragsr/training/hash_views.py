"""What a hash encoder learns from: views of photos, each clean and made bad.

A view is a crop of a photo as another camera would have taken it: from another place (a random homography), nearer,
in other light. View `number` of photo `i` depends on (seed, i, number) alone and is made once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from ragsr.image import load_reduced
from ragsr.training.degrade import PLAIN, STRONG, degrade_image
from ragsr.training.photos import Photo

LONG = 512  # pixels of the longer side that a photo keeps: views are smaller


@dataclass(frozen=True)
class Camera:
    """How far a view departs from its photo."""

    area: tuple[float, float] = (0.25, 1.0)  # share of the photo
    tilt: float = 0.12  # corners move by up to this share of the sides
    sides: tuple[float, float] = (192, 288)  # the longer side in pixels, before it is made bad
    light: float = 0.3  # brightness, contrast and saturation change by up to this share


Key = tuple[int, int]  # photo, number


class View(NamedTuple):
    clean: np.ndarray  # uint8 [S, S, 3]
    bad: np.ndarray  # the same, made bad


class Views:
    """Views of photos in memory, `count` of each."""

    def __init__(self, photos: Sequence[Photo], side: int, count: int, seed: int, camera: Camera | None = None) -> None:
        self.side, self.count, self.seed, self.camera = side, count, seed, camera or Camera()
        self.pictures = [reduced(photo) for photo in photos]
        scenes = [photo.scene for photo in photos]
        self.scenes = [[i for i, other in enumerate(scenes) if other == scene] for scene in dict.fromkeys(scenes)]
        self.made: dict[Key, View] = {}

    def view(self, photo: int, number: int) -> View:
        key = photo, number
        if key not in self.made:
            self.made[key] = self._make(photo, np.random.default_rng((self.seed, photo, number)))
        return self.made[key]

    def _make(self, photo: int, generator: np.random.Generator) -> View:
        picture = taken(self.pictures[photo], generator, self.camera)
        bad = degrade_image(picture, generator, STRONG if generator.random() < 0.8 else PLAIN)
        return View(prepared(picture, self.side), prepared(bad, self.side))

    def firsts(self) -> Tensor:
        """The first view of every photo, clean: uint8 [n, 3, S, S]."""
        pixels = np.stack([self.view(photo, 0).clean for photo in range(len(self.pictures))])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def draw(self, batch: int, step: tuple[int, ...]) -> list[tuple[Key, Key]]:
        """Two views each of `batch` scenes, as (photo, number). A scene of several photos gives two of them."""
        generator = np.random.default_rng((self.seed, *step))
        pairs = []
        for scene in generator.choice(len(self.scenes), batch, replace=False):
            photos = generator.choice(self.scenes[scene], 2, replace=len(self.scenes[scene]) == 1)
            numbers = generator.choice(self.count, 2, replace=False)
            one, other = zip(photos.tolist(), numbers.tolist(), strict=True)
            pairs.append((one, other))
        return pairs


def reduced(photo: Photo) -> Image.Image:
    """The photo, its longer side `LONG` at most."""
    picture, _ = load_reduced(photo.path, LONG * LONG)
    shrink = min(1.0, LONG / max(picture.size))
    size = [max(1, round(side * shrink)) for side in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def prepared(picture: Image.Image, side: int) -> np.ndarray:
    """As encoders see it: squashed to a square."""
    return np.array(picture.resize((side, side), Image.Resampling.BILINEAR))


def taken(picture: Image.Image, generator: np.random.Generator, camera: Camera) -> Image.Image:
    """The picture as another camera takes it."""
    width, height = picture.size
    share = np.sqrt(generator.uniform(*camera.area))
    stretch = np.exp(generator.uniform(-0.2, 0.2))
    w, h = min(1.0, share * stretch) * width, min(1.0, share / stretch) * height
    left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
    corners = np.array([(left, top), (left, top + h), (left + w, top + h), (left + w, top)])
    corners += generator.uniform(-camera.tilt, camera.tilt, (4, 2)) * (w, h)
    corners = corners.clip(0, (width, height))
    longer = generator.uniform(*camera.sides)
    size = [max(16, round(longer * side / max(w, h))) for side in (w, h)]
    plane = homography(size, corners)
    out = picture.transform((size[0], size[1]), Image.Transform.PERSPECTIVE, plane, Image.Resampling.BICUBIC)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        out = enhance(out).enhance(1 + generator.uniform(-camera.light, camera.light))
    return tinted(out, generator, camera.light / 3)


def tinted(picture: Image.Image, generator: np.random.Generator, strength: float) -> Image.Image:
    """In warmer or colder light."""
    gains = (1 + generator.uniform(-strength, strength, 3)) * 256
    tables = [min(255, round(value * gain / 256)) for gain in gains for value in range(256)]
    return picture.point(tables)


def homography(size: Sequence[int], corners: np.ndarray) -> list[float]:
    """Pillow's eight numbers that take the corners of an output of `size` to `corners` [4, 2] of the input.

    Corners go round from top left over bottom left.
    """
    width, height = size
    rows, right = [], []
    for (x, y), (u, v) in zip([(0, 0), (0, height), (width, height), (width, 0)], corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return [float(x) for x in np.linalg.solve(np.array(rows, dtype=np.float64), np.array(right))]
