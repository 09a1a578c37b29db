"""The compiled libraries keep to the stable ABI. RAGSR_LIBRARIES names another folder to look in."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import ragsr

FOLDER = Path(os.environ.get("RAGSR_LIBRARIES") or Path(ragsr.__file__).parent)


def symbols(stem: str) -> str:
    found = sorted(FOLDER.glob(f"{stem}.*so"))
    if not found:
        pytest.skip(f"{stem} was not built in {FOLDER}")
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run(["nm", "-D", "--undefined-only", "--demangle", found[0]], capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    return listing.stdout


@pytest.mark.parametrize("stem", ["_cpu", "_cuda"])
def test_op_libraries_need_only_the_stable_abi(stem):
    needed = symbols(stem)
    assert "aoti_torch_get_dtype" in needed  # the listing is real
    for unstable in ("at::", "c10::", "torch::", "Py"):
        assert unstable not in needed, f"{stem} needs an unstable symbol"


def test_index_knows_no_torch():
    needed = symbols("_index")
    assert "PyModule" in needed
    for foreign in ("torch", "c10::", "at::"):
        assert foreign not in needed
