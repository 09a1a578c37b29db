"""What a gallery keeps of its images beside their codes, when it is asked to: float features, and patches.

Both lie in tables of their own in the gallery file, which are made when they are first needed. A ragsr that does not
know them reads and writes the gallery as before: triggers take out what belongs to an image that is taken out, and
images that it adds are completed by the next `add` that meets them.
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ragsr.codes import CodeEncoder
from ragsr.errors import InputError
from ragsr.gallery.file import NEW_STATE
from ragsr.gallery.patches import SCHEME, Patches

TABLES = {
    "features": """
CREATE TABLE IF NOT EXISTS features (
    image INTEGER PRIMARY KEY,  -- id in images
    feature BLOB NOT NULL       -- float16, little endian, of length one
)""",
    "patches": """
CREATE TABLE IF NOT EXISTS patches (
    image INTEGER PRIMARY KEY,  -- id in images
    boxes BLOB NOT NULL,        -- int32 [P, 4], little endian: left, top, right, bottom in pixels of the upright image
    codes BLOB NOT NULL         -- [P, bits / 8], packed as in images
)""",
    "patch_features": """
CREATE TABLE IF NOT EXISTS patch_features (
    image INTEGER PRIMARY KEY,  -- id in images
    features BLOB NOT NULL      -- float16 [P, D], little endian
)""",
}
FOLLOW = (
    "CREATE TRIGGER IF NOT EXISTS {table}_follow AFTER DELETE ON images "
    "BEGIN DELETE FROM {table} WHERE image = old.id; END"
)
RENEW = (
    "CREATE TRIGGER IF NOT EXISTS state_after_patches AFTER INSERT ON patches "
    f"BEGIN UPDATE meta SET value = {NEW_STATE} WHERE key = 'state'; END"
)
VARIABLES = 500  # values of one SQL statement


class Kept(NamedTuple):
    """What is kept of every image beside its code."""

    features: bool = False
    patches: bool = False

    @property
    def tables(self) -> list[str]:
        return ["features"] * self.features + ["patches"] * self.patches


def as_meta(kept: Kept, encoder: CodeEncoder) -> dict[str, str]:
    """How `meta` says it. `InputError` where features are asked of an encoder without."""
    if kept.features and not encoder.features:
        raise InputError(f"the encoder {encoder.id} gives codes alone, no features; leave features out")
    said = {"features": str(encoder.features), "patches": SCHEME}
    return {name: value for name, value in said.items() if getattr(kept, name)}


def from_meta(meta: Mapping[str, str]) -> Kept:
    scheme = meta.get("patches")
    if scheme not in (None, SCHEME):
        raise InputError(f"this gallery keeps patches {scheme!r}, and this ragsr knows {SCHEME!r}: update ragsr")
    return Kept("features" in meta, scheme is not None)


def make_tables(connection: sqlite3.Connection, kept: Kept) -> None:
    """Make what is not there yet, inside a transaction of the caller."""
    tables = kept.tables + ["patch_features"] * (kept.features and kept.patches)
    for table in tables:
        connection.execute(TABLES[table])
        connection.execute(FOLLOW.format(table=table))
    if kept.patches:
        connection.execute(RENEW)


def is_complete(kept: Kept) -> str:
    """An SQL condition on a row of `images`: all is there that is to be kept of it."""
    return " AND ".join(f"EXISTS (SELECT 1 FROM {t} WHERE image = images.id)" for t in kept.tables) or "1"


def write_extras(
    connection: sqlite3.Connection, kept: Kept, image: int, feature: bytes | None, patches: Patches | None
) -> None:
    """In place of what was kept of that image, inside a transaction of the caller."""
    if kept.features and feature is not None:
        connection.execute("INSERT OR REPLACE INTO features VALUES (?, ?)", (image, feature))
    if kept.patches and patches is not None:
        boxes, codes = patches.boxes.astype("<i4").tobytes(), patches.codes.tobytes()
        connection.execute("INSERT OR REPLACE INTO patches VALUES (?, ?, ?)", (image, boxes, codes))
        if kept.features:
            values = image, as_half(patches.features)
            connection.execute("INSERT OR REPLACE INTO patch_features VALUES (?, ?)", values)


def count_rows(connection: sqlite3.Connection, table: str) -> int:
    ((count,),) = connection.execute(f"SELECT count(*) FROM {table}")
    return int(count)


def select(connection: sqlite3.Connection, query: str, ids: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """The rows of `query ... IN ids`, whatever the number of ids."""
    for start in range(0, len(ids), VARIABLES):
        part = ids[start : start + VARIABLES]
        yield from connection.execute(f"{query} IN ({', '.join('?' * len(part))})", part)


def as_half(features: np.ndarray) -> bytes:
    """Float features as they are stored."""
    return features.astype("<f2").tobytes()


def from_half(data: bytes, size: int) -> np.ndarray:  # float32 [n, size]
    return np.frombuffer(data, "<f2").astype(np.float32).reshape(-1, size)
