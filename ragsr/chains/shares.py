"""How much of the strength each of several references gets.

    a_r = softmax(score_r / temperature),  Σ a_r = 1          weight_r = s · score_r · a_r, 0 where score_r < threshold

Scores are the retrieval's, in [0, 1]. A soft-max of raw cosines is almost uniform (0.8 and 0.6 give 0.55 and 0.45), so
it has a temperature. References that a user names carry no score: they count as fully relevant, in equal shares.

Source: ReFIR, Eq. 4: shares by the soft-max of retrieval scores; there without temperature and relevance.
"""

import math
from collections.abc import Sequence

from ragsr.errors import InputError

TEMPERATURE = 0.1


def reference_weights(
    scores: Sequence[float | None],
    scale: float,
    threshold: float = 0.0,
    temperature: float = TEMPERATURE,
) -> list[float]:
    """Strength times share of each reference; they add up to at most `scale`. 0 says: leave it out."""
    if temperature <= 0:
        raise InputError(f"temperature is {temperature}; it must be above 0: small values favour the best reference")
    relevance = [1.0 if score is None else min(max(score, 0.0), 1.0) for score in scores]
    used = [r if r > 0 and r >= threshold else None for r in relevance]
    best = max((r for r in used if r is not None), default=0.0)
    powers = [0.0 if r is None else math.exp((r - best) / temperature) for r in used]
    total = sum(powers) or 1.0
    return [scale * r * power / total for r, power in zip(relevance, powers, strict=True)]
