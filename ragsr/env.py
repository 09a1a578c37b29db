"""What runs here: versions, and which kernel owns each op on each device, or why none does."""

import ctypes
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ragsr.ops
from ragsr.kernels import attention_table
from ragsr.ops import _library

PACKAGES = ("ragsr", "torch", "triton", "numpy", "pillow", "diffusers", "xformers")


def describe() -> dict[str, Any]:
    """Versions, devices, compiled libraries and the owner of every op, as plain data."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "devices": {"cpu": cpu_name(), **{f"cuda:{i}": cuda_name(i) for i in range(torch.cuda.device_count())}},
        "libraries": {f"ragsr.{stem}": reason or "loaded" for stem, reason in _library.BINARIES.items()}
        | {"ragsr._index": why_no_index() or "loaded", "triton": _library.why_no_triton() or "loaded"},
        "cpu kernel": cpu_kernel(),
        "ops": {
            name: {"cpu": owner(name, "CPU"), "cuda": owner(name, "CUDA")} for name in sorted(_library.PLAIN_FORMS)
        },
        "separate_attention in Triton": attention_table.owners(gpu_capability()),
    }


def provenance() -> dict[str, Any]:
    """What a saved number needs beside it: command, commit, date, versions and devices."""
    found = describe()
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": found["versions"],
        "devices": found["devices"],
        "cpu kernel": found["cpu kernel"],
    }


def commit() -> str:
    """The commit of the checkout this package is imported from, "+" if code differs from it; "unknown" elsewhere."""
    folder = Path(ragsr.ops.__file__).parents[2]
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        code = [*git, "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"]
        changed = subprocess.run(code, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout else "")


def owner(name: str, key: str) -> str:
    """Who computes the op on the devices of one dispatch key, with the reason where it is the plain form."""
    if key == "CUDA" and torch.version.cuda is None:
        return "nobody (this PyTorch has no CUDA)"
    if name in _library.TRITON and key == "CUDA":
        return "Triton"
    if _library.owns(name, key):
        return {"CPU": "C++", "CUDA": "CUDA C++"}[key]
    missing = _library.BINARIES["_cpu" if key == "CPU" else "_cuda"]
    return f"plain PyTorch ({missing or 'no kernel for it yet'})"


def gpu_capability() -> tuple[int, int]:
    """Of the first GPU; where there is none, what the tables would choose on an H100."""
    return torch.cuda.get_device_capability(0) if torch.cuda.is_available() else (9, 0)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def why_no_index() -> str | None:
    if _library.PLAIN:
        return _library.PLAIN_ASKED
    return None if importlib.util.find_spec("ragsr._index") else "ragsr._index was not built"


def cpu_kernel() -> str:
    """The distance kernel the C++ library chose for this processor: portable, avx2 or avx512."""
    found = sorted(Path(ragsr.ops.__file__).parents[1].glob("_cpu.*so"))
    if _library.BINARIES["_cpu"] is not None or not found:
        return "none: " + str(_library.BINARIES["_cpu"])
    library = ctypes.CDLL(str(found[0]))
    library.ragsr_cpu_kernel.restype = ctypes.c_char_p
    return str(library.ragsr_cpu_kernel().decode())


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def cuda_name(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 20} MiB"
