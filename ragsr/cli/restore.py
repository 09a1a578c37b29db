"""`ragsr restore`: one photo or many."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragsr.errors import InputError

if TYPE_CHECKING:  # the library is imported when the command runs, so that --help is instant
    from ragsr.gallery import Gallery
    from ragsr.pipelines import RefSRPipeline, Restored
    from ragsr.pipelines.refsr import Reference

DESCRIPTION = """\
Restore low-quality photos with the help of good ones: references that you name, or the nearest images of a gallery.

OUT is a file when there is one input and OUT ends like an image. Otherwise it is a folder, and photo.jpg becomes
OUT/photo.png; inputs of one name from several folders get a few letters of their path's checksum: photo_1f3a5c.png.
What exists in OUT already is skipped, so a command that was interrupted goes on when it is given again.
"""
EXAMPLES = """\
examples:
  ragsr restore small.jpg --ref good.jpg -o big.png
  ragsr restore low/ --gallery my-gallery -k 2 -o out/ --json > out.json
  ragsr restore small.jpg --no-reference -o big.png
"""
MODEL_HELP = (
    "refnet, transfer (without training), the folder of a model, or the file of a TTSR checkpoint (%(default)s)"
)
Record = dict[str, Any]  # what is told of one photo


def add_parser(commands: Any) -> None:
    """Register `restore`."""
    parser = commands.add_parser(
        "restore",
        help="restore low-quality photos",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", metavar="INPUT", type=Path, nargs="+", help="photos, and folders of photos")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ref", metavar="IMG", type=Path, nargs="+", help="references, the same for every photo")
    source.add_argument("--gallery", metavar="DIR", type=Path, help="find the references of each photo in this gallery")
    source.add_argument("--no-reference", action="store_true", help="restore each photo by itself")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="a file or a folder")
    parser.add_argument(
        "-k", metavar="N", type=int, default=1, help="references per photo from the gallery (%(default)s)"
    )
    parser.add_argument(
        "--threshold",
        metavar="X",
        type=float,
        help="what is found with a lower score is not used, and a photo without any is restored by itself (default: "
        "the encoder's; 0 takes whatever comes)",
    )
    add_model_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="redo what is in OUT already")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The selectors that every command with a restoration model shares."""
    parser.add_argument("--pipeline", choices=("refsr", "refir"), default="refsr", help="the method (%(default)s)")
    parser.add_argument("--model", metavar="NAME|PATH", default="refnet", help=MODEL_HELP)
    parser.add_argument(
        "--quality",
        choices=("faithful", "rich"),
        default="faithful",
        help="keep to what is in the photos, or add detail too; rich needs a diffusion model (%(default)s)",
    )
    parser.add_argument("--scale", metavar="N", type=int, default=4, help="times larger on each side (%(default)s)")
    parser.add_argument(
        "--tile", metavar="auto|N", default="auto", help="side of the tiles in pixels of the photo; auto is 256"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="for models that draw numbers (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def load_pipeline_of(args: argparse.Namespace) -> "RefSRPipeline":
    """The pipeline that `add_model_options` selected."""
    from ragsr.pipelines import load_pipeline

    return load_pipeline(
        args.pipeline,
        args.model,
        quality=args.quality,
        scale=args.scale,
        tile=args.tile,
        seed=args.seed,
        device=args.device,
    )


def run(args: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from ragsr.gallery import Gallery
    from ragsr.image import find_images

    inputs = find_images(args.inputs)
    outputs = plan_outputs(inputs, args.output)
    pipeline = load_pipeline_of(args)
    with Gallery.open(args.gallery) if args.gallery else nullcontext() as gallery:
        check_references(args, pipeline, gallery)
        records = restore_all(args, pipeline, gallery, list(zip(inputs, outputs, strict=True)))
    if args.json:
        print(json.dumps({"results": records, **settings(args, pipeline)}, indent=2))
    return 2 if any("error" in record for record in records) else 0


# ------------------------------------------------------------------ steps


def plan_outputs(inputs: Sequence[Path], out: Path) -> list[Path]:
    """Where each restored photo goes; no two to one place, and none onto an input."""
    from PIL import Image

    Image.init()
    names_file = out.suffix.lower() in Image.registered_extensions() and not out.is_dir()
    if names_file and len(inputs) > 1:
        raise InputError(f"{out}: names one file, and there are {len(inputs)} photos; name a folder")
    if not names_file and out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file is there, and a folder or an image file is needed; choose another name")
    often = Counter(path.stem.casefold() for path in inputs)
    outputs = [out if names_file else out / output_name(path, often[path.stem.casefold()] > 1) for path in inputs]
    overwritten = {path.resolve() for path in inputs} & {path.resolve() for path in outputs}
    if overwritten:
        raise InputError(f"{overwritten.pop()}: is an input and would be replaced by a result; choose another OUT")
    return outputs


def output_name(path: Path, is_shared: bool) -> str:
    """`photo.png`, or `photo_1f3a5c.png` where several inputs are called `photo`."""
    if not is_shared:
        return f"{path.stem}.png"
    import hashlib

    return f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]}.png"


def check_references(args: argparse.Namespace, pipeline: "RefSRPipeline", gallery: "Gallery | None") -> None:
    """Complain before the first photo about what would fail on every one."""
    if gallery is None:
        pipeline.prepare(args.ref or ())  # stays prepared
    elif not 1 <= args.k <= len(gallery):
        raise InputError(f"{args.gallery}: {args.k} references were asked for and there are {len(gallery)}")


def restore_all(
    args: argparse.Namespace, pipeline: "RefSRPipeline", gallery: "Gallery | None", jobs: Sequence[tuple[Path, Path]]
) -> list[Record]:
    """Restore every (input, output); one that fails is told of and the others go on."""
    from tqdm import tqdm

    records = []
    told: set[str] = set()
    with tqdm(jobs, unit="photo", desc="restoring", disable=None) as bar:  # None: no bar where nobody looks
        for source, target in bar:
            record: Record = {
                "input": str(source),
                "output": str(target),
                "skipped": target.exists() and not args.overwrite,
            }
            try:
                if not record["skipped"]:
                    record |= restore_one(args, pipeline, gallery, source, target)
            except (InputError, OSError) as error:
                record["error"] = str(error)
                tqdm.write(f"ragsr: error: {error}", file=sys.stderr)
            else:
                tqdm.write(describe(record, gallery), file=sys.stderr if args.json else sys.stdout)
                for note in sorted(notes_on(record) - told):
                    tqdm.write(f"ragsr: note: {note}", file=sys.stderr)
                told |= notes_on(record)
            records.append(record)
    return records


def restore_one(
    args: argparse.Namespace, pipeline: "RefSRPipeline", gallery: "Gallery | None", source: Path, target: Path
) -> Record:
    from ragsr.image import save_image
    from ragsr.pipelines.refsr import timed

    start = time.perf_counter()
    restored: Restored = pipeline(source, args.ref or (), gallery, args.k, args.threshold)
    with timed(restored.milliseconds, "save"):
        save_image(restored.image, target)
    return {
        "size": list(restored.image.size),
        "references": [told(reference) for reference in restored.references],
        "rejected": [told(reference) for reference in restored.rejected],
        "reference_share": round(restored.reference_share, 4),
        "seconds": round(time.perf_counter() - start, 3),
        "milliseconds": {stage: round(value, 1) for stage, value in restored.milliseconds.items()},
    }


# ------------------------------------------------------------------ what is told


def told(reference: "Reference") -> Record:
    """One reference, in JSON."""
    return vars(reference) | {
        "path": str(reference.path),
        "score": None if reference.score is None else round(reference.score, 4),
    }


def describe(record: Record, gallery: "Gallery | None") -> str:
    """One line on one photo."""
    if record["skipped"]:
        return f"{record['output']}: is there already, skipped (--overwrite redoes it)"
    used = [f"{r['path']}{'' if gallery is None else nearness(r, gallery)}" for r in record["references"]]
    source = f"{record['reference_share']:.0%} from {', '.join(used)}" if used else without(record, gallery)
    return f"{record['input']} -> {record['output']}: {source}, {record['seconds']:.1f} s"


def without(record: Record, gallery: "Gallery | None") -> str:
    """Why a photo was restored by itself."""
    if gallery is None or not record["rejected"]:
        return "without reference"
    nearest = record["rejected"][0]
    return f"without reference, none is of use; the nearest is {nearest['path']}{nearness(nearest, gallery)}"


def nearness(reference: Record, gallery: "Gallery") -> str:
    near = f"distance {reference['distance']} of {gallery.encoder.bits}, score {reference['score']:.2f}"
    return f" ({near}{', generated' if reference['generated'] else ''})"


def notes_on(record: Record) -> set[str]:
    """The notes on the references of one photo."""
    return {f"{r['path']}: {r['note']}" for r in record.get("references", ()) if r["note"]}


def settings(args: argparse.Namespace, pipeline: "RefSRPipeline") -> dict[str, Any]:
    """What the results depend on."""
    from ragsr.env import version

    return {
        "pipeline": args.pipeline,
        "model": args.model,
        "quality": args.quality,
        "scale": args.scale,
        "tile": pipeline.tile,
        "seed": args.seed,
        "device": str(pipeline.device),
        "gallery": None if args.gallery is None else str(args.gallery.resolve()),
        "k": args.k,
        "threshold": args.threshold,
        "versions": {name: version(name) for name in ("ragsr", "torch", "pillow")},
    }
