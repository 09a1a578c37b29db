"""`ragsr gallery augment`: let a gallery grow by images that a diffusion model makes from its photos."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the library is imported when the command runs, so that --help is instant
    from ragsr.gallery.augment import Augmentation, Made

DESCRIPTION = """\
Make new references from the photos of a gallery: a diffusion model draws each photo anew from a noisy copy (SDEdit).
While it draws, ragsr watches how far the model changes its mind about the picture. That is the hallucination score
(iRAG Eq. 2): the variance of the predicted clean latent over the steps. A picture below the threshold is stored in
DIR/generated with its score and its parent; one above is tried again, and if no try is good enough none is stored.

Generated images are found like photos, and are marked as generated wherever they appear. A command that was
interrupted goes on when it is given again, and repeats to the bit on one machine with one seed.
"""
EXAMPLES = """\
examples:
  ragsr gallery augment my-gallery --model stabilityai/stable-diffusion-2-1-base
  ragsr gallery augment my-gallery --model models/sdxl --count 2 --limit 100 --prompt "a sharp photo"

The threshold is that of the paper for Stable Diffusion 2.1; latents of other models have other scales. Try a few
photos with --limit 10 --json, look at the scores and pictures, and set --threshold.
"""


def add_command(commands: Any) -> None:
    """Register `augment` among the commands of `gallery`."""
    parser = commands.add_parser(
        "augment",
        help="add images that a diffusion model makes from the photos",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("gallery", metavar="DIR", type=Path, help="the gallery folder")
    parser.add_argument(
        "--model", metavar="PATH|ID", required=True, help="a diffusers model: its folder, or its name on the Hub"
    )
    parser.add_argument("--count", metavar="N", type=int, default=1, help="images per photo (%(default)s)")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N photos that lack any")
    parser.add_argument("--prompt", metavar="TEXT", help="what the images are told to be (Identical Realistic)")
    _range(parser, "--strength", "LOW HIGH", [0.55, 0.65], "how noisy the photo is made, drawn between the two")
    _range(parser, "--guidance", "LOW HIGH", [7.0, 10.0], "how much the prompt counts, drawn between the two")
    parser.add_argument(
        "--threshold", metavar="X", type=float, default=0.03, help="scores below are good enough (%(default)s)"
    )
    parser.add_argument("--tries", metavar="N", type=int, default=10, help="per image, at most (%(default)s)")
    _range(parser, "--window", "FROM TO", [0.0, 1.0], "steps that the score looks at, as shares of all that are done")
    parser.add_argument("--steps", metavar="N", type=int, default=50, help="of a whole denoising (%(default)s)")
    parser.add_argument("--size", metavar="N", type=int, help="work on N×N pixels (what the model was trained on)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="other images for other numbers (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def _range(parser: argparse.ArgumentParser, name: str, metavar: str, default: list[float], text: str) -> None:
    shown = f"({default[0]:g} {default[1]:g})"
    names = tuple(metavar.split())
    parser.add_argument(name, metavar=names, type=float, nargs=2, default=default, help=f"{text} {shown}")


def run(args: argparse.Namespace) -> int:
    from ragsr.gallery import Gallery, RejectionRule, augment_gallery
    from ragsr.pipelines import SDEdit

    rule = RejectionRule(args.threshold, args.tries, tuple(args.strength), tuple(args.guidance))
    with Gallery.open(args.gallery) as gallery:
        prompt = {} if args.prompt is None else {"prompt": args.prompt}
        edit = SDEdit.load(
            args.model, args.device, steps=args.steps, size=args.size, window=tuple(args.window), **prompt
        )
        done = augment_gallery(gallery, edit, count=args.count, limit=args.limit, rule=rule, seed=args.seed)
        folder, images = gallery.folder, len(gallery)
    for path, reason in done.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    print(f"{folder}: {done}; {images} images", file=sys.stderr)
    if args.json:
        print(json.dumps({"gallery": str(folder), **_document(done), "images": images}, indent=2))
    return 0


def _document(done: "Augmentation") -> dict[str, Any]:
    return {
        "made": [_told(one) for one in done.made],
        "rejected": [_told(one) for one in done.rejected],
        "done_before": done.before,
        "skipped": [[str(path), reason] for path, reason in done.skipped],
    }


def _told(one: "Made") -> dict[str, Any]:
    path = {} if one.path is None else {"path": str(one.path)}
    numbers = {name: getattr(one.row, name) for name in ("copy", "score", "strength", "guidance", "seed", "tries")}
    return {"parent": str(one.parent), **path, **numbers}
