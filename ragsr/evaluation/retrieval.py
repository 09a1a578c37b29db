"""How often an encoder finds the right reference: hit rates, recall and MAP, per group and degradation, and how far
apart the codes of right and wrong pairs are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ragsr.codes import CodeEncoder
from ragsr.errors import InputError
from ragsr.evaluation.pack import Pack, Query, load_low
from ragsr.evaluation.ranking import PATCHES, SHOWN, WAYS, Ranked, by_gallery, encode, gallery_of, ways_of
from ragsr.image import find_images, load_image
from ragsr.metrics import hit_rate, mean_average_precision, recall

COSINES = np.linspace(-1, 1, 81)  # edges of the histogram of cosines


@dataclass
class RetrievalRow:
    """One search."""

    query: Query
    degradation: str
    ranked: list[Path]  # candidates, best first
    values: list[float]  # of the first `SHOWN`: distance in bits, or cosine
    right: frozenset[Path]  # candidates that show the same scene

    @property
    def hits(self) -> list[tuple[Path, float]]:
        """The first candidates with their distance or cosine."""
        return list(zip(self.ranked[:SHOWN], self.values, strict=True))

    @property
    def rank(self) -> int | None:
        """The place of the first right one, from 1; None where it was not found."""
        return next((place for place, path in enumerate(self.ranked, 1) if path in self.right), None)


@dataclass
class Pairs:
    """How many pairs of a query and a candidate have which distance or cosine; bin i is from edge i to edge i + 1."""

    edges: list[float]
    true: list[int]  # of the same scene
    false: list[int]


@dataclass
class Retrieval:
    """All searches with one encoder in one way."""

    encoder: CodeEncoder
    way: str  # see ranking.py
    rows: list[RetrievalRow] = field(default_factory=list)
    pairs: dict[str, Pairs] = field(default_factory=dict)  # by degradation, where pairs were compared alone

    @property
    def label(self) -> str:
        return f"{self.encoder.id} {self.way}"

    @property
    def unit(self) -> str:
        """What the values of the rows are."""
        return "distance" if self.way == "codes" or not self.encoder.features else "cosine"


def evaluate_retrieval(
    packs: Sequence[Pack],
    encoders: Sequence[CodeEncoder],
    candidates: Sequence[str | Path] = (),
    seed: int = 0,
    rerank: bool = False,
    patches: bool = False,
) -> tuple[list[Retrieval], int]:
    """Search the low-quality photos of `packs` (one per degradation) among the pack's references and `candidates`.

    `candidates` are images and folders of them; `rerank` asks for the ways that use features too, `patches` for that of
    a gallery with patches. Returns what was found by every encoder in every way, and the number of candidates. What is
    equally far stands in the order in which the candidates were added, so that is shuffled by `seed`: no source is
    favoured.
    """
    if not any(query.same_scene for pack in packs for query in pack.queries):
        raise InputError(f"{packs[0].folder}: none of these photos has a reference to search for")
    paths = _shuffled(packs, candidates, seed)
    results = []
    for encoder in encoders:
        known = encode(encoder, [partial(load_image, path) for path in paths], f"{encoder.id}: candidates")
        asked = [encode(encoder, _lows(pack), f"{encoder.id}: {pack.degradation} queries") for pack in packs]
        for way in ways_of(encoder, rerank):
            results.append(Retrieval(encoder, way))
            for pack, queries in zip(packs, asked, strict=True):
                _add_rows(results[-1], pack, paths, WAYS[way](queries, known))
        if patches:
            results.append(Retrieval(encoder, PATCHES))
            with gallery_of(encoder, paths) as gallery:
                for pack, queries in zip(packs, asked, strict=True):
                    others = WAYS["re-ranked" if encoder.features else "codes"](queries, known)
                    _add_rows(results[-1], pack, paths, by_gallery(gallery, paths, _lows(pack), others))
    return results, len(paths)


def rates(rows: Sequence[RetrievalRow]) -> list[dict[str, Any]]:
    """Per degradation and group, and over all groups: hit rate and recall at 1 to 5, and MAP."""
    table = []
    for degradation in dict.fromkeys(row.degradation for row in rows):
        of_degradation = [row for row in rows if row.degradation == degradation]
        groups = dict.fromkeys(row.query.group for row in of_degradation)
        for group in (*groups, "all"):
            part = [row for row in of_degradation if group in (row.query.group, "all")]
            truth, found = [row.right for row in part], [row.ranked for row in part]
            line: dict[str, Any] = {"degradation": degradation, "group": group, "queries": len(part)}
            line |= {f"hit@{k}": hit_rate(truth, found, k) for k in range(1, SHOWN + 1)}
            line |= {f"recall@{k}": recall(truth, found, k) for k in range(1, SHOWN + 1)}
            table.append(line | {"map": mean_average_precision(truth, found)})
    return table


# ------------------------------------------------------------------ details


def _shuffled(packs: Sequence[Pack], candidates: Sequence[str | Path], seed: int) -> list[Path]:
    references = {pack.folder / name for pack in packs for name in pack.references}
    extra = find_images(candidates) if candidates else []
    paths = sorted({path.resolve() for path in (*references, *extra)})
    return [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]


def _lows(pack: Pack) -> list[partial[Image.Image]]:
    return [partial(load_low, query) for query in pack.queries if query.same_scene]


def _add_rows(result: Retrieval, pack: Pack, paths: Sequence[Path], ranked: Ranked) -> None:
    """Add the answers to the queries of one pack."""
    queries = [query for query in pack.queries if query.same_scene]
    for query, order, values in zip(queries, ranked.order, ranked.values, strict=True):
        right = frozenset((pack.folder / name).resolve() for name in query.same_scene)
        found = [paths[number] for number in order]
        result.rows.append(RetrievalRow(query, pack.degradation, found, values[:SHOWN].tolist(), right))
    if result.way in ("codes", "cosine"):  # in others, only some pairs are compared in full
        edges = np.arange(result.encoder.bits + 2) - 0.5 if result.way == "codes" else COSINES
        result.pairs[pack.degradation] = _pairs(result.rows[-len(queries) :], ranked, edges)


def _pairs(rows: Sequence[RetrievalRow], ranked: Ranked, edges: np.ndarray) -> Pairs:
    same = np.array([[path in row.right for path in row.ranked] for row in rows])
    values = ranked.values.clip(edges[0], edges[-1])  # a cosine may pass 1 by its last digit
    true, false = (np.histogram(values[part], edges)[0].tolist() for part in (same, ~same))
    return Pairs(edges.tolist(), true, false)
