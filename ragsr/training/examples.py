"""What the diffusion stages learn from: a crop, its low-quality version, and a reference registered with that.

References come in a mix whose shares are stated in `Mix`: found by hash codes among the other training photos, as they
are in use (iRAG, Table 3: without retrieval in training the references help less); another photo, at random, so that
the network learns to leave aside what does not fit; the rest is made of the same photo or scene, as for `refnet`
(`ragsr.training.pairs`). Registration takes longer than learning, so examples are kept on disk.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ragsr.codes import load_encoder
from ragsr.errors import InputError
from ragsr.files import replacing
from ragsr.image import image_to_tensor, load_image
from ragsr.models.alignment import align
from ragsr.models.views import ZOOMS, PreparedReferences, View, views_of
from ragsr.ops import hamming_distance
from ragsr.training.degrade import Recipe, degrade_image
from ragsr.training.pairs import REFERENCE_SIDE, SIDE, PairMaker, another_view, crop, retake, warped_reference
from ragsr.training.photos import Photo, pixels_to_tensor, turned

SCALE = 4
SECOND_ORDER = Recipe(scale=(SCALE, SCALE))
NEAREST = 3  # of the photos that a search finds, one is drawn
WITHOUT = 0.1  # share of the batches that see no reference
BLOCK = 32  # photos encoded at a time
MIX = "mix.json"  # beside the examples: what they were made with

Batch = dict[str, Tensor]  # truth [B, 3, S, S], low [B, 3, S/4, S/4]; clues [B, 6, S, S] unless without reference


@dataclass(frozen=True)
class Mix:
    """How examples are made. What `retrieved` and `random` leave over of 1 is made of the same photo or scene."""

    # bicubic; second-order (`ragsr.training.degrade`); mixed: half of each; graded: a third of the first, the others
    # from hardly any to the whole of the second, evenly
    degradation: str = "mixed"
    retrieved: float = 0.4
    random: float = 0.2
    encoder: str = "hash-64"  # whose codes find the references
    seed: int = 0


@dataclass(frozen=True)
class Example:
    truth: np.ndarray  # uint8 [SIDE, SIDE, 3]
    low: np.ndarray  # uint8 [SIDE / 4, SIDE / 4, 3]
    clues: np.ndarray  # float16 [6, SIDE, SIDE]
    kind: str  # of the reference: retrieved, random or same


class Finder:
    """The training photos by their codes: for a bad photo, the nearest ones but itself."""

    def __init__(self, photos: Sequence[Photo], encoder: str) -> None:
        self.photos, self.encoder = photos, load_encoder(encoder)
        blocks = [photos[i : i + BLOCK] for i in range(0, len(photos), BLOCK)]
        self.codes = torch.cat([self.encoder.encode([load_image(one.path) for one in block]) for block in blocks])

    def nearest(self, low: Image.Image, besides: Photo) -> list[Photo]:
        """The first `NEAREST`, nearest first; ties in the order of the photos."""
        distances = hamming_distance(self.encoder.encode([low]), self.codes)[0]
        order = torch.sort(distances, stable=True).indices.tolist()
        return [self.photos[i] for i in order if self.photos[i] != besides][:NEAREST]


class ExampleMaker:
    """Draws examples from photos; number i of a mix is always the same example."""

    def __init__(self, photos: Sequence[Photo], mix: Mix) -> None:
        self.mix = mix
        self.scenes = PairMaker(photos).scenes  # those that are large enough; `InputError` for too few
        self.photos = [photo for scene in self.scenes for photo in scene]
        self.finder = Finder(self.photos, mix.encoder) if mix.retrieved else None

    def make(self, number: int) -> Example:
        generator = np.random.default_rng((self.mix.seed, number))
        scene = self.scenes[generator.integers(len(self.scenes))]
        shot = int(generator.integers(len(scene)))
        image = load_image(scene[shot].path)
        truth, centre, shrink = crop(image, generator)
        bad = self._degraded(truth, generator)
        low, draw = image_to_tensor(bad), generator.random()
        if self.finder is not None and draw < self.mix.retrieved:
            found = self.finder.nearest(bad, scene[shot])
            kind, views = "retrieved", views_of(whole(found[generator.integers(len(found))]), SCALE)
        elif draw < self.mix.retrieved + self.mix.random:
            stranger = load_image(self._other_photo(scene[shot], generator).path)
            reference = image_to_tensor(crop(stranger, generator, REFERENCE_SIDE)[0])
            kind, views = "random", views_near(reference, float(generator.uniform(1, 2)))
        else:
            kind, views = "same", self._same(image, scene, shot, centre, shrink, generator)
        (aligned,) = align(low, PreparedReferences((views,)), SCALE, least=-np.inf)
        return Example(np.asarray(truth), np.asarray(bad), aligned.clues[0].half().numpy(), kind)

    def _same(
        self,
        image: Image.Image,
        scene: Sequence[Photo],
        shot: int,
        centre: np.ndarray,
        shrink: float,
        generator: np.random.Generator,
    ) -> tuple[View, ...]:
        if len(scene) > 1 and generator.random() < 0.5:
            reference, zoom = another_view(scene, shot, generator), 1 / shrink
        else:
            reference, zoom = warped_reference(image, centre, shrink, generator)
        stranger = load_image(self._other_photo(scene[shot], generator).path)
        return views_near(retake(reference, stranger, generator), zoom)

    def _other_photo(self, photo: Photo, generator: np.random.Generator) -> Photo:
        others = [one for one in self.photos if one.scene != photo.scene]
        return others[generator.integers(len(others))]

    def _degraded(self, truth: Image.Image, generator: np.random.Generator) -> Image.Image:
        kind = self.mix.degradation
        if kind == "second-order" or (kind == "mixed" and generator.random() < 0.5):
            return degrade_image(truth, generator, SECOND_ORDER)
        strength = float(generator.uniform(-0.5, 1)) if kind == "graded" else 0.0
        if strength > 0:
            return degrade_image(truth, generator, SECOND_ORDER.weaker(strength))
        return truth.resize((truth.width // SCALE, truth.height // SCALE), Image.Resampling.BICUBIC)


def whole(photo: Photo) -> Tensor:
    """A found photo, [1, 3, H, W], no side longer than a reference's."""
    picture = load_image(photo.path)
    picture.thumbnail((REFERENCE_SIDE, REFERENCE_SIDE), Image.Resampling.LANCZOS)
    return image_to_tensor(picture)


def views_near(reference: Tensor, zoom: float) -> tuple[View, ...]:
    """The search of use cut short, where it is known how much finer the reference is."""
    near = sorted(ZOOMS, key=lambda own: abs(np.log(own * zoom)))[:2]
    return tuple(View(reference, own, SCALE) for own in near)


# ------------------------------------------------------------------ kept on disk


def make_examples(photos: Sequence[Photo], mix: Mix, count: int, folder: Path) -> list[Path]:
    """The first `count` examples as files; those that are there are kept, if they were made with the same mix."""
    check_mix(mix, folder)
    paths = [folder / f"{number:06d}.npz" for number in range(count)]
    missing = [(number, path) for number, path in enumerate(paths) if not path.exists()]
    if missing:
        maker = ExampleMaker(photos, mix)
        with replacing(folder / MIX) as temporary:
            temporary.write_text(json.dumps(asdict(mix), indent=2) + "\n")
        for number, path in tqdm(missing, unit="example", desc="registering references", disable=None):
            example = maker.make(number)
            with replacing(path) as temporary:
                np.savez(temporary, **asdict(example))
    return paths


def check_mix(mix: Mix, folder: Path) -> None:
    if (folder / MIX).exists() and json.loads((folder / MIX).read_text()) != asdict(mix):
        raise InputError(f"{folder}: its examples were made with other settings; choose another --out, or remove it")


def load_example(path: Path) -> Example:
    try:
        with np.load(path) as file:
            return Example(file["truth"], file["low"], file["clues"], str(file["kind"]))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: is damaged ({error}); remove it, and it is made again") from error


class Examples:
    """The batches of a run, drawn by step."""

    def __init__(self, paths: Sequence[Path], side: int, batch: int, seed: int) -> None:
        self.paths, self.side, self.batch, self.seed = paths, side, batch, seed

    def draw(self, *number: int) -> Batch:
        """The batch of that step, and of whatever else counts batches."""
        generator = np.random.default_rng((self.seed, *number))
        drawn = [self._draw_one(generator) for _ in range(self.batch)]
        batch = {name: torch.cat([one[name] for one in drawn]) for name in ("truth", "low", "clues")}
        if generator.random() < WITHOUT:
            del batch["clues"]
        return batch

    def _draw_one(self, generator: np.random.Generator) -> Batch:
        """Cropped, and laid down in one of eight ways."""
        example = load_example(self.paths[int(generator.integers(len(self.paths)))])
        places = SIDE - self.side
        top, left = (SCALE * int(generator.integers(places // SCALE + 1)) for _ in range(2))
        fine = slice(top, top + self.side), slice(left, left + self.side)
        coarse = tuple(slice(one.start // SCALE, one.stop // SCALE) for one in fine)
        way = int(generator.integers(8))
        return {
            "truth": turned(pixels_to_tensor(example.truth[fine]), way),
            "low": turned(pixels_to_tensor(example.low[coarse]), way),
            "clues": turned(torch.from_numpy(example.clues[:, *fine]).float()[None], way),
        }
