"""iRAG's Table 5: what generated images are worth for the training of hash codes.

An encoder is trained on each of five sets of images, and the low-quality photos of CUFED5 are searched by its codes
among all references of CUFED5. R1 to R5 is the hit rate of the first one to five hits, a hit being any of the photo's
own references. (The paper speaks of "rank of the ref. patch similarity" and prints numbers that rise from R1 to R5, as
hit rates do; its code for them was not released.)

    real                 all photos
    generated            all images that were generated
    real + generated     both
    limited              a tenth of the photos
    limited + generated  the same tenth, and nine generated images for each of them

Source: iRAG Sec. 4.3, Table 5.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ragsr.codes import CodeEncoder
from ragsr.errors import InputError
from ragsr.evaluation.pack import CUFED5, Pack
from ragsr.evaluation.ranking import SHOWN
from ragsr.evaluation.retrieval import evaluate_retrieval, rates
from ragsr.gallery.augment import parent_of

LIMITED = 10  # a photo in so many is kept
FOLD = 9  # generated images for each of those
PAPER = {  # hit rates in %, with VGG16 and 16 bits on about 13,000 photos and as many generated images
    "real": (45, 59, 64, 70, 75),
    "generated": (40, 52, 59, 63, 66),
    "real + generated": (52, 60, 66, 71, 73),
    "limited": (48, 55, 60, 63, 67),
    "limited + generated": (52, 62, 63, 67, 71),
}
Train = Callable[[str, Sequence[Path]], CodeEncoder]  # the name of a set and its images to an encoder


@dataclass
class Table5Row:
    """One training set."""

    name: str
    images: int
    encoder: str
    codes: list[float]  # hit rates at 1 to 5, by Hamming distance
    reranked: list[float] | None  # the nearest codes ranked again by feature, where there are features
    paper: tuple[int, ...]  # in %


def training_sets(real: Sequence[Path], generated: Sequence[Path], seed: int = 0) -> dict[str, list[Path]]:
    """The five sets, by name. What is limited is drawn by `seed`.

    Generated images that say from which photo they are (those of `ragsr gallery augment` do) join the limited set with
    that photo alone; if none says so, any may join. Errors: `InputError` for fewer than `LIMITED` photos, and where a
    photo is among the generated images or no generated image is left for the limited set.
    """
    real, generated = sorted(real), sorted(generated)
    if len(real) < LIMITED:
        raise InputError(f"{len(real)} photos are too few: a tenth of them is a training set of its own")
    both = sorted({*real} & {*generated})
    if both:
        raise InputError(f"{both[0]}: is among the photos and among the generated images; name folders of their own")
    draws = np.random.default_rng(seed)
    limited = sorted(real[i] for i in draws.permutation(len(real))[: len(real) // LIMITED])
    parents = {path: parent_of(path) for path in generated}
    if any(parents.values()):
        kept = {hashlib.sha256(path.read_bytes()).digest() for path in limited}
        able = [path for path in generated if parents[path] in kept]
    else:
        able = generated
    if not able:
        raise InputError(f"no generated image is from one of the {len(limited)} photos of the limited set; make more")
    joined = sorted(able[i] for i in draws.permutation(len(able))[: FOLD * len(limited)])
    return {
        "real": real,
        "generated": generated,
        "real + generated": [*real, *generated],
        "limited": limited,
        "limited + generated": [*limited, *joined],
    }


def evaluate_table5(pack: Pack, sets: dict[str, list[Path]], train: Train, seed: int = 0) -> list[Table5Row]:
    """Train on every set, and search CUFED5 by what was trained."""
    rows = []
    for name, images in sets.items():
        encoder = train(name, images)
        results, _ = evaluate_retrieval([pack], [encoder], seed=seed, rerank=True)
        by = {result.way: _hit_rates(rates(result.rows)) for result in results}
        rows.append(Table5Row(name, len(images), encoder.id, by["codes"], by.get("re-ranked"), PAPER[name]))
    return rows


def _hit_rates(table: list[dict[str, Any]]) -> list[float]:
    (line,) = (line for line in table if line["group"] == CUFED5)
    return [line[f"hit@{k}"] for k in range(1, SHOWN + 1)]


def table5_lines(rows: Sequence[Table5Row]) -> str:
    head = f"{'hit rates in %':<21}{'images':>7}  " + "".join(f"{f'R{k}':>5}" for k in range(1, SHOWN + 1))
    lines = [f"{head}   re-ranked{'':<18}the paper"]
    for row in rows:
        again = _percent(row.reranked) if row.reranked else f"{'-':>5}" * SHOWN
        paper = "".join(f"{value:>5}" for value in row.paper)
        lines.append(f"{row.name:<21}{row.images:>7}  {_percent(row.codes)}  {again}  {paper}")
    return "\n".join(lines)


def _percent(values: Sequence[float]) -> str:
    return "".join(f"{100 * value:>5.0f}" for value in values)


def table5_document(rows: Sequence[Table5Row], settings: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    return {"evaluation": "table5", **settings, "rows": [asdict(row) for row in rows], "run": facts}
