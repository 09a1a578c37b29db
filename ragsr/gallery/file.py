"""The file of a gallery, `gallery.db`: one SQLite database with a magic word and a version of its own.

docs/gallery_format.md describes it for readers in any language. Here: making one, opening one with every check, and
writing under SQLite's transactions, so that a process killed at any moment leaves the last committed state.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from ragsr.errors import InputError
from ragsr.files import replacing

NAME = "gallery.db"
MAGIC = int.from_bytes(b"RAGS")  # SQLite's application_id
VERSION = 1  # SQLite's user_version; rises when an old reader would misread the file
SQLITE_HEADER = b"SQLite format 3\0"
COMMIT_SECONDS = 2.0  # how much work a kill can lose

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE images (
    id INTEGER PRIMARY KEY,
    path TEXT NOT NULL UNIQUE,      -- relative to the folder of this file, with forward slashes
    content BLOB NOT NULL UNIQUE,   -- SHA-256 of the image file
    size INTEGER NOT NULL,          -- bytes of the image file
    mtime_ns INTEGER NOT NULL,      -- its time of modification, nanoseconds since 1970
    width INTEGER NOT NULL,         -- pixels, upright
    height INTEGER NOT NULL,
    code BLOB NOT NULL              -- packed bits, component 8i + j in bit j of byte i
);
"""


def create_file(folder: Path, meta: Mapping[str, str]) -> None:
    """Make an empty gallery file in `folder` (made too if need be); it appears whole or not at all."""
    if (folder / NAME).exists():
        raise InputError(f"{folder}: there is a gallery already; open it, or choose another folder")
    with (
        replacing(folder / NAME) as temporary,
        explained(folder / NAME),
        closing(sqlite3.connect(temporary, isolation_level=None)) as connection,
    ):
        connection.executescript(f"PRAGMA application_id = {MAGIC}; PRAGMA user_version = {VERSION}; {SCHEMA}")
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())


def open_file(folder: Path) -> sqlite3.Connection:
    """Open the gallery file of `folder`, for reading too where it cannot be written. Raises `InputError`."""
    path = folder / NAME
    if not path.is_file():
        raise InputError(f"{folder}: no gallery there; build one with: ragsr gallery build PHOTOS... -o {folder}")
    with path.open("rb") as file:
        if file.read(len(SQLITE_HEADER)) != SQLITE_HEADER:
            raise InputError(f"{path}: not a gallery file, or damaged; restore a copy or build it anew")
    with explained(path):
        # autocommit: transactions are opened by name in `transaction`
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)
        try:
            _check(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection, folder: Path) -> Iterator[Callable[[], None]]:
    """Write: committed at the end, rolled back to the last commit on any error.

    Yields a function to call after every complete step: it commits now and then, so that a kill loses little work.
    """
    with explained(folder / NAME):
        connection.execute("PRAGMA busy_timeout = 0")  # a second writer is told at once
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("PRAGMA busy_timeout = 10000")  # a reader is waited for
        try:
            yield _committer(connection)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def stored_path(folder: Path, path: Path) -> str:
    """How the file in `folder` (resolved) names an image: relative, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), folder)).as_posix()


def absolute_path(folder: Path, stored: str) -> Path:
    """The image that `stored` names."""
    return Path(os.path.normpath(os.path.join(folder, stored)))


def _committer(connection: sqlite3.Connection) -> Callable[[], None]:
    last = time.monotonic()

    def step_done() -> None:
        nonlocal last
        if time.monotonic() - last >= COMMIT_SECONDS:
            connection.execute("COMMIT")
            connection.execute("BEGIN IMMEDIATE")
            last = time.monotonic()

    return step_done


def _check(connection: sqlite3.Connection, path: Path) -> None:
    ((magic,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    if magic != MAGIC:
        raise InputError(f"{path}: a database of another program, not a gallery")
    if version != VERSION:
        raise InputError(f"{path}: gallery format {version}; this ragsr reads format {VERSION}: update ragsr")
    ((verdict,),) = connection.execute("PRAGMA quick_check(1)")
    if verdict != "ok":
        raise InputError(f"{path}: damaged ({verdict}); restore a copy or build it anew")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors as sentences."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the detail in the upper bits
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise InputError(f"{path}: another process is writing this gallery; try again when it is done") from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            raise InputError(f"{path}: cannot be written here ({error}); check the folder's permissions") from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise InputError(f"{path}: damaged or cut off ({error}); restore a copy or build it anew") from error
        raise InputError(f"{path}: {error}") from error
