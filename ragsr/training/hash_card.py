"""The card of a hash encoder: what it is, what it learned from and under which licences, how, and how well."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragsr.training.card import write_documents
from ragsr.training.hash import Settings
from ragsr.training.photos import Photo

WHAT = """\
# A hash encoder of {bits} bits

Turns a photo into a code of {bits} bits and a feature of {features} floats, so that a low-quality photo lies near good
photos of the same scene. MobileNet v1 of width 0.25 on 160 × 160 pixels, then a head of 1024. Made for `ragsr gallery`.

Its score is the estimated probability that the first hit of a search shows the same scene, fitted on held-out photos
where one search in two has something to find; docs/codes.md has the protocol. A much larger gallery holds more
look-alikes, and there the score is too sure of itself.
"""


def write_hash_card(
    folder: Path,
    settings: Settings,
    photos: Sequence[Photo],
    init: str | None,
    teacher: Path | None,
    trained: bool,  # the backbone, before the head
    reached: dict[str, Any],
) -> None:
    """`README.md` and `training.json` in the folder of a model."""
    facts = {
        "settings": asdict(settings),
        "begun_with": init and Path(init).name,
        "teacher": teacher and teacher.name,
        "reached": reached,
    }
    begun = f"Begun with: {facts['begun_with'] or 'random weights'}; teacher: {facts['teacher'] or 'none'}."
    if init and trained:
        begun += " The backbone is the mean of what it began with and what training made of it."
    if "mobilenet" in f"{init}{teacher}":
        begun += " The MobileNets are those of Google's model zoo, trained on ImageNet, Apache-2.0."
    scores = [
        "## Reached, on bad crops of photos that were held out",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {name} | {value:.4g} |" for name, value in reached.items()),
        "",
    ]
    write_documents(folder, WHAT.format(bits=settings.bits, features=256), begun, facts, scores, photos)
