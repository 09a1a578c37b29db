"""Patches: overlapping squares of an image at two scales, each with a code and a feature of its own.

A photo that shows a part of another is near to that part, not to the whole; and a reference for a region of a large
photo is a part of an image. Patches are 1 and 0.62 times as large as the image's short side and overlap by half:

    ┌───────┬──┬───────┐   of a photo 3 : 2 two squares of the first scale and 4 × 2 of the second
    │       │  │       │
    └───────┴──┴───────┘

How two images compare by patches: half the cosine of the whole images, half the mean of the best matches of the three
best query patches, each matched with all patches of the other image and with the whole of it. One patch alone is
deceived by a sky or a wall; the mean of all by what only one of the two shows. Scales, shares and the number three were
chosen on photos of the training pack: smaller patches (0.4) did harm.
"""

import sqlite3
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ragsr.codes import CodeEncoder
from ragsr.image import to_rgb
from ragsr.search import Index

SCALES = (1.0, 0.62)  # of the short side
MOST = 12  # squares in a row: long panoramas have gaps instead of thousands
SCHEME = "squares of 1 and 0.62 short sides"  # its name in `meta`
SHORT = 512  # pixels of the short side from which patches are cut: encoders see less
BEST = 3  # query patches that count
WHOLE = 0.5  # the share of the whole images
ROWS = 1 << 12  # read at a time

Box = tuple[int, int, int, int]  # left, top, right, bottom


class Patches(NamedTuple):
    """The patches of one image."""

    boxes: np.ndarray  # int32 [P, 4]
    codes: np.ndarray  # uint8 [P, bits // 8]
    features: np.ndarray  # float32 [P, D]; D = 0 where there are none

    def only(self, number: int) -> "Patches":
        """One of them."""
        return Patches(*(part[number : number + 1] for part in self))


class Match(NamedTuple):
    """How near two images are, and where the best pair of patches lies."""

    cosine: float
    region: Box  # in the reference
    query_region: Box


def patch_boxes(width: int, height: int) -> np.ndarray:  # int32 [P, 4]
    """The squares of an image, row by row, the large ones first."""
    boxes = []
    for scale in SCALES:
        side = max(1, round(min(width, height) * scale))
        boxes += [(x, y, x + side, y + side) for y in _starts(height, side) for x in _starts(width, side)]
    return np.array(boxes, np.int32)


def _starts(length: int, side: int) -> list[int]:
    count = min(MOST, round((length - side) / (side / 2)) + 1)
    return [round(start) for start in np.linspace(0, length - side, count)]


def describe_patches(encoder: CodeEncoder, image: Image.Image) -> Patches:
    boxes = patch_boxes(*image.size)
    codes, features = encoder.describe(cut(image, boxes))
    return Patches(boxes, codes.numpy(), features.numpy())


def cut(image: Image.Image, boxes: np.ndarray) -> list[Image.Image]:
    """The parts of an image in `boxes` [P, 4], of a large image at a lower resolution."""
    shrink = max(1.0, min(image.size) / SHORT)
    size = round(image.width / shrink), round(image.height / shrink)
    small = to_rgb(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0) if shrink > 1 else image
    ratio = np.array([small.width / image.width, small.height / image.height] * 2)
    return [small.crop(_whole_pixels(box * ratio)) for box in boxes]


def _whole_pixels(box: np.ndarray) -> Box:
    left, top, right, bottom = np.rint(box).astype(int).tolist()
    return left, top, max(right, left + 1), max(bottom, top + 1)


def tiles_of(width: int, height: int, tile: int) -> np.ndarray:  # int32 [T, 4]
    """An image in parts of at most `tile` pixels a side, row by row, about equally large."""
    xs, ys = (np.linspace(0, side, -(-side // tile) + 1).round().astype(int).tolist() for side in (width, height))
    rows, columns = pairwise(ys), list(pairwise(xs))
    return np.array([(left, top, right, low) for top, low in rows for left, right in columns], np.int32)


def joined(a: Patches, b: Patches) -> Patches:
    return Patches(*(np.concatenate(parts) for parts in zip(a, b, strict=True)))


# ------------------------------------------------------------------ comparing


def similarity(a: Patches, b: Patches) -> np.ndarray:  # float32 [Pa, Pb]
    """The cosine of each with each: of the features, or, without, as hyperplane codes estimate it (Charikar)."""
    if a.features.shape[1] and b.features.shape[1]:
        return a.features @ b.features.T
    bits = [np.unpackbits(codes, axis=1).astype(np.float32) * 2 - 1 for codes in (a.codes, b.codes)]
    return np.cos(np.pi / 2 * (1 - bits[0] @ bits[1].T / bits[0].shape[1]))


def compare(query: Patches, reference: Patches) -> Match:
    """Two images, the whole of each being the first patch. See the head of this file."""
    similar = similarity(query, reference)
    best = np.sort(similar[1:].max(1))[-BEST:].mean()
    cosine = WHOLE * similar[0, 0] + (1 - WHOLE) * best
    number, other = np.unravel_index(similar[1:].argmax(), similar[1:].shape)
    return Match(float(cosine), as_box(reference.boxes[other]), as_box(query.boxes[1 + number]))


def compare_region(query: Patches, reference: Patches) -> tuple[Match, int]:
    """One region, the only patch of `query`, with the best patch of an image, and that patch's number."""
    similar = similarity(query, reference)[0]
    best = int(similar.argmax())
    return Match(float(similar[best]), as_box(reference.boxes[best]), as_box(query.boxes[0])), best


def as_box(box: np.ndarray) -> Box:
    left, top, right, bottom = box.tolist()
    return left, top, right, bottom


# ------------------------------------------------------------------ searching


class PatchIndex:
    """The codes of all patches of a gallery in memory."""

    def __init__(self, connection: sqlite3.Connection, bits: int, version: object) -> None:
        self.version = version  # of the content of the gallery for which it was made
        self.index = Index(bits)
        owners = [np.empty(0, np.int64)]
        cursor = connection.execute("SELECT image, codes FROM patches ORDER BY image")
        while rows := cursor.fetchmany(ROWS):
            self.index.add(np.frombuffer(b"".join(codes for _, codes in rows), np.uint8).reshape(-1, bits // 8))
            counts = [len(codes) // (bits // 8) for _, codes in rows]
            owners.append(np.repeat(np.array([image for image, _ in rows], np.int64), counts))
        self.owners: np.ndarray = np.concatenate(owners)  # int64 [n]: the image of every patch

    def images_near(self, codes: np.ndarray, n: int) -> Sequence[Any]:  # uint8 [Q, bits // 8]
        """The images of the n patches nearest to every query."""
        if not len(self.owners):
            return []
        _, numbers = self.index.search(np.ascontiguousarray(codes), min(n, len(self.owners)))
        found: list[int] = np.unique(self.owners[numbers]).tolist()
        return found
