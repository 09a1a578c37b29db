"""`ragsr eval restore` and `ragsr eval retrieval`: measure on a pack of photos with known truth."""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragsr.cli import table5
from ragsr.cli.models import add_model_options, load_pipeline_of
from ragsr.cli.refir import add_refir_options, refir_options
from ragsr.errors import InputError

if TYPE_CHECKING:  # the library is imported when a command runs, so that --help is instant
    from ragsr.evaluation import Pack
    from ragsr.gallery import Gallery

PACK = "an evaluation pack: a folder with retrieval_truth.json, lq_bicubic_x4 and lq_degraded_x4"


def add_parser(commands: Any) -> None:
    """Register `eval` and its commands."""
    parser = commands.add_parser(
        "eval",
        help="measure restoring and retrieval on a pack of photos with known truth",
        description="Measure restoring and retrieval on a pack of photos with known truth.",
    )
    kinds = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_restore(kinds)
    add_retrieval(kinds)
    table5.add_command(kinds)


def add_restore(kinds: Any) -> None:
    parser = kinds.add_parser(
        "restore",
        help="PSNR, SSIM, HaarPSI and NIQE of restored photos",
        description="Restore the photos of a pack and print how good they are, beside bicubic: PSNR per photo, and the "
        "means of all metrics with their 95 % interval over the scenes. --json and --html tell all of every photo.",
        epilog="example: ragsr eval restore --data pack --json restore.json --html restore.html",
    )
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help=PACK)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--reference",
        choices=("none", "best", "retrieved", "random"),
        nargs="+",
        default=["none", "best", "retrieved", "random"],
        help="without, with the true reference, with what is found among all references of the pack, with one of "
        "another scene (all four)",
    )
    source.add_argument("--gallery", metavar="DIR", type=Path, help="without, and with what this gallery finds")
    parser.add_argument(
        "-k", metavar="N", type=int, default=1, help="references per photo that are found (%(default)s)"
    )
    _add_pack_options(parser, ["multiview", "synthcrop"])
    parser.add_argument(
        "--degradation",
        choices=("bicubic", "degraded"),
        default="bicubic",
        help="which of the pack's low-quality copies are restored (%(default)s)",
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        nargs="+",
        help="psnr, ssim, haarpsi, niqe (these four; niqe needs 96 pixels a side); features, with --features; lpips, "
        'dists, clipiqa, musiq, fid, which need pip install "ragsr[metrics]"',
    )
    parser.add_argument(
        "--features",
        metavar="FILE|DIR",
        type=Path,
        help="measure also how differently this network sees result and truth, as LPIPS does, its layers counting "
        "alike: weights of a VGG in torchvision's naming, a MobileNet v1 (NAME_dequant.npz), or a model of train hash",
    )
    parser.add_argument("--preset", default="refir", help="refir, irag, c2 or ttsr: how PSNR and SSIM are computed")
    add_model_options(parser)
    add_refir_options(parser, "plan")
    _add_outputs(parser)
    parser.set_defaults(run=run_restore)


def add_retrieval(kinds: Any) -> None:
    parser = kinds.add_parser(
        "retrieval",
        help="hit rate of code encoders",
        description="Search the low-quality photos of a pack among its references, and print how many find one of the "
        "same scene among the first one to five, which share of all of the same scene is among the first five "
        "(recall), and the mean average precision over the whole order (MAP).",
        epilog="example: ragsr eval retrieval --data pack --candidates photos --encoder baseline-64 runs/hash/encoder "
        "--rerank --html retrieval.html",
    )
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help=f"{PACK}; or the test set CUFED5")
    parser.add_argument(
        "--candidates", metavar="DIR", type=Path, nargs="+", default=[], help="more photos to search among"
    )
    parser.add_argument(
        "--encoder",
        metavar="NAME|DIR",
        nargs="+",
        help="turns photos into codes; several are compared (that of ragsr gallery build)",
    )
    parser.add_argument(
        "--rerank",
        action="store_true",
        help="also rank the nearest codes again by float feature, and all candidates by feature alone",
    )
    parser.add_argument(
        "--patches", action="store_true", help="also search a gallery of the candidates that keeps patches (slow)"
    )
    _add_pack_options(parser, ["multiview", "pairs", "synthcrop"])
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="shuffles the candidates (%(default)s)")
    _add_outputs(parser)
    parser.add_argument("--plot", metavar="PNG", type=Path, help="draw hit rates and distances (needs matplotlib)")
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
    from ragsr.evaluation import evaluate_restore, report
    from ragsr.evaluation.restoring import fids
    from ragsr.metrics import USUAL, find_metric, find_preset
    from ragsr.metrics.named import FEATURES

    started = time.perf_counter()
    find_preset(args.preset)
    metrics = list(dict.fromkeys([*(args.metric or USUAL), *([FEATURES] if args.features else [])]))
    for name in metrics:
        find_metric(name)
    pack = _load_pack(args, args.degradation)
    pipeline = load_pipeline_of(args)
    methods = ["none", "gallery"] if args.gallery else args.reference
    with _searched(args, pack) as gallery, _sets(metrics) as sets:
        rows = evaluate_restore(
            pack, pipeline, methods, gallery, args.k, args.preset, args.seed, metrics, sets, args.features
        )
        of_sets = fids(sets, str(pipeline.device)) if sets else None
    names = ("preset", "degradation", "groups", "pipeline", "model", "quality", "scale", "seed", "k")
    settings = {name: getattr(args, name) for name in names} | {"tile": pipeline.tile, "steps": pipeline.steps}
    settings["options"] = refir_options(args)
    settings["features"] = args.features.name if args.features else None
    facts = report.run_facts(started, str(pipeline.device))
    document = report.restore_document(rows, settings, facts, of_sets)
    print(report.restore_lines(rows, document))
    if args.json:
        report.write_json(args.json, document)
    if args.html:
        report.write_text(args.html, report.restore_page(rows, document))
    return 0


def _searched(args: argparse.Namespace, pack: "Pack") -> AbstractContextManager["Gallery | None"]:
    """The gallery that references are found in: the user's, or the pack's own references, or none."""
    from ragsr.evaluation import pack_gallery
    from ragsr.gallery import Gallery

    if args.gallery:
        return Gallery.open(args.gallery)
    return pack_gallery(pack) if "retrieved" in args.reference and pack.references else nullcontext()


@contextmanager
def _sets(metrics: Sequence[str]) -> Iterator[Path | None]:
    """A folder for the pictures that FID compares, if it is asked for."""
    if "fid" not in metrics:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def run_retrieval(args: argparse.Namespace) -> int:
    from ragsr.codes import DEFAULT, load_encoder
    from ragsr.evaluation import degradations_of, evaluate_retrieval, report, retrieval_report

    started = time.perf_counter()
    encoders = [load_encoder(name) for name in dict.fromkeys(args.encoder or [DEFAULT])]
    packs = [_load_pack(args, degradation) for degradation in degradations_of(args.data)]
    results, candidates = evaluate_retrieval(packs, encoders, args.candidates, args.seed, args.rerank, args.patches)
    print(retrieval_report.retrieval_lines(results, candidates))
    settings = {"candidates": candidates, "groups": args.groups, "seed": args.seed}
    document = retrieval_report.retrieval_document(results, settings, report.run_facts(started))
    if args.json:
        report.write_json(args.json, document)
    if args.html:
        report.write_text(args.html, retrieval_report.retrieval_page(results, document))
    if args.plot and not retrieval_report.write_plot(results, args.plot):
        raise InputError(retrieval_report.NO_PLOTS)
    return 0


def _load_pack(args: argparse.Namespace, degradation: str) -> "Pack":
    from ragsr.evaluation import load_pack

    return load_pack(args.data, degradation, args.groups, args.limit)
