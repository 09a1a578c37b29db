"""CUDA kernels without a GPU: the same source, compiled for the host and run thread by thread (cuda_on_host.h).

Each driver in tests/csrc holds its kernels against a slow and simple form, and says how many cases were right.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("driver", sorted(FOLDER.glob("*_cuda_driver.cpp")), ids=lambda path: path.stem)
def test_kernels_on_the_host(driver, tmp_path):
    program = tmp_path / "driver"
    command = [COMPILER, "-std=c++17", "-O1", "-Wno-unknown-pragmas", driver, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout
