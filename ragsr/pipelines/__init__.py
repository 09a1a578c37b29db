"""Pipelines: from a photo to a restored one.

restore.py     the front door
refsr.py       the path of iRAG; diffusion.py, its second stage; irag_checkpoint.py reads published weights
refir.py       the path of ReFIR; refir_*.py: what goes into it, how it denoises, explains and falls
               back, its tiles and its memory; refir_restorer.py is what the front door takes
sdedit.py      references made from photos; hallucination.py says how far they were invented
"""

from ragsr.pipelines.refir import ReFIRPipeline
from ragsr.pipelines.refir_explain import Explanation, ReFIROutput
from ragsr.pipelines.refir_fallback import Fallback
from ragsr.pipelines.refir_restorer import ReFIROptions, ReFIRRestorer
from ragsr.pipelines.refsr import Reference, RefSRPipeline, Restored
from ragsr.pipelines.restore import load_pipeline, restore
from ragsr.pipelines.sdedit import SDEdit

__all__ = [
    "Explanation",
    "Fallback",
    "ReFIROptions",
    "ReFIROutput",
    "ReFIRPipeline",
    "ReFIRRestorer",
    "RefSRPipeline",
    "Reference",
    "Restored",
    "SDEdit",
    "load_pipeline",
    "restore",
]
