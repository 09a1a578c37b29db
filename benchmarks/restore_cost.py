"""Seconds and peak memory of restoring to 640×416, 512², 1024² and 2048², with one 1152×768 reference.

    python benchmarks/restore_cost.py --json benchmarks/results/restore_cost_refnet.json
    python benchmarks/restore_cost.py --model ttsr --plain --size 2048x2048     with the kernels, then without
    python benchmarks/restore_cost.py --model runs/rich/model --quality rich              with diffusion

Each size runs in a process of its own, so that its peak memory is its own. The photo and the reference are the stereo
pair of scikit-image, scaled; what is measured does not depend on what they show. `ttsr` has its published size and
random weights: there are none that may be shipped, and its cost does not depend on them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = ("640x416", "512x512", "1024x1024", "2048x2048")  # width x height
LINE = (
    "{width}x{height}, {ops}: {seconds:.1f} s ({cpu_seconds:.1f} s of all threads), of it {restore:.1f} s restoring, "
    "peak {peak_mib} MiB ({import_mib} after importing)"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    parser.add_argument("--model", default="refnet", help="refnet, transfer, ttsr or a file of weights (%(default)s)")
    parser.add_argument("--quality", choices=("faithful", "rich"), default="faithful", help="rich: with diffusion")
    parser.add_argument("--size", action="append", metavar="WxH", help="only this size; may be repeated")
    parser.add_argument("--plain", action="store_true", help="also with the plain forms of the ops, RAGSR_PLAIN=1")
    parser.add_argument("--one", metavar="WxH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.model, args.quality, *map(int, args.one.split("x")))))
        return 0
    rows = [
        measure_alone(args.model, args.quality, size, ops)
        for size in args.size or SIZES
        for ops in (("kernels", "plain") if args.plain else ("kernels",))
    ]
    if args.plain:
        say_by_how_much(rows)
    if args.json:
        from ragsr.env import provenance

        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps(
                {"model": args.model, "quality": args.quality, "provenance": provenance(), "rows": rows}, indent=2
            )
            + "\n"
        )
    return 0


def measure_alone(model: str, quality: str, size: str, ops: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--model", model, "--quality", quality, "--one", size],
        env=os.environ | {"RAGSR_PLAIN": str(int(ops == "plain"))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    row = {"ops": ops} | json.loads(done.stdout)
    print(LINE.format(**row, restore=row["milliseconds"]["restore"] / 1000), flush=True)
    return row


def say_by_how_much(rows: list[dict[str, Any]]) -> None:
    """Rows come in pairs, with the kernels and without."""
    for ours, plain in zip(rows[::2], rows[1::2], strict=True):
        ours["faster"] = plain["seconds"] / ours["seconds"]
        ours["smaller"] = plain["peak_mib"] / ours["peak_mib"]
        print("{width}x{height}: {faster:.2f} times as fast, 1/{smaller:.2f} of the memory".format(**ours))


def measure(model: str, quality: str, width: int, height: int) -> dict[str, Any]:
    from ragsr.cli.demo import PHOTO, TRUE_REFERENCE, photo_folder
    from ragsr.image import load_image
    from ragsr.pipelines import load_pipeline

    low = load_image(photo_folder() / PHOTO).resize((width // 4, height // 4), 3)
    reference = load_image(photo_folder() / TRUE_REFERENCE).resize((1152, 768), 3)
    with tempfile.TemporaryDirectory() as folder:
        weights = random_ttsr(Path(folder)) if model == "ttsr" else model
        before = peak_mib()
        start, used = time.perf_counter(), time.process_time()
        restored = load_pipeline(model=weights, quality=quality)(low, references=[reference])
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - used
    return {
        "width": width,
        "height": height,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads
        "peak_mib": peak_mib(),
        "import_mib": before,
        "milliseconds": restored.milliseconds,
    }


def random_ttsr(folder: Path) -> Path:
    """A checkpoint of TTSR at its published size, with random weights."""
    import torch
    from safetensors.torch import save_file

    from ragsr.models.ttsr import TTSRNet

    torch.manual_seed(0)
    save_file(TTSRNet().state_dict(), folder / "ttsr.safetensors")
    return folder / "ttsr.safetensors"


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    sys.exit(main())
