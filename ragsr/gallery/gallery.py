"""The class Gallery: open, add, remove, search, describe."""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from tqdm import tqdm

from ragsr.codes import CodeEncoder, load_encoder
from ragsr.errors import InputError
from ragsr.gallery.add import Adder, Report
from ragsr.gallery.file import (
    NAME,
    check_file,
    create_file,
    explained,
    open_file,
    read_state,
    snapshot,
    transaction,
)
from ragsr.gallery.hits import Finder, Hit
from ragsr.gallery.index import INDEX_NAME, Codes, IndexFollower
from ragsr.gallery.meta import new_meta, same_encoder
from ragsr.gallery.paths import absolute_path, at_or_below, is_utf8
from ragsr.image import find_images, load_image
from ragsr.search import COMPILED

PAGE = 10_000  # paths looked at in one go


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
        self._codes = Codes(connection, folder, encoder.bits)
        self._state_sought = False

    @staticmethod
    def is_at(folder: str | Path) -> bool:
        """Whether there is a gallery in `folder`."""
        return (Path(folder) / NAME).exists()

    @classmethod
    def create(cls, folder: str | Path, encoder: str = "baseline-64") -> Self:
        """Make an empty gallery. `InputError` where there is one already, and for an unknown encoder."""
        codes = load_encoder(encoder)
        create_file(Path(folder), new_meta(codes))
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
            return cls(folder, connection, same_encoder(folder, meta.get("encoder", "unknown"), encoder))
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
        with self._snapshot():
            ready = self._codes.load_mapped()
            if ready is not None:
                return len(ready)
            ((count,),) = self._connection.execute("SELECT count(*) FROM images")
            return int(count)

    def __repr__(self) -> str:
        return f"Gallery({str(self.folder)!r}, encoder={self.encoder.id!r}, images={len(self)})"

    def add(self, paths: Iterable[str | Path], progress: bool = True) -> Report:
        """Add image files, and folders of them to the bottom; what is in the gallery already is not read again.

        Files that cannot be read are skipped and listed in the report. Committed every few seconds: after a kill the
        same call goes on where it stopped. `InputError` if there are no images, none can be read, or another process is
        writing.
        """
        images = find_images(paths)
        with self._writing() as step_done:
            report = Adder(self._connection, self.folder, self.encoder).add(images, step_done, progress)
        if len(report.unreadable) == len(images):
            path, reason = report.unreadable[0]
            raise InputError(f"no images: none of {len(images)} files can be read; {path}: {reason}")
        return report

    def remove(self, paths: Iterable[str | Path]) -> int:
        """Take images out, named by file or folder, on disk or gone. Image files are not touched. Returns how many.

        `InputError` if the gallery holds none of them.
        """
        targets = sorted({Path(path).resolve() for path in paths})
        out = 0
        with self._writing():
            for target in targets:
                condition, values = at_or_below(self.folder, target)
                if all(map(is_utf8, values)):
                    out += self._connection.execute(f"DELETE FROM images WHERE {condition}", values).rowcount
        if not out:
            raise InputError(f"{', '.join(map(str, targets)) or 'an empty list'}: not in the gallery {self.folder}")
        return out

    def search(self, image: Image.Image | str | Path, k: int = 1) -> list[Hit]:
        """The k references nearest to `image`, best first; equal distances in the order of adding.

        Images that are no longer on disk are passed over (`info` lists them), so there can be fewer than k.
        `InputError` for a k that is larger than the gallery.
        """
        return self.search_many([image], k)[0]

    def search_many(self, images: Sequence[Image.Image | str | Path], k: int = 1) -> list[list[Hit]]:
        """`search` for several images in one pass over the codes: the hits of each."""
        pictures = [image if isinstance(image, Image.Image) else load_image(image) for image in images]
        codes = self.encoder.encode(pictures).numpy()
        self._make_sure_of_a_state()
        with self._snapshot():
            ready = self._codes.load()
            self._check_k(k, len(ready))
            return Finder(self._connection, self.folder, ready).find(codes, k)

    def info(self, progress: bool = True) -> Info:
        """Facts about the gallery. Looks for every image on disk, which takes its time in a large gallery."""
        meta = dict(self._rows("SELECT key, value FROM meta"))
        count = len(self)
        # disable=None: no bar where nobody looks; delay: nor where it is done at once
        with tqdm(total=count, unit="image", desc="looking", delay=1, disable=None if progress else True) as bar:
            missing = []
            for stored in self._stored_paths():
                if not os.path.isfile(os.path.join(self.folder, stored)):
                    missing.append(absolute_path(self.folder, stored))
                bar.update()
        return Info(
            folder=self.folder,
            encoder=self.encoder.id,
            bits=self.encoder.bits,
            images=count,
            missing=missing,
            created=meta.get("created", "unknown"),
            ragsr=meta.get("ragsr", "unknown"),
            file_bytes=(self.folder / NAME).stat().st_size,
        )

    def check(self) -> None:
        """Read all of the gallery's files and see that they are whole and agree; `InputError` where they do not."""
        check_file(self._connection, self.folder / NAME)
        with self._snapshot():
            ids, codes = self._codes.read_rows()
            ready = self._codes.load_mapped()
            if ready is None or ready.ids is not None:
                return
            held = ready.index.ids()
            if not (np.array_equal(held + 1, ids) and np.array_equal(ready.index.codes(held), codes)):
                path = self.folder / INDEX_NAME
                raise InputError(f"{path}: does not agree with {NAME}; delete it, it will be made anew")

    # ------------------------------------------------------------------ details

    def _stored_paths(self) -> Iterator[str]:
        """All images, by path, a page at a time, so that writers need not wait."""
        last = ""
        while page := self._rows(f"SELECT path FROM images WHERE path > ? ORDER BY path LIMIT {PAGE}", last):
            for (last,) in page:
                yield last

    def _check_k(self, k: int, count: int) -> None:
        if count == 0:
            raise InputError(f"{self.folder}: an empty gallery; add images: ragsr gallery add {self.folder} PHOTOS...")
        if not 1 <= k <= count:
            raise InputError(
                f"{self.folder}: {k} references were asked for and there are {count}; ask for 1 to {count}"
            )

    def _make_sure_of_a_state(self) -> None:
        """Give the file of an older ragsr its state, so that there can be an index file, if it can be written."""
        if self._state_sought or not COMPILED:
            return
        self._state_sought = True
        with self._snapshot():
            missing = read_state(self._connection) is None
        if missing:
            with suppress(InputError), transaction(self._connection, self.folder):
                pass

    @contextmanager
    def _writing(self) -> Iterator[Callable[[], None]]:
        follower = IndexFollower(self._codes)
        try:
            with transaction(self._connection, self.folder, follower) as step_done:
                yield step_done
        finally:
            follower.finish()

    def _snapshot(self) -> AbstractContextManager[None]:
        return snapshot(self._connection, self.folder)

    def _rows(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        with explained(self.folder / NAME):
            return self._connection.execute(query, values).fetchall()
