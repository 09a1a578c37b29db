"""`ragsr train`: train the small models that ship, on photos of your own or ours."""

import argparse
import json
from pathlib import Path
from typing import Any

from ragsr.cli import train_auto, train_hash, train_niqe, train_stages
from ragsr.errors import InputError

DESCRIPTION = """\
Train refnet, the reference-based super-resolver that `ragsr restore` uses, in two stages:

  base         crops of photos alone: a plain super-resolver
  reference    crops with references cut, warped, re-lit and re-compressed from the same photo, other views of a scene
               (same scene_id in the manifest), or photos of something else; half of the samples stay without

and what `ragsr restore --quality rich` adds to it, in two or three:

  autoencoder  pictures to latents and back
  diffusion    latent diffusion, conditioned by the photo and by what the reference stage makes of it; references are
               found by hash codes among the photos, drawn at random, or made of the same photo (--retrieved, --random)
  joint        the same, and the reference stage learns too: from its own loss, and from --alpha times the diffusion's

DATA is a folder of photos. If it holds a MANIFEST.csv (columns file, licence, licence_class, scene_id), only photos are
used whose licence lets the weights be given away: class clean or free and neither share-alike nor GPL, or class repo
with a BSD, MIT or Apache licence.

OUT keeps checkpoint, model, log, curve and a picture of held-out samples. The same command goes on where it stopped.
"""
EXAMPLES = """\
examples:
  ragsr train refsr --stage base --data photos/ --out runs/base
  ragsr train refsr --stage reference --data photos/ --init runs/base/model --out runs/refnet
  ragsr train refsr --stage reference --data photos/ --init refnet --steps 2000 --out runs/mine    # from what ships
  ragsr restore small.jpg --ref good.jpg --model runs/refnet/model -o big.png
  ragsr train refsr --stage autoencoder --data photos/ --out runs/autoencoder
  ragsr train refsr --stage diffusion --data photos/ --init runs/autoencoder/model --out runs/rich
  ragsr train refsr --stage joint --data photos/ --init runs/rich/model --steps 3000 --out runs/joint
  accelerate launch -m ragsr train refsr --stage diffusion --data photos/ --init runs/autoencoder/model --out runs/rich
"""


def add_parser(commands: Any) -> None:
    """Register `train`."""
    parser = commands.add_parser("train", help="train the models", description="Train the models.")
    models = parser.add_subparsers(title="models", metavar="MODEL", required=True)
    refsr = models.add_parser(
        "refsr",
        help="reference-based super-resolution",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    refsr.add_argument(
        "--stage", choices=("base", "reference", *train_stages.STAGES), required=True, help="what to learn, see above"
    )
    refsr.add_argument("--data", metavar="DATA", type=Path, required=True, help="a folder of photos")
    refsr.add_argument("--out", metavar="OUT", type=Path, required=True, help="the folder of this run")
    refsr.add_argument("--init", metavar="NAME|DIR", help="begin with this model: refnet, or a folder")
    refsr.add_argument("--steps", metavar="N", type=int, default=12000, help="steps of Adam (%(default)s)")
    refsr.add_argument("--batch", metavar="N", type=int, default=8, help="crops per step (%(default)s)")
    refsr.add_argument("--side", metavar="N", type=int, default=192, help="side of a crop in pixels (%(default)s)")
    refsr.add_argument("--rate", metavar="R", type=float, help="highest learning rate (8e-4; with a latent 2e-4)")
    refsr.add_argument("--pairs", metavar="N", type=int, default=1000, help="pairs to register first (%(default)s)")
    refsr.add_argument("--seed", metavar="N", type=int, default=0, help="of everything that is drawn (%(default)s)")
    refsr.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    refsr.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="bf16: autocast, which a CPU without instructions for it is slow at (base, reference: bf16; others: fp32)",
    )
    refsr.add_argument(
        "--kept",
        metavar="P",
        type=float,
        default=0.0,
        help="base, reference: the share of the weights of --init in the model that comes out, so that a further "
        "training loses less of what was known; 0.5 is a good one (%(default)s)",
    )
    refsr.add_argument("--json", action="store_true", help="print what was reached as JSON")
    train_stages.add_options(refsr)
    refsr.set_defaults(run=run)
    train_auto.add_parser(models)
    train_hash.add_parser(models)
    train_niqe.add_parser(models)


def run(args: argparse.Namespace) -> int:
    from ragsr.pipelines.restore import find_device
    from ragsr.training.card import write_card
    from ragsr.training.photos import find_photos
    from ragsr.training.refsr import Settings, train

    if args.stage in train_stages.STAGES:
        return train_stages.run(args)
    args.rate = args.rate or 8e-4
    check(args)
    photos = find_photos(args.data)
    settings = Settings(
        stage=args.stage,
        steps=args.steps,
        batch=args.batch,
        side=args.side,
        rate=args.rate,
        seed=args.seed,
        pairs=args.pairs if args.stage == "reference" else 0,
        precision=args.precision or "bf16",
        kept=args.kept,
    )
    reached = train(settings, photos, args.out, initial_weights(args.init), find_device(args.device))
    model = args.out / "model"
    write_card(model, settings, photos, args.init, reached)
    told = {"model": str(model), "photos": len(photos), **reached}
    print(json.dumps(told, indent=2) if args.json else describe(model, reached))
    return 0


def check(args: argparse.Namespace) -> None:
    """Complain about numbers before anything is read."""
    for name, least in (("steps", 1), ("batch", 2), ("side", 32), ("pairs", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    if args.side % 4 or args.side > 320:
        raise InputError(f"--side is {args.side}; it must be a multiple of 4, at most 320")
    if not 0 <= args.kept < 1 or (args.kept and args.init is None):
        raise InputError(f"--kept is {args.kept}; it is a share of the weights of --init, from 0 to less than 1")
    if not 0 < args.rate < 1:
        raise InputError(f"--rate is {args.rate}; it must lie between 0 and 1, say 8e-4")


def initial_weights(init: str | None) -> "dict[str, Any] | None":
    """The weights of the model to begin with."""
    from ragsr.models.refnet import RefNet

    if init is None:
        return None
    return (RefNet.load() if init == RefNet.name else RefNet.load(init)).net.state_dict()


def describe(model: Path, reached: dict[str, float]) -> str:
    lines = [f"{model}: step {reached['step']:.0f}; on crops of photos that were held out, without reference "]
    lines += [f"{reached['none']:.2f} dB, bicubic {reached['bicubic']:.2f} dB"]
    lines += [
        f", {reached[name]:+.2f} dB with a {kind} reference"
        for name, kind in (("gain_same", "true"), ("gain_other", "wrong"))
        if name in reached
    ]
    return "".join(lines)
