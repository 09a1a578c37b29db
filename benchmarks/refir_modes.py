"""How near the cheaper modes of ReFIR come to the paper's: python benchmarks/refir_modes.py --json FILE

The same photo with the same noise is restored in every mode; told is the PSNR between each result and that of
`denoise`, and, as a yardstick, between that of the plain model, without the reference, and `denoise`. With the random
weights of `small_hosts.py` the numbers say how far apart the computations are, not how it looks; `batched`, which
computes the same in another batch, tells how far rounding goes, in float64. `--model` takes a real one, in float16.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from refir_cost import MODES, STEPS, Runs, load_model
from small_hosts import SIZE

from ragsr.chains import PRESETS
from ragsr.env import provenance
from ragsr.metrics import psnr


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="(all)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=SIZE, help="pixels (256 512)")
    parser.add_argument("--steps", type=int, default=STEPS, help="(%(default)s)")
    parser.add_argument("--model", help="a real model instead, on a GPU in float16: a folder or hub name")
    args = parser.parse_args()
    host, told = load_model(args.model, torch.float16 if args.model else torch.float64, attention_scale=2)
    rows = []
    for preset in args.presets:
        runs = Runs(host, tuple(args.size), told, preset, args.steps)
        pictures = {mode: runs.run(mode, output="pt").float().cpu().clamp(0, 1) for mode in MODES}
        for mode in MODES:
            if mode != "denoise":
                equal = torch.equal(pictures[mode], pictures["denoise"])
                found = None if equal else psnr(pictures[mode], pictures["denoise"])
                rows.append({"preset": preset, "mode": mode, "psnr": found})
                print(f"{preset:15} {mode:10} {'the same' if found is None else f'{found:.1f} dB'}", flush=True)
    if args.json:
        about = {"size": list(args.size), "steps": args.steps, "model": args.model or "Stable Diffusion 2 / 8"}
        document = about | {"against": "denoise", "provenance": provenance(), "rows": rows}
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
