"""Seconds and peak memory of restoring to 640×416, 512², 1024² and 2048², with one 1152×768 reference.

    python benchmarks/restore_cost.py --json benchmarks/results/restore_cost_refnet.json

Each size runs in a process of its own, so that its peak memory is its own. The photo and the reference are the stereo
pair of scikit-image, scaled; what is measured does not depend on what they show.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = ((640, 416), (512, 512), (1024, 1024), (2048, 2048))  # width, height


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    parser.add_argument("--model", default="refnet", help="refnet or transfer (%(default)s)")
    parser.add_argument("--one", type=int, metavar="SIZE", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.model, *args.one)))
        return 0
    rows = []
    for width, height in SIZES:
        one = [sys.executable, __file__, "--model", args.model, "--one", str(width), str(height)]
        done = subprocess.run(one, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(
            "{width}x{height}: {seconds:.1f} s, peak {peak_mib} MiB ({import_mib} after importing)".format(**rows[-1])
        )
    if args.json:
        from ragsr.env import provenance

        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"model": args.model, "provenance": provenance(), "rows": rows}, indent=2) + "\n"
        )
    return 0


def measure(model: str, width: int, height: int) -> dict[str, Any]:
    from ragsr.cli.demo import PHOTO, TRUE_REFERENCE, photo_folder
    from ragsr.image import load_image
    from ragsr.pipelines import restore

    low = load_image(photo_folder() / PHOTO).resize((width // 4, height // 4), 3)
    reference = load_image(photo_folder() / TRUE_REFERENCE).resize((1152, 768), 3)
    before = peak_mib()
    start = time.perf_counter()
    restored = restore(low, references=[reference], model=model)
    return {
        "width": width,
        "height": height,
        "seconds": time.perf_counter() - start,
        "peak_mib": peak_mib(),
        "import_mib": before,
        "milliseconds": restored.milliseconds,
    }


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    sys.exit(main())
