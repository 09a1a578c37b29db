"""iRAG's ablations on a pack of photos with known truth: what each part is worth, with its confidence interval.

    python benchmarks/irag_ablations.py --data pack --model runs/rich/model --json ablations.json
    python benchmarks/irag_ablations.py --data pack --model a0.1=runs/a0.1/model --model a1=runs/a1/model     Table 4
    python benchmarks/irag_ablations.py --data pack --stage TTSR.pt                                           Table 8
    python benchmarks/irag_ablations.py --data pack --model runs/rich/model --without RM

Of every model with a diffusion stage (paper, Table 3):

    whole       the reference found by its hash code among all of the pack, reference stage, diffusion
    -H          a random reference of another scene in place of the found one
    -RM         without the reference stage: diffusion sees the photo alone, enlarged
    -R          without a reference
    faithful    without diffusion

Of a reference stage alone (Table 8): the found reference, a random one, none. Photos, truths and random references are
those of `ragsr eval restore`. Parts are taken away from a model as it was trained; to ablate the training, train
without the part and give the folder as another --model. Differences to the first row are means over photos; their
interval of 95 % is a bootstrap over scenes, as photos of one scene are not independent.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ragsr.codes import DEFAULT
from ragsr.evaluation import Pack, Query, interval, load_pack, pack_gallery
from ragsr.evaluation.restoring import random_reference
from ragsr.gallery import Gallery
from ragsr.image import load_image
from ragsr.metrics import load_measures
from ragsr.models.resample import resize
from ragsr.pipelines import RefSRPipeline, load_pipeline

METRICS = ("psnr", "haarpsi", "niqe")
PARTS = {"H": "-H", "RM": "-RM", "R": "-R", "diffusion": "faithful"}  # and what the whole is called without it
Scores = dict[str, list[float]]  # by metric, in the order of the photos


class Enlarged:
    """In place of a reference stage: the photo, enlarged."""

    name, scale, context = "bicubic", 4, 0

    def prepare(self, references: Sequence[Tensor]) -> None:
        """Nothing is taken from references."""

    def __call__(self, low: Tensor, prepared: None) -> tuple[Tensor, Tensor]:
        image = resize(low, (low.shape[2] * self.scale, low.shape[3] * self.scale)).clamp(0, 1)
        return image, torch.zeros_like(image[:, :1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", metavar="DIR", required=True, help="an evaluation pack")
    parser.add_argument("--model", metavar="[NAME=]DIR", action="append", default=[], help="a model with diffusion")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=list(PARTS), help="what to take away (each)")
    parser.add_argument("--stage", metavar="NAME|PATH", action="append", default=[], help="a reference stage alone")
    parser.add_argument("--encoder", default=DEFAULT, help="whose codes find references (%(default)s)")
    parser.add_argument("--degradation", choices=("bicubic", "degraded"), default="bicubic")
    parser.add_argument("--groups", nargs="+", default=["multiview", "synthcrop"], help="of photos (%(default)s)")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N photos")
    parser.add_argument("--steps", metavar="N", type=int, help="of the diffusion; default: each model's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    args = parser.parse_args(arguments)
    if not args.model and not args.stage:
        parser.error("give a --model or a --stage")
    pack = load_pack(args.data, args.degradation, args.groups, args.limit)
    tables = {}
    with pack_gallery(pack, args.encoder) as gallery:
        for given in args.model:
            name, path = given.split("=", 1) if "=" in given else (given, given)
            cases = of_model(path, args.steps, args.seed)
            kept = {case: cases[case] for case in ("whole", *(PARTS[part] for part in args.without))}
            tables[name] = compared(pack, kept, gallery, args.seed)
        for name in args.stage:
            tables[name] = compared(pack, of_stage(name), gallery, args.seed)
    for name, rows in tables.items():
        print_table(name, rows)
    if args.json:
        write(args, pack, tables)
    return 0


# ------------------------------------------------------------------ what is compared

Case = tuple[RefSRPipeline, str]  # a pipeline, and the reference it gets: found, random or none


def of_model(path: str, steps: int | None, seed: int) -> dict[str, Case]:
    rich = load_pipeline(model=path, quality="rich", steps=steps, seed=seed)
    faithful = RefSRPipeline(rich.model, rich.device)
    unrestored = RefSRPipeline(Enlarged(), rich.device, seed=seed, diffusion=rich.diffusion, steps=rich.steps)
    return {
        "whole": (rich, "found"),
        "-H": (rich, "random"),
        "-RM": (unrestored, "none"),
        "-R": (rich, "none"),
        "faithful": (faithful, "found"),
    }


def of_stage(name: str) -> dict[str, Case]:
    pipeline = load_pipeline(model=name)
    return {kind: (pipeline, kind) for kind in ("found", "random", "none")}


def compared(pack: Pack, cases: dict[str, Case], gallery: Gallery, seed: int) -> dict[str, dict[str, Any]]:
    """Per case: means, and the differences to the first case with their intervals."""
    generator = np.random.default_rng(seed)
    others = [random_reference(generator, pack, query) for query in pack.queries]
    measures = load_measures(METRICS)
    found: dict[str, Scores] = {name: defaultdict(list) for name in cases}
    for query, other in tqdm(list(zip(pack.queries, others, strict=True)), unit="photo", disable=None):
        truth = load_image(query.truth)
        for name, (pipeline, kind) in cases.items():
            made = restored(pipeline, kind, query, pack, other, gallery)
            for metric, measure in measures.items():
                found[name][metric].append(measure(made, truth))
    scenes = [query.scene for query in pack.queries]
    first = found[next(iter(cases))]
    return {name: summary(scores, first, scenes, seed) for name, scores in found.items()}


def restored(
    pipeline: RefSRPipeline, kind: str, query: Query, pack: Pack, other: str | None, gallery: Gallery
) -> Image.Image:
    if kind == "found":
        return pipeline(query.low, gallery=gallery).image
    return pipeline(query.low, [pack.folder / other] if kind == "random" and other is not None else []).image


# ------------------------------------------------------------------ statistics


def summary(scores: Scores, first: Scores, scenes: Sequence[str], seed: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for metric, values in scores.items():
        differences = np.subtract(values, first[metric])
        told[metric] = {
            "mean": float(np.mean(values)),
            "difference": float(differences.mean()),
            "interval": interval(differences, scenes, seed),
        }
    return told


# ------------------------------------------------------------------ what is told


def print_table(name: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{name}")
    for case, metrics in rows.items():
        cells = [
            f"{metric} {one['mean']:8.4f} ({one['difference']:+.4f}, {one['interval'][0]:+.4f} to "
            f"{one['interval'][1]:+.4f})"
            for metric, one in metrics.items()
        ]
        print(f"  {case:10}" + "  ".join(cells))


def write(args: argparse.Namespace, pack: Pack, tables: dict[str, Any]) -> None:
    from ragsr.env import provenance

    settings = {name: getattr(args, name) for name in ("encoder", "degradation", "groups", "steps", "seed")}
    document = {"settings": settings, "photos": len(pack.queries), "tables": tables, "provenance": provenance()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
