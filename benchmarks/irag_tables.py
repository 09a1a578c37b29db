"""Means, paired differences and verdicts of irag_evidence.py, and how they are printed."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from ragsr.evaluation import interval
from ragsr.metrics import find_metric
from ragsr.metrics.named import title

Facts = dict[str, Any]
Case = tuple[str, str | None]  # stage and kind of reference
KINDS = ("true", "retrieved", "none", "random")


def summary(rows: Sequence[Facts], seed: int) -> Facts:
    """Of rows with input, stage, reference, photo, scene and metrics: means and differences, each with its interval."""
    told: Facts = {"photos": {}, "means": [], "differences": []}
    for name in dict.fromkeys(row["input"] for row in rows):
        cases: dict[Case, dict[str, Facts]] = {}
        for row in rows:
            if row["input"] == name:
                cases.setdefault((row["stage"], row["reference"]), {})[row["photo"]] = row
        told["photos"][name] = len(next(iter(cases.values())))
        for case, photos in cases.items():
            told["means"].append({"input": name, "case": label(case), **means(list(photos.values()), seed)})
        for one, other in pairs(cases):
            both = [photo for photo in cases[one] if photo in cases[other]]
            if both:
                differences = [difference(cases[one][photo], cases[other][photo]) for photo in both]
                about = {"input": name, "case": label(one), "minus": label(other)}
                told["differences"].append(about | verdicts(means(differences, seed)))
    return told


def label(case: Case) -> str:
    stage, kind = case
    return stage if kind is None else f"{stage}, {kind}"


def pairs(cases: dict[Case, Any]) -> Iterator[tuple[Case, Case]]:
    """Stage against stage with the best reference there is, then reference against reference within a stage."""
    stages = list(dict.fromkeys(stage for stage, _ in cases))
    best: list[Case] = [next(case for case in cases if case[0] == stage) for stage in stages]
    yield from ((one, other) for place, one in enumerate(best) for other in best[:place])
    for stage in stages:
        kinds: list[Case] = [(stage, kind) for kind in KINDS if (stage, kind) in cases]
        yield from pairwise(kinds)


def means(rows: Sequence[Facts], seed: int) -> Facts:
    scenes = [row["scene"] for row in rows]
    told: Facts = {"photos": len(rows), "scenes": len(set(scenes)), "metrics": {}}
    for metric in rows[0]["metrics"]:
        values = [row["metrics"][metric] for row in rows]
        told["metrics"][metric] = {"mean": sum(values) / len(values), "interval": interval(values, scenes, seed)}
    return told


def difference(one: Facts, other: Facts) -> Facts:
    values = {metric: value - other["metrics"][metric] for metric, value in one["metrics"].items()}
    return {"scene": one["scene"], "metrics": values}


def verdicts(told: Facts) -> Facts:
    """Whether the difference is sure to lie on one side of 0, and on which."""
    for name, one in told["metrics"].items():
        low, high = (end if find_metric(name).higher else -end for end in one["interval"])
        low, high = min(low, high), max(low, high)
        one["verdict"] = "better" if low > 0 else "worse" if high < 0 else "open"
    return told


# ------------------------------------------------------------------ tables


def markdown(document: Facts) -> str:
    preset, metrics = document["preset"], list(document["metrics"])
    head = [f"{title(name, preset)} {'↑' if find_metric(name).higher else '↓'}" for name in metrics]
    made = document["provenance"]
    lines = [
        f"{document['model']}, {document['steps'] or 'no'} steps, seed {document['seed']}; faithful: that of "
        f"{document['faithful']}; in brackets 95 % over the scenes. {made['devices']['cpu']}, commit {made['commit']}, "
        f"{made['date'][:10]}."
    ]
    for name, photos in document["photos"].items():
        rows = [row for row in document["means"] if row["input"] == name]
        cells = [[row["case"], *(value(metric, row["metrics"][metric]) for metric in metrics)] for row in rows]
        lines += ["", f"**×4 {name}**, {photos} photos of {rows[0]['scenes']} scenes", "", *table(["", *head], cells)]
        rows = [row for row in document["differences"] if row["input"] == name]
        cells = [
            [f"{row['case']} − {row['minus']}", *(change(metric, row["metrics"][metric]) for metric in metrics)]
            for row in rows
        ]
        lines += ["", *table([f"differences, {name}", *head], cells)]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)]


def value(metric: str, told: Facts) -> str:
    digits = find_metric(metric).digits
    low, high = told["interval"]
    return f"{told['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def change(metric: str, told: Facts) -> str:
    digits = find_metric(metric).digits
    low, high = told["interval"]
    return f"{told['mean']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {told['verdict']}"
