"""Compile Triton kernels ahead of time, without a GPU, and say what ptxas gave them.

    python tests/kernels/compile_ahead.py hamming           one family
    python tests/kernels/compile_ahead.py --write           all of them, and keep the tables

`ahead/<family>.py` has a dictionary `SOURCES` of what to compile, `ahead/<family>.json` the table that was kept:
{Triton version: {kernel: {"sm_80": {"registers": …, "spills": …, "shared": …}, …}}}. Run in a process of its own: the
tests run Triton's interpreter, which takes the place of the compiler.
"""

import argparse
import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FOLDER = Path(__file__).with_name("ahead")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--write", action="store_true", help="keep the tables, for this version of Triton")
    args = parser.parse_args()
    families = args.families or sorted(path.stem for path in FOLDER.glob("*.py"))
    tables = {family: table_of(family) for family in families}
    if args.write:
        for family, table in tables.items():
            kept = FOLDER / f"{family}.json"
            versions = json.loads(kept.read_text()) if kept.exists() else {}
            kept.write_text(json.dumps(versions | {triton.__version__: table}, indent=1) + "\n")
    print(json.dumps(tables, indent=1))
    return 0


def table_of(family: str) -> dict[str, dict[str, dict[str, int]]]:
    sources: dict[str, Any] = runpy.run_path(str(FOLDER / f"{family}.py"))["SOURCES"]
    return {name: {f"sm_{a}": resources(source, a) for a in ARCHITECTURES} for name, source in sources.items()}


def resources(source: Any, architecture: int) -> dict[str, int]:
    """A source may come with options of the launch (num_warps, num_stages), or be a function of the architecture."""
    source = source if isinstance(source, ASTSource | tuple) else source(architecture)
    source, options = source if isinstance(source, tuple) else (source, {})
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing.stdout))
    return {
        "registers": int(numbers["REG"]),
        "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared": kernel.metadata.shared,
    }


if __name__ == "__main__":
    sys.exit(main())
