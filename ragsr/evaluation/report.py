"""What an evaluation leaves behind: lines for the terminal, JSON with its provenance, one self-contained HTML page."""

import base64
import html
import io
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ragsr.env import provenance
from ragsr.evaluation.restoring import METHODS, RestoreRow, mean_scores
from ragsr.files import replacing

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


def restore_document(rows: Sequence[RestoreRow], settings: Facts, facts: Facts) -> Facts:
    listed = [
        {"photo": row.query.name, "group": row.query.group, "scores": {m: asdict(s) for m, s in row.scores.items()}}
        for row in rows
    ]
    return {"evaluation": "restore", **settings, "mean": mean_scores(rows), "rows": listed, "run": facts}


def restore_lines(rows: Sequence[RestoreRow], preset: str) -> str:
    """A table: a line per photo, then the means and the gains over bicubic."""
    means = mean_scores(rows)
    width = max(len(row.query.name) for row in rows)
    lines = [f"{f'PSNR in dB / SSIM ({preset})':<{width}}" + "".join(f"{method:>16}" for method in means)]
    for row in rows:
        cells = [row.scores.get(method) for method in means]
        told = [f"{score.psnr:.2f} / {score.ssim:.4f}" if score else "-" for score in cells]
        lines.append(f"{row.query.name:<{width}}" + "".join(f"{cell:>16}" for cell in told))
    lines.append(f"{'mean':<{width}}" + "".join(f"{m['psnr']:>7.2f} / {m['ssim']:.4f}" for m in means.values()))
    lines.append(f"{'photos':<{width}}" + "".join(f"{m['photos']:>16}" for m in means.values()))
    for name in ("mean_gain", "worst_gain"):
        label = f"{name.replace('_', ' ')} over bicubic, dB"
        lines.append(f"{label:<{width}}" + "".join(f"{m[name]:>+16.2f}" for m in means.values()))
    return "\n".join(lines)


def restore_page(rows: Sequence[RestoreRow], document: Facts) -> str:
    means = document["mean"]
    head = ["", *means]
    lines = [
        ["PSNR, dB", *(f"{m['psnr']:.2f}" for m in means.values())],
        ["SSIM", *(f"{m['ssim']:.4f}" for m in means.values())],
        ["mean gain over bicubic, dB", *(f"{m['mean_gain']:+.2f}" for m in means.values())],
        ["worst gain, dB", *(f"{m['worst_gain']:+.2f}" for m in means.values())],
        ["photos", *(str(m["photos"]) for m in means.values())],
    ]
    legend = "; ".join(f"<b>{name}</b> {METHODS[name]}" for name in means if name in METHODS)
    intro = f"<p>Preset <b>{document['preset']}</b>, degradation {document['degradation']}. {legend}.</p>"
    sections = [f"<section><h2>{html.escape(row.query.name)}</h2>{_restore_figures(row)}</section>" for row in rows]
    return page("Restoring", intro + table(head, lines) + "".join(sections), document["run"])


def _restore_figures(row: RestoreRow) -> str:
    figures = []
    for name, picture in row.pictures.items():
        score = row.scores.get(name)
        figures.append(figure(picture, f"{name} · {score.psnr:.2f} dB, {score.ssim:.4f}" if score else name))
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
