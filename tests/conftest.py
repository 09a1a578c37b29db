"""Without a GPU, Triton kernels run in Triton's interpreter: it must be chosen before Triton is imported.

On a GPU machine where nothing can be installed some packages of the extra `test` may be missing. What needs them is
skipped there, with the reason: a whole file where it imports one, a test where PyTorch does.
"""

import os
import re
from collections.abc import Generator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DISPENSABLE = ("hypothesis", "expecttest")  # the second is imported by torch.library.opcheck


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if missing and missing[1] in DISPENSABLE:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), None, f"Skipped: {missing[1]} is not installed")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name in DISPENSABLE:
            pytest.skip(f"{error.name} is not installed")
        raise
