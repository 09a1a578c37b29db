"""setup.py of the checkout: what it says when something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.skipif(not (CHECKOUT / "setup.py").is_file(), reason="not in a checkout")
def test_missing_compiler_is_one_sentence_with_the_remedy(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "RAGSR_PLAIN")} | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stderr
    assert "apt install g++" in done.stderr
    assert "RAGSR_PLAIN=1 pip install ." in done.stderr
    assert "Traceback" not in done.stderr
