"""How well a search finds the right references."""

from collections.abc import Collection, Hashable, Sequence

from ragsr.errors import InputError

Truth = Sequence[Collection[Hashable]]  # the right answers of every search
Hits = Sequence[Sequence[Hashable]]  # what every search found, best first


def hit_rate(truth: Truth, hits: Hits, k: int) -> float:
    """The share of searches with at least one right answer among their first k hits, in [0, 1]."""
    _check_searches("hit_rate", truth, hits, k)
    return sum(not set(right).isdisjoint(found[:k]) for right, found in zip(truth, hits, strict=True)) / len(truth)


def recall(truth: Truth, hits: Hits, k: int) -> float:
    """The share of the right answers of a search that are among its first k hits, mean over the searches."""
    _check_searches("recall", truth, hits, k)
    shares = [len({*found[:k]}.intersection(right)) / len(set(right)) for right, found in zip(truth, hits, strict=True)]
    return sum(shares) / len(shares)


def mean_average_precision(truth: Truth, hits: Hits) -> float:
    """MAP: where the n-th right answer of a search stands at place p, the precision there is n / p. The mean over all
    right answers of a search, 0 for those that were not found, and the mean over the searches."""
    _check_searches("mean_average_precision", truth, hits)
    return sum(map(_average_precision, truth, hits)) / len(truth)


def _average_precision(right: Collection[Hashable], found: Sequence[Hashable]) -> float:
    sought = set(right)
    places = [place for place, one in enumerate(found, 1) if one in sought]
    return sum(n / place for n, place in enumerate(places, 1)) / len(sought)


def _check_searches(name: str, truth: Truth, hits: Hits, k: int = 1) -> None:
    if len(truth) != len(hits) or not truth:
        raise InputError(f"{name}: {len(truth)} right answers for {len(hits)} searches; both must match, at least one")
    if k < 1:
        raise InputError(f"{name}: k is {k}; it counts the first hits, from 1")
    if not all(truth):
        raise InputError(f"{name}: some searches have no right answer; leave them out")
