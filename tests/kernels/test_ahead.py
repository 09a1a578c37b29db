"""Every Triton kernel compiles for every architecture we name, and none spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
SCRIPT = Path(__file__).with_name("compile_ahead.py")


def test_kernels_compile_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kernel, architectures in json.loads(done.stdout).items():
        assert set(architectures) == {"sm_80", "sm_90", "sm_100", "sm_120"}
        for name, used in architectures.items():
            assert used["spills"] == 0, f"{kernel} spills on {name}: {used}"
            assert used["registers"] <= 128, f"{kernel} takes {used['registers']} registers on {name}"
