"""A pack: photos with known truth, their low-quality copies and their references.

PACK/retrieval_truth.json                  {"GROUP/SCENE/query_0.png": {"scene", "best": [...], "same_scene": [...]}}
PACK/GROUP/SCENE/query_0.png, ref_00.jpg   ground truth and references; GROUP is multiview, pairs or synthcrop
PACK/single/NAME.png                       ground truth without any reference
PACK/lq_bicubic_x4/SCENE_query_0.png       what is restored; for singles NAME.png
PACK/lq_degraded_x4/...                    the same after blur, noise and JPEG
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ragsr.errors import InputError

GROUPS = ("multiview", "pairs", "synthcrop", "single")
DEGRADATIONS = ("bicubic", "degraded")
TRUTH = "retrieval_truth.json"


@dataclass(frozen=True)
class Query:
    """One photo of a pack. References are named as the pack names them: relative to its folder."""

    name: str
    group: str
    scene: str
    truth: Path
    low: Path
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
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
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
                tuple(entry["best"]),
                frozenset(entry["same_scene"]),
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
