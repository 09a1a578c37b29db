"""What tests and benchmarks share: devices, inputs for every op, and the comparison of an op with its plain form.

The plain form is run in float64 on the same values, so the tolerance is the error of the op alone. All tolerances stand
in one table, each with its reason.
"""

import itertools
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
    """Argument lists for `op`: ordinary, odd and empty shapes, non-contiguous views. Seeded, the same every time."""
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
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes of tensors that PyTorch held at once during `run()`, beyond those that were there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


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
    return [*maps, (strided(torch.randn(2, 3, 5, 7)), strided(torch.randn(2, 3, 8, 4)))]


def _windows() -> list[tuple[Any, ...]]:
    """Several references, priors inside and far outside of them, windows of one position to all."""

    def one(a: Tensor, b: list[Tensor], window: int, k: int, patch: int, padding: int) -> tuple[Any, ...]:
        n = (a.shape[2] + 2 * padding - patch + 1) * (a.shape[3] + 2 * padding - patch + 1)
        return a, b, torch.randint(-6, 20, (a.shape[0], n, 3)) % 14 - 2, window, k, patch, padding, 1e-12

    maps = [(torch.randn(b, c, *s), torch.randn(b, c, *t)) for b, c, s, t in SIZES_MATCH]
    several = [torch.randn(2, 5, 4, 13), torch.randn(2, 5, 9, 3), torch.randn(2, 5, 8, 8)]
    a, b, prior, *settings = one(
        torch.randn(2, 3, 3, 2), [torch.randn(2, 3, 8, 4), torch.randn(2, 3, 5, 5)], 1, 2, 3, 1
    )
    return [
        *(one(a, [b], window, 1, 3, 1) for window, (a, b) in enumerate(maps)),
        one(torch.randn(2, 5, 2, 5), several, 2, 2, 3, 1),
        one(torch.randn(2, 5, 3, 3), several, 100, 2, 2, 0),
        one(torch.randn(1, 70, 2, 2), [torch.randn(1, 70, 12, 11)], 3, 2, 3, 1),
        (strided(a), [strided(x) for x in b], strided(prior), *settings),
    ]


def _fold_maps() -> list[tuple[Any, ...]]:
    def one(b: int, c: int, cells: tuple[int, int], grid: tuple[int, int], stride: int) -> tuple[Any, ...]:
        features = torch.randn(b, c, cells[0] * stride, cells[1] * stride)
        return features, torch.randint(0, cells[0] * cells[1], (b, *grid)), 3 * stride, stride

    contiguous = [one(*case) for case in SIZES_FOLD]
    features, index, _, stride = contiguous[2]
    return [*contiguous, (features, index, stride, stride), (strided(features), strided(index), 5 * stride, stride)]


def _features(*shape: int) -> Tensor:
    return torch.randn(*shape) + 0.5  # a common direction, so that similarities spread well beyond rounding


def _gate_tokens() -> list[tuple[Any, ...]]:
    cases = [(_features(b, n, c), _features(b, sum(m), c), m) for b, n, c, m in SIZES_GATE]
    image, reference = (
        _features(2, 6, 5, 7).flatten(2).transpose(1, 2),
        _features(2, 6, 3, 4).flatten(2).transpose(1, 2),
    )
    return [*cases, (image, reference, None), (strided(image), strided(reference), [5, 7])]


def _attention_heads() -> list[tuple[Any, ...]]:
    def one(b: int, h: int, n: int, d: int, m: list[int], *options: Any) -> tuple[Any, ...]:
        q, k, v = (torch.randn(b, h, n, d) for _ in range(3))
        gate = torch.rand(b, len(m), n) / max(1, len(m))
        gate[: b // 2] = 0
        return q, k, v, torch.randn(b, h, sum(m), d), torch.randn(b, h, sum(m), d), gate, m, *options

    *tensors, lengths = one(2, 3, 21, 16, [8, 11])
    shared = torch.randn(1, 2, 9, 8).expand(2, -1, -1, -1)
    return [
        *(one(*sizes) for sizes in SIZES_ATTENTION),
        *(one(1, 2, 17, 8, [5, 9], 0.3, align, mode) for align in (True, False) for mode in MODES),
        (*(strided(x) for x in tensors), lengths),
        (*(torch.randn(2, 6, 2, 8).transpose(1, 2) for _ in range(3)), shared, shared, torch.rand(2, 1, 6)),
    ]


def _norm_maps() -> list[tuple[Any, ...]]:
    def one(
        shape: tuple[int, ...], groups: int, *, map_: tuple[int, ...] | None = None, **options: Any
    ) -> tuple[Any, ...]:
        full = (shape[0], shape[1] + options.get("channels2", 0), *shape[2:])
        x2 = torch.randn(shape[0], full[1] - shape[1], *shape[2:]) if full != shape else None
        vectors, maps = torch.randn(2, full[1]), torch.randn(2, *(map_ or full))
        residual = torch.randn(full) if options.get("residual") else None
        return (
            torch.randn(shape),
            groups,
            *vectors,
            *maps,
            1e-5,
            options.get("activation"),
            residual,
            x2,
            options.get("raw_mix"),
        )

    def channels_last(*maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.to(memory_format=torch.channels_last) for x in maps)

    x, groups, *modulation = one((2, 6, 5, 3), 2)[:6]
    wide_x, wide_groups, *vectors, gamma, beta = one((2, 40, 17, 19), 8)[:6]
    halves = torch.randn(2, 80, 17, 19)
    half_gamma, half_beta = channels_last(halves)[0].chunk(2, dim=1)
    left, right = channels_last(torch.randn(2, 13, 17, 19), torch.randn(2, 27, 17, 19))
    return [
        one((1, 1), 1),
        one((2, 6, 63), 3, activation="silu"),
        one((0, 4, 3, 3), 2),
        one((2, 8, 5, 7), 4, map_=(1, 8, 1, 1), activation="relu", residual=True),
        one((2, 4, 3, 5), 3, channels2=5, residual=True, raw_mix=0.3, activation="silu"),  # a group across the seam
        (strided(x), groups, *(strided(p) for p in modulation)),
        (*channels_last(x), groups, *modulation),
        one((1, 6, 71, 67), 2, activation="silu"),  # a channel longer than one tile
        (wide_x, wide_groups, *vectors, *halves.chunk(2, dim=1)),  # halves of one tensor, in both layouts
        (*channels_last(wide_x), wide_groups, *vectors, half_gamma, half_beta, 1e-5, "relu", gamma),
        (left, wide_groups, *vectors, gamma, beta[:1], 1e-5, None, None, right, 0.7),
        (*channels_last(wide_x), wide_groups, *vectors, gamma[:, :, :1, :1], beta[:, :, :1]),
    ]


def _score_blocks() -> list[tuple[Any, ...]]:
    """Best keys so far and the next scores: many ties, few candidates, none so far, more than one vector."""
    keep_best = PLAIN_FORMS["keep_best"]

    def one(q: int, seen: int, n: int, k: int) -> tuple[Any, ...]:
        before, scores = torch.randint(-3, 3, (q, seen)) / 4, torch.randint(-3, 4, (q, n)) / 4
        return keep_best(torch.empty(q, 0, dtype=torch.int64), before, 0, k), scores, seen, k

    sizes = [
        (1, 0, 1, 1),
        (3, 0, 63, 4),
        (2, 9, 1000, 3),
        (5, 200, 257, 40),
        (2, 7, 6, 100),
        (0, 4, 9, 2),
        (2, 5, 0, 3),
    ]
    best, scores, first, k = one(4, 20, 70, 5)
    return [*(one(*size) for size in sizes), (strided(best), strided(scores), first, k)]


MODES = ("separate", "concat", "replace")
SIZES_GATE = [(1, 1, 1, [1]), (2, 63, 5, [63]), (1, 100, 16, [7, 1, 30]), (0, 9, 4, [4]), (1, 9, 4, [])]
SIZES_ATTENTION = [
    (1, 1, 1, 8, [1]),
    (2, 3, 63, 40, [100]),
    (3, 2, 20, 7, [1, 13, 30]),
    (0, 2, 4, 8, [5]),
    (2, 1, 9, 8, []),
]
SIZES_ADAIN = [((), 1, 5, 3), ((2,), 63, 63, 5), ((2, 3), 100, 1, 4), ((0,), 4, 6, 3), ((1, 2), 2, 2, 16)]
SIZES_COSINE = [(1, 1, 1), (3, 1000, 5), (63, 64, 32), (0, 9, 4)]
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
    "adain": lambda: (
        [(torch.randn(*b, n, c), torch.randn(*b, m, c) + 1) for b, n, m, c in SIZES_ADAIN]
        + [(strided(torch.randn(2, 9, 5)), strided(torch.randn(2, 4, 5)))]
    ),
    "correlation_topk": lambda: (
        [(a, b, 1 + i % 3, 3, 1, 1e-12) for i, (a, b) in enumerate(_match_maps())]
        + [(torch.randn(2, 4, 9, 6), torch.randn(2, 4, 5, 11), 2, patch, 0, 1e-5) for patch in (1, 2, 5)]
    ),
    "correlation_topk_near": _windows,
    "cosine_gate": _gate_tokens,
    "cosine_topk": lambda: (
        [(torch.randn(q, d), torch.randn(n, d), k) for q, n, d in SIZES_COSINE for k in sorted({1, min(5, n), n})]
        + [(strided(torch.randn(4, 6)), strided(torch.randn(63, 6)), 3)]
    ),
    "gated_blend": lambda: (
        [
            (torch.randn(s), torch.randn(s), torch.rand(g))
            for s, g in [((1,), ()), ((2, 3, 63), (2, 1, 63)), ((0, 5), (5,))]
        ]
        + [(strided(torch.randn(3, 5)), strided(torch.randn(3, 5)), strided(torch.rand(3, 1)))]
    ),
    "gather_fold": _fold_maps,
    "group_norm_sft_forward": _norm_maps,
    "keep_best": _score_blocks,
    "pack_bits": lambda: (
        [(torch.randn(*s),) for s in [(1,), (63,), (5, 64), (3, 7, 1000), (0, 9)]] + [(strided(torch.randn(6, 13)),)]
    ),
    "hamming_distance": lambda: [*_hamming_pairs(), (_codes(3, 4), _codes(0, 4))],
    "hamming_topk": lambda: [(q, c, k) for q, c in _hamming_pairs() for k in sorted({1, min(10, len(c)), len(c)})],
    "separate_attention": _attention_heads,
    "separate_attention_affine": lambda: [args for args in _attention_heads() if len(args) < 8],
    "sft": lambda: (
        [
            tuple(torch.randn(s) for s in shapes)
            for shapes in [((1,),) * 3, ((2, 5, 7, 3), (2, 5, 1, 1), (5, 7, 3)), ((0, 3),) * 3]
        ]
        + [tuple(strided(torch.randn(3, 63)) for _ in range(3))]
    ),
    "unit_rows": lambda: (
        [(torch.randn(s),) for s in [(1, 1), (3, 63), (5, 1000), (0, 4), (2, 0)]] + [(strided(torch.randn(6, 5)),)]
    ),
}


def _place(a: Any, device: str, dtype: torch.dtype) -> Any:
    """A tensor on `device` (floats in `dtype`) with its strides, its offset and what lies between its elements."""
    if isinstance(a, list):
        return [_place(x, device, dtype) for x in a]
    if not isinstance(a, Tensor):
        return a
    storage = a.as_strided((a.untyped_storage().nbytes() // a.element_size(),), (1,), 0)
    moved = storage.to(device, dtype if a.dtype.is_floating_point else a.dtype)
    return moved.as_strided(a.shape, a.stride(), a.storage_offset())


def _double(a: Any) -> Any:
    if isinstance(a, list):
        return [_double(x) for x in a]
    return a.double() if isinstance(a, Tensor) and a.dtype.is_floating_point else a


def _tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def _compute_dtype(args: tuple[Any, ...]) -> torch.dtype:
    floats = [a.dtype for a in args if isinstance(a, Tensor) and a.dtype.is_floating_point]
    return min(floats, key=lambda d: torch.finfo(d).bits) if floats else torch.float32
