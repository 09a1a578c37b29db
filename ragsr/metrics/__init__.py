"""How good a restored image is, and how often a search finds the right reference.

psnr, ssim     nearness to the truth, in the presets of several projects       fidelity.py
haarpsi        nearness to the truth as eyes see it, without learned weights   haarpsi.py
niqe           naturalness of an image by itself: lower is better              niqe.py
lpips, ...     those with learned weights, by pyiqa, an extra of its own       extra.py
hit_rate       of a search                                                     retrieval.py

Evaluations choose by name, and say what a number means (named.py).
"""

from ragsr.metrics.fidelity import PRESETS, Picture, find_preset, psnr, ssim
from ragsr.metrics.haarpsi import haarpsi
from ragsr.metrics.named import METRICS, USUAL, find_metric, load_measures
from ragsr.metrics.niqe import NaturalModel, fit_niqe, niqe
from ragsr.metrics.retrieval import hit_rate, mean_average_precision, recall

__all__ = [
    "METRICS",
    "PRESETS",
    "USUAL",
    "NaturalModel",
    "Picture",
    "find_metric",
    "find_preset",
    "fit_niqe",
    "haarpsi",
    "hit_rate",
    "load_measures",
    "mean_average_precision",
    "niqe",
    "psnr",
    "recall",
    "ssim",
]
