"""What an evaluation leaves behind: lines for the terminal, JSON with its provenance, one self-contained HTML page."""

import base64
import html
import io
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ragsr.env import provenance
from ragsr.evaluation.restoring import METHODS, RestoreRow, Score, mean_scores
from ragsr.files import replacing
from ragsr.metrics.extra import FID
from ragsr.metrics.named import describe, find_metric, title

Facts = dict[str, Any]
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 1700px; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .8em; text-align: right }
th { border-bottom: 2px solid #888 } td:first-child, th:first-child { text-align: left }
section { border-top: 1px solid #ccc; margin-top: 1.5em } h2 { font-size: 1.05em }
.row { display: flex; flex-wrap: wrap; gap: 10px } figure { margin: 0; max-width: 256px }
figcaption { font-size: .85em; color: #555 } img { display: block; max-width: 256px }
.right img { outline: 4px solid #2a9d4a } .wrong img { outline: 4px solid #c33 }
.small img { height: 110px; width: auto }
.plot { max-width: 100% }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto; font-size: .85em }
"""


def run_facts(started: float, device: str = "cpu") -> Facts:
    """What a reader must know to repeat the numbers; `started` is `time.perf_counter()` at the beginning."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "device": device,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mib": round(peak / 2**20),
        **provenance(),
    }


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Facts) -> None:
    write_text(path, json.dumps(document, indent=2) + "\n")


# ------------------------------------------------------------------ restoring


def restore_document(
    rows: Sequence[RestoreRow], settings: Facts, facts: Facts, fids: Mapping[str, float] | None = None
) -> Facts:
    """All that was measured; `settings` name the preset, and `fids` are of sets and so not in the rows."""
    listed = [
        {"photo": row.query.name, "group": row.query.group, "scores": {m: flat(s) for m, s in row.scores.items()}}
        for row in rows
    ]
    means = mean_scores(rows)
    for method, value in (fids or {}).items():
        means[method][FID] = value
    metrics = [*rows[0].scores["bicubic"].metrics, *([FID] if fids else [])]
    told = {name: describe(name, settings["preset"], settings.get("features")) for name in metrics}
    return {"evaluation": "restore", **settings, "metrics": told, "mean": means, "rows": listed, "run": facts}


def flat(score: Score) -> Facts:
    told = asdict(score)
    metrics: Facts = told.pop("metrics")
    return metrics | told


def restore_lines(rows: Sequence[RestoreRow], document: Facts) -> str:
    """Two tables: the first metric of every photo by method, then the means of all metrics."""
    head, *lines = mean_table(document)
    cells = [[f"mean [95 % over {most_scenes(document)} scenes]", *head[1:]], *lines]
    return "\n".join([*first_metric(rows, document), "", *aligned(cells)])


def first_metric(rows: Sequence[RestoreRow], document: Facts) -> list[str]:
    name, preset, methods = next(iter(document["metrics"])), document["preset"], document["mean"]
    if name == FID:
        return []
    cells = [[title(name, preset), *methods]]
    for row in rows:
        values = [row.scores[method].metrics[name] if method in row.scores else None for method in methods]
        cells.append([row.query.name, *("-" if value is None else number(name, value) for value in values)])
    return aligned(cells)


def mean_table(document: Facts) -> list[list[str]]:
    """A line per method, a column per metric; lines of gain over bicubic where PSNR was measured."""
    names, preset = list(document["metrics"]), document["preset"]
    gains = "psnr" in names
    head = ["", "photos", *(f"{title(name, preset)} {'↑' if find_metric(name).higher else '↓'}" for name in names)]
    lines = [head + [f"gain in PSNR ({preset}), dB", "worst gain"] * gains]
    for method, means in document["mean"].items():
        line = [method, str(means["photos"]), *(with_interval(name, means) for name in names)]
        lines.append(line + ([f"{means['mean_gain']:+.2f}", f"{means['worst_gain']:+.2f}"] if gains else []))
    return lines


def with_interval(name: str, means: Facts) -> str:
    told = number(name, means[name])
    if name not in means["intervals"]:
        return told
    low, high = means["intervals"][name]
    return f"{told} [{number(name, low)}, {number(name, high)}]"


def number(name: str, value: float) -> str:
    return f"{value:.{find_metric(name).digits}f}"


def most_scenes(document: Facts) -> int:
    return max(means["scenes"] for means in document["mean"].values())


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]


def restore_page(rows: Sequence[RestoreRow], document: Facts) -> str:
    head, *lines = mean_table(document)
    legend = "; ".join(f"<b>{name}</b> {METHODS[name]}" for name in document["mean"] if name in METHODS)
    sources = "; ".join(
        f"<b>{one['title']}</b> {html.escape(one['computed'])}, {one['better']} is better"
        for one in document["metrics"].values()
    )
    intro = (
        f"<p>Preset <b>{document['preset']}</b>, degradation {document['degradation']}. {legend}.</p><p>{sources}. "
        f"In brackets: 95 %, by drawing the {most_scenes(document)} scenes again and again.</p>"
    )
    sections = [
        f"<section><h2>{html.escape(row.query.name)}</h2>{_restore_figures(row, document['preset'])}</section>"
        for row in rows
    ]
    return page("Restoring", intro + table(head, lines) + "".join(sections), document["run"])


def _restore_figures(row: RestoreRow, preset: str) -> str:
    figures = []
    for name, picture in row.pictures.items():
        metrics = row.scores[name].metrics if name in row.scores else {}
        told = [f"{title(metric, preset)} {number(metric, value)}" for metric, value in metrics.items()]
        figures.append(figure(picture, " · ".join([name, *told])))
    return f'<div class="row">{"".join(figures)}</div>'


# ------------------------------------------------------------------ HTML


def page(title: str, body: str, facts: Facts) -> str:
    run = html.escape(json.dumps(facts, indent=2))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>ragsr: {title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1>{body}<section><h2>The run</h2><pre>{run}</pre></section></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def figure(picture: Image.Image, caption: str, kind: str = "") -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, format="JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure class="{kind}"><img src="data:image/jpeg;base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
