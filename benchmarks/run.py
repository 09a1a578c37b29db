"""Time the ops against their plain forms, and say how fast that is.

    python benchmarks/run.py                       every op that has a kernel here, on the CPU
    python benchmarks/run.py --op hamming_topk     one op
    python benchmarks/run.py --device cuda --json benchmarks/results/ops_cuda.json

Every result is first compared with the plain form: a wrong kernel is not timed. Kernel and plain form take turns; the
table shows medians with the 20th and 80th percentile, and work per second where the op has a natural unit of it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ragsr.ops  # noqa: F401  defines the ops
from ragsr.env import owner, provenance
from ragsr.ops._library import PLAIN_FORMS
from ragsr.testing import assert_matches_plain


class Case(NamedTuple):
    op: str
    name: str
    make: Callable[[], tuple[Any, ...]]
    work: float  # how many of `unit` one call does
    unit: str


def codes(rows: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8)


def topk_case(q: int, n: int, bits: int, k: int) -> Case:
    name = f"{q} queries, {n} codes of {bits} bits, k={k}"
    return Case("hamming_topk", name, lambda: (codes(q, bits // 8), codes(n, bits // 8), k), q * n, "pairs")


CASES = [
    topk_case(64, 26_500, 16, 1),
    topk_case(64, 26_500, 64, 4),
    topk_case(1, 1_000_000, 64, 4),
    topk_case(64, 1_000_000, 64, 4),
    topk_case(64, 200_000, 256, 4),
    Case(
        "hamming_distance",
        "64 queries, 100000 codes of 64 bits",
        lambda: (codes(64, 8), codes(100_000, 8)),
        6.4e6,
        "pairs",
    ),
    Case("pack_bits", "100000 vectors of 256 components", lambda: (torch.randn(100_000, 256),), 2.56e7, "components"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on each case (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    args = parser.parse_args()
    cases = [case for case in CASES if args.op in (None, case.op)]
    if not cases:
        parser.error(f"no case for {args.op}; there are {', '.join(sorted({case.op for case in CASES}))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    rows = [measure(case, args.device, args.seconds) for case in cases]
    if args.json:
        document = {"provenance": provenance(), "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in case.make())
    kernel, plain = getattr(torch.ops.ragsr, case.op), PLAIN_FORMS[case.op]
    assert_matches_plain(case.op, *inputs)
    times: dict[str, list[float]] = {"kernel": [], "plain": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["kernel"]) < 5:
        for name, function in (("kernel", kernel), ("plain", plain)):
            times[name].append(timed(function, inputs, device))
    row = {"op": case.op, "case": case.name, "device": device, "owner": owner(case.op, device.upper())}
    row |= {f"{name}_us": [round(x * 1e6, 1) for x in percentiles(values)] for name, values in times.items()}
    per_second = case.work / statistics.median(times["kernel"])
    row |= {"per_second": per_second, "unit": case.unit}
    row["times_plain"] = statistics.median(times["plain"]) / statistics.median(times["kernel"])
    low, middle, high = row["kernel_us"]
    print(
        f"{case.op:<17} {case.name:<45} {row['owner']:<8} {middle:>10.1f} µs [{low:.1f}, {high:.1f}]  "
        f"{per_second / 1e9:7.2f} G {case.unit}/s  {row['times_plain']:6.1f} × plain",
        file=sys.stderr,
    )
    return row


def timed(function: Callable[..., Any], inputs: tuple[Any, ...], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


if __name__ == "__main__":
    sys.exit(main())
