"""Evaluation: run a pack of scenes with known truth, and report.

`pack.py` finds the scenes, `restoring.py` and `retrieval.py` measure (`ranking.py` puts candidates in order,
`bootstrap.py` tells how sure a mean is), `report.py` and `retrieval_report.py` write JSON and one HTML page each,
`table5.py` is an experiment of iRAG's.
"""

from ragsr.evaluation.bootstrap import interval
from ragsr.evaluation.pack import DEGRADATIONS, GROUPS, Pack, Query, degradations_of, load_pack
from ragsr.evaluation.restoring import METHODS, RestoreRow, evaluate_restore, pack_gallery
from ragsr.evaluation.retrieval import Retrieval, RetrievalRow, evaluate_retrieval
from ragsr.evaluation.table5 import evaluate_table5, training_sets

__all__ = [
    "DEGRADATIONS",
    "GROUPS",
    "METHODS",
    "Pack",
    "Query",
    "RestoreRow",
    "Retrieval",
    "RetrievalRow",
    "degradations_of",
    "evaluate_restore",
    "evaluate_retrieval",
    "evaluate_table5",
    "interval",
    "load_pack",
    "pack_gallery",
    "training_sets",
]
