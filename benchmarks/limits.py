"""How fast this machine could be at most: figures measured here, or None where they cannot be.

read_rate    bytes per second at which a buffer of a given size is read: from the cache it fits into, or from memory
count_rate   bits per second that xor, population count and minimum compare at best, nothing else being done
product_rate floating-point operations per second of PyTorch's matrix product, two large square matrices

On the CPU `ceilings.cpp` measures the first two, with as many threads as the ops use. On CUDA the first is the sum of a
buffer, and the second is arithmetic: 16 population counts of 32 bits per clock and multiprocessor (CUDA C++ Programming
Guide, "Arithmetic Instructions", every architecture from 8.0 to 12.0), at the highest clock the driver states.

A search that does not count bits (planes of bits, a table of all queries, tensor cores) may pass the second. It then
says how much was won by not counting. Attention cannot pass the third: beside the products it takes exponentials.
"""

import atexit
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("ceilings.cpp")
LANE = {"cpu": 64, "cuda": 32}  # bits that are counted together, of a lane of a vector or of a thread
LARGEST = 1 << 30  # bytes: no cache holds more, so memory is as fast for any more
COUNTS_PER_CLOCK = 16  # of a multiprocessor


def scan_limit(device: str, queries: int, codes: int, width: int) -> tuple[float, str] | None:
    """Seconds that comparing every query with every code takes at least, and what sets them: reading or counting."""
    limits = []
    if (rate := read_rate(device, codes * width)) is not None:
        limits.append((codes * width / rate, f"reading the codes at {rate / 1e9:.0f} GB/s"))
    if (rate := count_rate(device)) is not None:
        seconds = queries * codes * _counted_bits(device, width) / rate
        limits.append((seconds, f"counting at {rate / 1e12:.2f} Tbit/s"))
    return max(limits, default=None)


def product_limit(device: str, operations: float, dtype: torch.dtype) -> tuple[float, str]:
    """Seconds of so many operations at the rate of large matrix products."""
    rate = product_rate(device, dtype)
    return operations / rate, f"matrix products at {rate / 1e12:.2f} TFLOP/s"


def read_limit(device: str, size: int) -> tuple[float, str] | None:
    """Seconds of reading so many bytes once."""
    rate = read_rate(device, size)
    return None if rate is None else (size / rate, f"reading at {rate / 1e9:.0f} GB/s")


@functools.cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """The best of ten products."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = min(_seconds(device, lambda: a @ b) for _ in range(11))
    return 2 * n**3 / seconds


def _seconds(device: str, run: Callable[[], object]) -> float:
    if device == "cpu":
        start_time = time.perf_counter()
        run()
        return time.perf_counter() - start_time
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _counted_bits(device: str, width: int) -> int:
    """Whole lanes; on the CPU lanes may be 8, 16 or 32 bits wide too, and more of them are counted at a time."""
    if device == "cpu" and width < 8:
        return 8 << (width - 1).bit_length()
    return -(-8 * width // LANE[device]) * LANE[device]


def read_rate(device: str, size: int) -> float | None:
    # what is timed on CUDA finds a cold cache, so there it is always memory
    return _read_rate(device, LARGEST if device == "cuda" else min(size, LARGEST))


@functools.cache
def _read_rate(device: str, size: int) -> float | None:
    return _ceiling("read", size) if device == "cpu" else _read_rate_cuda(size)


@functools.cache
def count_rate(device: str) -> float | None:
    if device == "cpu":
        words = _ceiling("popcount")
        return words * LANE["cpu"] if words else None
    clock = _clock_cuda()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return COUNTS_PER_CLOCK * LANE["cuda"] * processors * clock if clock else None


def _ceiling(*arguments: object) -> float | None:
    program = _program()
    if program is None:
        return None
    command = [program, *map(str, arguments), str(torch.get_num_threads())]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@functools.cache
def _program() -> str | None:
    """`ceilings.cpp`, compiled for this processor in a folder of its own; None without a compiler that can."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    program = str(Path(folder.name, "ceilings"))
    command = [compiler, "-O3", "-march=native", "-std=c++17", "-pthread", "-o", program, str(SOURCE)]
    return program if subprocess.run(command, capture_output=True).returncode == 0 else None


def _read_rate_cuda(size: int) -> float:
    """The best of ten sums over a buffer of `size` bytes."""
    numbers = torch.empty(size // 4, dtype=torch.float32, device="cuda").normal_()
    return size / min(_seconds("cuda", numbers.sum) for _ in range(11))


def _clock_cuda() -> float | None:
    """Clock of the multiprocessors in Hz as the driver states it, or None."""
    try:
        command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
        return 1e6 * float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None
