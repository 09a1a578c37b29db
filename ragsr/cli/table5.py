"""`ragsr eval table5`: what generated images are worth for the training of codes, as in iRAG's Table 5."""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragsr.cli.train_hash import ALLOWED

if TYPE_CHECKING:  # the library is imported when the command runs, so that --help is instant
    from ragsr.codes import CodeEncoder

DESCRIPTION = """\
Repeat Table 5 of the iRAG paper on photos of your own. An encoder is trained on each of five sets:

  real                 all photos of --real
  generated            all images of --generated
  real + generated     both
  limited              a tenth of the photos
  limited + generated  the same tenth, and up to nine images that were generated from each of them

Then the 126 photos of CUFED5, reduced by four, are searched among its 630 references. R1 to R5 is the share of photos
that find one of their own references among the first one to five.

OUT keeps a run of `ragsr train hash` per set. The same command goes on where it stopped. What stands after `--` is
given to `ragsr train hash`, for all sets alike; a batch is cut where a set is small.
"""
EXAMPLES = """\
examples:
  ragsr gallery build photos/ -o photos.ragsr
  ragsr gallery augment photos.ragsr --model stabilityai/stable-diffusion-2-1-base --count 9
  ragsr eval table5 --data CUFED5 --real photos/ --generated photos.ragsr/generated --out runs/table5
  ragsr eval table5 --data CUFED5 --real photos/ --generated photos.ragsr/generated --out runs/frozen \\
      -- --init hash-64 --backbone frozen
"""


def add_command(kinds: Any) -> None:
    """Register `table5` among the commands of `eval`."""
    parser = kinds.add_parser(
        "table5",
        help="what generated images are worth for training codes",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="CUFED5: 000_0.png to 125_5.png")
    parser.add_argument("--real", metavar="DIR", type=Path, required=True, help="photos to learn from, 80 or more")
    parser.add_argument("--generated", metavar="DIR", type=Path, required=True, help="images generated from them")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="the folder of the five runs")
    parser.add_argument("--bits", metavar="N", type=int, choices=ALLOWED, default=16, help="of a code (%(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of everything that is drawn (%(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write numbers, settings and versions")
    parser.add_argument("training", metavar="-- OPTION", nargs="*", help="of ragsr train hash")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ragsr.errors import InputError
    from ragsr.evaluation import evaluate_table5, load_pack, report, table5, training_sets
    from ragsr.evaluation.pack import is_cufed5
    from ragsr.image import find_images
    from ragsr.training.photos import find_photos

    started = time.perf_counter()
    if not is_cufed5(args.data):
        raise InputError(f"{args.data}: is not CUFED5, a folder with 000_0.png, 000_1.png to 125_5.png")
    pack = load_pack(args.data)
    real = [photo.path for photo in find_photos(args.real)]
    sets = training_sets(real, find_images([args.generated]), args.seed)
    rows = evaluate_table5(pack, sets, lambda name, images: train_on(args, name, images), args.seed)
    print(table5.table5_lines(rows))
    if args.json:
        settings = {name: getattr(args, name) for name in ("bits", "seed", "training")}
        report.write_json(args.json, table5.table5_document(rows, settings, report.run_facts(started)))
    return 0


def train_on(args: argparse.Namespace, name: str, images: Sequence[Path]) -> "CodeEncoder":
    """The encoder that `ragsr train hash` makes of a set, every image a scene of its own; nothing is done again."""
    from ragsr.cli import build_parser
    from ragsr.codes import load_encoder

    out = args.out / name.replace(" + ", "-")
    links = link_images(images, out / "images")
    command = ["train", "hash", "--data", links, "--out", out, "--bits", args.bits, "--seed", args.seed, *args.training]
    training = build_parser().parse_args([str(word) for word in command])
    training.batch = min(training.batch, len(images) - len(images) // 4)  # a quarter is held out
    with redirect_stdout(sys.stderr):
        training.run(training)
    return load_encoder(out / f"hash-{args.bits}" / "model")


def link_images(images: Sequence[Path], folder: Path) -> Path:
    """A folder of links to these images and to no others."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.is_symlink():
            old.unlink()
    for number, image in enumerate(images):
        (folder / f"{number:06}{image.suffix}").symlink_to(image.resolve())
    return folder
