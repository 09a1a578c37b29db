"""CUDA kernels without a GPU: the same source, compiled for the host and run thread by thread (cuda_on_host.h).

Each driver in tests/csrc holds its kernels against a slow and simple form, and says how many cases were right.
"""

import os
import shutil
from pathlib import Path

import pytest
from contract import run_driver

FOLDER = Path(__file__).parents[1] / "csrc"
DRIVERS = sorted(path.name.removesuffix("_driver.cpp") for path in FOLDER.glob("*_cuda_driver.cpp"))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("driver", DRIVERS)
def test_kernels_on_the_host(driver, tmp_path):
    assert "all right" in run_driver(driver, tmp_path)
