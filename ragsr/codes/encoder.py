"""What an encoder can do, and which there are.

Codes of two encoders, or of two versions of one, never compare: a gallery remembers the `id` of its encoder, and how
pictures were prepared for it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from ragsr.errors import InputError

DEFAULT = "hash-64"  # of a gallery that is made now


class CodeEncoder(Protocol):
    """Pictures to packed codes and float features. Every method may be called from several threads at once."""

    name: str
    version: int  # rises whenever the code of any picture changes
    bits: int  # a multiple of 8
    features: int  # length of the float feature; 0 where there is none
    preprocessing: str  # names exactly how pixels are prepared; the same when a gallery is built and when it is asked
    threshold: float  # of `score`: below it a reference is of no use

    @property
    def id(self) -> str:
        """What two codes must share to be comparable."""
        return f"{self.name}@{self.version}"

    @property
    def source(self) -> str:
        """What `load_encoder` takes to make this encoder again: its name, or the absolute path of its folder."""
        return self.name

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """The codes of `images`, of any sizes and modes: uint8 [n, bits // 8], in the bit order of `ops.pack_bits`."""
        return self.describe(images)[0]

    def describe(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Codes, as `encode` gives them, and features, float32 [n, features] of length one, from one pass.

        A picture without any content may have the feature zero.
        """
        ...

    def score(self, distance: int, cosine: float | None = None) -> float:
        """How relevant a reference is that differs in `distance` bits, in [0, 1].

        With `cosine`, that of the two features, it tells more. Falls with the distance and rises with the cosine. What
        the number means (for trained encoders: the estimated probability that both show the same scene) each encoder
        says.
        """
        ...


def _shipped(name: str) -> CodeEncoder:
    from ragsr.codes.hashing import ASSETS, load_hash

    return load_hash(ASSETS / name)


def _vgg(size: int) -> CodeEncoder:
    from ragsr.codes.features import FloatEncoder
    from ragsr.codes.vgg import VGGFeatures, find_weights, load_vgg16

    return FloatEncoder(VGGFeatures(load_vgg16(find_weights()), size))


def _clip(model: str) -> CodeEncoder:
    from ragsr.codes.features import FloatEncoder
    from ragsr.codes.hub import load_clip

    return FloatEncoder(load_clip(model))


def _dinov2(model: str) -> CodeEncoder:
    from ragsr.codes.features import FloatEncoder
    from ragsr.codes.hub import load_dinov2

    return FloatEncoder(load_dinov2(model))


ENCODERS: dict[str, Callable[[], CodeEncoder]] = {
    **{name: partial(_shipped, name) for name in ("hash-16", "hash-64", "hash-256")},
    "vgg16-512": partial(_vgg, 512),
    "vgg16-4096": partial(_vgg, 4096),
}
FAMILIES: dict[str, Callable[[str], CodeEncoder]] = {"clip": _clip, "dinov2": _dinov2}  # named as clip:MODEL


def load_encoder(name: str | Path = DEFAULT) -> CodeEncoder:
    """The encoder of that name, of a model `clip:MODEL` or `dinov2:MODEL`, or of a folder from `ragsr train hash`.

    Raises `InputError` with the list of names.
    """
    if name in ENCODERS:
        return ENCODERS[str(name)]()
    family, _, model = str(name).partition(":")
    if model and family in FAMILIES:
        return FAMILIES[family](model)
    if Path(name).is_dir():
        from ragsr.codes.hashing import load_hash

        return load_hash(name)
    raise InputError(
        f"there is no encoder {str(name)!r}; there are: {', '.join(sorted(ENCODERS))}, clip:MODEL, dinov2:MODEL, "
        "and folders that ragsr train hash wrote"
    )
