"""Renew docs/retrieval.md and its picture from the saved results.

    python benchmarks/retrieval_page.py                              everything in benchmarks/results
    python benchmarks/retrieval_page.py --results FOLDER

A table stands between two marks, `<!-- NAME -->` and `<!-- end NAME -->`; what was not measured keeps its old table.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs/retrieval.md", ROOT / "docs/retrieval.png"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder (%(default)s)")
    folder = parser.parse_args().results
    text = PAGE.read_text()
    for mark, (source, table) in TABLES.items():
        if (folder / source).exists():
            text = renewed(text, mark, f"{table(read(folder / source))}\n\n{origin(read(folder / source), source)}")
    PAGE.write_text(text)
    if (folder / "curve_cpu.json").exists():
        draw(read(folder / "curve_cpu.json")["rows"], PICTURE)
    return 0


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def renewed(text: str, mark: str, table: str) -> str:
    between = rf"(<!-- {mark} -->\n).*?(<!-- end {mark} -->)"
    text, times = re.subn(between, lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.S)
    if times != 1:
        sys.exit(f"{PAGE} has {times} places marked '{mark}'; exactly one is needed")
    return text


def origin(document: dict[str, Any], source: str) -> str:
    made = document["provenance"]
    return f"`{source}`: {made['devices']['cpu']}, commit {made['commit']}, {made['date'][:10]}."


# ------------------------------------------------------------------ the paper's Table 6


def hash_table(document: dict[str, Any]) -> str:
    columns = [(k, calls) for calls in ("one call", "calls of 64") for k in (1, 4)]
    found = {(p["name"], p["k"], p["calls"]): info for p, info in measured(document)}
    lines = ["| 80,000 × 26,500 codes of 16 bits | storage | " + " | ".join(f"{c}, k={k}" for k, c in columns) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for name in dict.fromkeys(name for name, _, _ in found):
        infos = [found.get((name, *column)) for column in columns]
        ours = [found.get(("ragsr", *column)) for column in columns]
        cells = [cell(info, our if name != "ragsr" else None) for info, our in zip(infos, ours, strict=True)]
        lines.append(f"| {name} | {size(next(i for i in infos if i)['storage bytes'])} | {' | '.join(cells)} |")
    return "\n".join([*lines, "| the paper, on a GPU | 51.76 KB | | | 67.8 ms | |"])


def vgg_table(document: dict[str, Any]) -> str:
    found = {parameters["name"]: info for parameters, info in measured(document)}
    lines = ["| 80,000 × 26,500 features of 4096 | storage | one call, k=1 |", "|---|---|---|"]
    for name, info in found.items():
        our = found.get("ragsr") if name != "ragsr" else None
        lines.append(f"| {name} | {size(info['storage bytes'])} | {cell(info, our)} |")
    return "\n".join([*lines, "| the paper, on a GPU | 828.13 MB | 4338.2 ms |"])


def measured(document: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Parameters and extra_info of every benchmark that pytest-benchmark saved."""
    return [(benchmark["params"], benchmark["extra_info"]) for benchmark in document["benchmarks"]]


def cell(info: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """The time, how many times ours that is, and a star where it was not measured on all queries."""
    if info is None:
        return ""
    star = "*" if info["queries timed"] < 80_000 else ""
    return duration(info["seconds"]) + star + (f" ({ratio(info['seconds'] / ours['seconds'])} ×)" if ours else "")


# ------------------------------------------------------------------ what run.py saves


def search_table(document: dict[str, Any]) -> str:
    rows = [row for row in document["rows"] if row["op"] == "hamming_topk"]
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    lines = ["| queries, codes, k | ours | [20 %, 80 %] | G pairs/s | of the limit | " + " | ".join(names) + " |"]
    lines.append("|---|---|---|---|---|" + "---|" * len(names))
    for row in rows:
        lines.append(f"| {row['case']} | {' | '.join([*ours(row), *(beside(row, name) for name in names)])} |")
    return "\n".join(lines)


def index_table(document: dict[str, Any]) -> str:
    lines = ["| | ours | [20 %, 80 %] | G pairs/s | of the limit | beside it |", "|---|---|---|---|---|---|"]
    for row in document["rows"]:
        times = ", ".join(f"{name} {ratio(value)} ×" for name, value in row["times"].items())
        lines.append(f"| {row['op']}: {row['case']} | {' | '.join(ours(row))} | {times} |")
    return "\n".join(lines)


def ours(row: dict[str, Any]) -> list[str]:
    low, middle, high = (duration(x / 1e6) for x in row["us"]["kernel"])
    limit = row["limit"]
    reached = f"{limit['reached']:.0%} of {limit['why']}" if limit else "not known"
    return [middle, f"[{low}, {high}]", f"{row['per_second'] / 1e9:.1f}", reached]


def beside(row: dict[str, Any], name: str) -> str:
    """How many times ours the peer takes, with a star where it was not measured on all queries."""
    star = "*" if name in row["scaled"] else ""
    return f"{ratio(row['times'][name])} ×{star}" if name in row["times"] else ""


def duration(seconds: float) -> str:
    unit, factor = next((u, f) for u, f in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if seconds * f >= 1 or u == "µs")
    return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"


def ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def size(count: int) -> str:
    return f"{count / 1024:.2f} KB" if count < 1 << 20 else f"{count / (1 << 20):.2f} MB"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "hash": ("table6_hash.json", hash_table),
    "vgg": ("table6_vgg.json", vgg_table),
    "search": ("ops_cpu.json", search_table),
    "index": ("index_cpu.json", index_table),
}


# ------------------------------------------------------------------ the picture

NAMES = {"kernel": "ragsr", "plain": "ragsr, plain PyTorch", "±1 matmul, topk": "torch: ±1 matmul, topk"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of 64 queries against the number of codes, a line per method, 16 bits on the left and 64 on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        n, bits = (int(x) for x in re.search(r"(\d+) codes of (\d+) bits", row["case"]).groups())
        for name, (_, middle, _) in row["us"].items():
            points.setdefault(bits, {}).setdefault(name, []).append((n, middle / 1e3))
    figure, axes = pyplot.subplots(1, len(points), figsize=(5.5 * len(points), 4.6), sharey=True, squeeze=False)
    for axis, (bits, lines) in zip(axes[0], sorted(points.items()), strict=True):
        for name, line in lines.items():
            width = 2.6 if name == "kernel" else 1.3
            axis.loglog(*zip(*sorted(line), strict=True), marker="o", ms=3.5, lw=width, label=NAMES.get(name, name))
        axis.set(title=f"{bits} bits", xlabel="codes")
        axis.grid(True, which="major", alpha=0.3)
    axes[0, 0].set_ylabel("64 queries, k = 4: milliseconds")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
