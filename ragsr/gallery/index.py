"""The codes of a gallery, ready to be searched.

The database is the truth. `gallery.index` beside it holds the same codes as a file that is mapped instead of read: an
index (docs/index_format.md) in which the image `id` is the code `id - 1`. It may be deleted at any time.

Every change of the images gives the database a new random state. The index carries the state it was made for as the
tag of its last commit, and is used only while the two are equal:

    database   ── commit, state A ──────────────────── commit, state B ──────────────────────
    index      ──────────────────── commit, tag A ──────────────────── commit, tag B ────────
                                    A = A: used        A ≠ B: not used                B = B

Wherever a crash, a copy, or another program leaves the two apart, the index is made anew from the database. Where it
cannot be written, or nothing was compiled, the codes are read into memory.
"""

import sqlite3
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ragsr.errors import InputError
from ragsr.gallery.file import NAME, damaged, read_state, snapshot
from ragsr.search import COMPILED, FlatIndex, Index, place

INDEX_NAME = "gallery.index"
ROWS = 1 << 16  # read at a time
MANY_COMMITS = 8  # of one writer: what small commits hold is copied into memory when it is loaded
PATIENCE = 1.0  # seconds a reader gives a writer that is between its two commits


class Loaded(NamedTuple):
    """Codes that can be searched, with what they were true for."""

    version: object
    index: Any  # FlatIndex, or Index where `ids` is given
    ids: np.ndarray | None = None  # int64 [n]: the image of every number; None: number + 1

    def __len__(self) -> int:
        return len(self.index)

    def search(self, codes: np.ndarray, k: int) -> tuple[list[list[int]], list[list[int]]]:
        """Distances and image ids of the k nearest of every query, each [Q, k]."""
        distances, numbers = self.index.search(codes, k)
        ids = numbers + 1 if self.ids is None else self.ids[numbers]
        return distances.tolist(), ids.tolist()


class Codes:
    """The codes of an open gallery, as they are at the moment. Its methods are called within a `snapshot`."""

    def __init__(self, connection: sqlite3.Connection, folder: Path, bits: int) -> None:
        self.connection = connection
        self.folder = folder
        self.bits = bits
        self._loaded: Loaded | None = None

    def load(self) -> Loaded:
        """What was loaded, if nothing has changed; else what is in the index file, or in the database."""
        ready = self.load_mapped()
        return self.load_anew() if ready is None else ready

    def load_anew(self) -> Loaded:
        """What is in the database; the index file is made of it where that is possible."""
        self._loaded = self._numbered(*self.read_rows())
        return self._loaded

    def load_mapped(self) -> Loaded | None:
        """The same where it costs nothing to speak of; None where all rows would have to be read."""
        state = read_state(self.connection)
        version = self._version(state)
        if self._loaded is None or self._loaded.version != version:
            index = open_mapped(self.folder / INDEX_NAME, state) if state and COMPILED else None
            self._loaded = None if index is None else Loaded(version, index)
        return self._loaded

    def read_rows(self) -> tuple[np.ndarray, np.ndarray]:  # int64 [n], uint8 [n, bits // 8]
        """Ids and codes of all images, by id."""
        width = self.bits // 8
        ids, codes = [np.empty(0, np.int64)], [np.empty((0, width), np.uint8)]
        cursor = self.connection.execute("SELECT id, code FROM images ORDER BY id")
        while rows := cursor.fetchmany(ROWS):
            if any(not isinstance(code, bytes) or len(code) != width for _, code in rows):
                raise damaged(self.folder / NAME, f"a code is not of {width} bytes")
            ids.append(np.array([number for number, _ in rows], np.int64))
            codes.append(np.frombuffer(b"".join(code for _, code in rows), np.uint8).reshape(-1, width))
        return np.concatenate(ids), np.concatenate(codes)

    def _numbered(self, ids: np.ndarray, codes: np.ndarray) -> Loaded:
        """Those rows, searchable."""
        state = read_state(self.connection)
        version = self._version(state)
        if state and COMPILED:
            index = FlatIndex(self.bits // 8)
            try:
                place(index, ids - 1, codes)
                index.save(self.folder / INDEX_NAME, tag=state)
            except OSError:
                pass  # a folder that cannot be written, a full disk, a writer at work
            except InputError:  # ids that leave too many holes
                index = None
            if index is not None:
                return Loaded(version, index)
        dense = Index(self.bits)
        dense.add(codes)
        return Loaded(version, dense, ids)

    def _version(self, state: bytes | None) -> object:
        """What tells one content of the database from another; without a state, as this connection sees them."""
        if state is not None:
            return state
        return self.connection.execute("PRAGMA data_version").fetchone(), self.connection.total_changes


class IndexFollower:
    """Writes to the index file what a writer of the gallery has committed: a `Follower` of its transaction.

    Nothing that happens to the index file stops the writer: the file is then left behind, and is made anew later.
    """

    LOG = (  # ids of all images that were added, removed or given another code since the transaction began
        "CREATE TEMP TABLE IF NOT EXISTS changed (id INTEGER PRIMARY KEY)",
        "CREATE TEMP TRIGGER IF NOT EXISTS log_insert AFTER INSERT ON main.images "
        "BEGIN INSERT OR IGNORE INTO changed VALUES (new.id); END",
        "CREATE TEMP TRIGGER IF NOT EXISTS log_delete AFTER DELETE ON main.images "
        "BEGIN INSERT OR IGNORE INTO changed VALUES (old.id); END",
        "CREATE TEMP TRIGGER IF NOT EXISTS log_update AFTER UPDATE OF id, code ON main.images "
        "BEGIN INSERT OR IGNORE INTO changed VALUES (old.id), (new.id); END",
        "DELETE FROM changed",
    )

    def __init__(self, codes: Codes) -> None:
        self.codes = codes
        self.connection = codes.connection
        self.path = codes.folder / INDEX_NAME
        self.index: Any = None  # open for adding, equal to the database as of the last commit; None: not in step
        self.possible = COMPILED
        self.commits = 0
        self.state: bytes | None = None
        self.changes: list[tuple[int, bytes | None]] = []

    def begun(self) -> None:
        if not self.possible:
            return
        for statement in self.LOG:
            self.connection.execute(statement)
        state = read_state(self.connection)
        if self.index is None:
            self.index = open_for_adding(self.path, state)
        elif self.index.tag != state:  # another process has written between two transactions
            self.close()

    def committing(self) -> None:
        if self.index is not None:
            self.state = read_state(self.connection)
            self.changes = self.connection.execute(
                "SELECT changed.id, code FROM changed LEFT JOIN images USING (id) ORDER BY changed.id"
            ).fetchall()

    def committed(self) -> None:
        if not self.possible:
            return
        try:
            if self.index is not None:
                self._follow()
        except (OSError, ValueError):  # a full disk; an id that is given out again in a gallery of an older ragsr
            self.close()
        if self.index is None:
            self._make_anew()

    def finish(self) -> None:
        """Let the file go; after many commits, written anew in one piece, which is mapped when it is loaded."""
        self.close()
        if self.commits >= MANY_COMMITS:
            with suppress(OSError, ValueError):
                committed = FlatIndex.load(self.path)
                committed.save(self.path, tag=committed.tag)

    def close(self) -> None:
        if self.index is not None:
            self.index.close()
            self.index = None

    def _follow(self) -> None:
        total = self.index.total
        came = [(number - 1, code) for number, code in self.changes if code is not None]
        gone = [number - 1 for number, code in self.changes if code is None and number <= total]
        if came:
            codes = np.frombuffer(b"".join(code for _, code in came), np.uint8).reshape(-1, self.index.width)
            place(self.index, np.array([number for number, _ in came]), codes)
        self.index.remove(gone)
        self.index.commit(tag=self.state)
        self.commits += 1

    def _make_anew(self) -> None:
        try:
            with snapshot(self.connection, self.codes.folder):
                self.codes.load_anew()
                self.index = open_for_adding(self.path, read_state(self.connection))
        except InputError:
            pass  # whoever searches is told
        self.possible = self.index is not None  # do not read all rows again at every commit


def open_mapped(path: Path, state: bytes) -> Any:
    """The index in a file, checked to the last byte, if it is of that state; else None."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            being_written = is_locked(path)  # asked first: afterwards its commit may be done
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a commit was interrupted: then the tag is an old one
                index = FlatIndex.load(path)
            if index.tag == state:
                index.codes([])  # reads and checks every block
                return index
            if not being_written or time.monotonic() > deadline:
                return None
        except (OSError, ValueError):  # not there, of another kind, damaged
            return None
        time.sleep(0.005)


def is_locked(path: Path) -> bool:
    """Whether somebody has this index open for adding."""
    import fcntl  # where index files are, this is too

    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def open_for_adding(path: Path, state: bytes | None) -> Any:
    """The same for adding; None too where it cannot be written or somebody writes it."""
    try:
        index = FlatIndex.open(path)
    except (OSError, ValueError):
        return None
    if index.tag == state:
        return index
    index.close()
    return None
