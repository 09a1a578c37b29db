"""ReFIR's two chains: the target chain restores the photo, the source chain carries the reference.

plan.py       when, where and how strongly       host.py      what a restoration model must offer
state.py      what the layers do in a pass       source.py    the source chain, its modes
attention.py  the processors that obey it        cache.py     what source chains left
shares.py     several references                 paired.py    both chains in one batch, canvas.py: as the original did
"""

from ragsr.chains.attention import chosen_layers, installed
from ragsr.chains.cache import ReferenceCache
from ragsr.chains.canvas import shared_canvas
from ragsr.chains.host import Condition, Defaults, Host, Layer, Sampler
from ragsr.chains.paired import PairedChains
from ragsr.chains.plan import PRESETS, ChainPlan, chain_plan
from ragsr.chains.shares import reference_weights
from ragsr.chains.source import MODES, Mode, SourceChain, encoded_once
from ragsr.chains.state import ChainState, Record, Sources

__all__ = [
    "MODES",
    "PRESETS",
    "ChainPlan",
    "ChainState",
    "Condition",
    "Defaults",
    "Host",
    "Layer",
    "Mode",
    "PairedChains",
    "Record",
    "ReferenceCache",
    "Sampler",
    "SourceChain",
    "Sources",
    "chain_plan",
    "chosen_layers",
    "encoded_once",
    "installed",
    "reference_weights",
    "shared_canvas",
]
