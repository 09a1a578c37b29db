"""How often an encoder finds the right reference: hit rates at 1 and 5, per group and degradation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ragsr.codes import CodeEncoder
from ragsr.errors import InputError
from ragsr.evaluation.pack import Pack, Query
from ragsr.image import find_images, load_image
from ragsr.metrics import hit_rate
from ragsr.search import Index

SHOWN = 5  # first hits that are reported; hit rates are taken at 1 and at this


@dataclass
class RetrievalRow:
    """One search."""

    query: Query
    degradation: str
    hits: list[tuple[Path, int]]  # the nearest candidates with their distance, best first
    right: frozenset[Path]  # candidates that show the same scene
    rank: int  # place of the first right one among all candidates, from 1


def evaluate_retrieval(
    packs: Sequence[Pack], encoder: CodeEncoder, candidates: Sequence[str | Path] = (), seed: int = 0
) -> tuple[list[RetrievalRow], int]:
    """Search the low-quality photos of `packs` (one per degradation) among the pack's references and `candidates`.

    `candidates` are images and folders of them. Returns the rows and the number of candidates. Where codes are equally
    far the index prefers the one added first, so candidates are added in an order shuffled by `seed`: no source is
    favoured.
    """
    if not any(query.same_scene for pack in packs for query in pack.queries):
        raise InputError(f"{packs[0].folder}: none of these photos has a reference to search for")
    references = {pack.folder / name for pack in packs for name in pack.references}
    extra = find_images(candidates) if candidates else []
    paths = sorted({path.resolve() for path in (*references, *extra)})
    paths = [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]
    index = Index(encoder.bits)
    index.add(_encode(encoder, paths, "candidates"))
    rows = []
    for pack in packs:
        queries = [query for query in pack.queries if query.same_scene]
        codes = _encode(encoder, [query.low for query in queries], f"{pack.degradation} queries")
        distances, numbers = index.search(codes, len(index))
        for query, near, order in zip(queries, distances, numbers, strict=True):
            right = frozenset((pack.folder / name).resolve() for name in query.same_scene)
            ranked = [paths[number] for number in order]
            rank = next(i for i, path in enumerate(ranked, 1) if path in right)
            hits = list(zip(ranked[:SHOWN], near[:SHOWN].tolist(), strict=True))
            rows.append(RetrievalRow(query, pack.degradation, hits, right, rank))
    return rows, len(paths)


def hit_rates(rows: Sequence[RetrievalRow]) -> list[dict[str, Any]]:
    """Per degradation and group, and over all groups: hit rate at 1 and at 5."""
    table = []
    for degradation in dict.fromkeys(row.degradation for row in rows):
        of_degradation = [row for row in rows if row.degradation == degradation]
        groups = dict.fromkeys(row.query.group for row in of_degradation)
        for group in (*groups, "all"):
            part = [row for row in of_degradation if group in (row.query.group, "all")]
            truth, hits = [row.right for row in part], [[path for path, _ in row.hits] for row in part]
            rates = {f"hit@{k}": hit_rate(truth, hits, k) for k in (1, SHOWN)}
            table.append({"degradation": degradation, "group": group, "queries": len(part), **rates})
    return table


def _encode(encoder: CodeEncoder, paths: Sequence[Path], what: str) -> np.ndarray:
    """The codes of image files: uint8 [n, bits // 8]."""
    codes = [encoder.encode([load_image(path)]) for path in tqdm(paths, unit="image", desc=what, disable=None)]
    return np.concatenate([code.numpy() for code in codes])
