"""What `--pipeline refir` adds to a command: its options, the memory it will take, the pictures that explain."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragsr.pipelines import ReFIRRestorer, RefSRPipeline, Restored

REFIR_ONLY = ("--pipeline refir", "These are refir's. What is left out is as the model is meant to be run.")


def add_refir_options(parser: argparse.ArgumentParser, preset: str = "preset") -> None:
    """What only refir can be told; the names are those of `ragsr.pipelines.ReFIROptions`.

    `preset` is what this command calls the preset: `ragsr eval` has presets of its own.
    """
    group = parser.add_argument_group(*REFIR_ONLY)

    def add(name: str, metavar: str | None, text: str, **more: Any) -> None:
        group.add_argument(f"--{name}", metavar=metavar, help=text, **more)

    presets, modes = ("paper", "released-seesr", "released-supir"), ("denoise", "noised", "fast", "batched")
    fallbacks = ("origin_lrm", "gen_ref", "ada_gen_ref")
    add(preset, None, "when and where references are looked at", choices=presets, dest="refir_preset")
    add("mode", None, "how references are prepared: denoise as in the paper, noised and fast cost less", choices=modes)
    text = "search the gallery for the whole photo, or for every tile by itself"
    add("references-per", None, text, choices=("image", "tile"))
    add("strength", "S", "in (0, 1], how far the result may leave the photo", type=float)
    add("reference-strength", "S", "in [0, 1], how much is taken from references", type=float)
    add("guidance", "G", "how strongly the prompt counts; 1 is off, and half the time", type=float)
    add("prompt", "TEXT", "what the photo shows")
    add("tags", "FILE", "what each photo shows, a line for each: photo.jpg: cat, sofa, window")
    add("negative-prompt", "TEXT", "what it must not look like")
    add("fallback", None, "if the gallery has none: no reference, a generated one, or the better", choices=fallbacks)
    add("caption", "TEXT", "what to generate as a reference; the prompt if left out")
    add("base", "PATH", "the Stable Diffusion 2 of SeeSR, the SDXL file of SUPIR")
    add("config", "DIR", "configurations for a single file")
    add("controlnet", "PATH", "a ControlNet of the kind tile")
    text = "of SUPIR: control_scale, control_start, guidance_start, restore, churn, churn_noise"
    add("steering", "NAME=NUMBER", text, nargs="+", type=named_number)


def add_explain_option(parser: argparse.ArgumentParser) -> None:
    text = "of refir: write OUT.explain.png, gates and what was drawn from, and OUT.share.png, what is from references"
    parser.add_argument("--explain", action="store_true", default=None, help=text)


def refir_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `add_refir_options` that were given."""
    import dataclasses

    from ragsr.pipelines import ReFIROptions

    names = [field.name for field in dataclasses.fields(ReFIROptions)]
    given = {name: getattr(args, name, None) for name in names} | {"preset": getattr(args, "refir_preset", None)}
    found = {name: value for name, value in given.items() if value is not None}
    return found | {"steering": dict(found["steering"])} if "steering" in found else found


def named_number(text: str) -> tuple[str, float]:
    """NAME=NUMBER; argparse tells of the `ValueError` of anything else."""
    name, _, number = text.partition("=")
    return name, float(number)


def tell_memory(args: argparse.Namespace, pipeline: "RefSRPipeline | ReFIRRestorer", photos: Sequence[Path]) -> None:
    """What the largest photo will take of memory, where a pipeline can say so."""
    from ragsr.pipelines import RefSRPipeline

    sizes = [size for size in map(size_of, photos) if size is not None]
    if isinstance(pipeline, RefSRPipeline) or not sizes:
        return
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    count = 0 if args.no_reference else len(args.ref or range(args.k))
    told = pipeline.estimate_memory((height, width), count)
    print(f"ragsr: note: {width}x{height} pixels will take about {told}", file=sys.stderr)


def size_of(photo: Path) -> tuple[int, int] | None:
    """Width and height, from the head of the file; None if it cannot be read, of which restoring it will tell."""
    from PIL import Image

    try:
        with Image.open(photo) as opened:
            return opened.size
    except (OSError, ValueError):
        return None


def save_explanation(restored: "Restored", target: Path) -> list[Path]:
    """The pictures of an explanation, beside the photo."""
    from ragsr.image import save_image

    told = restored.explanation
    if told is None:
        return []
    pictures = {"explain": told.sheet(restored.image), "share": told.share_picture()}
    paths = [target.with_name(f"{target.stem}.{name}.png") for name in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        save_image(picture, path)
    return paths
