"""`ragsr train niqe`: fit the model of natural photos that NIQE compares with."""

import argparse
import json
from pathlib import Path
from typing import Any

from ragsr.errors import InputError

DESCRIPTION = """\
Fit the distribution of the features of good photos, from their sharp patches. NIQE says how far an image is from it.

DATA is a folder of photos; of one with a MANIFEST.csv only those are used whose licence lets the result be given away,
as in ragsr train refsr. Photos with a side below 384 pixels are left out. OUT gets model.safetensors and a card.
"""
WHAT = """\
# Natural photos, for NIQE

Mean and covariance of the 36 features of sharp patches of good photos (A. Mittal et al., 2013). `ragsr.metrics.niqe`
gives the distance of an image from them; lower is more natural. Fitted to photos of our own: values do not equal those
of other programs. No photo can be recovered from it.
"""
LEAST_SIDE = 384  # pixels: smaller photos were reduced too much to be sharp as a camera is


def add_parser(models: Any) -> None:
    """Register `train niqe`."""
    parser = models.add_parser(
        "niqe",
        help="the model of natural photos for the metric NIQE",
        description=DESCRIPTION,
        epilog="example: ragsr train niqe --data photos/ --out runs/niqe",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", metavar="DATA", type=Path, required=True, help="a folder of good photos")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--json", action="store_true", help="print what was fitted as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ragsr.image import load_image
    from ragsr.metrics import fit_niqe
    from ragsr.training.card import write_documents
    from ragsr.training.photos import find_photos

    photos = find_photos(args.data)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out}: cannot be a folder ({error.strerror}); name another one") from error
    pictures = ((photo, load_image(photo.path)) for photo in tqdm(photos, unit="photo", disable=None))
    used = []

    def large() -> Any:
        for photo, picture in pictures:
            if min(picture.size) >= LEAST_SIDE:
                used.append(photo)
                yield picture

    model = fit_niqe(large())
    model.save(args.out / "model.safetensors")
    write_documents(args.out, WHAT, "", {}, [], used)
    told = {"model": str(args.out / "model.safetensors"), "photos": len(used)}
    print(json.dumps(told, indent=2) if args.json else f"{told['model']}: fitted to {len(used)} photos")
    return 0
