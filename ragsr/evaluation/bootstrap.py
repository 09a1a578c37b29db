"""Confidence intervals over scenes: photos of one scene are not independent, so whole scenes are drawn."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
TAIL = 0.025  # on each side: 95 % lie between


def interval(values: npt.ArrayLike, scenes: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """Of 95 % for the mean of `values`, one for each photo, by drawing whole scenes again and again."""
    numbers = np.asarray(values, dtype=float)
    groups = [numbers[[scene == one for scene in scenes]] for one in sorted(set(scenes))]
    sums, counts = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    drawn = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (TAIL, 1 - TAIL))
    return float(low), float(high)
