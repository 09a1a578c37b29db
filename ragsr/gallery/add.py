"""How images come into a gallery: read by several threads, written by one, and only what is new.

What is known by path, size and time is not read again; what is known by content is not decoded again.
"""

import hashlib
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from ragsr.codes import CodeEncoder
from ragsr.errors import InputError
from ragsr.gallery.extras import Kept, as_half, is_complete, write_extras
from ragsr.gallery.patches import Patches, describe_patches
from ragsr.gallery.paths import absolute_path, is_utf8, stored_path
from ragsr.image import decode_image

READERS = min(8, os.cpu_count() or 1)  # Pillow decodes without holding the interpreter's lock
AHEAD = 16 * READERS  # images that are being read, or wait to be written


@dataclass
class Report:
    """What became of every file that `Gallery.add` was given."""

    added: int = 0
    updated: int = 0  # the file at a known path had changed
    moved: int = 0  # known content whose old path holds it no more
    completed: int = 0  # known, but for the features or patches that the gallery keeps
    unchanged: int = 0
    duplicates: list[tuple[Path, Path]] = field(default_factory=list)  # (skipped, the file with the same content)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)  # (skipped, why)

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ("added", "updated", "moved", "completed", "unchanged")}
        counts |= {"duplicates skipped": len(self.duplicates), "unreadable skipped": len(self.unreadable)}
        return ", ".join(f"{n} {name}" for name, n in counts.items() if n)


class Reading(NamedTuple):
    """One file, read. Without a code where its content was known already, with all that is kept of it."""

    size: int
    mtime_ns: int
    content: bytes  # SHA-256
    width: int = 0
    height: int = 0
    code: bytes | None = None
    feature: bytes | None = None
    patches: Patches | None = None


class Adder:
    """Brings images into the `images` table of an open gallery file, inside a transaction of the caller."""

    def __init__(
        self, connection: sqlite3.Connection, folder: Path, encoder: CodeEncoder, kept: Kept | None = None
    ) -> None:
        self.connection = connection
        self.folder = folder
        self.encoder = encoder
        self.kept = kept or Kept()
        self.report = Report()
        self.using = threading.RLock()  # of the connection: the readers look up what is known

    def add(self, images: Sequence[Path], step_done: Callable[[], None], progress: bool) -> Report:
        """Bring in `images`; `step_done` is called whenever the table is consistent."""
        storable = [path for path in images if self._is_storable(path)]
        changed = [path for path in storable if not (self._is_unchanged(path) and self._is_complete(path))]
        self.report.unchanged = len(storable) - len(changed)
        # disable=None: no bar where nobody looks
        with tqdm(total=len(changed), unit="image", desc="adding", disable=None if progress else True) as bar:
            for path, reading in _in_parallel(self._read, changed):
                with self.using:
                    self._enter(path, reading)
                    step_done()
                bar.update()
        return self.report

    def _is_storable(self, path: Path) -> bool:
        if is_utf8(stored_path(self.folder, path)):
            return True
        self.report.unreadable.append((path, "the file name is not UTF-8; rename it"))
        return False

    def _read(self, path: Path) -> Reading | str:
        """Read one file (in a thread): what it holds, or the reason why it is of no use."""
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                content = hashlib.file_digest(file, "sha256").digest()
                if self._knows(content):
                    return Reading(stat.st_size, stat.st_mtime_ns, content)
                file.seek(0)
                image = decode_image(file, path)
            code, feature, patches = self._describe(image)
            return Reading(stat.st_size, stat.st_mtime_ns, content, *image.size, code, feature, patches)
        except InputError as error:
            return str(error).removeprefix(f"{path}: ")
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"

    def _describe(self, image: Image.Image) -> tuple[bytes, bytes | None, Patches | None]:
        """Code, feature and patches, as far as they are kept."""
        codes, features = self.encoder.describe([image])
        feature = as_half(features.numpy()) if self.kept.features else None
        patches = describe_patches(self.encoder, image) if self.kept.patches else None
        return codes.numpy().tobytes(), feature, patches

    def _enter(self, path: Path, reading: Reading | str) -> None:
        stored = stored_path(self.folder, path)
        if isinstance(reading, str):
            self._forget(stored)
            self.report.unreadable.append((path, reading))
            return
        holder = self._find("content", reading.content)
        if holder is not None:
            completes = reading.code is not None and not self._is_complete(absolute_path(self.folder, holder[0]))
            self._enter_known(path, stored, reading, holder[0], completes)
            if completes:
                self._write_extras(reading)
        elif reading.code is None:  # its twin changed while we were reading: it is new after all
            self._enter(path, self._read(path))
        else:
            self.enter_new(stored, reading)

    def _enter_known(self, path: Path, stored: str, reading: Reading, holder: str, completes: bool) -> None:
        """Content that the gallery holds already: touched, moved, to be completed, or a second copy."""
        if holder == stored:
            self.report.completed += completes
            self.report.unchanged += not completes
        elif self._is_unchanged(absolute_path(self.folder, holder)):
            self._forget(stored)
            self.report.duplicates.append((path, absolute_path(self.folder, holder)))
            return
        else:
            self._forget(stored)
            self.report.moved += 1
        self.connection.execute(
            "UPDATE images SET path = ?, size = ?, mtime_ns = ? WHERE content = ?",
            (stored, reading.size, reading.mtime_ns, reading.content),
        )

    def enter_new(self, stored: str, reading: Reading) -> None:
        """Content that is not in the gallery, in place of what its path held before."""
        updated = self._forget(stored)
        self.report.updated += updated
        self.report.added += not updated
        self.connection.execute(
            "INSERT INTO images (path, size, mtime_ns, content, width, height, code) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (stored, *reading[:6]),
        )
        self._write_extras(reading)

    def _write_extras(self, reading: Reading) -> None:
        ((image,),) = self.connection.execute("SELECT id FROM images WHERE content = ?", (reading.content,))
        write_extras(self.connection, self.kept, image, reading.feature, reading.patches)

    def _forget(self, stored: str) -> bool:
        return self.connection.execute("DELETE FROM images WHERE path = ?", (stored,)).rowcount > 0

    def _is_unchanged(self, path: Path) -> bool:
        """Whether the gallery knows this very file, by path, size and time."""
        row = self._find("path", stored_path(self.folder, path))
        if row is None or not path.is_file():
            return False
        stat = path.stat()
        return row[1:] == (stat.st_size, stat.st_mtime_ns)

    def _is_complete(self, path: Path) -> bool:
        """Whether all that is kept of the image at that path is there."""
        query = f"SELECT {is_complete(self.kept)} FROM images WHERE path = ?"
        row = self.connection.execute(query, (stored_path(self.folder, path),)).fetchone()
        return row is not None and bool(row[0])

    def _knows(self, content: bytes) -> bool:
        """Whether an image with that content is there, with all that is kept of it."""
        query = f"SELECT {is_complete(self.kept)} FROM images WHERE content = ?"
        with self.using:
            row = self.connection.execute(query, (content,)).fetchone()
        return row is not None and bool(row[0])

    def _find(self, column: str, value: str | bytes) -> tuple[str, int, int] | None:
        """Path, size and time of the image with that `path` or `content`."""
        query = f"SELECT path, size, mtime_ns FROM images WHERE {column} = ?"
        row: tuple[str, int, int] | None = self.connection.execute(query, (value,)).fetchone()
        return row


def _in_parallel(read: Callable[[Path], Reading | str], paths: Sequence[Path]) -> Iterator[tuple[Path, Reading | str]]:
    """Every path with what `read` says of it, in order; the readers are never more than `AHEAD` images ahead.

    The readers share the cores among them, so each keeps PyTorch to the core it is on.
    """
    threads = torch.get_num_threads()
    waiting: deque[tuple[Path, Future[Reading | str]]] = deque()
    try:
        with ThreadPoolExecutor(READERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for path in paths:
                    waiting.append((path, pool.submit(read, path)))
                    if len(waiting) == AHEAD:
                        path, done = waiting.popleft()
                        yield path, done.result()
                while waiting:
                    path, done = waiting.popleft()
                    yield path, done.result()
            finally:
                for _, unread in waiting:  # after an error, or an interrupt
                    unread.cancel()
    finally:
        torch.set_num_threads(threads)
