"""The ablations of ReFIR's paper as one command, for whoever has a model and photos.

    python benchmarks/ablations.py --model MODEL --data PACK --json FILE
    python benchmarks/ablations.py --tiny                                   random weights: shows that everything runs

    components   SA separate attention, SG the gate of similarity, DA the alignment of statistics    Tab. 4
    designs      separate attention, one soft-max over all keys, the reference's keys alone          Tab. 9
    positions    which self-attentions of the network take part                                      Tab. 5
    scale        the strength s                                                                      Fig. 11
    references   none, the true photo, the photo itself, one of another scene, the pack's best       Tab. 6
    count        one and two references                                                              Tab. 8

What a table does not vary is as in the plan (`--plan`, by default the model's own). PSNR and SSIM are computed by
every preset of `ragsr.metrics`; the printed table shows the one of `--score`. NIQE is that of `ragsr.metrics`, with a
model of our own photos, and lower is better. The paper's LPIPS, FID, MUSIQ and CLIPIQA need networks that do not ship
with ragsr.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor

from ragsr.chains import ChainPlan, chain_plan, state
from ragsr.image import load_image
from ragsr.metrics import PRESETS, haarpsi, niqe, psnr, ssim
from ragsr.ops import separate_attention
from ragsr.pipelines import ReFIRPipeline

SCALE = 4
TINY_SIDE, TINY_STEPS = 128, 3  # pixels of a result


@dataclass(frozen=True)
class Scene:
    """A photo with its truth. References are the best first."""

    name: str
    truth: Image.Image
    low: Image.Image
    references: list[Image.Image]
    other: Image.Image | None  # a good photo of something else

    def chosen(self, kind: str) -> list[Image.Image]:
        match kind:
            case "NoRef":
                return []
            case "HQRef":
                return [self.truth]
            case "SelfRef":
                return [self.low.resize(self.truth.size, Image.Resampling.BICUBIC)]
            case "Random":
                return [] if self.other is None else [self.other]
            case _:
                return self.references[: int(kind)]


@dataclass(frozen=True)
class Variant:
    table: str
    name: str
    plan: dict[str, Any] = field(default_factory=dict)  # changes
    references: str = "1"  # as `Scene.chosen` takes it
    gated: bool = True
    op: dict[str, Any] = field(default_factory=dict)  # options of `separate_attention`


def variants() -> list[Variant]:
    unaligned: dict[str, Any] = {"align": False}
    return [
        Variant("components", "none", references="NoRef"),
        Variant("components", "SA", gated=False, op=unaligned),
        Variant("components", "SA + SG", op=unaligned),
        Variant("components", "SA + DA", gated=False),
        Variant("components", "SA + SG + DA"),
        Variant("designs", "separate"),
        Variant("designs", "concat", op={"mode": "concat"}),
        Variant("designs", "replace", op={"mode": "replace"}),
        *(Variant("positions", part, {"layers": part}) for part in ("encoder", "middle", "decoder", "all")),
        *(Variant("scale", f"s = {s:g}", {"scale": s}) for s in (0.0, 0.25, 0.5, 0.75, 1.0)),
        *(Variant("references", kind, references=kind) for kind in ("NoRef", "HQRef", "SelfRef", "Random")),
        Variant("references", "best of the pack"),
        Variant("count", "one"),
        Variant("count", "two", references="2"),
    ]


@contextmanager
def switched(variant: Variant) -> Iterator[None]:
    """Attention and gate as the variant wants them, for the chains alone."""

    def constant(features: Tensor, directions: Tensor, lengths: Sequence[int]) -> Tensor:
        return torch.ones(features.shape[0], len(lengths), features.shape[1], device=features.device)

    gate: Callable[..., Tensor] = state.cosine_gate if variant.gated else constant
    with (
        patch.object(state, "separate_attention", partial(separate_attention, **variant.op)),
        patch.object(state, "cosine_gate", gate),
    ):
        yield


def scores(picture: Image.Image, truth: Image.Image) -> dict[str, float]:
    found = {f"psnr {name}": psnr(picture, truth, name) for name in PRESETS}
    found |= {f"ssim {name}": ssim(picture, truth, name) for name in PRESETS}
    return found | {"haarpsi": haarpsi(picture, truth), "niqe": niqe(picture)}


def measure(
    pipe: ReFIRPipeline, plan: ChainPlan, scenes: Sequence[Scene], variant: Variant, settings: dict[str, Any]
) -> dict[str, Any]:
    """The means of the scores over all scenes that have the references which the variant asks for."""
    rows = []
    for scene in scenes:
        references = scene.chosen(variant.references)
        wanted = 0 if variant.references == "NoRef" else int(variant.references == "2") + 1
        if len(references) < wanted:
            continue
        with switched(variant):
            output = pipe(scene.low, references, scale=SCALE, plan=replace(plan, **variant.plan), **settings)
        rows.append(scores(output.images[0], scene.truth))
    about = {"table": variant.table, "variant": variant.name, "photos": len(rows)}
    return about | {name: round(mean(row[name] for row in rows), 4) for name in (rows[0] if rows else ())}


def line(row: dict[str, Any], preset: str) -> str:
    if not row["photos"]:
        return f"{row['table']:12}{row['variant']:18} no photo has the references"
    told = f"{row[f'psnr {preset}']:8.2f}{row[f'ssim {preset}']:9.4f}{row['haarpsi']:9.4f}{row['niqe']:9.3f}"
    return f"{row['table']:12}{row['variant']:18}{told}{row['photos']:8}"


# ------------------------------------------------------------------ model and photos


def tiny() -> tuple[ReFIRPipeline, list[Scene], dict[str, Any]]:
    """A network with random weights and the stereo pair of scikit-image, as small as NIQE allows."""
    from small_hosts import prompts, small_host

    from ragsr.cli.demo import OTHERS, PHOTO, TRUE_REFERENCE, photo_folder

    def cut(name: str) -> Image.Image:
        picture = load_image(photo_folder() / name).convert("RGB")
        left, top = (picture.width - TINY_SIDE) // 2, (picture.height - TINY_SIDE) // 2
        return picture.crop((left, top, left + TINY_SIDE, top + TINY_SIDE))

    truth, second = cut(PHOTO), cut(TRUE_REFERENCE).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    low = truth.resize((TINY_SIDE // SCALE,) * 2, Image.Resampling.BICUBIC)
    scene = Scene(PHOTO, truth, low, [cut(TRUE_REFERENCE), second], cut(OTHERS[0]))
    return ReFIRPipeline(small_host()), [scene], prompts() | {"num_inference_steps": TINY_STEPS}


def real(args: argparse.Namespace) -> tuple[ReFIRPipeline, list[Scene], dict[str, Any]]:
    from ragsr.evaluation import load_pack

    pack = load_pack(args.data, args.degradation, limit=args.photos)
    scenes = []
    for number, query in enumerate(pack.queries):
        others = [name for name in pack.references if name not in query.same_scene]
        other = load_image(pack.folder / others[7919 * number % len(others)]) if others else None
        best = [load_image(pack.folder / name) for name in query.best[:2]]
        scenes.append(Scene(query.name, load_image(query.truth), load_image(query.low), best, other))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    files = {name: getattr(args, name) for name in ("base", "config", "controlnet") if getattr(args, name)}
    pipe = ReFIRPipeline.from_pretrained(args.model, dtype=dtype, **files).to(device)
    settings = {"prompt": args.prompt, "num_inference_steps": args.steps}
    return pipe, scenes, {name: value for name, value in settings.items() if value is not None}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tiny", action="store_true", help="a tiny network with random weights and one photo")
    source.add_argument("--model", help="folder, hub name or file of a model that ragsr.hosts knows")
    parser.add_argument("--data", type=Path, metavar="PACK", help="an evaluation pack, see ragsr.evaluation.pack")
    parser.add_argument("--degradation", choices=("bicubic", "degraded"), default="degraded", help="(%(default)s)")
    parser.add_argument("--photos", type=int, metavar="N", help="only the first N photos")
    for name in ("base", "config", "controlnet", "prompt"):
        parser.add_argument(f"--{name}", help="as in ragsr restore --pipeline refir")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's")
    parser.add_argument("--mode", choices=("denoise", "noised", "fast"), default="denoise", help="(%(default)s)")
    parser.add_argument("--plan", help="paper, released-seesr or released-supir; default: the model's")
    parser.add_argument("--tables", nargs="+", choices=list(dict.fromkeys(v.table for v in variants())))
    parser.add_argument("--score", choices=list(PRESETS), default="refir", help="PSNR and SSIM shown (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all scores with settings, versions and commit")
    args = parser.parse_args()
    if args.model and not args.data:
        parser.error("--model needs --data")
    return args


def main() -> int:
    args = parse()
    pipe, scenes, settings = tiny() if args.tiny else real(args)
    pipe.set_progress_bar_config(disable=True)
    plan = chain_plan(args.plan or pipe.host.defaults.plan)
    settings |= {"mode": args.mode, "generator": args.seed, "strength": 1.0 if args.tiny else None}
    print(f"{'table':12}{'variant':18}{'PSNR':>8}{'SSIM':>9}{'HaarPSI':>9}{'NIQE':>9}{'photos':>8}  ({args.score})")
    rows = []
    for variant in variants():
        if args.tables is None or variant.table in args.tables:
            rows.append(measure(pipe, plan, scenes, variant, settings))
            print(line(rows[-1], args.score), flush=True)
    if args.json:
        from ragsr.env import provenance

        model = "Stable Diffusion 2 / 8, random weights" if args.tiny else Path(args.model).name
        told = {name: value for name, value in settings.items() if not isinstance(value, Tensor)}
        about = {"model": model, "plan": repr(plan), "settings": told, "photos": [scene.name for scene in scenes]}
        args.json.write_text(json.dumps(about | {"provenance": provenance(), "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
