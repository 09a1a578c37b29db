"""Write the table of docs/retrieval_quality.md from what `ragsr eval retrieval --json` measured.

    ragsr eval retrieval --data PACK --candidates PHOTOS --encoder baseline-64 hash-16 hash-64 hash-256 \\
        --rerank --patches --json quality.json --plot docs/retrieval_quality.png
    python benchmarks/retrieval_quality.py quality.json

What it needs of that file is kept in benchmarks/results, without the hits of every single photo.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/retrieval_quality.md"
RESULTS = ROOT / "benchmarks/results/retrieval_quality.json"
MARKED = re.compile(r"(<!-- quality -->\n).*(<!-- end quality -->)", re.DOTALL)


def main() -> None:
    if len(sys.argv) > 1:
        measured = json.loads(Path(sys.argv[1]).read_text())
        kept = [{name: value for name, value in one.items() if name != "rows"} for one in measured["results"]]
        RESULTS.write_text(json.dumps(measured | {"results": kept}, indent=1) + "\n")
    document = json.loads(RESULTS.read_text())
    text = PAGE.read_text()
    if len(MARKED.findall(text)) != 1:
        sys.exit(f"{PAGE}: needs one place marked 'quality'")
    PAGE.write_text(MARKED.sub(lambda found: f"{found[1]}{table(document)}\n\n{origin(document)}\n{found[2]}", text))


def table(document: dict[str, Any]) -> str:
    """A line per encoder, way and degradation: right scene first / among the first five per group, recall and MAP."""
    groups = [line["group"] for line in document["results"][0]["rates"] if line["degradation"] == "bicubic"][:-1]
    lines = [
        f"| encoder | ranked by | queries | {' | '.join(groups)} | recall@5 | MAP |",
        "|---" * (len(groups) + 5) + "|",
    ]
    for result in document["results"]:
        for degradation in dict.fromkeys(line["degradation"] for line in result["rates"]):
            of_group = {line["group"]: line for line in result["rates"] if line["degradation"] == degradation}
            counts = [f"{hits(of_group[group], 1)} / {hits(of_group[group], 5)}" for group in groups]
            numbers = f"{of_group['all']['recall@5']:.2f} | {of_group['all']['map']:.2f}"
            cells = f"`{result['encoder']}` | {result['way']} | {degradation} | {' | '.join(counts)}"
            lines.append(f"| {cells} | {numbers} |")
    sizes = {line["group"]: line["queries"] for line in document["results"][0]["rates"]}
    for group in groups:
        lines[0] = lines[0].replace(f" {group} ", f" {group} ({sizes[group]}) ")
    return "\n".join(lines)


def hits(line: dict[str, Any], k: int) -> int:
    return round(line[f"hit@{k}"] * line["queries"])


def origin(document: dict[str, Any]) -> str:
    run = document["run"]
    return (
        f"`{RESULTS.name}`: {document['candidates']} candidates, seed {document['seed']}, commit {run['commit'][:12]}, "
        f"{run['date'][:10]}."
    )


if __name__ == "__main__":
    main()
