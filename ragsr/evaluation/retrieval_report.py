"""What an evaluation of retrieval leaves behind: lines, JSON, a page, and a picture of rates and distances."""

import base64
import html
import io
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragsr.evaluation.pack import load_low
from ragsr.evaluation.ranking import SHOWN
from ragsr.evaluation.report import Facts, figure, page, table
from ragsr.evaluation.restoring import thumbnail
from ragsr.evaluation.retrieval import Retrieval, RetrievalRow, rates
from ragsr.files import replacing
from ragsr.image import load_image

NO_PLOTS = 'the picture needs matplotlib: pip install "ragsr[train]"'
COLUMNS = [f"hit@{k}" for k in range(1, SHOWN + 1)]


def retrieval_document(results: Sequence[Retrieval], settings: Facts, facts: Facts) -> Facts:
    """Hits are named relative to the folder the command ran in, so that a report says the same on another machine."""
    listed = [
        {
            "encoder": result.encoder.id,
            "bits": result.encoder.bits,
            "features": result.encoder.features,
            "way": result.way,
            "rates": rates(result.rows),
            "pairs": {degradation: asdict(pairs) for degradation, pairs in result.pairs.items()},
            "rows": [_row_facts(row) for row in result.rows],
        }
        for result in results
    ]
    return {"evaluation": "retrieval", **settings, "results": listed, "run": facts}


def _row_facts(row: RetrievalRow) -> Facts:
    hits = [{"path": os.path.relpath(path), "by": by, "right": path in row.right} for path, by in row.hits]
    return {"photo": row.query.name, "degradation": row.degradation, "rank": row.rank, "hits": hits}


def retrieval_lines(results: Sequence[Retrieval], candidates: int) -> str:
    """A table per encoder and way: searches with a right one among the first 1 to 5, recall and MAP."""
    lines = []
    for result in results:
        lines += [
            f"{result.label}, {candidates} candidates",
            _line("degradation", "group", *COLUMNS, "recall@5", "MAP"),
        ]
        lines += [_line(*cells) for cells in _cells(result.rows)]
    return "\n".join(lines)


def _cells(rows: Sequence[RetrievalRow]) -> list[list[str]]:
    return [
        [
            line["degradation"],
            line["group"],
            *(f"{round(line[name] * line['queries'])}/{line['queries']}" for name in COLUMNS),
            f"{line[f'recall@{SHOWN}']:.3f}",
            f"{line['map']:.3f}",
        ]
        for line in rates(rows)
    ]


def _line(degradation: str, group: str, *cells: str) -> str:
    return f"{degradation:<12}{group:<12}" + "".join(f"{cell:>9}" for cell in cells)


# ------------------------------------------------------------------ the page


def retrieval_page(results: Sequence[Retrieval], document: Facts) -> str:
    """Numbers of all; pictures of what each encoder found in the last of its ways, which is the most able."""
    body = f"<p>{document['candidates']} candidates. Photos with a right one among the first 1 to 5 hits.</p>"
    head = ["encoder and way", "degradation", "group", *COLUMNS, "recall@5", "MAP"]
    body += table(head, [[result.label, *cells] for result in results for cells in _cells(result.rows)])
    picture = plot(results)
    if picture is None:
        body += f"<p>{html.escape(NO_PLOTS)}</p>"
    else:
        data = base64.b64encode(picture).decode()
        body += f'<img class="plot" src="data:image/png;base64,{data}" alt="hit rates and distances">'
    shown = list({result.encoder.id: result for result in results}.values())
    for rows in zip(*(result.rows for result in shown), strict=True):
        body += _section(rows, shown)
    return page("Retrieval", body, document["run"])


def _section(rows: Sequence[RetrievalRow], results: Sequence[Retrieval]) -> str:
    query = rows[0].query
    text = f"<section><h2>{html.escape(query.name)}, {rows[0].degradation}</h2>"
    photo = figure(thumbnail(load_low(query)), "photo", "small")
    for row, result in zip(rows, results, strict=True):
        rank = "not found" if row.rank is None else f"rank {row.rank}"
        text += (
            f'<p>{html.escape(result.label)}: {rank}</p><div class="row">{photo}{_hit_figures(row, result.unit)}</div>'
        )
        photo = ""
    return text + "</section>"


def _hit_figures(row: RetrievalRow, unit: str) -> str:
    figures = []
    for path, by in row.hits:
        kind = "right" if path in row.right else "wrong"
        near = f"{by:.0f}" if unit == "distance" else f"{by:.3f}"
        figures.append(figure(thumbnail(load_image(path)), f"{unit} {near}", f"small {kind}"))
    return "".join(figures)


# ------------------------------------------------------------------ the picture


def write_plot(results: Sequence[Retrieval], path: Path) -> bool:
    """Draw to a PNG file; False where matplotlib is not installed."""
    picture = plot(results)
    if picture is not None:
        with replacing(path) as temporary:
            temporary.write_bytes(picture)
    return picture is not None


def plot(results: Sequence[Retrieval]) -> bytes | None:
    """A PNG, a row per degradation: hit rates from 1 to 5 of all results, then how far right and wrong pairs are apart
    in each. None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    compared = [result for result in results if result.pairs]
    degradations = list(dict.fromkeys(row.degradation for row in results[0].rows))
    size = (3.6 * (1 + len(compared)), 3.2 * len(degradations))
    drawing = Figure(figsize=size, layout="constrained")
    panels = drawing.subplots(len(degradations), 1 + len(compared), squeeze=False)
    for row, degradation in zip(panels, degradations, strict=True):
        _draw_rates(row[0], results, degradation)
        for axes, result in zip(row[1:], compared, strict=True):
            _draw_pairs(axes, result, degradation)
    file = io.BytesIO()
    drawing.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _draw_rates(axes: Any, results: Sequence[Retrieval], degradation: str) -> None:
    for result in results:
        line = next(x for x in rates(result.rows) if (x["degradation"], x["group"]) == (degradation, "all"))
        axes.plot(range(1, SHOWN + 1), [line[name] for name in COLUMNS], marker="o", label=result.label)
    axes.set(title=f"{degradation}: hit rate", xlabel="first hits", ylim=(0, 1.02), xticks=range(1, SHOWN + 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="lower right")


def _draw_pairs(axes: Any, result: Retrieval, degradation: str) -> None:
    pairs = result.pairs[degradation]
    for name, counts in (("same scene", pairs.true), ("other", pairs.false)):
        total = max(1, sum(counts))
        axes.stairs([n / total for n in counts], pairs.edges, fill=True, alpha=0.5, label=f"{name} ({sum(counts)})")
    unit = "differing bits" if result.way == "codes" else "cosine"
    axes.set(title=f"{degradation}: {result.label}", xlabel=unit, ylabel="share of pairs")
    axes.title.set_fontsize("small")
    axes.legend(fontsize="x-small")
