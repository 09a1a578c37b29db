"""Seconds and peak memory of iRAG whole, reference stage and diffusion, and the share that our kernels have in it.

    python benchmarks/irag_cost.py --json benchmarks/results/irag_cost.json            512², 1024² and 2048²
    python benchmarks/irag_cost.py --plain --size 512 --json FILE                      with the kernels, then without
    python benchmarks/irag_cost.py --full-size --steps 2 --plain --json FILE           Stable Diffusion 2.1 and TTSR

Each run is a process of its own, so that its peak memory is its own, and of every stage the peak is told by itself. The
photo is searched for in a gallery of a few photos, followed by a million random codes, as a large gallery has them; the
nearest photo is the reference. Weights are random unless `--model` names a folder: what is measured does not depend on
them. On the CPU the shares are those of CPU time, so that other programs do not count, on CUDA those of the device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIDES = (512, 1024, 2048)
OPS = {  # of ragsr, and what they stand for
    "group_norm_sft_forward": "SFT",
    "correlation_topk": "correlation search",
    "correlation_topk_near": "correlation search",
    "gather_fold": "bringing over",
}
MAPS, HAMMING = "SFT maps", "Hamming search"  # γ and β; all codes of the gallery
KERNELS = ("SFT", "correlation search", "bringing over", HAMMING)
STAGES = ("retrieve", "prepare", "restore", "encode", "steps", "decode")
STEPS = {False: 10, True: 2}  # by whether the network is full-size
CODES = 1_000_000


def main() -> int:
    args = options()
    if args.one:
        from irag_cost_run import measure

        print(json.dumps(measure(args.model, args.full_size, args.one, args.steps, args.dtype, args.device, CODES)))
        return 0
    rows = []
    for side in args.size or SIDES[: 1 if args.full_size else None]:
        pair = [measure_alone(args, side, ops) for ops in (("kernels", "plain") if args.plain else ("kernels",))]
        rows += pair
        if args.plain:
            pair[0]["saved"] = saved(*pair)
    page = f"{table(rows)}\n\n{shares(rows)}" if args.plain else table(rows)
    print(page)
    if args.json:
        from ragsr.env import provenance

        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"provenance": provenance(), "codes": CODES, "rows": rows}, indent=2) + "\n")
    if args.markdown:
        args.markdown.write_text(page + "\n")
    return 0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="save the tables that are printed")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model with a diffusion stage; default: random")
    parser.add_argument("--full-size", action="store_true", help="random weights of Stable Diffusion 2.1 and TTSR")
    parser.add_argument("--size", type=int, action="append", metavar="N", help="a side of the result; may be repeated")
    parser.add_argument("--steps", type=int, metavar="N", help="of the diffusion (10; full-size 2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    parser.add_argument("--plain", action="store_true", help="also with the plain forms of the ops, RAGSR_PLAIN=1")
    parser.add_argument("--one", type=int, metavar="N", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps = args.steps or STEPS[args.full_size]
    return args


def measure_alone(args: argparse.Namespace, side: int, ops: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", str(side), "--steps", str(args.steps)]
    command += ["--dtype", args.dtype, *(["--full-size"] if args.full_size else [])]
    command += ["--device", args.device] if args.device else []
    command += ["--model", str(args.model)] if args.model else []
    with tempfile.TemporaryDirectory() as folder:  # of the run, for its gallery
        done = subprocess.run(
            command,
            env=os.environ | {"RAGSR_PLAIN": str(int(ops == "plain")), "TMPDIR": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    row = {"side": side, "ops": ops, "dtype": args.dtype} | json.loads(done.stdout)
    print(line(row), file=sys.stderr, flush=True)
    return row


def saved(ours: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """The share of the whole, as it is without kernels, that those of each kind save; below 0 they cost."""
    each = {name: (time_of(plain, name) - time_of(ours, name)) / plain["time"] for name in KERNELS}
    return each | {"all": sum(each.values())}


def time_of(row: dict[str, Any], part: str) -> float:
    return row["parts"].get(part, {"time": 0.0})["time"]


# ------------------------------------------------------------------ what is printed


def line(row: dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {row['parts'][name]['seconds']:.2f}" for name in STAGES)
    return (
        f"{row['side']}², {row['ops']}: {row['seconds']:.1f} s ({row['cpu_seconds']:.1f} s of all threads): {stages}; "
        f"peak {row['peak_mib']} MiB, {row['loaded_mib']} of it after loading"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds and MiB of every stage."""
    lines = [f"| side | ops | {' | '.join(STAGES)} | a step | whole |", "|---" * (len(STAGES) + 4) + "|"]
    for row in rows:
        cells = [f"{row['parts'][name]['seconds']:.2f} s, {row['parts'][name]['peak_mib']} MiB" for name in STAGES]
        step = row["parts"]["steps"]["seconds"] / row["steps"]
        whole = f"{row['seconds']:.1f} s, {row['peak_mib']} MiB"
        lines.append(f"| {row['side']}² | {row['ops']} | {' | '.join(cells)} | {step:.2f} s | {whole} |")
    return "\n".join(lines)


def shares(rows: list[dict[str, Any]]) -> str:
    """What the ops take of the whole, and what the kernels save of it."""
    lines = ["| side | op | calls | plain | kernels | share before | saved |", "|---|---|---|---|---|---|---|"]
    for ours, plain in zip(rows[::2], rows[1::2], strict=True):
        for name in (*KERNELS, MAPS):
            if name not in ours["parts"]:
                continue
            before, now = (f"{time_of(row, name):.4g} s" for row in (plain, ours))
            share, less = time_of(plain, name) / plain["time"], ours["saved"].get(name)
            told = "no kernel" if less is None else f"{less:.2%}"
            calls = ours["parts"][name]["calls"]
            lines.append(f"| {ours['side']}² | {name} | {calls} | {before} | {now} | {share:.2%} | {told} |")
        whole = f"{plain['time']:.4g} s | {ours['time']:.4g} s | 100% | {ours['saved']['all']:.2%}"
        lines.append(f"| {ours['side']}² | whole | | {whole} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
