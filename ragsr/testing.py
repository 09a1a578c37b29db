"""What tests and benchmarks share: devices, inputs for every op, and the comparison of an op with its plain form.

The plain form is run in float64 on the same values, so the tolerance is the error of the op alone. All tolerances stand
in one table, each with its reason.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ragsr.ops._library import PLAIN_FORMS

# dtype -> (relative, absolute) tolerance of a float op against its plain form in float64
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-12),  # the same arithmetic in another order
    torch.float32: (1e-4, 2e-5),  # sums over some thousand terms of size one
    torch.float16: (5e-3, 5e-3),  # ten bits of mantissa in and out, float32 sums
    torch.bfloat16: (3e-2, 3e-2),  # seven bits of mantissa in and out, float32 sums
}


def devices() -> list[str]:
    """The devices ops are tested on here: always "cpu", and "cuda" where there is one."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def inputs(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple[Any, ...]]:
    """Argument lists for `op`: ordinary, odd and empty shapes, and non-contiguous views. Seeded, the same every time."""
    torch.manual_seed(0)
    return [tuple(_place(a, device, dtype) for a in args) for args in INPUTS[op]()]


def assert_matches_plain(op: str, *args: Any, tolerance: tuple[float, float] | None = None) -> None:
    """Compare `torch.ops.ragsr.<op>(*args)` with its plain form in float64; integer results must be equal."""
    found = getattr(torch.ops.ragsr, op)(*args)
    wanted = PLAIN_FORMS[op](*(_double(a) for a in args))
    for got, want in zip(_tuple(found), _tuple(wanted), strict=True):
        assert got.shape == want.shape, f"{op}: shape {tuple(got.shape)} where plain gives {tuple(want.shape)}"
        if got.dtype.is_floating_point:
            relative, absolute = tolerance or TOLERANCES[_compute_dtype(args)]
            torch.testing.assert_close(got.double(), want.double(), rtol=relative, atol=absolute)
        else:
            assert got.dtype == want.dtype and torch.equal(got, want), f"{op}: integers differ from the plain form"


def strided(x: Tensor) -> Tensor:
    """The same values as `x` in a view that is contiguous in no dimension and starts past the storage's beginning."""
    room = x.new_empty(*(2 * n + 1 for n in x.shape))
    room.view(torch.uint8).fill_(0xFF)  # NaN for floats: whoever reads between the elements will show it
    view = room[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


# ------------------------------------------------------------------ inputs per op


def _codes(rows: int, width: int) -> Tensor:
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8)


def _hamming_pairs() -> list[tuple[Any, ...]]:
    pairs = [(_codes(q, w), _codes(n, w)) for q, n, w in SIZES_HAMMING]
    few = torch.randint(0, 2, (300, 8), dtype=torch.uint8)  # many equal distances: ties decide
    return [*pairs, (few[:9], few), (strided(_codes(5, 12)), strided(_codes(63, 12)))]


def _match_maps() -> list[tuple[Any, ...]]:
    maps = [(torch.randn(b, c, *s), torch.randn(b, c, *t)) for b, c, s, t in SIZES_MATCH]
    same = (torch.randn(1, 4, 6, 5), torch.ones(1, 4, 7, 6))  # every inner patch ties
    return [*maps, same, (strided(torch.randn(2, 3, 5, 7)), strided(torch.randn(2, 3, 8, 4)))]


def _fold_maps() -> list[tuple[Any, ...]]:
    def one(b: int, c: int, cells: tuple[int, int], grid: tuple[int, int], stride: int) -> tuple[Any, ...]:
        features = torch.randn(b, c, cells[0] * stride, cells[1] * stride)
        return features, torch.randint(0, cells[0] * cells[1], (b, *grid)), 3 * stride, stride

    contiguous = [one(*case) for case in SIZES_FOLD]
    features, index, patch, stride = contiguous[1]
    return [*contiguous, (features, index, stride, stride), (strided(features), strided(index), 5 * stride, stride)]


SIZES_MATCH = [(1, 1, (3, 3), (3, 3)), (2, 5, (7, 9), (4, 13)), (1, 16, (1, 63), (63, 1)), (0, 3, (4, 4), (5, 5))]
SIZES_FOLD = [
    (1, 1, (1, 1), (1, 1), 1),
    (2, 5, (7, 9), (4, 13), 1),
    (1, 3, (5, 3), (1, 63), 2),
    (2, 4, (3, 4), (4, 3), 4),
    (0, 3, (4, 4), (5, 5), 1),
]
SIZES_HAMMING = [
    (1, 1, 1),
    (3, 1000, 2),
    (64, 63, 8),
    (7, 1000, 9),
    (5, 257, 16),
    (4, 100, 32),
    (2, 65, 128),
    (0, 9, 4),
]

INPUTS: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "correlation_topk": lambda: (
        [(a, b, k, 3, 1, 1e-12) for a, b in _match_maps() for k in (1, 3)]
        + [(torch.randn(2, 4, 9, 6), torch.randn(2, 4, 5, 11), 2, patch, 0, 1e-5) for patch in (1, 2, 5)]
    ),
    "gather_fold": _fold_maps,
    "pack_bits": lambda: (
        [(torch.randn(*s),) for s in [(1,), (63,), (5, 64), (3, 7, 1000), (0, 9)]] + [(strided(torch.randn(6, 13)),)]
    ),
    "hamming_distance": lambda: [*_hamming_pairs(), (_codes(3, 4), _codes(0, 4))],
    "hamming_topk": lambda: [(q, c, k) for q, c in _hamming_pairs() for k in sorted({1, min(10, len(c)), len(c)})],
}


def _place(a: Any, device: str, dtype: torch.dtype) -> Any:
    if not isinstance(a, Tensor):
        return a
    moved = (
        a
        if a.device.type == device
        else torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device).copy_(a)
    )
    return moved.to(dtype) if a.dtype.is_floating_point and dtype != a.dtype else moved


def _double(a: Any) -> Any:
    return a.double() if isinstance(a, Tensor) and a.dtype.is_floating_point else a


def _tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def _compute_dtype(args: tuple[Any, ...]) -> torch.dtype:
    floats = [a.dtype for a in args if isinstance(a, Tensor) and a.dtype.is_floating_point]
    return min(floats, key=lambda d: torch.finfo(d).bits) if floats else torch.float32
