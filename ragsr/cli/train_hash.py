"""`ragsr train hash`: train the encoder that finds references."""

import argparse
import json
from pathlib import Path
from typing import Any

from ragsr.errors import InputError

DESCRIPTION = """\
Train an encoder: photos to short binary codes, so that a bad photo has nearly the code of a good one of the same scene.

DATA is a folder of photos. If it holds a MANIFEST.csv (columns file, licence, licence_class, scene_id), only photos are
used whose licence lets the weights be given away: class clean or free and neither share-alike nor GPL, or class repo
with a BSD, MIT or Apache licence. A quarter of the scenes is held out: they choose the best model and calibrate its
scores.

INIT is where the backbone begins: hash-16, hash-64 or hash-256, a folder that this command wrote, or a MobileNet v1 of
width 0.25 as NAME_dequant.npz. With --backbone train (the default) it is trained first, in OUT/backbone, and its
weights are averaged with those it began with; with frozen it stays as it is. Then a head is trained for every length,
in OUT/hash-BITS: they all share the backbone.

Each of these folders keeps checkpoint, model, log and curve. The same command goes on where it stopped.
"""
EXAMPLES = """\
examples:
  ragsr train hash --data photos/ --bits 64 --init hash-64 --backbone frozen --out runs/mine
  ragsr train hash --data photos/ --bits 64 --init hash-64 --out runs/adapted
  ragsr gallery build photos/ -o gallery --encoder runs/adapted/hash-64/model
  accelerate launch -m ragsr train hash --data photos/ --bits 64 --init hash-64 --out runs/four-gpus
"""
ALLOWED = (16, 32, 64, 128, 256)
HEAD_BATCH = 128  # scenes per step, where there are as many


def add_parser(models: Any) -> None:
    """Register `train hash`."""
    parser = models.add_parser(
        "hash",
        help="codes that find references",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", metavar="DATA", type=Path, required=True, help="a folder of photos")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="the folder of this run")
    parser.add_argument(
        "--bits", metavar="N", type=int, nargs="+", default=[64], help="16, 32, 64, 128, 256, or several of them (64)"
    )
    parser.add_argument("--init", metavar="INIT", help="what the backbone begins with; default: random weights")
    parser.add_argument("--backbone", choices=("train", "frozen"), default="train", help="see above (%(default)s)")
    parser.add_argument("--teacher", metavar="FILE", type=Path, help="a larger MobileNet, NAME_dequant.npz")
    parser.add_argument("--steps", metavar="N", type=int, default=300, help="steps, backbone (%(default)s)")
    parser.add_argument("--head-steps", metavar="N", type=int, default=400, help="steps, a head (%(default)s)")
    parser.add_argument("--batch", metavar="N", type=int, default=48, help="scenes per step, backbone (%(default)s)")
    parser.add_argument("--views", metavar="N", type=int, default=6, help="views made of each photo (%(default)s)")
    parser.add_argument("--rate", metavar="R", type=float, default=5e-4, help="highest rate, backbone (%(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of everything that is drawn (%(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on cuda, fp32 on cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print what was reached as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check(args)
    from ragsr.pipelines.restore import find_device
    from ragsr.training.hash import Material, Settings, train
    from ragsr.training.hash_blend import blend
    from ragsr.training.hash_card import write_hash_card
    from ragsr.training.hash_start import initial_backbone, load_teacher
    from ragsr.training.photos import find_photos

    photos, device = find_photos(args.data), find_device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    common = {"views": args.views, "seed": args.seed, "precision": precision}
    start = initial_backbone(args.init) if args.init else None
    teacher = load_teacher(args.teacher) if args.teacher else None
    material = Material(photos, args.views, args.seed, args.batch)
    if args.backbone == "train":
        settings = Settings(max(args.bits), "train", args.steps, args.batch, rate=args.rate, **common)
        train(settings, material, args.out / "backbone", start, teacher, device)
        trained = initial_backbone(str(args.out / "backbone" / "model"))
        start = trained if start is None else blend(start, trained, material.views.firsts(), device)
    found = {}
    for bits in args.bits:
        settings = Settings(bits, "frozen", args.head_steps, min(HEAD_BATCH, material.scenes), **common)
        reached = train(settings, material, args.out / f"hash-{bits}", start, None, device)
        if reached:  # else another process writes
            model = args.out / f"hash-{bits}" / "model"
            write_hash_card(model, settings, photos, args.init, args.teacher, args.backbone == "train", reached)
            found[bits] = {"model": str(model), "photos": len(photos), **reached}
    print(json.dumps(list(found.values()), indent=2) if args.json else "\n".join(map(told, found.values())))
    return 0


def check(args: argparse.Namespace) -> None:
    """Complain about numbers before anything is read."""
    for bits in args.bits:
        if bits not in ALLOWED:
            raise InputError(f"--bits is {bits}; codes have {', '.join(map(str, ALLOWED))} bits")
    for name, least in (("steps", 1), ("head_steps", 1), ("batch", 2), ("views", 2)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    if not 0 < args.rate < 1:
        raise InputError(f"--rate is {args.rate}; it must lie between 0 and 1, say 5e-4")
    if args.backbone == "frozen" and args.init is None:
        raise InputError("--backbone frozen needs --init: random weights find nothing; try --init hash-64")


def told(reached: dict[str, Any]) -> str:
    return (
        f"{reached['model']}: bad crops of held-out photos find theirs first in {reached['hit@1_code']:.0%} of the "
        f"searches by code, {reached['hit@1_float']:.0%} by feature"
    )
