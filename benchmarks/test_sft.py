"""The modulation ops against what PyTorch composes and compiles, in the form of pytest-benchmark.

    pytest benchmarks/test_sft.py --benchmark-group-by=group
    pytest benchmarks/test_sft.py -k "backward and float32" --benchmark-json=sft.json

The cases are those of `benchmarks/cases/sft.py`; `benchmarks/run.py --op sft` lets the contestants of a case take turns
and is the better judge of a ratio. A wrong kernel is not timed.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for cases and run, as when run.py is started

from cases.sft import CASES
from run import contestants

import ragsr.ops  # noqa: F401  defines the ops
from ragsr.testing import assert_matches_plain

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


@pytest.mark.parametrize("who", ["kernel", "plain", "eager", "torch.compile", "mul, add", "addcmul"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_sft(benchmark, case, who):
    if who not in ("kernel", "plain", *case.peers):
        pytest.skip(f"{who} is no peer of {case.op}")
    torch.manual_seed(0)
    inputs = case.make()
    assert_matches_plain(case.op, *inputs)
    runs, _ = contestants(case, inputs)
    benchmark.group = f"{case.op} {case.name}"
    benchmark.extra_info["bytes"] = case.work
    benchmark(runs[who])
