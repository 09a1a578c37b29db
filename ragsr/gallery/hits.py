"""From codes to files: which images of a gallery are nearest, and still there."""

import math
import sqlite3
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ragsr.gallery.file import NAME, damaged
from ragsr.gallery.index import Loaded
from ragsr.gallery.paths import absolute_path


class Hit(NamedTuple):
    """One reference that a search found."""

    path: Path  # absolute
    distance: int  # differing bits
    score: float  # in [0, 1]: see `score`


class Finder:
    """Finds hits among the codes of a gallery, and looks up the paths of those alone. Used within a `snapshot`."""

    def __init__(self, connection: sqlite3.Connection, folder: Path, codes: Loaded) -> None:
        self.connection = connection
        self.folder = folder
        self.codes = codes

    def find(
        self,
        queries: np.ndarray,  # uint8 [Q, bits // 8]
        k: int,
    ) -> list[list[Hit]]:
        """The k nearest images of every query whose files are on disk; fewer where there are no more."""
        near = zip(queries, *self.codes.search(queries, k), strict=True)
        return [self._on_disk(query, k, distances, ids) for query, distances, ids in near]

    def _on_disk(self, query: np.ndarray, k: int, distances: list[int], ids: list[int]) -> list[Hit]:
        """The k nearest whose file is there; `distances` and `ids` are of the k nearest of all."""
        count = len(self.codes)
        hits: list[Hit] = []
        seen = 0
        while True:
            for distance, number in zip(distances[seen:], ids[seen:], strict=True):
                path = self._path(number)
                if path.is_file():
                    hits.append(Hit(path, distance, score(distance, 8 * len(query))))
            seen = len(ids)
            if len(hits) >= k or seen == count:
                return hits[:k]
            (distances,), (ids,) = self.codes.search(query[None], min(2 * seen, count))

    def _path(self, number: int) -> Path:
        row = self.connection.execute("SELECT path FROM images WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise damaged(self.folder / NAME, f"there is no image {number}")
        return absolute_path(self.folder, row[0])


def score(distance: int, bits: int) -> float:
    """max(0, cos(π · distance / bits)): the cosine between two descriptors that hyperplane codes estimate (Charikar).

    1 for equal codes; 0 from half of the bits on, where codes agree no more than by chance.
    """
    return max(0.0, math.cos(math.pi * distance / bits))
