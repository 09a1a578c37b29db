"""What an index must answer, by counting bits in NumPy."""

import numpy as np


def random_codes(n: int, width: int, seed: int = 0, values: int = 256) -> np.ndarray:
    """uint8 [n, width]; with few `values` there are many ties."""
    return np.random.default_rng([seed, n, width]).integers(0, values, (n, width), dtype=np.uint8)


class Counted:
    """Codes and a bit per id that says whether it is still there."""

    def __init__(self, width: int) -> None:
        self.codes = np.empty((0, width), np.uint8)
        self.live = np.empty(0, bool)

    def copy(self) -> "Counted":
        twin = Counted(self.codes.shape[1])
        twin.codes, twin.live = self.codes.copy(), self.live.copy()
        return twin

    def add(self, codes: np.ndarray) -> int:
        first = len(self.codes)
        self.codes = np.concatenate((self.codes, codes))
        self.live = np.append(self.live, np.ones(len(codes), bool))
        return first

    def remove(self, ids: np.ndarray) -> None:
        self.live[ids] = False

    def sorted(self, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances and ids of all live codes, by (distance, id)."""
        ids = np.flatnonzero(self.live)
        distances = np.bitwise_count(query ^ self.codes[ids]).sum(-1, dtype=np.int32)
        order = np.argsort(distances, kind="stable")
        return distances[order], ids[order]


def assert_answers(index, model: Counted, queries: np.ndarray, k: int, radius: int) -> None:
    """`search` and `range_search` of the index give what counting gives."""
    assert len(index) == model.live.sum()
    limits, near_distances, near_ids = index.range_search(queries, radius)
    assert (limits.dtype, near_distances.dtype, near_ids.dtype) == (np.int64, np.int32, np.int64)
    assert (len(limits), limits[0], limits[-1]) == (len(queries) + 1, 0, len(near_ids))
    found = index.search(queries, k) if k else None
    for row, query in enumerate(queries):
        distances, ids = model.sorted(query)
        here = slice(limits[row], limits[row + 1])
        count = np.searchsorted(distances, radius, side="right")
        np.testing.assert_array_equal(near_distances[here], distances[:count])
        np.testing.assert_array_equal(near_ids[here], ids[:count])
        if found:
            np.testing.assert_array_equal(found[0][row], distances[:k])
            np.testing.assert_array_equal(found[1][row], ids[:k])
