"""What is searched for: a picture as an encoder sees it, if asked also mirrored, enlarged, and in patches."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ragsr.codes import CodeEncoder
from ragsr.errors import InputError
from ragsr.gallery.patches import Patches, cut, describe_patches

PROBES = ("flips", "scales")
CENTRES = (0.71, 0.5)  # of the sides: what a reference shows that was taken from nearer


class Query(NamedTuple):
    """A picture and its patches. `views` are of the whole: first the picture, then its probes."""

    views: Patches
    patches: Patches | None = None


def describe_query(
    encoder: CodeEncoder, image: Image.Image, patches: bool = False, probes: Sequence[str] = ()
) -> Query:
    """Encode a picture. `InputError` for a probe that is not in `PROBES`."""
    unknown = sorted(set(probes) - set(PROBES))
    if unknown:
        raise InputError(f"there is no probe {unknown[0]!r}; there are: {', '.join(PROBES)}")
    boxes = [(0, 0, *image.size)]
    if "scales" in probes:
        boxes += [centre_box(*image.size, share) for share in CENTRES]
    pictures = [image, *(image.crop(box) for box in boxes[1:])]
    if "flips" in probes:
        pictures += [ImageOps.mirror(picture) for picture in pictures]
        boxes *= 2
    codes, features = encoder.describe(pictures)
    views = Patches(np.array(boxes, np.int32), codes.numpy(), features.numpy())
    return Query(views, describe_patches(encoder, image) if patches else None)


def describe_regions(encoder: CodeEncoder, image: Image.Image, boxes: np.ndarray) -> list[Query]:
    """The parts of a picture in `boxes` [T, 4], each as a query of its own."""
    codes, features = encoder.describe(cut(image, boxes))
    parts = zip(boxes, codes.numpy(), features.numpy(), strict=True)
    return [Query(Patches(box[None], code[None], feature[None])) for box, code, feature in parts]


def centre_box(width: int, height: int, share: float) -> tuple[int, int, int, int]:
    w, h = max(1, round(width * share)), max(1, round(height * share))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
