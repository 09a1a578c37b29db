"""A gallery that grows by generated images: iRAG's augmentation, with its filter of hallucinations.

    every photo ──▶ a try: strength and guidance drawn, edited, scored ──▶ below the threshold: stored, with its score
                      ▲ up to `tries` times                    │             and its parent; else only noted
                      └──────────── too high ──────────────────┘

What a photo's picture looks like depends on the photo, the settings and the seed, not on the order of the photos nor on
what was done before. Every picture is committed by itself, so that a process killed at any moment has lost one at most,
and the same call goes on from there.

Source: iRAG Sec. 3.1 (Eq. 1 and 2) and 4.2: strength of [0.55, 0.65], guidance of [7, 10], threshold 0.03, 10 tries.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ragsr.errors import InputError
from ragsr.files import replacing
from ragsr.gallery.gallery import Gallery, Parent
from ragsr.gallery.generated import Generated, as_text
from ragsr.image import decode_image

FOLDER = "generated"  # below that of the gallery
LARGEST = 1e300  # stands for infinite scores, which JSON does not know
Range = tuple[float, float]
Draw = tuple[float, float, int]  # strength, guidance and the seed of the noise


class Editor(Protocol):
    """Makes a picture from a photo, as `ragsr.pipelines.SDEdit` does."""

    @property
    def settings(self) -> dict[str, Any]: ...

    def __call__(
        self, photo: Image.Image, strength: float, guidance: float, seed: int
    ) -> tuple[Image.Image, float]: ...


@dataclass(frozen=True)
class RejectionRule:
    """Which tries are made, and which is good enough."""

    threshold: float = 0.03  # scores below are good enough; of the latents of Stable Diffusion 2.1
    tries: int = 10
    strength: Range = (0.55, 0.65)
    guidance: Range = (7.0, 10.0)

    def __post_init__(self) -> None:
        low, high = self.strength
        if not 0 < low <= high <= 1:
            raise InputError(f"strength is {low} to {high}; it lies between 0 and 1, the lower first")
        if not self.guidance[0] <= self.guidance[1]:
            raise InputError(f"guidance is {self.guidance[0]} to {self.guidance[1]}; the lower comes first")
        if self.tries < 1 or not self.threshold > 0:
            raise InputError(f"{self.tries} tries below {self.threshold}: there must be a try, and a threshold above 0")


class Try(NamedTuple):
    """One picture and what it was made with."""

    picture: Image.Image
    score: float
    strength: float
    guidance: float
    seed: int


class Made(NamedTuple):
    """One picture of this run, or tries that all were rejected."""

    parent: Path
    path: Path | None  # None: rejected
    row: Generated


@dataclass
class Augmentation:
    """What became of every photo and copy."""

    made: list[Made] = field(default_factory=list)
    rejected: list[Made] = field(default_factory=list)
    before: int = 0  # made or rejected by an earlier run
    skipped: list[tuple[Path, str]] = field(default_factory=list)  # (photo, why)

    def __str__(self) -> str:
        counts = {"made": len(self.made), "rejected": len(self.rejected)}
        counts |= {"done before": self.before, "photos skipped": len(self.skipped)}
        return ", ".join(f"{n} {name}" for name, n in counts.items() if n or name == "made")


def augment_gallery(
    gallery: Gallery,
    edit: Editor,
    *,
    count: int = 1,
    limit: int | None = None,
    rule: RejectionRule | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Augmentation:
    """Add `count` generated pictures for every photo of the gallery, or for the first `limit` that lack any.

    Pictures are written to the folder `generated` of the gallery, and never made from pictures. A photo that is gone,
    unreadable or changed since it was added is skipped and listed. What was rejected is tried again only with other
    settings. Errors: `InputError` for a count or limit below 1, an empty gallery, a full disk, and while another
    process writes the gallery; all that was finished is kept.
    """
    if count < 1 or (limit is not None and limit < 1):
        raise InputError(f"{count} pictures of {limit} photos were asked for; ask for 1 or more")
    rule = rule or RejectionRule()
    settings = as_text(edit.settings | _as_settings(rule) | {"seed": seed})
    result = Augmentation()
    work = _plan(gallery, count, limit, settings, result)
    # disable=None: no bar where nobody looks
    total = sum(len(copies) for _, copies in work)
    with tqdm(total=total, unit="image", desc="generating", disable=None if progress else True) as bar:
        for parent, copies in work:
            photo = _read(parent, result)
            if photo is None:
                bar.update(len(copies))
                continue
            for copy in copies:
                best, tries = _best(photo, edit, rule, _draws(rule, parent.content, copy, seed))
                score = min(best.score, LARGEST)
                row = Generated(parent.content, copy, None, score, *best[2:], tries, settings)
                if best.score < rule.threshold:
                    result.made.append(_store(gallery, parent, best.picture, row))
                else:
                    gallery.note_generated(row)
                    result.rejected.append(Made(parent.path, None, row))
                bar.set_postfix(made=len(result.made), rejected=len(result.rejected), refresh=False)
                bar.update()
    return result


def parent_of(picture: Path) -> bytes | None:
    """The SHA-256 of the photo that a picture of `augment_gallery` is from, as the file says; None for other files."""
    try:
        with Image.open(picture) as image:
            said = json.loads(getattr(image, "text", {}).get("ragsr", "{}"))
        return bytes.fromhex(said["parent"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plan(
    gallery: Gallery, count: int, limit: int | None, settings: str, result: Augmentation
) -> list[tuple[Parent, list[int]]]:
    """The photos that lack copies, and which; `result.before` counts the copies that are there."""
    parents, rows = gallery.parents()
    if not parents:
        raise InputError(f"{gallery.folder}: holds no photos; add some: ragsr gallery add {gallery.folder} PHOTOS...")
    done = {(row.parent, row.copy) for row in rows if row.content is not None or row.settings == settings}
    work = []
    for parent in parents:
        copies = [copy for copy in range(count) if (parent.content, copy) not in done]
        result.before += count - len(copies)
        if copies:
            work.append((parent, copies))
    return work[:limit]


def _read(parent: Parent, result: Augmentation) -> Image.Image | None:
    """The photo, if it is the one that was added; else the result says why not."""
    try:
        with parent.path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").digest() != parent.content:
                raise InputError(f"{parent.path}: has changed since it was added; add it again")
            file.seek(0)
            return decode_image(file, parent.path)
    except (InputError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{parent.path}: ")
        result.skipped.append((parent.path, reason or str(error)))
        return None


def _best(photo: Image.Image, edit: Editor, rule: RejectionRule, draws: Iterator[Draw]) -> tuple[Try, int]:
    """The try with the lowest score, and how many were made: the first that is good enough ends it."""
    tries: list[Try] = []
    for draw in draws:
        picture, score = edit(photo, *draw)
        tries.append(Try(picture, score, *draw))
        if score < rule.threshold:
            break
    return min(tries, key=lambda one: one.score), len(tries)


def _draws(rule: RejectionRule, content: bytes, copy: int, seed: int) -> Iterator[Draw]:
    """Strength, guidance and the seed of the noise, for every try on one copy of one photo."""
    for number in range(rule.tries):
        drawn = random.Random(hashlib.sha256(content + f"{seed}/{copy}/{number}".encode()).digest())
        yield drawn.uniform(*rule.strength), drawn.uniform(*rule.guidance), drawn.getrandbits(63)


def _store(gallery: Gallery, parent: Parent, picture: Image.Image, row: Generated) -> Made:
    """The picture in its file, its code and its row in the gallery; nothing of it where that fails."""
    path = gallery.folder / FOLDER / f"{parent.path.stem[:40]}-{parent.content.hex()[:12]}-{row.copy}.png"
    about = PngInfo()  # for whom the file alone reaches
    about.add_text("ragsr", json.dumps({"generated": True, "parent": parent.content.hex(), "score": row.score}))
    try:
        with replacing(path) as temporary:
            picture.save(temporary, pnginfo=about)
        row = replace(row, content=hashlib.sha256(path.read_bytes()).digest())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); what was finished is kept, and the same command "
            "goes on from there"
        ) from error
    try:
        gallery.note_generated(row, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Made(parent.path, path, row)


def _as_settings(rule: RejectionRule) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(rule).items()}
