"""What every op must keep to on a GPU, whoever owns it there: CUDA C++, Triton or plain PyTorch.

Checks that make sense on any device take one, and test_checks.py shows on the CPU that they find what they look for.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import torch
from contract import gradients, requiring_grad
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ragsr.env import owner
from ragsr.ops import hamming
from ragsr.ops._library import owns
from ragsr.testing import TOLERANCES, assert_matches_plain, inputs

CYCLES = 100_000_000  # of waiting on the device: some 50 ms, which no launch takes


def op_of(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.ragsr, name)


def tensors(values: Any) -> list[Tensor]:
    """All tensors of arguments or results, also those in lists."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def why_exempt(name: str) -> str | None:
    """Why the op may wait for the device, or None: the functions of PyTorch that a plain form calls may do so."""
    who = owner(name, "CUDA")
    return f"{name} is {who}, which may wait for the device" if who.startswith("plain") else None


def floating(name: str) -> bool:
    """Whether the op takes floats, and so several dtypes."""
    return any(x.is_floating_point() for args in inputs(name) for x in tensors(args))


def largest(name: str, device: str) -> tuple[Any, ...]:
    """The largest of the inputs of `ragsr.testing`."""
    return max(inputs(name, device), key=lambda args: sum(x.numel() for x in tensors(args)))


def many(name: str, device: str) -> tuple[Any, ...]:
    """Inputs that keep many blocks busy at once: where order is left to chance, it differs between runs here."""
    torch.manual_seed(1)
    if name not in LARGE:
        return largest(name, device)
    return tree_map(lambda a: a.to(device) if isinstance(a, Tensor) else a, LARGE[name]())


def _codes(rows: int, width: int) -> Tensor:
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8)


def _heads(tokens: int) -> list[Tensor]:
    return [torch.randn(2, 4, tokens, 64) for _ in range(3)]


LARGE: dict[str, Callable[[], tuple[Any, ...]]] = {
    "adain": lambda: (torch.randn(4, 4096, 64), torch.randn(4, 4096, 64) + 1),
    "correlation_topk": lambda: (torch.randn(1, 32, 40, 40), torch.randn(1, 32, 41, 43), 2, 3, 1, 1e-12),
    "cosine_gate": lambda: (torch.randn(2, 4096, 320) + 0.5, torch.randn(2, 4096, 320) + 0.5, [4000, 96]),
    "cosine_topk": lambda: (torch.randn(500, 256), torch.randn(20_000, 256), 10),
    "gated_blend": lambda: (torch.randn(4, 4096, 320), torch.randn(4, 4096, 320), torch.rand(4, 4096, 1)),
    "gather_fold": lambda: (torch.randn(1, 32, 120, 120), torch.randint(0, 1600, (1, 40, 40)), 9, 3),
    "group_norm_sft_forward": lambda: (
        *(torch.randn(2, 320, 64, 64), 32, torch.randn(320), torch.randn(320)),
        *(torch.randn(2, 320, 64, 64), torch.randn(2, 320, 64, 64), 1e-5, "silu"),
    ),
    "hamming_distance": lambda: (_codes(64, 8), _codes(50_000, 8)),
    "hamming_topk": lambda: (_codes(64, 8), _codes(200_000, 8), 100),
    "pack_bits": lambda: (torch.randn(20_000, 256),),
    "separate_attention": lambda: (*_heads(1024), *_heads(1024)[:2], torch.rand(2, 1, 1024)),
    "sft": lambda: tuple(torch.randn(2, 320, 64, 64) for _ in range(3)),
}


# ------------------------------------------------------------------ results


def assert_precise(name: str, device: str, dtype: torch.dtype) -> None:
    """Every input of `ragsr.testing`, after the memory that results are put into was filled with NaN."""
    for args in inputs(name, device, dtype):
        poison(device)
        assert_matches_plain(name, *args, tolerance=_of_results(op_of(name)(*args), dtype))


def _of_results(found: Any, dtype: torch.dtype) -> tuple[float, float] | None:
    """float64 in and float32 out (scores) cannot agree better than float32; else the table's tolerance."""
    narrower = [x for x in tensors(found) if x.is_floating_point() and x.dtype != dtype]
    return TOLERANCES[torch.float32] if narrower and dtype == torch.float64 else None


def poison(device: str) -> None:
    """Leave blocks of NaN behind where the next allocations come from."""
    for size in (1 << 9, 1 << 14, 1 << 18, 1 << 22):
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for _ in range(8)]
        del blocks


def assert_gradients(name: str, device: str, truth: Callable[..., Any] | None = None) -> bool:
    """Gradients in float32 against those in float64 on the CPU, which tests/ops compares with differences.

    False: the op has none.
    """
    if not owns(name, "Autograd"):
        return False
    for args, same in zip(inputs(name, device), inputs(name, dtype=torch.float64), strict=True):
        try:
            with torch.device(device):
                found = gradients(_first_of(op_of(name)), requiring_grad(args))
        except NotImplementedError:  # it says that it has none
            return False
        wanted = gradients(_first_of(truth or op_of(name)), requiring_grad(same))
        for got, want in zip(found, wanted, strict=True):
            limit = 1e-3 * want.abs().max().item() + 1e-6 if want.numel() else 0.0
            torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=limit)
    return True


def _first_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """What comes beside the first result (statistics) carries no gradient."""
    return lambda *args: tensors(function(*args))[0]


def assert_same_bits_again(function: Callable[..., Any], args: Iterable[Any], times: int = 20) -> None:
    first = function(*args)
    for _ in range(times):
        assert same_bits(function(*args), first), "the same call gave other bits"


def assert_compiles(name: str, device: str) -> None:
    args = largest(name, device)
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(lambda *a: op_of(name)(*a), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*args), op_of(name)(*args))


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a.shape == b.shape and torch.equal(_bytes(a), _bytes(b)) for a, b in pairs)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


# ------------------------------------------------------------------ the device's own time


def assert_does_not_wait(name: str, args: tuple[Any, ...]) -> None:
    """No call of PyTorch that waits; and the op returns while what was asked of the device before is still going on."""
    function = op_of(name)
    function(*args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = torch.cuda.Event()
    torch.cuda._sleep(CYCLES)
    before.record()
    function(*args)
    assert not before.query(), f"{name} returned only when the device had nothing left to do"
    torch.cuda.synchronize()


def assert_replays(name: str, args: tuple[Any, ...]) -> None:
    """Captured once in a CUDA graph, then replayed on other values in the same memory."""
    function, held = op_of(name), copied(args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*held)
    for values in (reordered(args), args):
        wanted = function(*overwrite(copied(args), values))
        overwrite(held, values)
        graph.replay()
        assert same_bits(out, wanted), f"{name}: a replayed graph gave other bits than a call"


def assert_keeps_to_its_stream(name: str, args: tuple[Any, ...], streams: int = 3) -> None:
    """On each of several streams the inputs get their values late: a kernel on another stream would read old ones."""
    wanted = op_of(name)(*copied(args))
    torch.cuda.synchronize()
    found = []
    for stream in [torch.cuda.Stream() for _ in range(streams)]:
        with torch.cuda.stream(stream):
            held = overwrite(copied(args), reordered(args))
            torch.cuda._sleep(CYCLES // 5)
            found.append(op_of(name)(*overwrite(held, args)))
    torch.cuda.synchronize()
    for out in found:  # close, not equal: PyTorch's matrix products may differ in their last bits between streams
        torch.testing.assert_close(out, wanted, msg=f"{name} did not keep to the stream it was called on")


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, args)


def reordered(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Other valid arguments of the same shapes: the elements of each tensor backwards."""
    return tree_map(lambda a: a.flatten().flip(0).view(a.shape) if isinstance(a, Tensor) else a, args)


def overwrite(held: tuple[Any, ...], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """`held`, its memory and its strides, with the values of `values`."""
    for to, source in zip(tensors(held), tensors(values), strict=True):
        to.copy_(source)
    return held


# ------------------------------------------------------------------ Hamming search, at the sizes that matter

KINDS = ("random", "duplicates", "equal")


def hard_codes(kind: str, rows: int, width: int, device: str) -> Tensor:
    """uint8 [rows, width] in a view at an odd address, between bytes that would change the answer if they were read."""
    room = torch.full((rows * width + 1024,), 0xFF, dtype=torch.uint8, device=device)
    codes = room[513 : 513 + rows * width].view(rows, width)
    generator = torch.Generator(device).manual_seed(width)
    codes.copy_(torch.randint(0, 256, (rows, width), dtype=torch.uint8, device=device, generator=generator))
    if kind == "duplicates":
        codes.copy_(codes[torch.arange(rows, device=device) % 701])
    elif kind == "equal":
        codes.copy_(codes[:1].clone().expand(rows, width))
    return codes


def assert_nearest(codes: Tensor, numbers: Sequence[int], ks: Sequence[int]) -> None:
    """Every number of queries with every k; half of the queries are codes of the set, so that distance 0 occurs."""
    most, width = max(numbers), codes.shape[1]
    generator = torch.Generator(codes.device).manual_seed(most)
    queries = torch.randint(0, 256, (most, width), dtype=torch.uint8, device=codes.device, generator=generator)
    queries[::2] = codes[torch.arange(0, most, 2, device=codes.device) * 7 % len(codes)]
    aligned = codes.clone()
    with mock.patch.object(hamming, "BLOCK", 1 << 28):  # larger blocks: the same answer, in fewer launches
        distance, index = hamming.hamming_topk_plain(queries, aligned, max(ks))
    for q in numbers:
        for k in ks:
            for searched in (codes, aligned) if q < 100 else (aligned,):
                found = torch.ops.ragsr.hamming_topk(queries[:q], searched, k)
                assert torch.equal(found[0], distance[:q, :k]), f"distances of {q} queries, k={k}"
                assert torch.equal(found[1], index[:q, :k]), f"indices of {q} queries, k={k}"
