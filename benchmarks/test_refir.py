"""ReFIR's modes under pytest-benchmark, in the proportions of 1024²: pytest benchmarks/test_refir.py"""

import pytest
import torch
from refir_cost import MODES, STEPS, Runs
from small_hosts import SIZE, prompts, small_host


@pytest.fixture(scope="module")
def runs():
    torch.set_num_threads(1)
    return Runs(small_host(), SIZE, prompts(), "paper", STEPS)


@pytest.mark.parametrize("mode", MODES)
def test_mode(benchmark, runs, mode):
    assert benchmark.pedantic(runs.run, [mode], rounds=3).isfinite().all()
