"""How fast encoders code, and how their scores of right and wrong first hits lie to the threshold.

    python benchmarks/codes.py --data PACK --candidates PHOTOS --json benchmarks/results/codes.json

How well they find is told by `ragsr eval retrieval`. Here: the scores of the first hits by cosine, right and wrong ones
apart; and the processor time of one thread to code a picture of 256 × 256.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ragsr.codes import load_encoder
from ragsr.env import provenance
from ragsr.evaluation import DEGRADATIONS, load_pack
from ragsr.image import find_images, load_image
from ragsr.ops import hamming_distance

GROUPS = ("multiview", "pairs", "synthcrop")
PICTURES, ROUNDS = 16, 5  # of the timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="an evaluation pack")
    parser.add_argument("--candidates", type=Path, nargs="+", default=[], help="more photos to search among")
    parser.add_argument("--encoders", nargs="+", default=["baseline-64", "hash-16", "hash-64", "hash-256"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    packs = [load_pack(args.data, degradation, GROUPS) for degradation in DEGRADATIONS]
    extra = find_images(args.candidates) if args.candidates else []
    paths = sorted({path.resolve() for path in (*(args.data / name for name in packs[0].references), *extra)})
    paths = [paths[i] for i in np.random.default_rng(args.seed).permutation(len(paths))]
    document = {"candidates": len(paths), "seed": args.seed, "encoders": {}}
    for name in args.encoders:
        found = measure(name, packs, args.data, paths)
        document["encoders"][name] = found
        print(f"\n{name}: {found['milliseconds_per_picture']} ms a picture on one thread")
        for row in found["scores"]:
            print("  score", json.dumps(row))
    if args.json:
        args.json.write_text(json.dumps({**document, "run": provenance()}, indent=2) + "\n")


def measure(name: str, packs: list, folder: Path, paths: list[Path]) -> dict:
    encoder = load_encoder(name)
    codes, features = described(encoder, paths)
    scores = []
    for pack in packs:
        queries = [query for query in pack.queries if query.same_scene]
        own, close = described(encoder, [query.low for query in queries])
        right = torch.tensor(
            [[path in {(folder / n).resolve() for n in query.same_scene} for path in paths] for query in queries]
        )
        distances, cosines = hamming_distance(own, codes), close @ features.T
        first = cosines.argmax(dim=1)
        scores.append({"degradation": pack.degradation} | first_scores(encoder, first, right, distances, cosines))
    return {
        "id": encoder.id,
        "milliseconds_per_picture": milliseconds_per_picture(encoder),
        "scores": scores,
    }


def first_scores(encoder, first, right, distances, cosines) -> dict:
    """How the scores of right and wrong first hits lie to the threshold."""
    place = torch.arange(len(first))
    good = right[place, first].tolist()
    told = [
        encoder.score(int(d), float(c)) for d, c in zip(distances[place, first], cosines[place, first], strict=True)
    ]
    found = {"threshold": encoder.threshold}
    for name, wanted in (("right", True), ("wrong", False)):
        of_kind = [score for score, is_right in zip(told, good, strict=True) if is_right == wanted]
        over = sum(score >= encoder.threshold for score in of_kind)
        found[name] = {"count": len(of_kind), "mean": round(float(np.mean(of_kind or [0])), 3), "at_or_over": over}
    return found


def described(encoder, paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [
        encoder.describe([load_image(path)]) for path in tqdm(paths, unit="image", desc=encoder.name, disable=None)
    ]
    codes, features = zip(*pairs, strict=True)
    return torch.cat(codes), torch.cat(features)


def milliseconds_per_picture(encoder) -> float:
    """Processor time of one thread, the best of several rounds."""
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(PICTURES)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for picture in pictures:
            encoder.describe([picture])
        times.append(time.thread_time() - start)
    torch.set_num_threads(threads)
    return round(1000 * min(times) / PICTURES, 2)


if __name__ == "__main__":
    main()
