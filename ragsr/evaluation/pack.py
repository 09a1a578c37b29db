"""A pack: photos with known truth, their low-quality copies and their references.

PACK/retrieval_truth.json                  {"GROUP/SCENE/query_0.png": {"scene", "best": [...], "same_scene": [...]}}
PACK/GROUP/SCENE/query_0.png, ref_00.jpg   ground truth and references; GROUP is multiview, pairs or synthcrop
PACK/single/NAME.png                       ground truth without any reference
PACK/lq_bicubic_x4/SCENE_query_0.png       what is restored; for singles NAME.png
PACK/lq_degraded_x4/...                    the same after blur, noise and JPEG

The test set CUFED5 (Z. Zhang et al., "Image super-resolution by neural texture transfer", CVPR 2019) is read too, as it
is handed out: the 126 photos NNN_0.png and the references of each, NNN_1.png the most like it to NNN_5.png. It has no
low-quality copies: they are made, by bicubic ×4.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ragsr.errors import InputError
from ragsr.image import load_image, to_rgb

GROUPS = ("multiview", "pairs", "synthcrop", "single")
DEGRADATIONS = ("bicubic", "degraded")
CUFED5 = "cufed5"  # the one group of that set
SCALE = 4
TRUTH = "retrieval_truth.json"


@dataclass(frozen=True)
class Query:
    """One photo of a pack. References are named as the pack names them: relative to its folder."""

    name: str
    group: str
    scene: str
    truth: Path
    low: Path
    shrink: int = 1  # above 1: `low` is the truth itself, to be reduced so many times
    best: tuple[str, ...] = ()  # references that show the same part of the scene, best first
    same_scene: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pack:
    folder: Path
    degradation: str
    queries: tuple[Query, ...]
    references: tuple[str, ...]  # every reference of the pack, sorted


def load_pack(
    folder: str | Path, degradation: str = "bicubic", groups: Sequence[str] = GROUPS, limit: int | None = None
) -> Pack:
    """The first `limit` queries of those groups. Raises `InputError` that says what the folder lacks."""
    folder = Path(folder)
    if degradation not in DEGRADATIONS:
        raise InputError(f"there is no degradation {degradation!r}; there are: {', '.join(DEGRADATIONS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is the number of photos to evaluate, from 1 on")
    if degradation not in degradations_of(folder):
        raise InputError(f"{folder}: is CUFED5, which has no degraded copies; ask for bicubic")
    if is_cufed5(folder):
        return _load_cufed5(folder, limit)
    lows = folder / f"lq_{degradation}_x4"
    found = [*_with_truth(folder, lows), *_singles(folder, lows)]
    queries = tuple(query for query in found if query.group in groups)[:limit]
    if not queries:
        raise InputError(f"{folder}: no photos of the groups {', '.join(groups)}")
    references = tuple(sorted({name for query in found for name in query.same_scene}))
    needed = [path for q in queries for path in (q.truth, q.low)] + [folder / name for name in references]
    missing = [str(path.relative_to(folder)) for path in needed if not path.is_file()]
    if missing:
        raise InputError(f"{folder}: {len(missing)} files are missing, the first is {missing[0]}")
    return Pack(folder, degradation, queries, references)


def degradations_of(folder: str | Path) -> tuple[str, ...]:
    """Which low-quality copies there are of a pack."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: there is no such folder")
    return DEGRADATIONS[:1] if is_cufed5(Path(folder)) else DEGRADATIONS


def is_cufed5(folder: Path) -> bool:
    return not (folder / TRUTH).exists() and any(folder.glob("*_0.png"))


def load_low(query: Query) -> Image.Image:
    """The low-quality photo of a query."""
    if query.shrink == 1:
        return load_image(query.low)
    truth = load_truth(query)
    return truth.resize((truth.width // query.shrink, truth.height // query.shrink), Image.Resampling.BICUBIC)


def load_truth(query: Query) -> Image.Image:
    """What restoring it should give; where it is reduced first, without the last rows and columns that do not fit."""
    image = load_image(query.truth)
    if query.shrink == 1:
        return image
    width, height = (max(1, side // query.shrink) * query.shrink for side in image.size)
    return to_rgb(image).crop((0, 0, width, height))


def _load_cufed5(folder: Path, limit: int | None) -> Pack:
    queries = []
    for truth in sorted(folder.glob("*_0.png")):
        scene = truth.stem.removesuffix("_0")
        references = [f"{scene}_{place}.png" for place in range(1, 6)]
        there = tuple(name for name in references if (folder / name).is_file())
        if not there:
            raise InputError(f"{truth}: has no references {references[0]} to {references[-1]} beside it")
        queries.append(Query(truth.name, CUFED5, scene, truth, truth, SCALE, there, frozenset(there)))
    references = sorted({name for query in queries for name in query.same_scene})
    return Pack(folder, DEGRADATIONS[0], tuple(queries[:limit]), tuple(references))


def _with_truth(folder: Path, lows: Path) -> list[Query]:
    """The queries that `retrieval_truth.json` lists, in its order."""
    path = folder / TRUTH
    try:
        entries = json.loads(path.read_text())
        return [
            Query(
                name,
                Path(name).parts[0],
                entry["scene"],
                folder / name,
                lows / f"{entry['scene']}_{Path(name).stem}.png",
                best=tuple(entry["best"]),
                same_scene=frozenset(entry["same_scene"]),
            )
            for name, entry in entries.items()
        ]
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; the folder is not an evaluation pack") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: is not the table of an evaluation pack ({error!r})") from error


def _singles(folder: Path, lows: Path) -> list[Query]:
    truths = sorted((folder / "single").glob("*.png"))
    return [Query(f"single/{t.name}", "single", t.stem, t, lows / t.name) for t in truths]
