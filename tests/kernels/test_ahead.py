"""Every Triton kernel compiles for every architecture we name, spills nothing, and takes what the kept table says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
SCRIPT = Path(__file__).with_name("compile_ahead.py")
FOLDER = SCRIPT.with_name("ahead")


@pytest.mark.parametrize("family", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_kernels_compile_as_recorded(family):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, family], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)[family]
    kept = json.loads((FOLDER / f"{family}.json").read_text())
    if triton.__version__ not in kept:  # it compiles; how well, nobody has looked at
        pytest.skip(f"no table is kept for Triton {triton.__version__}: compile_ahead.py --write makes one")
    for kernel, architectures in table.items():
        assert set(architectures) == {"sm_80", "sm_90", "sm_100", "sm_120"}
        for name, used in architectures.items():
            assert used["spills"] == 0, f"{kernel} spills on {name}: {used}"
    assert table == kept[triton.__version__]
