"""`ragsr._index`: a file larger than a cache, searched where it lies, and buckets against the scan."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from limits import read_rate

from ragsr.search import FlatIndex, MultiIndexHash

from . import Case, Prepare

MAPPED, HASHED, WIDTH = 100_000_000, 20_000_000, 8
CLUSTER, FLIPS, QUERIES = 100, 3, 64  # codes of a cluster, bits that they differ in from its centre at most


def same_answers(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), "the answers differ"


# ------------------------------------------------------------------ one query, all codes read from a mapped file


def random_codes(rows: int, seed: int) -> np.ndarray:  # uint8 [rows, WIDTH]
    return np.random.default_rng(seed).integers(0, 1 << 64, rows, np.uint64).view(np.uint8).reshape(rows, WIDTH)


def search_mapped(query: np.ndarray, k: int) -> Callable[[], Any]:
    """The file is removed at once; the mapping keeps its bytes until the index is gone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "codes.index")
        whole = FlatIndex(WIDTH)
        whole.add(random_codes(MAPPED, seed=0))
        whole.save(str(path))
        index = FlatIndex.load(str(path), mmap=True)
    return lambda: index.search(query, k)


def numpy_scan(query: np.ndarray, k: int) -> Callable[[], Any]:
    """Distance and index in one number, block after block: the same order as ours."""
    words = random_codes(MAPPED, seed=0).view(np.uint64)[:, 0]

    def run() -> Any:
        best = np.empty(0, np.int64)
        for first in range(0, MAPPED, 1 << 20):
            distance = np.bitwise_count(words[first : first + (1 << 20)] ^ query.view(np.uint64)[0, 0])
            keys = distance.astype(np.int64) << 40 | np.arange(first, first + len(distance))
            best = np.partition(np.concatenate((best, keys)), k - 1)[:k]
        best.sort()
        return (best >> 40).astype(np.int32)[None], (best & ((1 << 40) - 1))[None]

    return run


# ------------------------------------------------------------------ buckets


@functools.cache
def hashed() -> tuple[MultiIndexHash, np.ndarray]:
    """The tables, made once for all contestants, of codes that are centres with a few bits flipped; queries alike."""
    draw = np.random.default_rng(1)
    centres = draw.integers(0, 1 << 64, HASHED // CLUSTER, np.uint64)

    def members(rows: int) -> np.ndarray:  # uint8 [rows, WIDTH]
        found = centres[draw.integers(0, len(centres), rows)]
        for _ in range(FLIPS):
            found ^= np.uint64(1) << draw.integers(0, 64, rows, np.uint64)
        return found.view(np.uint8).reshape(rows, WIDTH)

    index = FlatIndex(WIDTH)
    index.add(members(HASHED))
    return MultiIndexHash(index), members(QUERIES)


def by_plan(plan: str) -> Prepare:
    return lambda queries, k: lambda: hashed()[0].search(queries, k, plan)


def read_limit(device: str) -> tuple[float, str] | None:
    rate = read_rate(device, MAPPED * WIDTH)
    return None if rate is None else (MAPPED * WIDTH / rate, f"reading the codes at {rate / 1e9:.0f} GB/s")


CASES = [
    Case(
        "FlatIndex.search",
        f"1 query, {MAPPED} codes of 64 bits in a mapped file, k=10",
        lambda: (random_codes(1, seed=2), 10),
        MAPPED,
        "pairs",
        peers={"NumPy, one thread": numpy_scan},
        same=same_answers,
        limit=read_limit,
        run=search_mapped,
        on_request=True,
    ),
    Case(
        "MultiIndexHash",
        f"{QUERIES} queries, {HASHED} clustered codes of 64 bits, k=10",
        lambda: (hashed()[1], 10),
        QUERIES * HASHED,
        "pairs",
        peers={"own scan": by_plan("scan")},
        same=same_answers,
        run=by_plan("auto"),
        on_request=True,
    ),
]
if FlatIndex is None:  # installed without a compiler
    CASES = []
