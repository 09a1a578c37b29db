"""From codes to files: which images of a gallery are nearest, and still there.

    codes ──▶ candidates by Hamming distance ──▶ ranked by cosine ──▶ those on disk

Without features the candidates are the k nearest codes. With them they are the `WIDE`·k nearest, at least `LEAST`, and
all others as near as the last of those, up to `MOST`: short codes tie by the hundred, and a tie says nothing. With
patches the images of the patches nearest to every patch of the query come to these.
"""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragsr.codes import CodeEncoder
from ragsr.gallery.extras import Kept, from_half, select
from ragsr.gallery.file import NAME, damaged
from ragsr.gallery.generated import has_table, is_generated
from ragsr.gallery.index import Loaded
from ragsr.gallery.patches import Box, Match, Patches, PatchIndex, compare, compare_region, joined, similarity
from ragsr.gallery.paths import absolute_path
from ragsr.gallery.query import Query

LEAST, WIDE, MOST = 200, 10, 4096
PATCHES = 50  # patches taken for every patch of the query, at least; each brings its image with all patches
DIGITS = 4  # of a cosine; the rest belongs to the machine and to the half precision of what is stored


class Hit(NamedTuple):
    """One reference that a search found."""

    path: Path  # absolute
    distance: int  # differing bits
    score: float  # in [0, 1]: what it means, the encoder says
    generated: bool = False  # made by a diffusion model: see augment.py
    cosine: float | None = None  # of the features; None where the gallery keeps none. With patches see patches.py
    region: Box | None = None  # in pixels of the reference: where it is most like the query; None without patches
    query_region: Box | None = None  # and the part of the query that this is like


class Ranked(NamedTuple):
    """A candidate, compared with the query. They are sorted by (-cosine, distance, number)."""

    order: tuple[float, int, int]
    path: Path
    distance: int
    cosine: float | None
    match: Match | None


class Finder:
    """Finds hits among the codes of a gallery, and looks up the paths of those alone. Used within a `snapshot`."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        folder: Path,
        codes: Loaded,
        encoder: CodeEncoder,
        kept: Kept,
        patches: PatchIndex | None = None,
    ) -> None:
        self.connection = connection
        self.folder = folder
        self.codes = codes
        self.encoder = encoder
        self.kept = kept
        self.patches = patches  # None: they are not to be used
        self.some_generated = has_table(connection)

    def find(self, queries: Sequence[Query], k: int, regions: bool = False) -> list[list[Hit]]:
        """The k best images for every query whose files are on disk; fewer where there are no more.

        `regions`: the queries are parts of a picture, and the best part of every image is sought.
        """
        wanted = max(LEAST, WIDE * k) if self.kept.features or self.patches else k
        fetched = min(len(self.codes), MOST if wanted > k else k)
        views = np.concatenate([query.views.codes for query in queries])
        near = iter(zip(*self.codes.search(views, fetched), strict=True))
        found = []
        for query in queries:
            lists = [next(near) for _ in query.views.codes]
            found.append(self._on_disk(query, k, wanted, lists, regions))
        return found

    def _on_disk(
        self, query: Query, k: int, wanted: int, lists: Sequence[tuple[list[int], list[int]]], regions: bool
    ) -> list[Hit]:
        """The k best whose file is there; `lists` are distances and ids of the nearest codes of every view."""
        while True:
            ids = {number for near in lists for number in with_ties(*near, wanted)}
            if self.patches:
                asked = query.patches.codes if query.patches else query.views.codes
                ids.update(self.patches.images_near(asked, max(PATCHES, wanted * PATCHES // LEAST)))
            hits: list[Hit] = []
            for one in sorted(self._rank(query, sorted(ids), regions)):
                if len(hits) < k and one.path.is_file():
                    hits.append(self._hit(one))
            if len(hits) >= k or wanted >= len(self.codes):
                return hits
            wanted = min(2 * wanted, len(self.codes))
            fetched = max(wanted, len(lists[0][0]))
            lists = list(zip(*self.codes.search(query.views.codes, fetched), strict=True))

    def _rank(self, query: Query, ids: Sequence[int], regions: bool) -> list[Ranked]:
        """Every candidate, compared with the query by features and patches where there are any."""
        rows = list(self._rows("SELECT id, path, width, height, code FROM images WHERE id", ids))
        if len(rows) < len(ids):
            lost = min(set(ids) - {number for number, *_ in rows})
            raise damaged(self.folder / NAME, f"there is no image {lost}")
        packed = np.frombuffer(b"".join(code for *_, code in rows), np.uint8).reshape(len(rows), -1)
        distances = np.bitwise_count(query.views.codes[:, None] ^ packed).sum(2).min(0).tolist()
        features = self._features(ids)
        cosines = best_cosines(query.views.features, features)
        patches = self._patches(ids) if self.patches else {}
        ranked = []
        for (number, stored, width, height, _), code, distance in zip(rows, packed, distances, strict=True):
            match, cosine = None, cosines.get(number)
            if number in patches:
                feature = features.get(number, np.empty(0, np.float32))
                whole = Patches(np.array([[0, 0, width, height]], np.int32), code[None], feature[None])
                match, distance = self._match(query, whole, patches[number], regions, distance)
                cosine = match.cosine
            cosine = None if cosine is None else max(-1.0, min(1.0, round(cosine, DIGITS)))
            order = (2.0 if cosine is None else -cosine, distance, number)  # without a feature: behind all others
            ranked.append(Ranked(order, absolute_path(self.folder, stored), distance, cosine, match))
        return ranked

    def _match(self, query: Query, whole: Patches, patches: Patches, regions: bool, distance: int) -> tuple[Match, int]:
        """Compare by patches; `distance` of the wholes is replaced by that of the region where one was asked for."""
        reference = joined(whole, patches)
        if regions or query.patches is None:
            match, number = compare_region(query.views, reference)
            return match, int(np.bitwise_count(query.views.codes[0] ^ reference.codes[number]).sum())
        best = int(similarity(query.views, whole).argmax())  # the view that fits, of all probes
        return compare(joined(query.views.only(best), query.patches), reference), distance

    def _hit(self, one: Ranked) -> Hit:
        generated = self.some_generated and is_generated(self.connection, one.order[2])
        score = self.encoder.score(one.distance, one.cosine if self.kept.features else None)
        cosine = one.cosine if self.kept.features else None
        where = (one.match.region, one.match.query_region) if one.match else (None, None)
        return Hit(one.path, one.distance, score, generated, cosine, *where)

    # ------------------------------------------------------------------ what is stored

    def _features(self, ids: Sequence[int]) -> dict[int, np.ndarray]:
        if not self.kept.features:
            return {}
        rows = self._rows("SELECT image, feature FROM features WHERE image", ids)
        return {image: from_half(feature, self.encoder.features)[0] for image, feature in rows}

    def _patches(self, ids: Sequence[int]) -> dict[int, Patches]:
        width, size = self.encoder.bits // 8, self.encoder.features if self.kept.features else 0
        features = {}
        if size:
            rows = self._rows("SELECT image, features FROM patch_features WHERE image", ids)
            features = {image: from_half(data, size) for image, data in rows}
        found = {}
        for image, boxes, codes in self._rows("SELECT image, boxes, codes FROM patches WHERE image", ids):
            packed = np.frombuffer(codes, np.uint8).reshape(-1, width)
            of_patches = features.get(image, np.empty((len(packed), 0), np.float32))
            found[image] = Patches(np.frombuffer(boxes, "<i4").reshape(-1, 4), packed, of_patches)
        return found

    def _rows(self, query: str, ids: Sequence[int]) -> Iterable[tuple[Any, ...]]:
        return select(self.connection, query, ids)


def with_ties(distances: Sequence[int], ids: Sequence[int], wanted: int) -> Sequence[int]:
    """The first `wanted` ids, and those as near as the last of them. Exactly `wanted` where no more are known."""
    if wanted >= len(ids):
        return ids
    return ids[: int(np.searchsorted(distances, distances[wanted - 1], side="right"))]


def best_cosines(
    views: np.ndarray,  # float32 [V, D]
    features: Mapping[int, np.ndarray],  # float32 [D] of every image
) -> dict[int, float]:
    """Of every image with the view that is nearest to it."""
    if not features:
        return {}
    best = (views @ np.stack(list(features.values())).T).max(0)
    return dict(zip(features, best.tolist(), strict=True))
