"""Patch matching and texture transfer against the originals' formulas, in the form of pytest-benchmark.

pytest benchmarks/test_match.py --benchmark-group-by=group
RAGSR_QUICK=1 pytest benchmarks/test_match.py
"""

import pytest
from cases.match import CASES
from under_pytest import everyone, time_contestant

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


@pytest.mark.parametrize(("case", "who"), everyone(CASES))
def test_match(benchmark, case, who):
    time_contestant(benchmark, case, who)
