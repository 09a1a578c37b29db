"""The card of a trained model: what it is, what it learned from and under which licences, how, and how well."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragsr.env import provenance
from ragsr.files import replacing
from ragsr.training.photos import Photo, sources_of

WHAT = """\
# refnet

Reference-based ×4 super-resolution: a photo at a quarter of its size, and any number of other photos of which some may
show the same things. References are registered with the photo (patch matching, then windowed correlation); the network
decides what to take from them. Without references it is a plain super-resolver.

Made for: photos that were reduced bicubically. Noise and compression in the input were not trained for.
"""


def write_card(
    folder: Path,
    settings: Any,  # a dataclass
    photos: Sequence[Photo],
    start: str | None,
    reached: dict[str, float],
    what: str = WHAT,
    more: dict[str, Any] | None = None,  # facts for `training.json`
    measure: str = "PSNR in dB, preset refir",  # what the numbers of `reached` are
) -> None:
    """`README.md` and `training.json` in the folder of a model; `what` it is opens the card."""
    facts = {"settings": asdict(settings), "begun_with": start, "reached": reached, **(more or {})}
    begun = f"Begun with: {start or 'random weights'}."
    scores = [
        f"## Reached, on crops of photos that were held out ({measure})",
        "",
        "| " + " | ".join(reached) + " |",
        "|" + "---|" * len(reached),
        "| " + " | ".join(f"{value:.5g}" for value in reached.values()) + " |",
        "",
    ]
    write_documents(folder, what, begun, facts, scores, photos)


def write_documents(
    folder: Path,
    what: str,
    begun: str,
    facts: dict[str, Any],
    scores: Sequence[str],
    photos: Sequence[Photo],
) -> None:
    """The two files of any card: what it is, how it was made (`begun` opens that), `scores`, the photos' licences."""
    sources = sources_of(photos)
    facts = facts | {"photos": len(photos), "sources": sources} | provenance()
    made = f"Code: commit {facts['commit']}, {facts['date']}, PyTorch {facts['versions']['torch']}."
    settings = [f"Settings: {json.dumps(facts['settings'])}."] if "settings" in facts else []
    lines = [
        what,
        "## Training",
        "",
        f"`{facts['command']}`",
        "",
        " ".join(filter(None, [begun, made, *settings])),
        "",
        *scores,
        f"## Data: {len(photos)} photos, none of which is part of this folder",
        "",
        "| source | licence, as stated there | photos |",
        "|---|---|---|",
        *(f"| {source} | {licence} | {count} |" for source, licence, count in sources),
        "",
    ]
    for name, text in (("README.md", "\n".join(lines)), ("training.json", json.dumps(facts, indent=2) + "\n")):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
