"""`ragsr eval restore` and `ragsr eval retrieval`: measure on a pack of photos with known truth."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragsr.cli.restore import add_model_options, load_pipeline_of

if TYPE_CHECKING:  # the library is imported when a command runs, so that --help is instant
    from ragsr.evaluation import Pack

PACK = "an evaluation pack: a folder with retrieval_truth.json, lq_bicubic_x4 and lq_degraded_x4"


def add_parser(commands: Any) -> None:
    """Register `eval` and its two commands."""
    parser = commands.add_parser(
        "eval",
        help="measure restoring and retrieval on a pack of photos with known truth",
        description="Measure restoring and retrieval on a pack of photos with known truth.",
    )
    kinds = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_restore(kinds)
    add_retrieval(kinds)


def add_restore(kinds: Any) -> None:
    parser = kinds.add_parser(
        "restore",
        help="PSNR and SSIM of restored photos",
        description="Restore the photos of a pack and print PSNR and SSIM per photo and mean, beside bicubic.",
        epilog="example: ragsr eval restore --data pack --json restore.json --html restore.html",
    )
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help=PACK)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--reference",
        choices=("none", "best", "random"),
        nargs="+",
        default=["none", "best", "random"],
        help="without, with the true reference, with one of another scene (all three)",
    )
    source.add_argument("--gallery", metavar="DIR", type=Path, help="without, and with what this gallery finds")
    parser.add_argument(
        "-k", metavar="N", type=int, default=1, help="references per photo from the gallery (%(default)s)"
    )
    _add_pack_options(parser, ["multiview", "synthcrop"])
    parser.add_argument(
        "--degradation", choices=("bicubic", "degraded"), default="bicubic", help="of the photos (%(default)s)"
    )
    parser.add_argument("--preset", default="refir", help="refir, irag, c2 or ttsr: how PSNR and SSIM are computed")
    add_model_options(parser)
    _add_outputs(parser)
    parser.set_defaults(run=run_restore)


def add_retrieval(kinds: Any) -> None:
    parser = kinds.add_parser(
        "retrieval",
        help="hit rate of a code encoder",
        description="Search the low-quality photos of a pack among its references, and print how often one of the same "
        "scene comes first and among the first five.",
        epilog="example: ragsr eval retrieval --data pack --candidates other-photos --json retrieval.json",
    )
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help=PACK)
    parser.add_argument(
        "--candidates", metavar="DIR", type=Path, nargs="+", default=[], help="more photos to search among"
    )
    parser.add_argument(
        "--encoder", metavar="NAME", default="baseline-64", help="turns photos into codes (%(default)s)"
    )
    _add_pack_options(parser, ["multiview", "pairs", "synthcrop"])
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="shuffles the candidates (%(default)s)")
    _add_outputs(parser)
    parser.set_defaults(run=run_retrieval)


def _add_pack_options(parser: argparse.ArgumentParser, groups: list[str]) -> None:
    allowed = ("multiview", "pairs", "synthcrop", "single")
    parser.add_argument("--groups", choices=allowed, nargs="+", default=groups, help=f"of photos ({' '.join(groups)})")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N photos")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="OUT", type=Path, help="write numbers, settings and versions")
    parser.add_argument("--html", metavar="OUT", type=Path, help="write one page with pictures")


# ------------------------------------------------------------------ commands


def run_restore(args: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from ragsr.evaluation import evaluate_restore, report
    from ragsr.gallery import Gallery
    from ragsr.metrics import find_preset

    started = time.perf_counter()
    find_preset(args.preset)
    pack = _load_pack(args, args.degradation)
    pipeline = load_pipeline_of(args)
    methods = ["none", "gallery"] if args.gallery else args.reference
    with Gallery.open(args.gallery) if args.gallery else nullcontext() as gallery:
        rows = evaluate_restore(pack, pipeline, methods, gallery, args.k, args.preset, args.seed)
    print(report.restore_lines(rows, args.preset))
    names = ("preset", "degradation", "groups", "pipeline", "model", "quality", "scale", "seed", "k")
    settings = {name: getattr(args, name) for name in names} | {"tile": pipeline.tile}
    document = report.restore_document(rows, settings, report.run_facts(started, str(pipeline.device)))
    if args.json:
        report.write_json(args.json, document)
    if args.html:
        report.write_text(args.html, report.restore_page(rows, document))
    return 0


def run_retrieval(args: argparse.Namespace) -> int:
    from ragsr.codes import load_encoder
    from ragsr.evaluation import DEGRADATIONS, evaluate_retrieval, report

    started = time.perf_counter()
    encoder = load_encoder(args.encoder)
    packs = [_load_pack(args, degradation) for degradation in DEGRADATIONS]
    rows, candidates = evaluate_retrieval(packs, encoder, args.candidates, args.seed)
    print(report.retrieval_lines(rows, encoder.id, candidates))
    settings = {"encoder": encoder.id, "candidates": candidates, "groups": args.groups, "seed": args.seed}
    document = report.retrieval_document(rows, settings, report.run_facts(started))
    if args.json:
        report.write_json(args.json, document)
    if args.html:
        report.write_text(args.html, report.retrieval_page(rows, document))
    return 0


def _load_pack(args: argparse.Namespace, degradation: str) -> "Pack":
    from ragsr.evaluation import load_pack

    return load_pack(args.data, degradation, args.groups, args.limit)
