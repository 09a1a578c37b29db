"""Index: codes in memory, searched by Hamming distance.

The work is done by the compiled `ragsr._index` where it was built, else by `ops.hamming_topk`. Both are exact and sort
by (distance, index), so their answers are the same. `RAGSR_PLAIN=1` takes the op.

Programs that add, remove, and keep codes in files (docs/index_format.md) take the compiled classes `FlatIndex` and
`MultiIndexHash` themselves; they are None where nothing was compiled. `to_faiss` and `from_faiss` carry codes over.
"""

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ragsr.errors import InputError
from ragsr.ops import hamming_topk
from ragsr.ops._library import PLAIN

try:
    from ragsr._index import FlatIndex, MultiIndexHash
except ImportError:  # installed without a compiler
    FlatIndex = MultiIndexHash = None

COMPILED = FlatIndex is not None and not PLAIN  # whether there may be index files


class Index:
    """Codes of `bits` bits in the order they were added; `search` finds the nearest by number."""

    def __init__(self, bits: int) -> None:
        if bits < 8 or bits % 8:
            raise InputError(f"codes of {bits} bits cannot be stored; the number of bits must be a multiple of 8")
        self.bits = bits
        self._flat = FlatIndex(bits // 8) if COMPILED else _Codes(bits // 8)

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


def place(
    index: "FlatIndex",
    ids: np.ndarray,  # int64 [n], ascending, the first not below index.total
    codes: np.ndarray,  # uint8 [n, width]
) -> None:
    """Append codes under ids of one's own; the ids left out are holes, as if their codes had been removed.

    Errors: `InputError` for ids that are negative, doubled, given out before, or mostly holes.
    """
    if len(ids) == 0:
        return
    first, total = index.total, int(ids[-1]) + 1
    if ids[0] < first or (ids[1:] <= ids[:-1]).any():
        raise InputError(
            f"ids must be {first} or more, all different and ascending; these begin with {ids[:3].tolist()}"
        )
    if total > 10 * (len(index) + len(ids)) + 1_000_000:
        raise InputError(f"{len(ids)} codes have ids up to {total - 1}, mostly holes; number them from 0, keep a table")
    if total - first == len(ids):
        index.add(codes)
        return
    placed = np.zeros((total - first, codes.shape[1]), np.uint8)
    placed[ids - first] = codes
    index.add(placed)
    index.remove(np.setdiff1d(np.arange(first, total), ids, assume_unique=True))


CARRIED = 1 << 20  # codes that are copied at a time


def to_faiss(index: "FlatIndex") -> Any:
    """A `faiss.IndexBinaryFlat` with the codes of a FlatIndex; where codes were removed, in an `IndexBinaryIDMap2`.

    Ids stay what they are. Distances are the same, and faiss leaves the order of equal ones open.
    Errors: `InputError` where faiss is not installed.
    """
    faiss = _faiss()
    flat = faiss.IndexBinaryFlat(8 * index.width)
    ids = index.ids()
    whole = len(ids) == 0 or ids[-1] == len(ids) - 1
    target = flat if whole else faiss.IndexBinaryIDMap2(flat)
    for part in np.split(ids, range(CARRIED, len(ids), CARRIED)):
        if whole:
            target.add(index.codes(part))
        else:
            target.add_with_ids(index.codes(part), part)
    return target


def from_faiss(index: Any) -> "FlatIndex":
    """A FlatIndex with the codes and ids of a `faiss.IndexBinaryFlat`, or of one in an `IndexBinaryIDMap`.

    Ids that the map leaves out are holes, as if their codes had been removed. Errors: `InputError` where faiss is not
    installed, for other kinds of index, and for ids that are negative, doubled, or mostly holes.
    """
    faiss = _faiss()
    index = faiss.downcast_IndexBinary(index) if isinstance(index, faiss.IndexBinary) else index
    ids = None
    if isinstance(index, faiss.IndexBinaryIDMap | faiss.IndexBinaryIDMap2):
        ids, index = faiss.vector_to_array(index.id_map), faiss.downcast_IndexBinary(index.index)
    if not isinstance(index, faiss.IndexBinaryFlat):
        raise InputError(f"{type(index).__name__} cannot be read; IndexBinaryFlat can, alone or in an IndexBinaryIDMap")
    codes = faiss.vector_to_array(index.xb).reshape(-1, index.code_size)
    flat = FlatIndex(codes.shape[1])
    if ids is None:
        flat.add(codes)
    else:
        order = np.argsort(ids, kind="stable")
        place(flat, ids[order], codes[order])
    return flat


def _faiss() -> ModuleType:
    if FlatIndex is None:
        raise InputError("ragsr._index was not built: install ragsr where a C++ compiler is, without RAGSR_PLAIN")
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise InputError("faiss is not installed: pip install faiss-cpu") from None
