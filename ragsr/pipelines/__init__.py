"""Pipelines: from a photo to a restored one.

`restore.py` is the front door, `refsr.py` the path of iRAG.
"""

from ragsr.pipelines.refsr import Reference, RefSRPipeline, Restored
from ragsr.pipelines.restore import load_pipeline, restore

__all__ = ["RefSRPipeline", "Reference", "Restored", "load_pipeline", "restore"]
