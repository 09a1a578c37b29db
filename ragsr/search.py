"""Index: codes in memory, searched by Hamming distance.

The work is done by the compiled `ragsr._index` where it was built, else by `ops.hamming_topk`. Both are exact and sort
by (distance, index), so their answers are the same. `RAGSR_PLAIN=1` takes the op.
"""

import numpy as np
import torch

from ragsr.errors import InputError
from ragsr.ops import hamming_topk
from ragsr.ops._library import PLAIN

try:
    from ragsr._index import FlatIndex, MultiIndexHash
except ImportError:  # installed without a compiler
    FlatIndex = MultiIndexHash = None


class Index:
    """Codes of `bits` bits in the order they were added; `search` finds the nearest by number."""

    def __init__(self, bits: int) -> None:
        if bits < 8 or bits % 8:
            raise InputError(f"codes of {bits} bits cannot be stored; the number of bits must be a multiple of 8")
        self.bits = bits
        self._flat = _Codes(bits // 8) if PLAIN or FlatIndex is None else FlatIndex(bits // 8)

    def __len__(self) -> int:
        return len(self._flat)

    def __repr__(self) -> str:
        return f"Index(bits={self.bits}, codes={len(self)}, kernel={type(self._flat).__name__})"

    def add(self, codes: np.ndarray) -> None:  # uint8 [n, bits // 8]
        """Append codes; the first gets the number `len(index)`."""
        self._flat.add(self._checked("codes", codes))

    def search(
        self,
        queries: np.ndarray,  # uint8 [Q, bits // 8]
        k: int,
    ) -> tuple[np.ndarray, np.ndarray]:  # int32 [Q, k], int64 [Q, k]
        """The k nearest codes of every query: distances and numbers, sorted by (distance, number)."""
        queries = self._checked("queries", queries)
        if not 1 <= k <= len(self):
            raise InputError(f"{k} nearest codes were asked for and there are {len(self)}; ask for 1 to {len(self)}")
        return self._flat.search(queries, k)

    def _checked(self, name: str, codes: np.ndarray) -> np.ndarray:
        if codes.dtype != np.uint8 or codes.ndim != 2:
            raise InputError(
                f"{name} are {codes.dtype} {list(codes.shape)}; packed codes are uint8 [n, {self.bits // 8}]"
            )
        if codes.shape[1] != self.bits // 8:
            raise InputError(
                f"{name} have {codes.shape[1]} bytes and this index holds codes of {self.bits // 8}; "
                "both must come from one encoder"
            )
        return np.ascontiguousarray(codes)


class _Codes:
    """`FlatIndex` with the op inside."""

    def __init__(self, width: int) -> None:
        self.codes = torch.empty(0, width, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.codes)

    def add(self, codes: np.ndarray) -> None:
        self.codes = torch.cat((self.codes, torch.tensor(codes)))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distances, indices = hamming_topk(torch.tensor(queries), self.codes, k)
        return distances.numpy(), indices.numpy()
