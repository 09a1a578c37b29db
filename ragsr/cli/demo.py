"""`ragsr demo`: the whole path on photographs that ship inside scikit-image."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from ragsr.pipelines import Restored

PHOTO = "motorcycle_left.png"  # restored; its stereo partner is the true reference
TRUE_REFERENCE = "motorcycle_right.png"
OTHERS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "retina.jpg",
    "rocket.jpg",
)
SCALE = 4
NEAREST, BICUBIC = 0, 3  # PIL.Image.Resampling, which is imported when the command runs
CLOSE_UP = (0.42, 0.36, 0.30)  # left, top and size of the enlarged part, as shares of the photo


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="run the whole path on photos that ship with scikit-image",
        description="Degrade a photo by 4, find its reference by hash in a gallery of thirteen photos, restore it with "
        "and without that reference, and write one picture (demo.png), a table (demo.json) and the gallery. Where "
        "diffusers is installed, the photo is also restored with --quality rich.",
        epilog="example: ragsr demo -o out/demo",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, default=Path("ragsr-demo"), help="where to (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import json

    from ragsr.env import provenance
    from ragsr.files import replacing
    from ragsr.image import save_image

    folder = photo_folder()
    truth = cropped(folder / PHOTO)
    low = truth.resize((truth.width // SCALE, truth.height // SCALE), BICUBIC)
    ranks, restored = restore_all(low, folder, args.output)
    results = {
        "photo": PHOTO,
        "scale": SCALE,
        "true_reference": TRUE_REFERENCE,
        "rank_of_true_reference": ranks.index(TRUE_REFERENCE) + 1,
        "gallery": ranks,
        "rows": scores(low, truth, restored),
        "provenance": provenance(),
    }
    save_image(sheet(low, truth, restored, results), args.output / "demo.png")
    with replacing(args.output / "demo.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2) if args.json else table(results))
    print(f"wrote {args.output / 'demo.png'} and {args.output / 'demo.json'}", file=sys.stderr)
    return 0


# ------------------------------------------------------------------ steps


def photo_folder() -> Path:
    """Where scikit-image keeps the photos it ships."""
    import importlib.util

    from ragsr.errors import InputError

    found = importlib.util.find_spec("skimage")
    folder = Path(found.origin).parent / "data" if found and found.origin else None
    if folder is None or not (folder / PHOTO).is_file():
        raise InputError("the demo uses the photos of scikit-image, which is not installed: pip install 'ragsr[demo]'")
    return folder


def cropped(path: Path) -> "Image.Image":
    """The photo, cut so that both sides are multiples of the scale."""
    from ragsr.image import load_image

    image = load_image(path)
    return image.crop((0, 0, image.width // SCALE * SCALE, image.height // SCALE * SCALE))


def restore_all(low: "Image.Image", folder: Path, output: Path) -> tuple[list[str], dict[str, "Restored"]]:
    """The gallery's photos in the order of the search, and the photo restored without and with the nearest one."""
    from importlib.util import find_spec

    from ragsr.gallery import Gallery
    from ragsr.models.refnet import RICH
    from ragsr.pipelines import restore

    output.mkdir(parents=True, exist_ok=True)
    there = Gallery.is_at(output / "gallery")
    with Gallery.open(output / "gallery") if there else Gallery.create(output / "gallery") as gallery:
        gallery.add([folder / name for name in (TRUE_REFERENCE, *OTHERS)])
        ranks = [hit.path.name for hit in gallery.search(low, len(gallery))]
        restored = {
            "no reference": restore(low, scale=SCALE),
            "reference": restore(low, gallery=gallery, scale=SCALE),
        }
        if find_spec("diffusers") and RICH.is_dir():
            restored["reference, rich"] = restore(low, gallery=gallery, scale=SCALE, quality="rich")
        return ranks, restored


def scores(low: "Image.Image", truth: "Image.Image", restored: dict[str, "Restored"]) -> list[dict[str, Any]]:
    """One row per method: PSNR, SSIM, preset, milliseconds per stage."""
    from ragsr.image import image_to_tensor
    from ragsr.metrics import psnr, ssim

    images = {"bicubic": low.resize(truth.size, BICUBIC)} | {name: r.image for name, r in restored.items()}
    goal = image_to_tensor(truth)
    return [
        {
            "method": name,
            "preset": "refir",
            "psnr": psnr(image_to_tensor(image), goal, preset="refir"),
            "ssim": ssim(image_to_tensor(image), goal, preset="refir"),
            "milliseconds": restored[name].milliseconds if name in restored else {},
        }
        for name, image in images.items()
    ]


# ------------------------------------------------------------------ what is shown


def sheet(
    low: "Image.Image", truth: "Image.Image", restored: dict[str, "Restored"], results: dict[str, Any]
) -> "Image.Image":
    """Two rows: the whole pictures, and the same part of each enlarged."""
    from ragsr.image import load_image
    from ragsr.sheet import contact_sheet

    decibel = {row["method"]: f"{row['psnr']:.2f} dB" for row in results["rows"]}
    hit = restored["reference"].references[0]
    assert hit.path is not None  # it comes from a gallery
    rich = [(restored[name].image, f"restored, {name}\n{decibel[name]}") for name in restored if name.endswith("rich")]
    cells = [
        (low.resize(truth.size, NEAREST), f"low quality\n{low.width} x {low.height}"),
        (low.resize(truth.size, BICUBIC), f"bicubic\n{decibel['bicubic']}"),
        (restored["no reference"].image, f"restored without reference\n{decibel['no reference']}"),
        (restored["reference"].image, f"restored with the reference found\n{decibel['reference']}"),
        *rich,
        (truth, "ground truth"),
        (load_image(hit.path), f"the reference: {hit.path.name}\ndistance {hit.distance} of 64, score {hit.score:.2f}"),
    ]
    return contact_sheet([cells, [(close_up(picture), caption.partition("\n")[0]) for picture, caption in cells]])


def close_up(picture: "Image.Image") -> "Image.Image":
    left, width = round(CLOSE_UP[0] * picture.width), round(CLOSE_UP[2] * picture.width)
    top, height = round(CLOSE_UP[1] * picture.height), round(CLOSE_UP[2] * picture.height)
    return picture.crop((left, top, left + width, top + height)).resize((2 * width, 2 * height), NEAREST)


def table(results: dict[str, Any]) -> str:
    rank, count = results["rank_of_true_reference"], len(results["gallery"])
    lines = [f"{'method':<15} {'PSNR':>9} {'SSIM':>7}   milliseconds (PSNR and SSIM: preset refir)"]
    for row in results["rows"]:
        stages = ", ".join(f"{stage} {ms:.0f}" for stage, ms in row["milliseconds"].items())
        lines.append(f"{row['method']:<15} {row['psnr']:>6.2f} dB {row['ssim']:>7.4f}   {stages}")
    return "\n".join([*lines, f"the true reference, {results['true_reference']}, was found at rank {rank} of {count}"])
