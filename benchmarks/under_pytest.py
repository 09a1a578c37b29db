"""One contestant of one case of `benchmarks/cases`, timed by pytest-benchmark.

`benchmarks/run.py` lets the contestants of a case take turns and is the better judge of a ratio; this is for comparing
commits, and for what pytest-benchmark makes of its files. RAGSR_QUICK=1 takes small maps and few rounds: whether
everything runs, not how fast.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import QUICK, Case
from run import contestants, owner_of
from torch.utils._pytree import tree_map

import ragsr.ops  # noqa: F401  defines the ops
from ragsr.testing import assert_matches_plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def everyone(cases: Iterable[Case]) -> list[Any]:
    """Every case with each of its contestants, as parameters of a test."""
    return [
        pytest.param(case, who, id=f"{case.op} {case.name}, {who}")
        for case in cases
        for who in ("kernel", "plain", *case.peers)
    ]


def time_contestant(benchmark: Any, case: Case, who: str) -> None:
    """Time it, unless the kernel is wrong; beside the times, what was moved or multiplied, how fast, of which limit."""
    torch.manual_seed(0)
    inputs = tree_map(lambda a: a.to(DEVICE) if isinstance(a, torch.Tensor) else a, case.make())
    if who == "kernel":
        assert_matches_plain(case.op, *inputs)
    runs, missing = contestants(case, inputs)
    if who not in runs:
        pytest.skip(", ".join(missing))
    benchmark.group = f"{case.op} {case.name}"
    run = finished(runs[who])
    benchmark.pedantic(run, rounds=3, warmup_rounds=1) if QUICK else benchmark(run)
    limit = case.limit(DEVICE) if case.limit else None
    benchmark.extra_info |= {"owner": owner_of(case, DEVICE), "threads": torch.get_num_threads()}
    benchmark.extra_info |= {"bytes" if case.unit == "B" else case.unit: case.work}
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s" if case.unit == "B" else f"G {case.unit}/s"] = case.work / seconds / 1e9
    if limit:
        benchmark.extra_info |= {"limit": limit[1], "% of limit": 100 * limit[0] / seconds}


def finished(run: Callable[[], Any]) -> Callable[[], Any]:
    def wait() -> None:
        run()
        torch.cuda.synchronize()

    return wait if DEVICE == "cuda" else run
