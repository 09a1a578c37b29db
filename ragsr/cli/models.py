"""The options that select a restoration model, for every command that has one, and the pipeline they select."""

import argparse
from typing import TYPE_CHECKING

from ragsr.cli.refir import refir_options

if TYPE_CHECKING:  # the library is imported when a command runs, so that --help is instant
    from ragsr.pipelines import ReFIRRestorer, RefSRPipeline

MODEL_HELP = (
    "of refsr: auto (refnet or refnet-real, as the photo needs), refnet (for photos that were only reduced), "
    "refnet-real (for blur, noise and compression), transfer (without training), the folder of a model, or the file of "
    "a TTSR checkpoint (%(default)s). "
    "Of refir: the folder, hub name or file of a diffusion model; its kind is read from it"
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The selectors that every command with a restoration model shares."""
    parser.add_argument(
        "--pipeline",
        choices=("refsr", "refir"),
        default="refsr",
        help="refsr is fast; refir needs a diffusion model and may invent detail (%(default)s)",
    )
    parser.add_argument("--model", metavar="NAME|PATH", default="auto", help=MODEL_HELP)
    parser.add_argument(
        "--quality",
        choices=("faithful", "rich"),
        default="faithful",
        help="of refsr: keep to what is in the photos, or add detail by a model with a diffusion stage (%(default)s)",
    )
    parser.add_argument("--steps", metavar="N", type=int, help="of the diffusion; default: what the model was made for")
    parser.add_argument("--scale", metavar="N", type=int, default=4, help="times larger on each side (%(default)s)")
    parser.add_argument(
        "--tile", metavar="auto|N", default="auto", help="side of the tiles in pixels of the photo (%(default)s)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="for models that draw numbers (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def load_pipeline_of(args: argparse.Namespace) -> "RefSRPipeline | ReFIRRestorer":
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
        **refir_options(args),
    )
