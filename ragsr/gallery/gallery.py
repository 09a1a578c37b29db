"""The class Gallery: open, add, remove, search, describe."""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image
from tqdm import tqdm

from ragsr.codes import DEFAULT, CodeEncoder, load_encoder
from ragsr.errors import InputError
from ragsr.gallery.add import Adder, Report
from ragsr.gallery.extras import Kept, as_meta, count_rows, from_meta, make_tables
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
from ragsr.gallery.generated import Generated, count_generated, read_rows, write_row
from ragsr.gallery.hits import Finder, Hit
from ragsr.gallery.index import INDEX_NAME, Codes, IndexFollower
from ragsr.gallery.meta import new_meta, same_encoder
from ragsr.gallery.patches import PatchIndex, tiles_of
from ragsr.gallery.paths import absolute_path, at_or_below, is_utf8
from ragsr.gallery.query import Query, describe_query, describe_regions
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
    generated: int  # of them
    features: int | None  # of them, how many have a float feature; None where none are kept
    patches: int | None  # the same for codes of their patches
    preprocessing: str  # how pictures are prepared for the encoder
    missing: list[Path]  # images that are no longer where they were
    created: str  # ISO 8601, UTC
    ragsr: str  # the version that created it
    file_bytes: int


class Parent(NamedTuple):
    """A photo from which images may be generated."""

    path: Path
    content: bytes  # its SHA-256 when it was added


class Gallery:
    """A gallery on disk. Made by `Gallery.open` or `Gallery.create`; a context manager; for one thread."""

    def __init__(
        self, folder: Path, connection: sqlite3.Connection, encoder: CodeEncoder, kept: Kept | None = None
    ) -> None:
        self.folder = folder
        self.encoder = encoder
        self.kept = kept or Kept()
        self._connection = connection
        self._codes = Codes(connection, folder, encoder.bits)
        self._patches: PatchIndex | None = None
        self._state_sought = False

    @staticmethod
    def is_at(folder: str | Path) -> bool:
        """Whether there is a gallery in `folder`."""
        return (Path(folder) / NAME).exists()

    @classmethod
    def create(
        cls, folder: str | Path, encoder: str = DEFAULT, features: bool | None = None, patches: bool = False
    ) -> Self:
        """Make an empty gallery. `InputError` where there is one already, and for an unknown encoder.

        features    keep the float feature of every image, 2 bytes a number, by which hits are ranked again; None:
                    wherever the encoder has one
        patches     keep codes, and features if those are kept, of overlapping patches: see `search_regions`
        """
        codes = load_encoder(encoder)
        kept = Kept(codes.features > 0 if features is None else features, patches)
        create_file(Path(folder), new_meta(codes) | as_meta(kept, codes), lambda file: make_tables(file, kept))
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
            return cls(folder, connection, same_encoder(folder, meta, encoder), from_meta(meta))
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

    def keep(self, features: bool = False, patches: bool = False) -> None:
        """From now on keep these of every image too. `add` completes images that lack them, where it meets them."""
        kept = Kept(self.kept.features or features, self.kept.patches or patches)
        meta = as_meta(kept, self.encoder) | {"encoder_source": self.encoder.source}
        with self._writing():
            make_tables(self._connection, kept)
            self._connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())
        self.kept = kept

    def add(self, paths: Iterable[str | Path], progress: bool = True) -> Report:
        """Add image files, and folders of them to the bottom; what is in the gallery already is not read again.

        Files that cannot be read are skipped and listed in the report. Committed every few seconds: after a kill the
        same call goes on where it stopped. `InputError` if there are no images, none can be read, or another process is
        writing.
        """
        images = find_images(paths)
        with self._writing() as step_done:
            report = self._adder().add(images, step_done, progress)
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

    def search(
        self,
        image: Image.Image | str | Path,
        k: int = 1,
        patches: bool | None = None,
        probes: Sequence[str] = (),
    ) -> list[Hit]:
        """The k references nearest to `image`, best first.

        Ranked by Hamming distance; where features are kept, the nearest (see hits.py) ranked again by cosine; equal
        ones in the order of adding. Images that are no longer on disk are passed over (`info` lists them), so there can
        be fewer than k.

        patches     compare by patches too (see patches.py), and say where; None: where the gallery keeps them
        probes      look also for the mirrored image ("flips") and for its middle, enlarged ("scales")

        Errors: `InputError` for a k that is larger than the gallery, for patches it does not keep, unknown probes.
        """
        return self.search_many([image], k, patches, probes)[0]

    def search_many(
        self,
        images: Sequence[Image.Image | str | Path],
        k: int = 1,
        patches: bool | None = None,
        probes: Sequence[str] = (),
    ) -> list[list[Hit]]:
        """`search` for several images in one pass over the codes: the hits of each."""
        by_patches = self.kept.patches if patches is None else patches
        if by_patches:
            self._check_patches()
        return self._find([describe_query(self.encoder, _picture(image), by_patches, probes) for image in images], k)

    @property
    def keeps_patches(self) -> bool:
        """Whether there are codes of parts of the images."""
        return self.kept.patches

    def search_regions(self, image: Image.Image | str | Path, tile: int, k: int = 1) -> list[list[Hit]]:
        """The k references nearest to every part of `image`, a tile of at most `tile` pixels a side, row by row.

        `Hit.query_region` is the tile, `Hit.region` the patch of the reference that is most like it. `InputError` for
        what `search` refuses, and for a gallery without patches.
        """
        if tile < 1:
            raise InputError(f"tile is {tile}; it is the side of the regions in pixels, from 1 on")
        self._check_patches()
        picture = _picture(image)
        return self._find(describe_regions(self.encoder, picture, tiles_of(*picture.size, tile)), k, regions=True)

    def parents(self) -> tuple[list[Parent], list[Generated]]:
        """All photos that were not generated, by path, and all that is noted on generated images."""
        with self._snapshot():
            rows = read_rows(self._connection)
            generated = {row.content for row in rows}
            images = self._connection.execute("SELECT path, content FROM images ORDER BY path")
            photos = [(stored, content) for stored, content in images if content not in generated]
        return [Parent(absolute_path(self.folder, stored), content) for stored, content in photos], rows

    def note_generated(self, row: Generated, picture: Path | None = None) -> None:
        """Say how an image was generated, and add it: both or neither. Without `picture`: that none was good enough."""
        with self._writing():
            write_row(self._connection, row)
            if picture is not None:
                self._adder().add([picture], lambda: None, progress=False)

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
            generated=self._count_generated(),
            features=self._count("features") if self.kept.features else None,
            patches=self._count("patches") if self.kept.patches else None,
            preprocessing=meta.get("preprocessing", self.encoder.preprocessing),
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

    def _adder(self) -> Adder:
        return Adder(self._connection, self.folder, self.encoder, self.kept)

    def _find(self, queries: Sequence[Query], k: int, regions: bool = False) -> list[list[Hit]]:
        """The k best images for every query, as the gallery is now."""
        self._make_sure_of_a_state()
        by_patches = regions or any(query.patches is not None for query in queries)
        with self._snapshot():
            ready = self._codes.load()
            self._check_k(k, len(ready))
            patches = self._load_patches(ready.version) if by_patches else None
            finder = Finder(self._connection, self.folder, ready, self.encoder, self.kept, patches)
            return finder.find(queries, k, regions)

    def _load_patches(self, version: object) -> PatchIndex:
        if self._patches is None or self._patches.version != version:
            self._patches = PatchIndex(self._connection, self.encoder.bits, version)
        return self._patches

    def _check_patches(self) -> None:
        if not self.kept.patches:
            raise InputError(
                f"{self.folder}: keeps no patches; let it: ragsr gallery build PHOTOS... -o {self.folder} --patches"
            )

    def _count(self, table: str) -> int:
        with self._snapshot():
            return count_rows(self._connection, table)

    def _count_generated(self) -> int:
        with self._snapshot():
            return count_generated(self._connection)

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


def _picture(image: Image.Image | str | Path) -> Image.Image:
    return image if isinstance(image, Image.Image) else load_image(image)
