"""The class Gallery: open, add, remove, search, describe."""

import math
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from ragsr.codes import ENCODERS, CodeEncoder, load_encoder
from ragsr.errors import InputError
from ragsr.gallery.add import Adder, Report
from ragsr.gallery.file import NAME, absolute_path, create_file, explained, open_file, transaction
from ragsr.image import find_images, load_image
from ragsr.search import Index


class Hit(NamedTuple):
    """One reference that a search found."""

    path: Path  # absolute
    distance: int  # differing bits
    score: float  # in [0, 1]: see `score`


@dataclass
class Info:
    """What there is to know about a gallery."""

    folder: Path
    encoder: str  # its id
    bits: int
    images: int
    missing: list[Path]  # images that are no longer where they were
    created: str  # ISO 8601, UTC
    ragsr: str  # the version that created it
    file_bytes: int


class Gallery:
    """A gallery on disk. Made by `Gallery.open` or `Gallery.create`; a context manager; for one thread."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, encoder: CodeEncoder) -> None:
        self.folder = folder
        self.encoder = encoder
        self._connection = connection
        self._loaded: tuple[tuple[int, int], Index, list[str]] | None = None

    @staticmethod
    def is_at(folder: str | Path) -> bool:
        """Whether there is a gallery in `folder`."""
        return (Path(folder) / NAME).exists()

    @classmethod
    def create(cls, folder: str | Path, encoder: str = "baseline-64") -> Self:
        """Make an empty gallery. `InputError` where there is one already, and for an unknown encoder."""
        codes = load_encoder(encoder)
        meta = {
            "encoder": codes.id,
            "encoder_name": codes.name,
            "encoder_version": str(codes.version),
            "bits": str(codes.bits),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "ragsr": _ragsr_version(),
        }
        create_file(Path(folder), meta)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, encoder: str | None = None) -> Self:
        """Open a gallery, for searching also where it cannot be written. `encoder`: insist on one.

        `InputError` where there is no gallery, where it is damaged or of a newer format, and where it was built by
        another encoder, or by a version of it that is not here: codes of two encoders do not compare.
        """
        folder = Path(folder).resolve()
        connection = open_file(folder)
        try:
            with explained(folder / NAME):
                meta = dict(connection.execute("SELECT key, value FROM meta"))
            return cls(folder, connection, _same_encoder(folder, meta.get("encoder", "unknown"), encoder))
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._rows("SELECT count(*) FROM images")[0][0])

    def __repr__(self) -> str:
        return f"Gallery({str(self.folder)!r}, encoder={self.encoder.id!r}, images={len(self)})"

    def add(self, paths: Iterable[str | Path], progress: bool = True) -> Report:
        """Add image files, and folders of them to the bottom; what is in the gallery already is not read again.

        Files that cannot be read are skipped and listed in the report. Committed every few seconds: after a kill the
        same call goes on where it stopped. `InputError` if there are no images, none can be read, or another process is
        writing.
        """
        images = find_images(paths)
        with transaction(self._connection, self.folder) as step_done:
            report = Adder(self._connection, self.folder, self.encoder).add(images, step_done, progress)
        if len(report.unreadable) == len(images):
            path, reason = report.unreadable[0]
            raise InputError(f"no images: none of {len(images)} files can be read; {path}: {reason}")
        return report

    def remove(self, paths: Iterable[str | Path]) -> int:
        """Take images out, named by file or folder, on disk or gone. Image files are not touched. Returns how many.

        `InputError` if the gallery holds none of them.
        """
        targets = {Path(path).resolve() for path in paths}
        with transaction(self._connection, self.folder):
            stored = [path for (path,) in self._rows("SELECT path FROM images")]
            out = [
                (path,) for path in stored if not targets.isdisjoint(_with_parents(absolute_path(self.folder, path)))
            ]
            self._connection.executemany("DELETE FROM images WHERE path = ?", out)
        if not out:
            raise InputError(f"{', '.join(map(str, targets)) or 'an empty list'}: not in the gallery {self.folder}")
        return len(out)

    def search(self, image: Image.Image | str | Path, k: int = 1) -> list[Hit]:
        """The k references nearest to `image`, best first; equal distances in the order of adding.

        Images that are no longer on disk are passed over (`info` lists them), so there can be fewer than k.
        `InputError` for a k that is larger than the gallery.
        """
        index, stored = self._load()
        count = len(index)
        if count == 0:
            raise InputError(f"{self.folder}: an empty gallery; add images: ragsr gallery add {self.folder} PHOTOS...")
        if not 1 <= k <= count:
            raise InputError(
                f"{self.folder}: {k} references were asked for and there are {count}; ask for 1 to {count}"
            )
        picture = image if isinstance(image, Image.Image) else load_image(image)
        code = self.encoder.encode([picture]).numpy()
        asked = k
        while True:
            distances, numbers = (row[0].tolist() for row in index.search(code, asked))
            near = zip((absolute_path(self.folder, stored[number]) for number in numbers), distances, strict=True)
            hits = [Hit(path, distance, score(distance, index.bits)) for path, distance in near if path.is_file()]
            if len(hits) >= k or asked == count:
                return hits[:k]
            asked = min(2 * asked, count)

    def info(self) -> Info:
        """Facts about the gallery; looks for every image on disk."""
        meta = dict(self._rows("SELECT key, value FROM meta"))
        paths = [absolute_path(self.folder, path) for (path,) in self._rows("SELECT path FROM images ORDER BY path")]
        return Info(
            folder=self.folder,
            encoder=self.encoder.id,
            bits=self.encoder.bits,
            images=len(paths),
            missing=[path for path in paths if not path.is_file()],
            created=meta.get("created", "unknown"),
            ragsr=meta.get("ragsr", "unknown"),
            file_bytes=(self.folder / NAME).stat().st_size,
        )

    def _load(self) -> tuple[Index, list[str]]:
        """The codes and stored paths, by number; read again when this or another process has changed the file."""
        state = (int(self._rows("PRAGMA data_version")[0][0]), self._connection.total_changes)
        if self._loaded is None or self._loaded[0] != state:
            rows = self._rows("SELECT path, code FROM images ORDER BY id")
            width = self.encoder.bits // 8
            if any(len(code) != width for _, code in rows):
                raise InputError(f"{self.folder / NAME}: damaged (a code is not of {width} bytes); build it anew")
            index = Index(self.encoder.bits)
            index.add(np.frombuffer(b"".join(code for _, code in rows), dtype=np.uint8).reshape(-1, width))
            self._loaded = state, index, [path for path, _ in rows]
        return self._loaded[1:]

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        with explained(self.folder / NAME):
            return self._connection.execute(query).fetchall()


def score(distance: int, bits: int) -> float:
    """max(0, cos(π · distance / bits)): the cosine between two descriptors that hyperplane codes estimate (Charikar).

    1 for equal codes; 0 from half of the bits on, where codes agree no more than by chance.
    """
    return max(0.0, math.cos(math.pi * distance / bits))


def _with_parents(path: Path) -> list[Path]:
    return [path, *path.parents]


def _same_encoder(folder: Path, built_by: str, asked: str | None) -> CodeEncoder:
    """The encoder that a gallery needs, if it is here and is the one asked for."""
    anew = (
        "codes of two encoders do not compare: build another gallery with ragsr gallery build PHOTOS... -o NEW_FOLDER"
    )
    if asked is not None and load_encoder(asked).id != built_by:
        raise InputError(
            f"{folder}: built by the encoder {built_by}, and {load_encoder(asked).id} was asked for; {anew}"
        )
    name = built_by.partition("@")[0]
    encoder = load_encoder(name) if name in ENCODERS else None
    if encoder is None or encoder.id != built_by:
        here = encoder.id if encoder else ", ".join(sorted(ENCODERS))
        raise InputError(f"{folder}: built by the encoder {built_by}, and this ragsr has {here}; {anew}")
    return encoder


def _ragsr_version() -> str:
    try:
        return version("ragsr")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
