"""`ragsr train refsr --stage autoencoder|diffusion|joint`: what `--quality rich` needs."""

import argparse
import json
from pathlib import Path

from ragsr.errors import InputError

STAGES = ("autoencoder", "diffusion", "joint")
RATE = 2e-4
WARM_UP = 200  # steps, or a twentieth of a short run


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only these stages have."""
    group = parser.add_argument_group("the stages autoencoder, diffusion and joint")
    group.add_argument("--size", choices=("small", "tiny"), default="small", help="tiny is for tests (%(default)s)")
    group.add_argument(
        "--reference", metavar="NAME|DIR", help="the reference stage; default: that of --init, or refnet"
    )
    group.add_argument(
        "--autoencoder", metavar="DIR", type=Path, help="begin with this published one: *_encoder.pth, *_decoder.pth"
    )
    group.add_argument("--predicts", choices=("x0", "noise"), default="x0", help="clean latent or noise (%(default)s)")
    group.add_argument("--alpha", metavar="A", type=float, default=1.0, help="of the diffusion loss (%(default)s)")
    group.add_argument(
        "--picture-share",
        dest="picture",
        metavar="P",
        type=float,
        default=1.0,
        help="of the picture in the diffusion loss; 0: latents alone, several times as fast (%(default)s)",
    )
    group.add_argument(
        "--perceptual", metavar="FILE|DIR", type=Path, help="a VGG, a MobileNet, or a model of train hash"
    )
    group.add_argument("--perceptual-share", metavar="P", type=float, default=0.5, help="of its loss (%(default)s)")
    group.add_argument(
        "--gan", metavar="P", type=float, default=0.0, help="share of the adversarial loss (%(default)s)"
    )
    group.add_argument(
        "--degradation",
        choices=("bicubic", "second-order", "mixed", "graded"),
        default="mixed",
        help="of photos; graded: a third bicubic, the others from hardly bad to second-order (%(default)s)",
    )
    group.add_argument("--retrieved", metavar="P", type=float, default=0.4, help="share found by codes (%(default)s)")
    group.add_argument("--random", metavar="P", type=float, default=0.2, help="share drawn at random (%(default)s)")
    group.add_argument("--encoder", metavar="NAME", default="hash-64", help="whose codes find (%(default)s)")
    group.add_argument("--accumulate", metavar="N", type=int, default=1, help="batches for one step (%(default)s)")
    group.add_argument("--sampling-steps", metavar="N", type=int, default=10, help="when it is used (%(default)s)")
    group.add_argument(
        "--timesteps",
        choices=("any", "own"),
        default="any",
        help="any: the truth with the noise of any timestep; own: the timesteps of --sampling-steps, reached by the "
        "network's own answers; for the last run of a model that is used with few steps (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    check(args)
    try:
        from ragsr.training.stages import Begin, train
    except ImportError as error:
        raise InputError(f'stage {args.stage} needs diffusers ({error}): pip install "ragsr[diffusion]"') from None
    from ragsr.pipelines.restore import find_device
    from ragsr.training.examples import Mix
    from ragsr.training.photos import find_photos
    from ragsr.training.run import Settings

    photos = find_photos(args.data)
    settings = Settings(
        **{name: getattr(args, name) for name in ("stage", "steps", "size", "batch", "accumulate", "side", "seed")},
        **{
            name: getattr(args, name) for name in ("predicts", "alpha", "picture", "gan", "sampling_steps", "timesteps")
        },
        rate=args.rate or RATE,
        precision=args.precision or "fp32",
        warm_up=max(1, min(WARM_UP, args.steps // 20)),
        perceptual=args.perceptual_share if args.perceptual else 0.0,
    )
    begin = Begin(Path(args.init) if args.init else None, args.reference, args.perceptual, args.autoencoder)
    mix = Mix(args.degradation, args.retrieved, args.random, args.encoder, args.seed)
    reached = train(settings, photos, args.out, begin, mix, args.pairs, find_device(args.device))
    if not reached:  # another process tells
        return 0
    told = {"model": str(args.out / "model"), "photos": len(photos), **reached}
    print(json.dumps(told, indent=2) if args.json else describe(told))
    return 0


def check(args: argparse.Namespace) -> None:
    """Complain about numbers before anything is read."""
    for name, least in (("steps", 1), ("batch", 1), ("accumulate", 1), ("pairs", 1), ("sampling_steps", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    if args.side % 64 or not 64 <= args.side <= 320:
        raise InputError(f"--side is {args.side}; for stage {args.stage} it must be a multiple of 64, at most 320")
    if args.rate is not None and not 0 < args.rate < 1:
        raise InputError(f"--rate is {args.rate}; it must lie between 0 and 1, say {RATE}")
    if min(args.retrieved, args.random) < 0 or args.retrieved + args.random > 1:
        raise InputError(
            f"--retrieved {args.retrieved} and --random {args.random} are shares: none below 0, together at most 1"
        )
    if min(args.alpha, args.picture, args.perceptual_share, args.gan) < 0:
        raise InputError("--alpha, --picture-share, --perceptual-share and --gan must not be negative")
    if args.kept:
        raise InputError(f"--kept is of the stages base and reference; leave it out for stage {args.stage}")
    if args.init is not None and args.autoencoder is not None:
        raise InputError("--init has an autoencoder of its own; leave out --autoencoder")
    if args.stage != "autoencoder" and args.init is None:
        raise InputError(f"stage {args.stage} needs --init, the folder model/ of a run of --stage autoencoder")


def describe(told: dict[str, object]) -> str:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in told.items() if isinstance(value, float))
    return f"{told['model']}: {numbers}"
