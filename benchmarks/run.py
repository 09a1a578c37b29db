"""Time the ops against their plain forms and other libraries, and say how fast that is.

    python benchmarks/run.py                       every op, on the CPU
    python benchmarks/run.py --op hamming          one family of ops, or one op: --op hamming_topk
    python benchmarks/run.py --op index            what takes long, or much memory, runs only by the name of its family
    python benchmarks/run.py --device cuda --json benchmarks/results/ops_cuda.json
    python benchmarks/run.py --json FILE --resume  goes on where the last run of this commit was stopped

Every answer is first compared with the plain form, and the peers' answers with ours: what is wrong is not timed. The
contestants of a case take turns, each for its share of the time, with the same number of threads. The table shows
medians with the 20th and 80th percentile, work per second, the share of the limit where one is known, the memory that
PyTorch's tensors take at most beyond the arguments, and how many times longer each contestant takes. On CUDA, times are
those between two events on the stream, with a cold L2 cache; the kernel is also timed in a CUDA graph, with a warm one.
A peer that is not installed is left out, and named.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report that it starts and stops

import torch
from cases import Case, LeftOut, Part, families
from torch.utils._pytree import tree_map

import ragsr.ops  # noqa: F401  defines the ops
from ragsr.env import owner, provenance
from ragsr.ops._library import PLAIN_FORMS
from ragsr.testing import assert_matches_plain, peak_bytes

TURN = 0.02  # seconds that a contestant is called for before the next one has its turn
ROUNDS = 3  # at least, however long they take


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", metavar="NAME", help="only this family or op")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend on each case (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    parser.add_argument("--resume", action="store_true", help="leave out what FILE already holds of this commit")
    args = parser.parse_args()
    chosen = [case for name, cases in families().items() for case in cases if wanted(case, name, args.op)]
    if not chosen:
        parser.error(f"no case for {args.op}; the families are {', '.join(families())}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    results = Results(args.json, args.device)
    failed = 0
    for case in chosen:
        if args.resume and results.has(case):
            continue
        try:
            row = measure(case, args.device, args.seconds)
        except (AssertionError, RuntimeError) as error:
            failed += 1
            print(f"{case.op:<17} {case.name:<45} FAILED, not timed: {first_line(error)}", file=sys.stderr)
            continue
        print(line(row), file=sys.stderr)
        results.add(row)
    return 1 if failed else 0


def wanted(case: Case, family: str, asked: str | None) -> bool:
    return asked == family or (not case.on_request and asked in (None, case.op))


class Results:
    """The rows of a JSON file, written after every case; a case that is measured again replaces its row."""

    def __init__(self, path: Path | None, device: str) -> None:
        self.path, self.device, self.provenance = path, device, provenance()
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path and path.exists() else []

    def has(self, case: Case) -> bool:
        here = {"op": case.op, "case": case.name, "device": self.device, "commit": self.provenance["commit"]}
        return any(here.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        row |= {"commit": self.provenance["commit"]}
        self.rows = [r for r in self.rows if any(r[x] != row[x] for x in ("op", "case", "device"))] + [row]
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"provenance": self.provenance, "rows": self.rows}, indent=2) + "\n")


# ------------------------------------------------------------------ one case


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = tree_map(lambda a: a.to(device) if isinstance(a, torch.Tensor) else a, case.make())
    runs, missing = contestants(case, inputs)
    answer = check(case, inputs, runs)
    times = take_turns(runs, device, seconds)
    assert same_bits(runs["kernel"](), answer), "the answer changed while it was being timed"
    median = {name: statistics.median(values) for name, values in times.items()}
    limit = case.limit(device) if case.limit else None
    row: dict[str, Any] = {"op": case.op, "case": case.name, "device": device, "owner": owner_of(case, device)}
    row["threads"] = torch.get_num_threads() if device == "cpu" else None
    row["us"] = {name: [round(x * 1e6, 1) for x in percentiles(values)] for name, values in times.items()}
    row["rounds"] = {name: len(values) for name, values in times.items()}
    row["scaled"] = {name: run.scale for name, run in runs.items() if isinstance(run, Part)}
    row |= {"per_second": case.work / median["kernel"], "unit": case.unit, "missing": missing}
    row["limit"] = {"us": limit[0] * 1e6, "why": limit[1], "reached": limit[0] / median["kernel"]} if limit else None
    row["peak_mib"] = {name: round(peak_bytes(run, device) / 2**20, 2) for name, run in runs.items()}
    row["times"] = {name: value / median["kernel"] for name, value in median.items() if name != "kernel"}
    if device == "cuda" and not row["owner"].startswith("plain"):  # plain forms may wait for the device
        row["graph_us"] = graph_us(runs["kernel"])
    return row


def contestants(case: Case, inputs: tuple[Any, ...]) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """What is timed, by name, and which peers are not installed."""
    runs: dict[str, Callable[[], Any]] = {}
    if case.run:
        runs["kernel"] = case.run(*inputs)
    else:
        op, plain = getattr(torch.ops.ragsr, case.op), PLAIN_FORMS[case.op]
        part = few_of(case, inputs)
        runs["kernel"] = lambda: op(*inputs)
        runs["plain"] = lambda: plain(*part)
        if part is not inputs:
            runs["plain"] = Part(runs["plain"], len(inputs[0]) / len(part[0]))
    missing = []
    for name, prepare in case.peers.items():
        try:
            runs[name] = prepare(*inputs)
        except ImportError:
            missing.append(f"without {name}")
        except LeftOut:
            pass
    return runs, missing


def few_of(case: Case, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments that the plain form gets."""
    return (inputs[0][: case.few], *inputs[1:]) if case.few and case.few < len(inputs[0]) else inputs


def check(case: Case, inputs: tuple[Any, ...], runs: dict[str, Callable[[], Any]]) -> Any:
    """Our answer, after comparing it with the plain form's and the peers'. Peers that find no memory are taken out."""
    answer = runs["kernel"]()
    if case.check:
        case.check(*inputs)
    elif not case.run:
        part = few_of(case, inputs)
        assert_matches_plain(case.op, *part)
        if part is not inputs:
            rows = [x[: len(part[0])] for x in tensors(answer)]
            torch.testing.assert_close(rows, tensors(getattr(torch.ops.ragsr, case.op)(*part)))
    for name in [name for name in case.peers if name in runs]:
        try:
            theirs = runs[name]()
            if case.same:
                case.same(answer, theirs)
        except torch.OutOfMemoryError:
            del runs[name]
        except AssertionError as error:
            raise AssertionError(f"{name} gives another answer: {error}") from None
    return answer


# ------------------------------------------------------------------ timing


def take_turns(runs: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of every call. A contestant that has used its share of the time sits out, after a few turns at least."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    share = seconds / len(runs)
    while True:
        waiting = [name for name, spent in times.items() if len(spent) < ROUNDS or real(runs[name], spent) < share]
        if not waiting:
            return times
        for name in waiting:
            end = time.perf_counter() + TURN
            times[name].append(timed(runs[name], device))
            while time.perf_counter() < end:
                times[name].append(timed(runs[name], device))


def real(run: Callable[[], Any], spent: list[float]) -> float:
    return sum(spent) / scale(run)


def scale(run: Callable[[], Any]) -> float:
    return run.scale if isinstance(run, Part) else 1.0


def timed(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        return scale(run) * timed_cuda(run)
    start = time.perf_counter()
    run()
    return scale(run) * (time.perf_counter() - start)


def timed_cuda(run: Callable[[], Any], flush: bool = True) -> float:
    """Between two events. The writing before them empties L2, and lasts while the CPU prepares the launch."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush:
        torch.empty(1 << 28, dtype=torch.uint8, device="cuda").zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def graph_us(run: Callable[[], Any], calls: int = 10) -> float | str:
    """Microseconds of one of ten calls in a CUDA graph; or why it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
    except RuntimeError as error:
        return first_line(error)
    return round(statistics.median(timed_cuda(graph.replay, flush=False) for _ in range(20)) / calls * 1e6, 2)


# ------------------------------------------------------------------ small things


def owner_of(case: Case, device: str) -> str:
    return "C++ (ragsr._index)" if case.run else owner(case.op, device.upper())


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a.shape == b.shape and torch.equal(bytes_of(a), bytes_of(b)) for a, b in pairs)


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def tensors(answer: Any) -> list[torch.Tensor]:
    return [torch.as_tensor(x) for x in (answer if isinstance(answer, tuple | list) else (answer,))]


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def rate_of(row: dict[str, Any]) -> str:
    if row["unit"] == "FLOP":
        return f"{row['per_second'] / 1e12:7.3f} TFLOP/s"
    return f"{row['per_second'] / 1e9:7.2f} G {row['unit']}/s"


def line(row: dict[str, Any]) -> str:
    low, middle, high = row["us"]["kernel"]
    limit = row["limit"]
    reached = f"{limit['reached']:.0%} of {limit['why']}" if limit else "no limit known"
    compared = [f"{ratio:.1f} × {name}" for name, ratio in row["times"].items()]
    graph = [f"in a graph {row['graph_us']} µs"] if "graph_us" in row else []
    return (
        f"{row['op']:<17} {row['case']:<45} {row['owner']:<8} {middle:>10.1f} µs [{low:.1f}, {high:.1f}]  "
        f"{rate_of(row)}  {reached}  at most {row['peak_mib']['kernel']:g} MiB  "
        + ", ".join([*compared, *graph, *row["missing"]])
    )


if __name__ == "__main__":
    sys.exit(main())
