"""Evaluation: run a pack of scenes with known truth, and report.

`pack.py` finds the scenes, `restoring.py` and `retrieval.py` measure, `report.py` writes JSON and one HTML page.
"""

from ragsr.evaluation.pack import DEGRADATIONS, GROUPS, Pack, Query, load_pack
from ragsr.evaluation.restoring import METHODS, RestoreRow, evaluate_restore
from ragsr.evaluation.retrieval import RetrievalRow, evaluate_retrieval

__all__ = [
    "DEGRADATIONS",
    "GROUPS",
    "METHODS",
    "Pack",
    "Query",
    "RestoreRow",
    "RetrievalRow",
    "evaluate_restore",
    "evaluate_retrieval",
    "load_pack",
]
