"""`ragsr train auto`: teach the model `auto` which photos need `refnet-real`."""

import argparse
import json
from pathlib import Path
from typing import Any

from ragsr.errors import InputError

DESCRIPTION = """\
Train the gate of the model auto, which decides how much of refnet and of refnet-real goes into a result.

DATA is a folder of photos; of one with a MANIFEST.csv only those are used whose licence lets the result be given away,
as in ragsr train refsr. They are made bad, a third of them by reduction alone, the others from hardly to very, and both
models restore each, with a reference and without. OUT gets these examples, and the gate in OUT/model with a card.
Examples that are there are not made again.
"""
WHAT = """\
# auto

The gate of the model `auto`: from a low-quality photo, how much of its result is to come from `refnet-real`, and how
much from `refnet`. Below a quarter it is `refnet` alone, above three quarters `refnet-real` alone.
"""


def add_parser(models: Any) -> None:
    """Register `train auto`."""
    parser = models.add_parser(
        "auto",
        help="the choice between refnet and refnet-real",
        description=DESCRIPTION,
        epilog="example: ragsr train auto --data photos/ --out runs/auto",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", metavar="DATA", type=Path, required=True, help="a folder of good photos")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="the folder of this run")
    parser.add_argument("--pairs", metavar="N", type=int, default=1000, help="examples to learn from (%(default)s)")
    parser.add_argument("--steps", metavar="N", type=int, default=4000, help="steps of Adam (%(default)s)")
    parser.add_argument("--batch", metavar="N", type=int, default=32, help="photos per step (%(default)s)")
    parser.add_argument("--rate", metavar="R", type=float, default=1e-2, help="highest learning rate (%(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of everything that is drawn (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print what was reached as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name in ("pairs", "steps", "batch"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not 0 < args.rate < 1:
        raise InputError(f"--rate is {args.rate}; it must lie between 0 and 1, say 1e-2")
    from ragsr.pipelines.restore import find_device
    from ragsr.training.auto import Settings, train
    from ragsr.training.card import write_card
    from ragsr.training.photos import find_photos

    photos = find_photos(args.data)
    settings = Settings(args.steps, args.batch, args.rate, args.pairs, args.seed)
    reached = train(settings, photos, args.out, find_device(args.device))
    model = args.out / "model"
    write_card(model, settings, photos, None, reached, WHAT, measure="PSNR in dB of luma")
    told = {"model": str(model), "photos": len(photos), **reached}
    numbers = ", ".join(f"{name} {value:.2f} dB" for name, value in reached.items() if name != "step")
    print(json.dumps(told, indent=2) if args.json else f"{model}: on photos that were held out, {numbers}")
    return 0
