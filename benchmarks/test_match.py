"""The cases of `cases/match.py` under pytest-benchmark: pytest benchmarks/test_match.py

`benchmarks/run.py --op match` times them against their peers; this is for comparing commits.
"""

import pytest
import torch
from cases.match import CASES

import ragsr.ops  # noqa: F401  defines the ops
from ragsr.testing import assert_matches_plain

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_match(benchmark, case):
    torch.manual_seed(0)
    inputs = case.make()
    assert_matches_plain(case.op, *inputs)
    benchmark.extra_info |= {"work": case.work, "unit": case.unit}
    benchmark(getattr(torch.ops.ragsr, case.op), *inputs)
