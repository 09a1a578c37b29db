"""Training pairs: a crop of a photo, and a reference that may or may not show the same things.

The reference is cut from the same photo (overlapping, or beside it), warped by a perspective and a smooth displacement,
re-lit, partly covered by another photo, blurred, and compressed; or it is another view of the scene; or it is another
photo altogether. It is then brought into line with the crop by the same `ragsr.models.alignment` that runs in use, so
that the network learns from the very mistakes it will meet.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm import tqdm

from ragsr.errors import InputError
from ragsr.files import replacing
from ragsr.image import image_to_tensor, load_image, tensor_to_image
from ragsr.models.alignment import align
from ragsr.models.views import ZOOMS, PreparedReferences, View
from ragsr.training.photos import Photo, degrade, sharp_square

SIDE = 320  # of a crop
REFERENCE_SIDE = 640
LANCZOS = Image.Resampling.LANCZOS
VIEWS = 0.12  # share of the crops from scenes with several views
OTHER = 0.16  # share of the references that show something else
TWO = 0.25  # share of the crops with two references
ROOMY = round(1.3 * SIDE)  # sides of a photo with room for a crop and what lies around it


@dataclass(frozen=True)
class Pair:
    """One crop and what its references, R of them, say of it."""

    truth: np.ndarray  # uint8 [SIDE, SIDE, 3]
    clues: np.ndarray  # float16 [R, 6, SIDE, SIDE]
    kinds: tuple[str, ...]  # of each reference: "same" or "other"


# ------------------------------------------------------------------ references made from the photo itself


def warped_reference(
    image: Image.Image, centre: np.ndarray, shrink: float, generator: np.random.Generator
) -> tuple[Tensor, float]:
    """A reference [1, 3, R, R] from the surroundings of a crop, R = `REFERENCE_SIDE`, and how much finer it is.

    The crop was taken around `centre` (x, y) of the photo reduced by `shrink`.
    """
    zoom = float(np.exp(generator.uniform(np.log(0.8), np.log(1.9))))
    reduced = min(1.0, zoom * shrink)  # so that sampling does not alias
    source = image_to_tensor(image.resize((round(image.width * reduced), round(image.height * reduced)), LANCZOS))
    place = perspective_grid(REFERENCE_SIDE, generator) + generator.uniform(-0.4, 0.4, 2)
    place = (place * REFERENCE_SIDE + wobble(REFERENCE_SIDE, generator)) * reduced / (zoom * shrink) + centre * reduced
    target = (place / np.array([source.shape[3], source.shape[2]]) * 2 - 1)[None]
    sampled = F.grid_sample(
        source, torch.from_numpy(target).float(), mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return sampled.clamp(0, 1), zoom


def perspective_grid(side: int, generator: np.random.Generator) -> np.ndarray:
    """A turned, stretched and tilted square, centred: (x, y) in units of its side, [side, side, 2]."""
    turn = generator.normal(0, 0.12)
    cos, sin = np.cos(turn), np.sin(turn)
    linear = np.array([[cos, -sin], [sin, cos]]) @ (np.eye(2) + generator.uniform(-0.12, 0.12, (2, 2)))
    tilt = generator.uniform(-0.25, 0.25, 2)
    steps = (np.arange(side) + 0.5) / side - 0.5
    x, y = np.meshgrid(steps, steps)
    flat = np.stack((x, y), axis=-1)
    return flat @ linear.T / (1 + flat @ tilt)[..., None]


def wobble(side: int, generator: np.random.Generator) -> np.ndarray:
    """A smooth displacement, as depth makes it: [side, side, 2] in pixels."""
    amplitude = float(generator.choice([0, 1, 3, 6]))
    knots = int(generator.integers(3, 9))
    coarse = torch.from_numpy(generator.normal(0, 1, (1, 2, knots, knots))).float()
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)
    return amplitude * smooth[0].permute(1, 2, 0).numpy()


def retake(reference: Tensor, stranger: Image.Image, generator: np.random.Generator) -> Tensor:
    """As if photographed another day, by another camera: other light, something in the way, another file."""
    gain, gamma = generator.uniform(0.75, 1.25), np.exp(generator.normal(0, 0.15))
    tint = torch.from_numpy(generator.uniform(0.93, 1.07, (1, 3, 1, 1))).float()
    ramp = torch.linspace(-1, 1, reference.shape[3]) * generator.normal(0, 0.08)
    lit = (gain * tint * (1 + ramp) * reference.clamp(min=0) ** float(gamma)).clamp(0, 1)
    picture = tensor_to_image(lit)
    if generator.random() < 0.3:
        cover(picture, stranger, generator)
    if generator.random() < 0.35:
        picture = picture.filter(ImageFilter.GaussianBlur(generator.exponential(0.6)))
    if generator.random() < 0.05:
        picture = picture.convert("L").convert("RGB")
    return image_to_tensor(recompress(picture, int(generator.integers(70, 97))))


def cover(picture: Image.Image, stranger: Image.Image, generator: np.random.Generator) -> None:
    """Paste a piece of another photo somewhere, in place."""
    width, height = (int(generator.integers(60, 240)) for _ in range(2))
    left, top = (int(generator.integers(0, side - 60)) for side in picture.size)
    picture.paste(stranger.crop((0, 0, width, height)), (left, top))


def recompress(picture: Image.Image, quality: int) -> Image.Image:
    with BytesIO() as file:
        picture.save(file, "JPEG", quality=quality)
        file.seek(0)
        with Image.open(file) as image:
            return image.convert("RGB")


# ------------------------------------------------------------------ pairs


class PairMaker:
    """Draws pairs from photos; number i of a seed is always the same pair."""

    def __init__(self, photos: Sequence[Photo], seed: int = 0, scale: int = 4) -> None:
        self.seed, self.scale = seed, scale
        scenes: dict[str, list[Photo]] = defaultdict(list)
        for photo in photos:
            scenes[photo.scene].append(photo)
        self.scenes = [scene for scene in scenes.values() if large(scene[0])]
        self.many_sided = [scene for scene in self.scenes if len(scene) > 1]
        if len(self.scenes) < 2:
            raise InputError(f"pairs need two photos and more with sides of at least {ROOMY} pixels")

    def make(self, number: int) -> Pair:
        """Crop, references, registration."""
        generator = np.random.default_rng((self.seed, number))
        scenes = self.many_sided if self.many_sided and generator.random() < VIEWS else self.scenes
        scene = scenes[generator.integers(len(scenes))]
        shot = int(generator.integers(len(scene)))
        image = load_image(scene[shot].path)
        truth, centre, shrink = crop(image, generator)
        low = degrade(image_to_tensor(truth), self.scale)
        clues, kinds = [], []
        for _ in range(1 + (generator.random() < TWO)):
            draw = generator.random()
            if draw < OTHER:
                reference, zoom = self._other(generator)
            elif len(scene) > 1 and draw < 0.8:
                reference, zoom = another_view(scene, shot, generator), 1 / shrink
            else:
                reference, zoom = warped_reference(image, centre, shrink, generator)
            clues.append(self._clues(low, retake(reference, self._photo(generator), generator), zoom))
            kinds.append("other" if draw < OTHER else "same")
        return Pair(np.asarray(truth), torch.cat(clues).half().numpy(), tuple(kinds))

    def _clues(self, low: Tensor, reference: Tensor, zoom: float) -> Tensor:
        """[1, 6, SIDE, SIDE], with the search of use cut short: the zoom is known."""
        near = sorted(ZOOMS, key=lambda own: abs(np.log(own * zoom)))[:2]
        views = tuple(View(reference, own, self.scale) for own in near)
        (aligned,) = align(low, PreparedReferences((views,)), self.scale, least=-np.inf)
        return aligned.clues

    def _other(self, generator: np.random.Generator) -> tuple[Tensor, float]:
        """A reference that has nothing to do with the crop."""
        picture = crop(self._photo(generator), generator, REFERENCE_SIDE)[0]
        return image_to_tensor(picture), float(generator.uniform(1, 2))

    def _photo(self, generator: np.random.Generator) -> Image.Image:
        scene = self.scenes[generator.integers(len(self.scenes))]
        return load_image(scene[generator.integers(len(scene))].path)


def large(photo: Photo) -> bool:
    """Whether pairs can be made of a photo."""
    with Image.open(photo.path) as image:
        return min(image.size) >= ROOMY


def another_view(scene: Sequence[Photo], shot: int, generator: np.random.Generator) -> Tensor:
    """A neighbour of that shot in the scene, as it is."""
    near = [i for i in range(len(scene)) if 1 <= abs(i - shot) <= 2]
    return image_to_tensor(load_image(scene[int(generator.choice(near))].path))


def crop(image: Image.Image, generator: np.random.Generator, side: int = SIDE) -> tuple[Image.Image, np.ndarray, float]:
    """A sharp crop of the reduced photo, its centre (x, y) in the photo, and by how much the photo was reduced."""
    least = min(1.0, side / min(image.size))
    shrink = float(generator.uniform(max(least, 0.45), 1)) if least < 1 else side / min(image.size)
    size = (max(side, round(image.width * shrink)), max(side, round(image.height * shrink)))
    small = np.asarray(image.resize(size, LANCZOS))
    rows, columns = sharp_square(small, side, generator)
    centre = (np.array([columns.start, rows.start]) + side / 2) / shrink
    return Image.fromarray(small[rows, columns]), centre, shrink


# ------------------------------------------------------------------ kept on disk: making one takes a second


def make_pairs(maker: PairMaker, count: int, folder: Path) -> list[Path]:
    """The first `count` pairs as files; those that are there already are kept."""
    paths = [folder / f"{number:06d}.npz" for number in range(count)]
    missing = [(number, path) for number, path in enumerate(paths) if not path.exists()]
    for number, path in tqdm(missing, unit="pair", desc="registering pairs", disable=None):
        pair = maker.make(number)
        with replacing(path) as temporary:
            np.savez(temporary, truth=pair.truth, clues=pair.clues, kinds=pair.kinds)
    return paths


def load_pair(path: Path) -> Pair:
    with np.load(path) as file:
        return Pair(file["truth"], file["clues"], tuple(file["kinds"].tolist()))
