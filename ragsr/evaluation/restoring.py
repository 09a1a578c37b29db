"""How well a pipeline restores a pack: per photo, bicubic against the model with several choices of reference."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ragsr.evaluation.pack import Pack, Query, load_low, load_truth
from ragsr.gallery import Gallery
from ragsr.image import load_image
from ragsr.metrics import psnr, ssim
from ragsr.pipelines import ReFIRRestorer, RefSRPipeline, Restored

METHODS = {
    "none": "without reference",
    "best": "with the first of the query's best references",
    "random": "with a random reference of another scene",
    "gallery": "with the nearest images of the gallery",
}
CLOSE_UP = 256  # pixels a side of what the page shows at full size


@dataclass
class Score:
    psnr: float
    ssim: float
    seconds: float | None = None
    references: list[str] = field(default_factory=list)
    reference_share: float | None = None  # how much came from the references


@dataclass
class RestoreRow:
    """One photo: scores by method, "bicubic" first, and what the page shows of them."""

    query: Query
    scores: dict[str, Score]
    pictures: dict[str, Image.Image]


def evaluate_restore(
    pack: Pack,
    pipeline: RefSRPipeline | ReFIRRestorer,
    methods: Sequence[str] = ("none", "best", "random"),
    gallery: Gallery | None = None,
    k: int = 1,
    preset: str = "refir",
    seed: int = 0,
) -> list[RestoreRow]:
    """Restore every photo of the pack by every method; a photo without references skips the methods that need one.

    The random reference of each photo is drawn with `numpy.random.default_rng(seed)`, one after the other in the order
    of the pack, from the sorted references of all other scenes.
    """
    generator = np.random.default_rng(seed)
    others = [random_reference(generator, pack, query) for query in pack.queries]
    rows = []
    for query, other in tqdm(
        list(zip(pack.queries, others, strict=True)), unit="photo", desc="restoring", disable=None
    ):
        row = _start_row(query, pipeline.scale, preset)
        sources = _sources(pack, query, other, gallery, k)
        for method in methods:
            if method in sources:
                start = time.perf_counter()
                restored = pipeline(load_low(query), **sources[method])
                _add_score(row, method, restored, time.perf_counter() - start, preset, pack.folder)
        rows.append(row)
    return rows


def mean_scores(rows: Sequence[RestoreRow]) -> dict[str, dict[str, Any]]:
    """Per method: mean PSNR and SSIM, and gain over bicubic (mean and worst), over the photos that have the method."""
    means = {}
    for method in dict.fromkeys(method for row in rows for method in row.scores):
        pairs = [(row.scores[method], row.scores["bicubic"]) for row in rows if method in row.scores]
        gains = [score.psnr - bicubic.psnr for score, bicubic in pairs]
        means[method] = {
            "photos": len(pairs),
            "psnr": mean(score.psnr for score, _ in pairs),
            "ssim": mean(score.ssim for score, _ in pairs),
            "mean_gain": mean(gains),
            "worst_gain": min(gains),
        }
    return means


# ------------------------------------------------------------------ details


def random_reference(generator: np.random.Generator, pack: Pack, query: Query) -> str | None:
    """A random reference that does not show the query's scene."""
    wrong = [name for name in pack.references if name not in query.same_scene]
    return wrong[generator.integers(len(wrong))] if wrong else None


def _sources(pack: Pack, query: Query, other: str | None, gallery: Gallery | None, k: int) -> dict[str, dict[str, Any]]:
    """For every method that this photo allows, what the pipeline is given beside the photo."""
    sources: dict[str, dict[str, Any]] = {"none": {}}
    if query.best:
        sources["best"] = {"references": [pack.folder / query.best[0]]}
    if other is not None:
        sources["random"] = {"references": [pack.folder / other]}
    if gallery is not None:
        sources["gallery"] = {"gallery": gallery, "k": k}
    return sources


def _start_row(query: Query, scale: int, preset: str) -> RestoreRow:
    truth, low = load_truth(query), load_low(query)
    size = (low.width * scale, low.height * scale)
    bicubic = low.resize(size, Image.Resampling.BICUBIC)
    shown = {"low quality": low.resize(size, Image.Resampling.NEAREST), "truth": truth, "bicubic": bicubic}
    pictures = {name: close_up(picture) for name, picture in shown.items()}
    return RestoreRow(query, {"bicubic": Score(psnr(bicubic, truth, preset), ssim(bicubic, truth, preset))}, pictures)


def _add_score(row: RestoreRow, method: str, restored: Restored, seconds: float, preset: str, folder: Path) -> None:
    truth = load_truth(row.query)
    used = [reference.path for reference in restored.references if reference.path is not None]
    row.scores[method] = Score(
        psnr(restored.image, truth, preset),
        ssim(restored.image, truth, preset),
        seconds,
        [name_in(folder, path) for path in used],
        restored.reference_share,
    )
    row.pictures[method] = close_up(restored.image)
    if used:
        row.pictures[f"reference: {method}"] = thumbnail(load_image(used[0]))


def name_in(folder: Path, path: Path) -> str:
    """A reference as the pack names it, or its name alone when it lies elsewhere: no path of this machine is told."""
    whole, inside = path.resolve(), folder.resolve()
    return whole.relative_to(inside).as_posix() if whole.is_relative_to(inside) else whole.name


def close_up(picture: Image.Image) -> Image.Image:
    """The middle of a picture, pixel by pixel."""
    width, height = min(CLOSE_UP, picture.width), min(CLOSE_UP, picture.height)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def thumbnail(picture: Image.Image) -> Image.Image:
    """The whole picture, small."""
    small = picture.copy()
    small.thumbnail((CLOSE_UP, CLOSE_UP))
    return small
