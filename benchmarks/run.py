"""Time the ops against their plain forms, and say how fast that is.

    python benchmarks/run.py                       every op that has a kernel here, on the CPU
    python benchmarks/run.py --op hamming          one family of ops, or one op: --op hamming_topk
    python benchmarks/run.py --device cuda --json benchmarks/results/ops_cuda.json

Every result is first compared with the plain form: a wrong kernel is not timed. The kernel, the plain form and the
peers of a case take turns; the table shows medians with the 20th and 80th percentile, and work per second. A peer that
is not installed is left out, and named.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Case, families

import ragsr.ops  # noqa: F401  defines the ops
from ragsr.env import owner, provenance
from ragsr.ops._library import PLAIN_FORMS
from ragsr.testing import assert_matches_plain


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", metavar="NAME", help="only this family or op")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on each case (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    args = parser.parse_args()
    cases = [case for name, found in families().items() for case in found if args.op in (None, name, case.op)]
    if not cases:
        parser.error(f"no case for {args.op}; the families are {', '.join(families())}")
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
    assert_matches_plain(case.op, *inputs)
    runs, missing = contestants(case, inputs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["kernel"]) < 5:
        for name, run in runs.items():
            times[name].append(timed(run, device))
    median = {name: statistics.median(values) for name, values in times.items()}
    row = {"op": case.op, "case": case.name, "device": device, "owner": owner(case.op, device.upper())}
    row |= {"us": {name: [round(x * 1e6, 1) for x in percentiles(values)] for name, values in times.items()}}
    row |= {"per_second": case.work / median["kernel"], "unit": case.unit, "missing": missing}
    row["times"] = {name: value / median["kernel"] for name, value in median.items() if name != "kernel"}
    low, middle, high = row["us"]["kernel"]
    compared = ", ".join([*(f"{ratio:.1f} × {name}" for name, ratio in row["times"].items()), *missing])
    print(
        f"{case.op:<17} {case.name:<45} {row['owner']:<8} {middle:>10.1f} µs [{low:.1f}, {high:.1f}]  "
        f"{row['per_second'] / 1e9:7.2f} G {case.unit}/s  {compared}",
        file=sys.stderr,
    )
    return row


def contestants(case: Case, inputs: tuple[Any, ...]) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """What is timed, by name, and which peers are not installed."""
    op, plain = getattr(torch.ops.ragsr, case.op), PLAIN_FORMS[case.op]
    runs: dict[str, Callable[[], Any]] = {"kernel": lambda: op(*inputs), "plain": lambda: plain(*inputs)}
    missing = []
    for name, prepare in case.peers.items():
        try:
            runs[name] = prepare(*inputs)
        except ImportError:
            missing.append(f"without {name}")
    return runs, missing


def timed(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


if __name__ == "__main__":
    sys.exit(main())
