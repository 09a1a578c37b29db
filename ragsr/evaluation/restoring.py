"""How well a pipeline restores a pack: per photo, bicubic against the model with several choices of reference."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ragsr.codes import DEFAULT
from ragsr.evaluation.bootstrap import interval
from ragsr.evaluation.pack import Pack, Query, load_low, load_truth
from ragsr.gallery import Gallery
from ragsr.image import load_image
from ragsr.metrics import USUAL, load_measures
from ragsr.metrics.extra import FIDMeasure, save_for_fid
from ragsr.metrics.named import Measure
from ragsr.pipelines import ReFIRRestorer, RefSRPipeline, Restored

METHODS = {
    "none": "without reference",
    "best": "with the true reference, the first of the query's best",
    "retrieved": "with what is found among all references of the pack, if it is like enough",
    "random": "with a random reference of another scene",
    "gallery": "with the nearest images of the gallery",
}
CLOSE_UP = 256  # pixels a side of what the page shows at full size


@dataclass
class Score:
    metrics: dict[str, float]  # by name
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
    metrics: Sequence[str] = USUAL,
    sets: Path | None = None,
    network: Path | None = None,
) -> list[RestoreRow]:
    """Restore every photo of the pack by every method; a photo without references skips the methods that need one.

    The random reference of each photo is drawn with `numpy.random.default_rng(seed)`, one after the other in the order
    of the pack, from the sorted references of all other scenes. `gallery` is what "gallery" and "retrieved" search; for
    the latter it holds the references of the pack (`pack_gallery`). `metrics` are names of `ragsr.metrics.METRICS`; for
    FID, which compares sets, the pictures are written to the folder `sets`, where `fids` finds them. `network` is what
    the metric "features" looks with.
    """
    measures = load_measures(metrics, preset, pipeline.device, network)
    generator = np.random.default_rng(seed)
    others = [random_reference(generator, pack, query) for query in pack.queries]
    rows: list[RestoreRow] = []
    for query, other in tqdm(
        list(zip(pack.queries, others, strict=True)), unit="photo", desc="restoring", disable=None
    ):
        truth = load_truth(query)
        row, bicubic = _start_row(query, truth, pipeline.scale, measures)
        made = {"bicubic": bicubic}
        sources = _sources(pack, query, other, gallery, k)
        for method in methods:
            if method in sources:
                start = time.perf_counter()
                restored = pipeline(load_low(query), **sources[method])
                seconds = time.perf_counter() - start
                made[method] = restored.image
                _add_score(row, method, restored, seconds, measured(measures, restored.image, truth), pack.folder)
        if sets is not None:
            _save_sets(sets, made, truth, len(rows))
        rows.append(row)
    return rows


def measured(measures: Mapping[str, Measure], made: Image.Image, truth: Image.Image) -> dict[str, float]:
    return {name: measure(made, truth) for name, measure in measures.items()}


def mean_scores(rows: Sequence[RestoreRow], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Per method, over the photos that have it: the means of the metrics, their intervals of 95 % over the scenes, and
    the gain in PSNR over bicubic (mean and worst)."""
    means: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(method for row in rows for method in row.scores):
        found = [(row.scores[method].metrics, row) for row in rows if method in row.scores]
        scenes = [row.query.scene for _, row in found]
        columns = {name: [metrics[name] for metrics, _ in found] for name in found[0][0]}
        means[method] = {
            "photos": len(found),
            "scenes": len(set(scenes)),
            **{name: mean(values) for name, values in columns.items()},
            "intervals": {name: interval(values, scenes, seed) for name, values in columns.items()},
        }
        if "psnr" in columns:
            gains = [metrics["psnr"] - row.scores["bicubic"].metrics["psnr"] for metrics, row in found]
            means[method] |= {"mean_gain": mean(gains), "worst_gain": min(gains)}
    return means


def fids(sets: Path, device: str = "cpu") -> dict[str, float]:
    """FID per method, of the pictures that `evaluate_restore` wrote to `sets`."""
    measure = FIDMeasure(device)
    return {folder.name: measure(folder / "made", folder / "truth") for folder in sorted(sets.iterdir())}


@contextmanager
def pack_gallery(pack: Pack, encoder: str = DEFAULT) -> Iterator[Gallery]:
    """A gallery of all references of a pack, for a while."""
    with tempfile.TemporaryDirectory() as folder, Gallery.create(Path(folder) / "gallery", encoder) as gallery:
        gallery.add([pack.folder / name for name in pack.references], progress=False)
        yield gallery


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
        sources["gallery"] = sources["retrieved"] = {"gallery": gallery, "k": k}
    return sources


def _start_row(
    query: Query, truth: Image.Image, scale: int, measures: Mapping[str, Measure]
) -> tuple[RestoreRow, Image.Image]:
    low = load_low(query)
    size = (low.width * scale, low.height * scale)
    bicubic = low.resize(size, Image.Resampling.BICUBIC)
    shown = {"low quality": low.resize(size, Image.Resampling.NEAREST), "truth": truth, "bicubic": bicubic}
    pictures = {name: close_up(picture) for name, picture in shown.items()}
    return RestoreRow(query, {"bicubic": Score(measured(measures, bicubic, truth))}, pictures), bicubic


def _add_score(
    row: RestoreRow, method: str, restored: Restored, seconds: float, metrics: dict[str, float], folder: Path
) -> None:
    used = [reference.path for reference in restored.references if reference.path is not None]
    names = [name_in(folder, path) for path in used]
    row.scores[method] = Score(metrics, seconds, names, restored.reference_share)
    row.pictures[method] = close_up(restored.image)
    if used:
        row.pictures[f"reference: {method}"] = thumbnail(load_image(used[0]))


def _save_sets(sets: Path, made: Mapping[str, Image.Image], truth: Image.Image, number: int) -> None:
    """The pictures of one photo, and its truth once for every method that has it: what FID compares."""
    for method, picture in made.items():
        save_for_fid(picture, sets / method / "made", number)
        save_for_fid(truth, sets / method / "truth", number)


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
