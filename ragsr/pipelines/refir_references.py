"""Which references a photo gets, where, and how strongly.

    references_per    the gallery is searched for
    image             the whole photo: its k nearest images serve every tile
    tile              every tile by itself: a large photo shows many things, and one reference seldom shows them all

A reference that several tiles get is read, encoded and denoised once. A tile for which nothing is relevant is what the
plain model makes of it.
"""

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ragsr.chains import Host, reference_weights
from ragsr.errors import InputError
from ragsr.gallery import Gallery, Hit
from ragsr.image import image_to_tensor, tensor_to_image, to_rgb
from ragsr.pipelines.refir_inputs import LEAST, Photo, fit
from ragsr.pipelines.refir_tiles import Box
from ragsr.pipelines.refsr import Reference, named, read_reference

USEFUL = 512 * 512  # pixels that a reference may have beside however small a photo


class Region(NamedTuple):
    """A part of the result, and how much each of the R references counts in it."""

    box: Box  # in pixels of the result
    weights: list[float]  # [R]: strength times share; 0 where it is not used


@dataclass(frozen=True)
class Chosen:
    """The references of a photo."""

    references: list[Reference]  # [R], each once, as its best place found it
    pictures: list[Photo]  # [R]
    regions: list[Region]
    rejected: list[Reference] = field(default_factory=list)  # found, and too little alike; nearest first

    @property
    def weights(self) -> list[float]:
        """[R]: the mean over the regions."""
        return [sum(parts) / len(parts) for parts in zip(*(region.weights for region in self.regions), strict=True)]


def only(reference: Reference, picture: Photo, weight: float, boxes: Sequence[Box]) -> Chosen:
    """One reference, for the whole photo."""
    return Chosen([reference], [picture], [Region(box, [weight]) for box in boxes])


class Candidate(NamedTuple):
    """What was found for one region."""

    key: Hashable  # equal for one and the same reference
    reference: Reference
    picture: Photo


def choose_references(
    given: Photo | Sequence[Photo],
    gallery: Gallery | None,
    photo: Tensor,  # [1, 3, H, W] at the size of the result
    boxes: Sequence[Box],  # the regions
    k: int,
    strength: float,
    threshold: float,
    temperature: float,
    otherwise: str,
) -> tuple[Chosen, Chosen | None]:
    """The user's references, or those of the k nearest of the gallery that are relevant; warns if none is.

    If none is, the second answer is what was found nevertheless; `otherwise` says what will be done.
    """
    found = find_references(given, gallery, photo, boxes, k)
    relevant = weigh(boxes, found, strength, threshold, temperature)
    if gallery is None or relevant.references or strength == 0:
        return relevant, None
    best = max((one.score or 0.0 for one in relevant.rejected), default=0.0)
    warnings.warn(
        f"no reference is relevant enough (the best scores {best:.2f}, the threshold is {threshold:g}); {otherwise}",
        stacklevel=4,
    )
    return relevant, weigh(boxes, found, strength, 0.0, temperature)


def find_references(
    given: Photo | Sequence[Photo], gallery: Gallery | None, photo: Tensor, boxes: Sequence[Box], k: int
) -> list[list[Candidate]]:
    """For every region, nearest first."""
    pictures: list[Photo] = [given] if isinstance(given, Photo) else list(given)
    if gallery is None:
        asked = [Candidate(i, *both) for i, both in enumerate(zip(named(pictures), pictures, strict=True))]
        return [asked for _ in boxes]
    if pictures:
        raise InputError("references and a gallery were both given; give one of them, or neither")
    whole = tensor_to_image(photo)
    searches = gallery.search_many([whole.crop(box) for box in boxes], k)
    if not any(searches):
        raise InputError(
            f"{gallery.folder}: none of its images is on disk; ragsr gallery info {gallery.folder} lists them"
        )
    return [[Candidate(hit.path, as_reference(hit), hit.path) for hit in hits] for hits in searches]


def as_reference(hit: Hit) -> Reference:
    return Reference(hit.path, hit.distance, hit.score, generated=hit.generated, cosine=hit.cosine, region=hit.region)


def weigh(
    boxes: Sequence[Box],
    found: Sequence[Sequence[Candidate]],
    strength: float,
    threshold: float,
    temperature: float,
) -> Chosen:
    """Weights per region; what counts in none is left out, and rejected if its score is the reason."""
    used: dict[Hashable, Candidate] = {}
    rejected: dict[Hashable, Candidate] = {}
    weighed = []
    for candidates in found:
        scores = [one.reference.score for one in candidates]
        weights = reference_weights(scores, strength, threshold, temperature)
        weighed.append(dict(zip((one.key for one in candidates), weights, strict=True)))
        for one, weight in zip(candidates, weights, strict=True):
            if weight > 0:
                used[one.key] = nearer(one, used.get(one.key))
            elif is_below(one.reference.score, threshold):
                rejected[one.key] = nearer(one, rejected.get(one.key))
    left = [one.reference for key, one in rejected.items() if key not in used]
    return Chosen(
        [one.reference for one in used.values()],
        [one.picture for one in used.values()],
        [Region(box, [weights.get(key, 0.0) for key in used]) for box, weights in zip(boxes, weighed, strict=True)],
        sorted(left, key=lambda one: -(one.score or 0.0)),
    )


def is_below(score: float | None, threshold: float) -> bool:
    return score is not None and (score < threshold or score <= 0)


def nearer(one: Candidate, other: Candidate | None) -> Candidate:
    """The one with the higher score; the other, if they are equal."""
    return one if other is None or (one.reference.score or 0.0) > (other.reference.score or 0.0) else other


def region_of(regions: Sequence[Region], x: float, y: float) -> Region:
    """The region whose centre is nearest to the point; the first of equals."""

    def away(region: Region) -> float:
        left, top, right, bottom = region.box
        return ((left + right) / 2 - x) ** 2 + ((top + bottom) / 2 - y) ** 2

    return min(regions, key=away)


def load_reference(reference: Photo, number: int, host: Host, pixels: int) -> tuple[Tensor, str | None]:
    """A reference of at most about so many pixels, continued to the host's multiple, and a note if it shrank.

    Raises `InputError` for one that is too small, or so narrow that it would be.
    """
    picture, note = read_reference(reference, number)
    name = f"reference {number}" if isinstance(reference, Image.Image) else str(reference)
    width, height = picture.size
    shrink = min(1.0, math.sqrt(max(pixels, USEFUL) / (width * height)))
    if shrink < 1:
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        picture = to_rgb(picture).resize(size, Image.Resampling.BICUBIC)
        note = f"reduced from {width}x{height} to {size[0]}x{size[1]}: a reference is used no larger than the result"
    least = LEAST * host.latent_stride
    if min(picture.size) < least:
        raise InputError(
            f"{name}: {width}x{height} pixels, used as {picture.width}x{picture.height}; {host.name} needs {least} on "
            "both sides: crop it to the part that matters, or find it larger"
        )
    return fit(image_to_tensor(picture), host), note
