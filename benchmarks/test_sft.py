"""The modulation ops against what PyTorch composes and compiles, in the form of pytest-benchmark.

pytest benchmarks/test_sft.py --benchmark-group-by=group
pytest benchmarks/test_sft.py -k "backward and float32" --benchmark-json=sft.json
RAGSR_QUICK=1 pytest benchmarks/test_sft.py
"""

import pytest
from cases.sft import CASES
from under_pytest import everyone, time_contestant

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


@pytest.mark.parametrize(("case", "who"), everyone(CASES))
def test_sft(benchmark, case, who):
    time_contestant(benchmark, case, who)
