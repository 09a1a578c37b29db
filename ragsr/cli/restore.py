"""`ragsr restore`: one photo or many."""

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragsr.cli.models import add_model_options, load_pipeline_of
from ragsr.cli.refir import add_explain_option, add_refir_options, refir_options, save_explanation, tell_memory
from ragsr.errors import InputError

if TYPE_CHECKING:  # the library is imported when the command runs, so that --help is instant
    from ragsr.gallery import Gallery
    from ragsr.pipelines import ReFIRRestorer, RefSRPipeline, Restored
    from ragsr.pipelines.refsr import Reference

    Pipeline = RefSRPipeline | ReFIRRestorer

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
  ragsr restore low/ --gallery my-gallery -o out/ --pipeline refir --model my-sdxl --explain
  ragsr restore small.jpg --ref good.jpg --model runs/rich/model --quality rich -o big.png
"""
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
    add_refir_options(parser)
    add_explain_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="redo what is in OUT already")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from ragsr.gallery import Gallery
    from ragsr.image import find_images

    inputs = find_images(args.inputs)
    outputs = plan_outputs(inputs, args.output)
    pipeline = load_pipeline_of(args)
    with Gallery.open(args.gallery) if args.gallery else nullcontext() as gallery:
        check_references(args, pipeline, gallery)
        jobs = list(zip(inputs, outputs, strict=True))
        tell_memory(args, pipeline, [source for source, target in jobs if args.overwrite or not target.exists()])
        records = restore_all(args, pipeline, gallery, jobs)
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


def check_references(args: argparse.Namespace, pipeline: "Pipeline", gallery: "Gallery | None") -> None:
    """Complain before the first photo about what would fail on every one."""
    if gallery is None:
        pipeline.prepare(args.ref or ())  # stays prepared
    elif not 1 <= args.k <= len(gallery):
        raise InputError(f"{args.gallery}: {args.k} references were asked for and there are {len(gallery)}")


def restore_all(
    args: argparse.Namespace, pipeline: "Pipeline", gallery: "Gallery | None", jobs: Sequence[tuple[Path, Path]]
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
    args: argparse.Namespace, pipeline: "Pipeline", gallery: "Gallery | None", source: Path, target: Path
) -> Record:
    from ragsr.image import save_image
    from ragsr.pipelines.refsr import timed

    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        restored: Restored = pipeline(source, args.ref or (), gallery, args.k, args.threshold)
    with timed(restored.milliseconds, "save"):
        explained = save_explanation(restored, target)
        save_image(restored.image, target)  # last: what is there is skipped
    return {
        "notes": [f"{source}: {w.message}" for w in caught if w.category is UserWarning],
        "explanation": [str(path) for path in explained],
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
        "path": None if reference.path is None else str(reference.path),
        "score": None if reference.score is None else round(reference.score, 4),
    }


def describe(record: Record, gallery: "Gallery | None") -> str:
    """One line on one photo."""
    if record["skipped"]:
        return f"{record['output']}: is there already, skipped (--overwrite redoes it)"
    used = [f"{r['path'] or 'a reference'}{nearness(r, gallery)}" for r in record["references"]]
    source = f"{record['reference_share']:.0%} from {', '.join(used)}" if used else without(record, gallery)
    return f"{record['input']} -> {record['output']}: {source}, {record['seconds']:.1f} s"


def without(record: Record, gallery: "Gallery | None") -> str:
    """Why a photo was restored by itself."""
    if gallery is None or not record["rejected"]:
        return "without reference"
    nearest = record["rejected"][0]
    return f"without reference, none is of use; the nearest is {nearest['path']}{nearness(nearest, gallery)}"


def nearness(reference: Record, gallery: "Gallery | None") -> str:
    if gallery is None or reference["distance"] is None:
        return f" {reference['note']}" if reference["path"] is None else ""
    near = f"distance {reference['distance']} of {gallery.encoder.bits}, score {reference['score']:.2f}"
    return f" ({near}{', generated' if reference['generated'] else ''})"


def notes_on(record: Record) -> set[str]:
    """The notes on one photo and its references."""
    references = {f"{r['path']}: {r['note']}" for r in record.get("references", ()) if r["note"] and r["path"]}
    return references | set(record.get("notes", ()))


def settings(args: argparse.Namespace, pipeline: "Pipeline") -> dict[str, Any]:
    """What the results depend on."""
    from ragsr.env import version

    return {
        "pipeline": args.pipeline,
        "model": args.model,
        "quality": args.quality,
        "scale": args.scale,
        "steps": pipeline.steps,
        "tile": pipeline.tile,
        "seed": args.seed,
        "device": str(pipeline.device),
        **refir_options(args),
        "gallery": None if args.gallery is None else str(args.gallery.resolve()),
        "k": args.k,
        "threshold": args.threshold,
        "versions": {name: version(name) for name in ("ragsr", "torch", "pillow")},
    }
