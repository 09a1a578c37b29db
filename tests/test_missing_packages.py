"""Tests that need a package which is not installed are skipped, and say so; other packages must be there."""

import os
import subprocess
import sys
from pathlib import Path

MISSING = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)"
SINGLE = """
def test_skipped():
    import expecttest

def test_passes():
    pass

def test_fails():
    import needed
"""
FILES = {
    "hypothesis.py": MISSING,  # in place of what is installed
    "expecttest.py": MISSING,
    "needed.py": MISSING,
    "test_whole_file.py": "import hypothesis\ndef test_never_runs(): assert False",
    "test_single_tests.py": SINGLE,
    "test_broken_file.py": "import needed",
}
COMMAND = [sys.executable, "-m", "pytest", "-rsfE", "--continue-on-collection-errors"]
PLUGINS = ["-p", "conftest", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"]  # the first is ours


def test_what_needs_a_missing_package_is_skipped(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [*COMMAND, *PLUGINS, "--rootdir", tmp_path, tmp_path],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "1 failed, 1 passed, 2 skipped, 1 error" in done.stdout, done.stdout + done.stderr
    assert "hypothesis is not installed" in done.stdout
    assert "expecttest is not installed" in done.stdout
    assert "test_fails" in done.stdout
