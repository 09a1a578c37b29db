"""Seconds and peak memory of `ragsr restore` for 512², 1024² and 2048² outputs, with one reference.

    python benchmarks/restore_cost.py --json benchmarks/results/restore_cost_cpu.json

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

SIZES = (512, 1024, 2048)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    parser.add_argument("--one", type=int, metavar="SIZE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return 0
    rows = []
    for size in SIZES:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(size)], stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append(json.loads(done.stdout))
        print(
            "{size}²: {seconds:.1f} s, peak {peak_mib} MiB (of which {import_mib} after importing)".format(**rows[-1])
        )
    if args.json:
        from ragsr.env import provenance

        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=2) + "\n")
    return 0


def measure(size: int) -> dict[str, Any]:
    from ragsr.cli.demo import PHOTO, TRUE_REFERENCE, photo_folder
    from ragsr.image import load_image
    from ragsr.pipelines import restore

    low = load_image(photo_folder() / PHOTO).resize((size // 4, size // 4), 3)
    reference = load_image(photo_folder() / TRUE_REFERENCE).resize((1152, 768), 3)
    before = peak_mib()
    start = time.perf_counter()
    restored = restore(low, references=[reference])
    return {
        "size": size,
        "seconds": time.perf_counter() - start,
        "peak_mib": peak_mib(),
        "import_mib": before,
        "milliseconds": restored.milliseconds,
    }


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    sys.exit(main())
