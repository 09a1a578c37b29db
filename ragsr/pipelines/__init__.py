"""Pipelines: from a photo to a restored one.

`restore.py` is the front door, `refsr.py` the path of iRAG. `refir.py` is that of ReFIR; what goes into it, how it
denoises, its tiles and its memory are the files beside it whose names begin with its own.
"""

from ragsr.pipelines.refir import ReFIROutput, ReFIRPipeline
from ragsr.pipelines.refsr import Reference, RefSRPipeline, Restored
from ragsr.pipelines.restore import load_pipeline, restore

__all__ = ["ReFIROutput", "ReFIRPipeline", "RefSRPipeline", "Reference", "Restored", "load_pipeline", "restore"]
