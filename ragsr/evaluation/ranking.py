"""How the candidates of a search are put in order: by codes, by features, by both, or by patches.

Every way gives all candidates, best first, for every query, and by what they were ordered.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ragsr.codes import CodeEncoder
from ragsr.gallery import Gallery
from ragsr.gallery.add import READERS
from ragsr.gallery.hits import DIGITS, LEAST, MOST, WIDE, with_ties
from ragsr.search import Index

SHOWN = 5  # first hits that are reported; rates are taken from 1 to this
PATCHES = "patches"


@dataclass
class Encoded:
    """What an encoder says of some pictures."""

    codes: np.ndarray  # uint8 [n, bits // 8]
    features: np.ndarray  # float32 [n, features], of length one


@dataclass
class Ranked:
    """The answers to some queries."""

    order: np.ndarray  # int64 [Q, N], numbers of candidates, best first
    values: np.ndarray  # [Q, N], their distances in bits (int32) or cosines (float32), in that order


Load = Callable[[], Image.Image]


def encode(encoder: CodeEncoder, pictures: Sequence[Load], what: str) -> Encoded:
    """Encode pictures, each read when it is its turn, by several threads."""

    def one(load: Load) -> tuple[np.ndarray, np.ndarray]:
        code, feature = encoder.describe([load()])
        return code.numpy(), feature.numpy()

    with ThreadPoolExecutor(READERS) as pool:
        done = list(tqdm(pool.map(one, pictures), total=len(pictures), unit="image", desc=what, disable=None))
    codes, features = zip(*done, strict=True)
    return Encoded(np.concatenate(codes), np.concatenate(features))


def by_codes(queries: Encoded, candidates: Encoded) -> Ranked:
    """By Hamming distance; equal ones in the order of the candidates."""
    index = Index(8 * candidates.codes.shape[1])
    index.add(candidates.codes)
    distances, order = index.search(queries.codes, len(index))
    return Ranked(order, distances)


def by_cosine(queries: Encoded, candidates: Encoded) -> Ranked:
    """By the cosine of the features."""
    cosines = queries.features @ candidates.features.T
    order = np.argsort(-cosines, axis=1, kind="stable")
    return Ranked(order, np.take_along_axis(cosines, order, 1))


def by_codes_then_cosine(queries: Encoded, candidates: Encoded) -> Ranked:
    """The nearest codes by cosine, as a gallery that is asked for `SHOWN` hits takes and ranks them; then the others by
    distance. The values are cosines."""
    near = by_codes(queries, candidates)
    stored = candidates.features.astype(np.float16).astype(np.float32)
    cosines = (queries.features @ stored.T).round(DIGITS)
    for row, distances, of_query in zip(near.order, near.values, cosines, strict=True):
        known = min(len(row), MOST)
        taken = len(with_ties(distances[:known].tolist(), row[:known].tolist(), max(LEAST, WIDE * SHOWN)))
        row[:taken] = row[:taken][np.lexsort((row[:taken], distances[:taken], -of_query[row[:taken]]))]
    return Ranked(near.order, np.take_along_axis(cosines, near.order, 1))


def by_gallery(gallery: Gallery, paths: Sequence[Path], pictures: Sequence[Load], others: Ranked) -> Ranked:
    """The first `SHOWN` hits of a gallery of the candidates, then the rest as `others` has them. The values are cosines
    where the gallery keeps features, else distances; they are those of the hits alone."""
    numbers = {path: number for number, path in enumerate(paths)}
    order, values = [], []
    for load, rest in tqdm(list(zip(pictures, others.order, strict=True)), unit="image", desc=PATCHES, disable=None):
        hits = gallery.search(load(), min(SHOWN, len(gallery)), patches=True)
        first = [numbers[hit.path] for hit in hits]
        order.append([*first, *(number for number in rest if number not in first)])
        near = [hit.distance if hit.cosine is None else hit.cosine for hit in hits]
        values.append([*near, *[math.nan] * (len(paths) - len(near))])
    return Ranked(np.array(order), np.array(values))


@contextmanager
def gallery_of(encoder: CodeEncoder, paths: Sequence[Path]) -> Iterator[Gallery]:
    """A gallery of the candidates with patches, in a folder that is removed afterwards."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Gallery.create(Path(folder) / "gallery", encoder.source, patches=True) as gallery,
    ):
        gallery.add(paths)
        yield gallery


WAYS: dict[str, Callable[[Encoded, Encoded], Ranked]] = {
    "codes": by_codes,
    "re-ranked": by_codes_then_cosine,
    "cosine": by_cosine,
}


def ways_of(encoder: CodeEncoder, rerank: bool) -> list[str]:
    """The ways that an encoder allows: by codes, and if that is asked and it has features, by those too."""
    return ["codes", "re-ranked", "cosine"] if rerank and encoder.features else ["codes"]
