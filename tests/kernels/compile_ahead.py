"""Compile every Triton kernel ahead of time, without a GPU, and print what ptxas gave it.

    python tests/kernels/compile_ahead.py

prints JSON: {kernel: {"sm_80": {"registers": …, "spills": …, "shared": …}, …}}. Run in a process of its own: the tests
run Triton's interpreter, which takes the place of the compiler.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ragsr.kernels import hamming

ARCHITECTURES = (80, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

KERNELS = {
    "hamming_keys_kernel": ASTSource(
        hamming.hamming_keys_kernel,
        signature={
            **dict.fromkeys(("queries", "codes"), "*i32"),
            "keys": "*i64",
            **dict.fromkeys(("n", "total", "first"), "i64"),
        }
        | dict.fromkeys(("WORDS", "BLOCK"), "constexpr"),
        constexprs={"WORDS": 2, "BLOCK": hamming.BLOCK},
    )
}


def resources(source: ASTSource, architecture: int) -> dict[str, int]:
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    numbers = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", listing.stdout))
    return {
        "registers": int(numbers["REG"]),
        "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared": int(numbers["SHARED"]),
    }


if __name__ == "__main__":
    table = {name: {f"sm_{a}": resources(source, a) for a in ARCHITECTURES} for name, source in KERNELS.items()}
    print(json.dumps(table, indent=2))
