"""Image codes: what a gallery is searched by.

An encoder turns pictures into packed bits, and near pictures into near codes; most also give a float feature, by which
what the bits found is ranked again. `encoder.py` says what every encoder can do and finds one by name; `baseline.py` is
the one that needs no training.
"""

from ragsr.codes.baseline import DESCRIPTOR_SIZE, Baseline64, coins, describe, hyperplanes
from ragsr.codes.encoder import DEFAULT, ENCODERS, CodeEncoder, load_encoder

__all__ = [
    "DEFAULT",
    "DESCRIPTOR_SIZE",
    "ENCODERS",
    "Baseline64",
    "CodeEncoder",
    "coins",
    "describe",
    "hyperplanes",
    "load_encoder",
]
