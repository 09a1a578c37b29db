"""`make gpu`: build, test and time everything on the NVIDIA GPU of this machine, in one go of under ten minutes.

    python benchmarks/gpu.py --out benchmarks/results

Uses the Python that runs it, with the torch that is there, and fetches nothing. Every step is a process with its own
share of the time; one that fails or runs out of it is noted, and the next begins. OUT/gpu.json holds the outcome of all
steps and the end of what they said, OUT/*_cuda.json the times. Ends with 1 if any step failed.
"""

import argparse
import collections
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 570  # seconds for everything
SHORTEST = 5  # seconds for which it makes sense to begin a step
NEEDED = ("torch", "numpy", "setuptools", "pybind11", "pytest")
CPU_ONLY = ("index",)  # families of benchmarks that have nothing to do on a GPU


class Step(NamedTuple):
    name: str
    seconds: int  # at most
    command: list[str]  # arguments of Python
    saved: Path | None = None  # the rows it writes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the results")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    if reason := why_not():
        print(f"make gpu: {reason}", file=sys.stderr)
        return 1
    end, results = time.monotonic() + TOTAL, []
    for step in steps(out):
        results.append(run(step, min(step.seconds, end - time.monotonic())))
        save(out / "gpu.json", results)
    summary(results)
    return int(any(result["outcome"] != "passed" for result in results))


def why_not() -> str | None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"this needs {', '.join(NEEDED)} in {sys.executable}, and {', '.join(missing)} cannot be imported there."
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device here."


def steps(out: Path) -> list[Step]:
    """The most telling first: what comes last is what a short run loses."""
    pytest = ["-m", "pytest", "-rfEs", "-p", "no:cacheprovider"]
    families = sorted(path.stem for path in (ROOT / "benchmarks/cases").glob("[a-z]*.py"))
    large = [name for name in ("hamming_large", "curve") if name in families]
    ordinary = [name for name in families if name not in (*CPU_ONLY, *large)]
    return [
        Step("build", 180, ["setup.py", "build_ext", "--inplace"]),
        Step("tests/gpu", 150, [*pytest, "tests/gpu"]),
        *(timing(name, 60, out) for name in ordinary),
        Step("tests/kernels", 40, [*pytest, "tests/kernels", "--ignore=tests/kernels/test_ahead.py"]),
        Step("tests/ops", 60, [*pytest, "tests/ops"]),
        *(timing(name, 90, out) for name in large),
    ]


def timing(family: str, seconds: int, out: Path) -> Step:
    saved = out / f"{family}_cuda.json"
    asked = ["--op", family, "--device", "cuda", "--seconds", "1", "--json", str(saved)]
    return Step(f"time {family}", seconds, ["benchmarks/run.py", *asked], saved)


def run(step: Step, seconds: float) -> dict[str, Any]:
    """Runs it, shows what it says, and keeps the end of that."""
    result: dict[str, Any] = {"step": step.name, "command": " ".join(["python", *step.command]), "seconds": 0}
    if seconds <= SHORTEST:
        return result | {"outcome": "no time left", "tail": [], "rows": []}
    print(f"\n== {step.name} ({seconds:.0f} s at most)", flush=True)
    if step.saved:
        step.saved.unlink(missing_ok=True)
    start, late = time.monotonic(), threading.Event()
    child = subprocess.Popen(
        [sys.executable, *step.command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def stop() -> None:
        late.set()
        os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    tail: collections.deque[str] = collections.deque(maxlen=60)
    for said in child.stdout or ():
        print(said, end="", flush=True)
        tail.append(said.rstrip())
    code = child.wait()
    timer.cancel()
    outcome = "out of time" if late.is_set() else "passed" if code == 0 else f"failed with {code}"
    took = round(time.monotonic() - start, 1)
    return result | {"seconds": took, "outcome": outcome, "tail": list(tail), "rows": rows_of(step.saved)}


def environment() -> dict[str, str]:
    """The package of this checkout, with CUDA, compiled for the GPU that is here alone."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    named = re.search(rf"\b{major}\.{minor}a?\b", (ROOT / "setup.py").read_text())  # 9.0a, where setup.py says so
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return (
        {"TORCH_CUDA_ARCH_LIST": named[0] if named else f"{major}.{minor}"}
        | os.environ
        | {
            "RAGSR_CUDA": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
        }
    )


def rows_of(saved: Path | None) -> list[dict[str, Any]]:
    return json.loads(saved.read_text())["rows"] if saved and saved.exists() else []


def save(path: Path, results: list[dict[str, Any]]) -> None:
    sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)
    from ragsr.env import provenance

    kept = [{name: value for name, value in result.items() if name != "rows"} for result in results]
    path.write_text(json.dumps({"provenance": provenance(), "steps": kept}, indent=2) + "\n")


def summary(results: list[dict[str, Any]]) -> None:
    print("\n== summary")
    for result in results:
        last = result["tail"][-1] if result["tail"] else ""
        told = f"{len(result['rows'])} cases" if result["rows"] else last[:90]
        print(f"{result['outcome']:<14} {result['step']:<22} {result['seconds']:>6.1f} s  {told}")
        for row in result["rows"]:
            print(f"    {told_briefly(row)}")


def told_briefly(row: dict[str, Any]) -> str:
    graph = row.get("graph_us")
    warm = f", {graph} µs in a graph" if isinstance(graph, float) else ""
    limit = f", {row['limit']['reached']:.0%} of the limit" if row["limit"] else ""
    times = "".join(f", {ratio:.1f} × {name}" for name, ratio in row["times"].items())
    return f"{row['op']}: {row['case']}: {row['owner']}: {row['us']['kernel'][1]} µs{warm}{limit}{times}"


if __name__ == "__main__":
    sys.exit(main())
