"""The attention ops under pytest-benchmark: pytest benchmarks/test_attention.py"""

import pytest
import torch
from cases.attention import CASES

import ragsr.ops  # noqa: F401  defines the ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case.name}")
def test_op(benchmark, case):
    torch.manual_seed(0)
    args = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in case.make()]
    op = getattr(torch.ops.ragsr, case.op)

    def run():
        out = op(*args)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return out

    assert benchmark(run).isfinite().all()
