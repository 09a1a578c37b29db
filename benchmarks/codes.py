"""How well encoders find references, and how fast they code, with the numbers in a file.

    python benchmarks/codes.py --data PACK --candidates PHOTOS --json benchmarks/results/codes.json

For every encoder: right scene first and among the first five, when photos are ranked by the distance of codes (equal
distances in the order of the index, which is shuffled), by codes and then the first candidates by the cosine of the
features, and by the cosine alone; mean and spread of its scores for right and wrong first hits; and the processor time
of one thread to code a picture of 256 × 256.
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
RERANKED = 50  # candidates that the features put in order, as many as a gallery takes for its first five
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
    document = {"candidates": len(paths), "seed": args.seed, "reranked": RERANKED, "encoders": {}}
    for name in args.encoders:
        found = measure(name, packs, args.data, paths)
        document["encoders"][name] = found
        print(f"\n{name}: {found['milliseconds_per_picture']} ms a picture on one thread")
        for row in found["rows"]:
            counts = "  ".join(f"{group} {row[group]}" for group in GROUPS)
            print(f"  {row['degradation']:9} {row['ranking']:16} {counts}")
        for row in found["scores"]:
            print("  score", json.dumps(row))
    if args.json:
        args.json.write_text(json.dumps({**document, "run": provenance()}, indent=2) + "\n")


def measure(name: str, packs: list, folder: Path, paths: list[Path]) -> dict:
    encoder = load_encoder(name)
    codes, features = described(encoder, paths)
    rows, scores = [], []
    for pack in packs:
        queries = [query for query in pack.queries if query.same_scene]
        own, close = described(encoder, [query.low for query in queries])
        right = torch.tensor(
            [[path in {(folder / n).resolve() for n in query.same_scene} for path in paths] for query in queries]
        )
        distances, cosines = hamming_distance(own, codes), close @ features.T
        by_code = distances.argsort(dim=1, stable=True)
        near = by_code[:, :RERANKED]
        again = near.gather(1, cosines.gather(1, near).argsort(dim=1, descending=True, stable=True))
        orders = {
            "code": by_code,
            "code, feature": again,
            "feature": cosines.argsort(dim=1, descending=True, stable=True),
        }
        for ranking, order in orders.items():
            hits = right.gather(1, order[:, :5])
            row = {"degradation": pack.degradation, "ranking": ranking}
            for group in GROUPS:
                chosen = torch.tensor([query.group == group for query in queries])
                row[group] = f"{int(hits[chosen, 0].sum())} {int(hits[chosen].any(1).sum())} of {int(chosen.sum())}"
            rows.append(row)
        scores.append({"degradation": pack.degradation} | first_scores(encoder, again[:, 0], right, distances, cosines))
    return {
        "id": encoder.id,
        "milliseconds_per_picture": milliseconds_per_picture(encoder),
        "rows": rows,
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
