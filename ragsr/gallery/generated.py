"""Which images of a gallery were generated, from which photo, and how: the table `generated` of the gallery file.

It is made when the first image is generated. What was generated is known by its content, as all images are, so that
it stays marked when it is moved, or taken out and added again.
"""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

TABLE = """
CREATE TABLE IF NOT EXISTS generated (
    parent BLOB NOT NULL,     -- SHA-256 of the photo from which
    copy INTEGER NOT NULL,    -- 0, 1, ... of that photo
    content BLOB,             -- SHA-256 of the picture; NULL: every try was rejected, and there is none
    score REAL NOT NULL,      -- hallucination score, the lowest of the tries; below: what that try was made with
    strength REAL NOT NULL,
    guidance REAL NOT NULL,
    seed INTEGER NOT NULL,
    tries INTEGER NOT NULL,   -- how many were made
    settings TEXT NOT NULL,   -- JSON: model, prompt, steps, threshold and the like, keys sorted
    PRIMARY KEY (parent, copy)
) WITHOUT ROWID
"""
INDEX = "CREATE INDEX IF NOT EXISTS generated_content ON generated (content)"
COLUMNS = "parent, copy, content, score, strength, guidance, seed, tries, settings"


@dataclass(frozen=True)
class Generated:
    """One row: a picture that was made, or, without `content`, tries that all were rejected."""

    parent: bytes
    copy: int
    content: bytes | None
    score: float
    strength: float
    guidance: float
    seed: int
    tries: int
    settings: str


def write_row(connection: sqlite3.Connection, row: Generated) -> None:
    """In place of the row of the same parent and copy, inside a transaction of the caller."""
    connection.execute(TABLE)
    connection.execute(INDEX)
    values = tuple(getattr(row, name) for name in COLUMNS.split(", "))
    connection.execute(f"INSERT OR REPLACE INTO generated ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)


def read_rows(connection: sqlite3.Connection) -> list[Generated]:
    if not has_table(connection):
        return []
    return [Generated(*row) for row in connection.execute(f"SELECT {COLUMNS} FROM generated ORDER BY parent, copy")]


def has_table(connection: sqlite3.Connection) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'generated'"
    return connection.execute(query).fetchone() is not None


def is_generated(connection: sqlite3.Connection, number: int) -> bool:
    """Whether the image with that id was generated; there must be the table."""
    query = "SELECT 1 FROM images JOIN generated USING (content) WHERE images.id = ?"
    return connection.execute(query, (number,)).fetchone() is not None


def count_generated(connection: sqlite3.Connection) -> int:
    """How many images of the gallery were generated."""
    if not has_table(connection):
        return 0
    ((count,),) = connection.execute("SELECT count(*) FROM images WHERE content IN (SELECT content FROM generated)")
    return int(count)


def as_text(settings: dict[str, Any]) -> str:
    """Settings as `settings` holds them: equal settings are equal texts."""
    return json.dumps(settings, sort_keys=True)
