"""What a model with a diffusion stage is worth, on a pack of photos with known truth.

    python benchmarks/irag_evidence.py --data pack --model runs/rich/model --json evidence.json \
        --markdown evidence.md --sheets /tmp/sheets
    python benchmarks/irag_evidence.py --data pack --model runs/rich/model --scenes 8 --inputs degraded
    python benchmarks/irag_evidence.py --data pack --model ragsr/assets/rich --faithful refnet-real
    python benchmarks/irag_evidence.py --data pack --model refnet --stages faithful

Each photo is restored from its low-quality copies, with four choices of reference:

    true        the first of the photo's best
    retrieved   what its code finds among all references of the pack; nothing, if that is not like enough
    none
    random      one of another scene

`faithful` is what `rich` begins with, or, with --faithful, what another reference stage makes. What comes to the same
references (`retrieved` often is the true one) or to the same intermediate result (a random reference is often not used
at all) is not computed twice.

Means and paired differences over the photos have a 95 % interval: a bootstrap over scenes. A difference is called
better or worse where its whole interval lies on that side of 0, and open otherwise.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from irag_sheet import Shown, why_not, write_sheets
from irag_tables import markdown, summary
from PIL import Image
from tqdm import tqdm

from ragsr.env import provenance
from ragsr.errors import InputError
from ragsr.evaluation import DEGRADATIONS, Pack, Query, load_pack, pack_gallery
from ragsr.evaluation.pack import load_low, load_truth
from ragsr.evaluation.restoring import measured, name_in, random_reference
from ragsr.gallery import Gallery
from ragsr.image import load_image
from ragsr.metrics import USUAL, load_measures
from ragsr.metrics.named import FEATURES, describe
from ragsr.pipelines import RefSRPipeline, load_pipeline
from ragsr.pipelines.refsr import picture_of

STAGES = ("faithful", "rich")
ON_SHEET = 12  # scenes


@dataclass
class Row:
    """The scores of one picture."""

    photo: str
    scene: str
    input: str
    stage: str  # bicubic, faithful or rich
    reference: str | None  # which kind; None for bicubic
    references: list[str]
    seconds: float | None  # of one thread, all stages; None where the picture was made for another kind
    metrics: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    started, network = time.perf_counter(), args.features
    packs = {one: load_pack(args.data, one, args.groups) for one in args.inputs}
    pipeline = load_pipeline(model=args.model, quality=args.stages[-1], steps=args.steps, seed=args.seed)
    rows, sheets = collect(packs, pipeline, load_pipeline(model=args.faithful) if args.faithful else None, args)
    told = summary([asdict(row) for row in rows], args.seed)
    settings = {name: getattr(args, name) for name in ("inputs", "groups", "scenes", "stages", "preset", "seed")}
    document = {
        "evaluation": "irag evidence",
        "model": Path(args.model).name,
        "faithful": Path(args.faithful or args.model).name,
        "weights": fingerprints(Path(args.model)),
        **settings,
        "steps": pipeline.steps,
        "metrics": {name: describe(name, args.preset, network and network.name) for name in metrics_of(network)},
        **told,
        "seconds": round(time.perf_counter() - started, 1),
        "provenance": provenance(),
        "rows": [asdict(row) for row in rows],
    }
    print(markdown(document))
    for path, text in ((args.json, json.dumps(document, indent=2) + "\n"), (args.markdown, markdown(document))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for name, shown in sheets.items():
        print(*write_sheets(args.sheets, name, shown), sep="\n")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", metavar="DIR", required=True, help="an evaluation pack")
    parser.add_argument("--model", metavar="NAME|DIR", required=True, help="as in ragsr restore --quality rich")
    parser.add_argument("--faithful", metavar="NAME|DIR", help="the reference stage to compare with; default: its own")
    parser.add_argument("--inputs", nargs="+", choices=DEGRADATIONS, default=list(DEGRADATIONS), help="low quality by")
    parser.add_argument("--groups", nargs="+", default=["multiview", "synthcrop"], help="of photos (%(default)s)")
    parser.add_argument("--scenes", metavar="N", type=int, help="only N scenes, spread over the pack")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="faithful: no diffusion")
    parser.add_argument("--steps", metavar="N", type=int, help="of the diffusion; default: the model's own")
    parser.add_argument("--preset", default="refir", help="how PSNR and SSIM are computed (%(default)s)")
    parser.add_argument("--features", metavar="FILE|DIR", type=Path, help="as in ragsr eval restore")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all scores with device, versions and commit")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="save the tables")
    parser.add_argument("--sheets", type=Path, metavar="DIR", help=f"contact sheets of {ON_SHEET} scenes, not in here")
    args = parser.parse_args(arguments)
    args.stages = [stage for stage in STAGES if stage in args.stages]
    if args.sheets and (reason := why_not(args.sheets)):
        parser.error(reason)
    if args.scenes is not None and args.scenes < 1:
        parser.error(f"--scenes is {args.scenes}; it counts scenes, from 1 on")
    return args


def metrics_of(network: Path | None) -> tuple[str, ...]:
    """The usual ones, and that of deep features where there is a network for it."""
    return (*USUAL, *([FEATURES] if network else []))


def spread(pack: Pack, count: int | None) -> Pack:
    """The pack with so many of its scenes, at equal distances in its order."""
    scenes = list(dict.fromkeys(query.scene for query in pack.queries))
    if count is None or count >= len(scenes):
        return pack
    kept = {scenes[round(place)] for place in np.linspace(0, len(scenes) - 1, count)}
    queries = tuple(query for query in pack.queries if query.scene in kept)
    return Pack(pack.folder, pack.degradation, queries, pack.references)


def fingerprints(model: Path) -> dict[str, str]:
    """Which weights these were. Of a model that ships, the commit says it."""
    found = sorted(model.rglob("*.safetensors")) if model.is_dir() else []
    return {path.relative_to(model).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in found}


# ------------------------------------------------------------------ restoring


def collect(
    packs: dict[str, Pack], pipeline: RefSRPipeline, faithful: RefSRPipeline | None, args: argparse.Namespace
) -> tuple[list[Row], dict[str, list[Shown]]]:
    """The scores of all pictures, and those that are shown, by input."""
    first = next(iter(packs.values()))
    generator = np.random.default_rng(args.seed)
    others = [random_reference(generator, first, query) for query in first.queries]
    few = spread(first, args.scenes)
    on_sheet = {query.name for query in spread(few, ON_SHEET).queries} if args.sheets else set()
    measures = load_measures(metrics_of(args.features), args.preset, network=args.features)
    rows: list[Row] = []
    sheets: dict[str, list[Shown]] = {name: [] for name in packs} if args.sheets else {}
    together = zip(*(pack.queries for pack in packs.values()), others, strict=True)
    photos = [photo for photo in together if photo[0] in few.queries]
    with pack_gallery(first) as gallery:
        for *queries, other in tqdm(photos, unit="photo", disable=None):
            for name, query in zip(packs, queries, strict=True):
                references = references_of(pipeline, first, query, other, gallery)
                pictures = dict(restored(pipeline, load_low(query), references, args.stages, faithful))
                truth = load_truth(query)
                for (stage, kind), (picture, seconds) in pictures.items():
                    scores = measured(measures, picture, truth)
                    used = [name_in(first.folder, path) for path in references.get(kind or "", ())]
                    rows.append(Row(query.name, query.scene, name, stage, kind, used, seconds, scores))
                is_new_scene = query.scene not in {one.name for one in sheets.get(name, ())}
                if query.name in on_sheet and is_new_scene:
                    sheets[name].append(shown(query, truth, pictures, references, args.stages))
    return rows, sheets


References = dict[str, tuple[Path, ...]]  # by kind
Known = list[tuple[torch.Tensor, Image.Image]]  # intermediate results of one photo, and what the diffusion made of them
Pictures = dict[tuple[str, str | None], tuple[Image.Image, float | None]]  # by stage and kind, with the seconds it took


def references_of(pipeline: RefSRPipeline, pack: Pack, query: Query, other: str | None, gallery: Gallery) -> References:
    found, _ = pipeline.retrieve(gallery, pipeline.load(load_low(query)), k=1)
    chosen: References = {
        "true": tuple(pack.folder / name for name in query.best[:1]),
        "retrieved": tuple(one.path for one in found if one.path is not None),
        "none": (),
        "random": () if other is None else (pack.folder / other,),
    }
    needed = {"true": bool(query.best), "random": other is not None}
    return {kind: paths for kind, paths in chosen.items() if needed.get(kind, True)}


def restored(
    pipeline: RefSRPipeline,
    picture: Image.Image,
    references: References,
    stages: Sequence[str],
    faithful: RefSRPipeline | None = None,
) -> Iterator[tuple[tuple[str, str | None], tuple[Image.Image, float | None]]]:
    """Bicubic, and every stage with every kind of reference."""
    size = (picture.width * pipeline.scale, picture.height * pipeline.scale)
    yield ("bicubic", None), (picture.resize(size, Image.Resampling.BICUBIC), None)
    low = pipeline.load(picture)
    made: dict[tuple[Path, ...], dict[str, Image.Image]] = {}
    known: Known = []
    for kind, paths in references.items():
        seconds = None
        if paths not in made:
            start = time.thread_time()
            made[paths] = stages_of(pipeline, low, paths, known, faithful)
            seconds = time.thread_time() - start
        for stage in stages:
            yield (stage, kind), (made[paths][stage], seconds)


@torch.no_grad()
def stages_of(
    pipeline: RefSRPipeline,
    low: torch.Tensor,
    references: tuple[Path, ...],
    known: Known,
    faithful: RefSRPipeline | None = None,
) -> dict[str, Image.Image]:
    """What `pipeline(low, references)` gives, and what it has before the diffusion or what `faithful` makes.

    `known` grows by what is made here. The diffusion sees of the references the intermediate result alone.
    """
    intermediate = before_diffusion(pipeline, low, references)
    first = intermediate if faithful is None else before_diffusion(faithful, low, references)
    pictures = {"faithful": picture_of(first)}
    if pipeline.diffusion is not None and pipeline.steps is not None:
        rich = next((picture for seen, picture in known if torch.equal(seen, intermediate)), None)
        if rich is None:
            rich = picture_of(pipeline.diffuse(pipeline.diffusion, low, intermediate, pipeline.steps))
            known.append((intermediate, rich))
        pictures["rich"] = rich
    return pictures


def before_diffusion(pipeline: RefSRPipeline, low: torch.Tensor, references: tuple[Path, ...]) -> torch.Tensor:
    prepared, _ = pipeline.prepare(references)
    return pipeline.restore(low, prepared)[0]


def shown(query: Query, truth: Image.Image, pictures: Pictures, references: References, stages: Sequence[str]) -> Shown:
    """A row of the sheet, with the true reference where there is one."""
    kind = next(iter(references))
    low = load_low(query).resize(truth.size, Image.Resampling.NEAREST)
    cells = [(low, f"{query.scene}: low quality"), (pictures["bicubic", None][0], "bicubic")]
    cells += [(pictures[stage, kind][0], stage) for stage in stages]
    reference = load_image(references[kind][0]) if references[kind] else Image.new("RGB", truth.size, "white")
    return Shown(query.scene, truth, [*cells, (truth, "truth"), (reference, f"reference: {kind}")])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"irag_evidence.py: {error}")
