"""The card of a model of natural photos."""

import json
from collections.abc import Sequence
from pathlib import Path

from ragsr.env import provenance
from ragsr.files import replacing
from ragsr.training.photos import Photo, sources_of

WHAT = """\
# Natural photos, for NIQE

Mean and covariance of the 36 features of sharp patches of good photos (A. Mittal et al., 2013). `ragsr.metrics.niqe`
gives the distance of an image from them; lower is more natural. Fitted to photos of our own: values do not equal those
of other programs. No photo can be recovered from it.
"""


def write_niqe_card(folder: Path, photos: Sequence[Photo]) -> None:
    """`README.md` and `training.json` beside the model."""
    sources = sources_of(photos)
    facts = {"photos": len(photos), "sources": sources, **provenance()}
    lines = [
        WHAT,
        f"`{facts['command']}`, commit {facts['commit']}, {facts['date']}.",
        "",
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
