"""The file of a gallery, `gallery.db`: one SQLite database with a magic word and a version of its own.

docs/gallery_format.md describes it for readers in any language. Here: making one, opening one with every check, and
writing under SQLite's transactions, so that a process killed at any moment leaves the last committed state.

Every change of the images gives the file a new random state, by which index.py tells whether its codes are those of
the file. Triggers see to it, so that no program that writes the file can forget it.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

from ragsr.errors import InputError
from ragsr.files import replacing

NAME = "gallery.db"
MAGIC = int.from_bytes(b"RAGS")  # SQLite's application_id
VERSION = 1  # SQLite's user_version; rises when an old reader would misread the file
SQLITE_MAGIC = b"SQLite format 3\0"
SQLITE_HEADER = 100  # bytes; SQLite takes less for a new database
COMMIT_SECONDS = 2.0  # how much work a kill can lose

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE images (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given out twice
    path TEXT NOT NULL UNIQUE,      -- relative to the folder of this file, with forward slashes
    content BLOB NOT NULL UNIQUE,   -- SHA-256 of the image file
    size INTEGER NOT NULL,          -- bytes of the image file
    mtime_ns INTEGER NOT NULL,      -- its time of modification, nanoseconds since 1970
    width INTEGER NOT NULL,         -- pixels, upright
    height INTEGER NOT NULL,
    code BLOB NOT NULL              -- packed bits, component 8i + j in bit j of byte i
);
"""

NEW_STATE = "hex(randomblob(16))"
TRIGGERS = {
    f"state_after_{event}": f"CREATE TRIGGER state_after_{event} AFTER {event} ON images BEGIN "
    f"UPDATE meta SET value = {NEW_STATE} WHERE key = 'state'; END"
    for event in ("insert", "update", "delete")
}


class Follower(Protocol):
    """Who must know of every transaction, such as the one who keeps the index file in step."""

    def begun(self) -> None: ...
    def committing(self) -> None: ...
    def committed(self) -> None: ...


def create_file(folder: Path, meta: Mapping[str, str], extend: Callable[[sqlite3.Connection], None]) -> None:
    """Make an empty gallery file in `folder` (made too if need be), with the tables that `extend` adds.

    It appears whole or not at all.
    """
    if (folder / NAME).exists():
        raise InputError(f"{folder}: there is a gallery already; open it, or choose another folder")
    with (
        replacing(folder / NAME) as temporary,
        explained(folder / NAME),
        closing(sqlite3.connect(temporary, isolation_level=None)) as connection,
    ):
        connection.executescript(f"PRAGMA application_id = {MAGIC}; PRAGMA user_version = {VERSION}; {SCHEMA}")
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        extend(connection)
        give_state(connection)


def open_file(folder: Path) -> sqlite3.Connection:
    """Open the gallery file of `folder`, for reading too where it cannot be written. Raises `InputError`.

    Looks at the head of the file and at its length; `check_file` looks at everything. The connection may be used by
    several threads, by one at a time.
    """
    path = folder / NAME
    if not path.is_file():
        raise InputError(f"{folder}: no gallery there; build one with: ragsr gallery build PHOTOS... -o {folder}")
    with path.open("rb") as file:
        head = file.read(SQLITE_HEADER)
        if len(head) < SQLITE_HEADER or not head.startswith(SQLITE_MAGIC):
            raise InputError(f"{path}: not a gallery file, or damaged; restore a copy or build it anew")
    with explained(path):
        # autocommit: transactions are opened by name in `transaction`
        uri = f"{path.absolute().as_uri()}?mode=rw"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute("PRAGMA cache_size = -65536")  # KiB, taken when needed: contents are random keys
            with snapshot(connection, folder):
                _check_kind(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def check_file(connection: sqlite3.Connection, path: Path) -> None:
    """Read the whole file: its tables, its indexes, and that they agree. Raises `InputError` where it is damaged."""
    with explained(path):
        ((verdict,),) = connection.execute("PRAGMA integrity_check(1)")
    if verdict != "ok":
        raise damaged(path, verdict.splitlines()[-1])


@contextmanager
def snapshot(connection: sqlite3.Connection, folder: Path) -> Iterator[None]:
    """Read one state of the file, whatever others write meanwhile. They cannot commit: do not stay long."""
    with explained(folder / NAME):
        connection.execute("BEGIN")
        try:
            yield
        finally:
            if connection.in_transaction:  # SQLite itself leaves one that met a broken disk
                connection.execute("ROLLBACK")


@contextmanager
def transaction(
    connection: sqlite3.Connection, folder: Path, follower: Follower | None = None
) -> Iterator[Callable[[], None]]:
    """Write: committed at the end, rolled back to the last commit on any error.

    Yields a function to call after every complete step: it commits now and then, so that a kill loses little work.
    """

    def begin() -> None:
        connection.execute("BEGIN IMMEDIATE")
        give_state(connection)
        if follower:
            follower.begun()

    def commit() -> None:
        if follower:
            follower.committing()
        connection.execute("COMMIT")
        if follower:
            follower.committed()

    with explained(folder / NAME):
        try:
            connection.execute("PRAGMA busy_timeout = 0")  # a second writer is told at once
            begin()
            connection.execute("PRAGMA busy_timeout = 10000")  # a reader is waited for
            yield _committer(begin, commit)
            commit()
        finally:
            connection.execute("PRAGMA busy_timeout = 10000")
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def read_state(connection: sqlite3.Connection) -> bytes | None:
    """What this very content of `images` is known by, 16 bytes; None in a file of an older ragsr that has no state."""
    row = connection.execute(
        "SELECT value FROM meta WHERE key = 'state' AND ? = (SELECT count(*) FROM sqlite_master WHERE type = 'trigger' "
        "AND tbl_name = 'images' AND name IN (?, ?, ?))",
        (len(TRIGGERS), *TRIGGERS),
    ).fetchone()
    try:
        state = bytes.fromhex(row[0]) if row else b""
    except ValueError:
        return None
    return state if len(state) == 16 else None


def give_state(connection: sqlite3.Connection) -> None:
    """Give a file its state where it has none."""
    if read_state(connection) is not None:
        return
    for name, statement in TRIGGERS.items():
        connection.execute(f"DROP TRIGGER IF EXISTS {name}")
        connection.execute(statement)
    connection.execute(f"INSERT OR REPLACE INTO meta VALUES ('state', {NEW_STATE})")


def _committer(begin: Callable[[], None], commit: Callable[[], None]) -> Callable[[], None]:
    last = time.monotonic()

    def step_done() -> None:
        nonlocal last
        if time.monotonic() - last >= COMMIT_SECONDS:
            commit()
            begin()
            last = time.monotonic()

    return step_done


def _check_kind(connection: sqlite3.Connection, path: Path) -> None:
    ((magic,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    if magic != MAGIC:
        raise InputError(f"{path}: a database of another program, not a gallery")
    if version != VERSION:
        raise InputError(f"{path}: gallery format {version}; this ragsr reads format {VERSION}: update ragsr")
    ((pages,),) = connection.execute("PRAGMA page_count")
    ((bytes_per_page,),) = connection.execute("PRAGMA page_size")
    if path.stat().st_size < pages * bytes_per_page:  # SQLite does not mind a last page that is not whole
        raise damaged(path, "cut off")


def damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: damaged ({what}); restore a copy or build it anew")


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
