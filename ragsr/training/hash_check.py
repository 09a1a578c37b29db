"""How well a hash encoder finds, on photos that it did not learn from; and what its scores mean.

Queries are crops of held-out photos, made bad and four times smaller. They are searched among clean, wider crops of the
same photos and, as distractors, the photos that were learned from. Held-out scenes with several photos give the hardest
queries: the whole photo, made bad, searches another photo of its scene.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ragsr.training.degrade import Recipe, degrade_image
from ragsr.training.hash_views import Camera, prepared, reduced, taken
from ragsr.training.photos import Photo

QUERIES = 2  # of each held-out photo
SMALLER = Recipe(scale=(4.0, 4.0))
NARROW, WIDE = Camera((0.2, 0.6), 0.15, (352, 512)), Camera((0.4, 1.0), sides=(352, 512))

Coder = Callable[[Tensor], tuple[Tensor, Tensor]]  # uint8 [n, 3, S, S] -> codes of ±1 [n, bits], features [n, D]


def split(photos: Sequence[Photo], seed: int, most: int = 100) -> tuple[list[Photo], list[Photo]]:
    """Photos to learn from, and to check with: a quarter of the scenes, those with several photos first."""
    often = Counter(photo.scene for photo in photos)
    scenes = sorted(often)
    order = np.random.default_rng(seed).permutation(len(scenes))
    ranked = sorted((scenes[i] for i in order), key=lambda scene: often[scene] == 1)
    held = set(ranked[: min(most, len(scenes) // 4)])
    return [photo for photo in photos if photo.scene not in held], [photo for photo in photos if photo.scene in held]


class Check:
    """Queries and candidates, prepared; every number it tells is of a search among all candidates."""

    def __init__(self, held: Sequence[Photo], others: Sequence[Photo], side: int, seed: int) -> None:
        often = Counter(photo.scene for photo in held)
        queries, references = [], []
        self.own: list[int] = []  # of each query: the reference made from the same photo
        for number, photo in enumerate(held):
            generator = np.random.default_rng((seed, number))
            picture, alone = reduced(photo), often[photo.scene] == 1
            references.append(taken(picture, generator, WIDE) if alone else picture)
            for _ in range(QUERIES if alone else 1):
                seen = taken(picture, generator, NARROW) if alone else picture
                queries.append(degrade_image(seen, generator, SMALLER))
                self.own.append(number)
        self.queries = stacked(queries, side)
        self.candidates = stacked([*references, *map(reduced, others)], side)
        scenes = [photo.scene for photo in (*held, *others)]
        of_query = [held[number].scene for number in self.own]
        self.right = torch.tensor([[a == b for b in scenes] for a in of_query])  # [Q, N]
        self.several = torch.tensor([often[scene] > 1 for scene in of_query])
        rows = self.several.nonzero()[:, 0]
        self.hidden = torch.zeros_like(self.right)  # a photo does not search itself
        self.hidden[rows, torch.tensor(self.own)[rows]] = True
        self.right &= ~self.hidden

    def measure(self, coder: Coder) -> dict[str, float]:
        """Hit rates at 1 and 5 of the codes and of the features, and how the codes use their bits."""
        (codes, features), (near, close) = coder(self.candidates), coder(self.queries)
        told: dict[str, float] = {}
        for name, likeness in (("code", near @ codes.T), ("float", close @ features.T)):
            order = likeness.masked_fill(self.hidden, -torch.inf).argsort(dim=1, descending=True, stable=True)
            found = self.right.gather(1, order)
            told |= {f"hit@{k}_{name}": float(found[:, :k].any(1).float().mean()) for k in (1, 5)}
        return told

    def calibrate(self, coder: Coder) -> dict[str, Any]:
        """The fits for `codes.hashing.relevance`, and how good they are.

        Every query counts twice: with its scene among the candidates, and without. What is judged is its first hit, by
        bits for the fit without the cosine, else by the cosine.
        """
        (codes, features), (near, close) = coder(self.candidates), coder(self.queries)
        shares, cosines = (1 - near @ codes.T / codes.shape[1]) / 2, close @ features.T
        fits, told = {}, {}
        for name, likeness in (("distance", -shares), ("both", cosines)):
            rows, labels = [], []
            for gone in (self.hidden, self.hidden | self.right):
                first = likeness.masked_fill(gone, -torch.inf).argmax(1, keepdim=True)
                columns = [-shares.gather(1, first), *([cosines.gather(1, first)] if name == "both" else [])]
                rows.append(torch.cat(columns, 1))
                labels.append(self.right.gather(1, first)[:, 0] & ~gone.gather(1, first)[:, 0])
            x, y = torch.cat(rows).double().numpy(), torch.cat(labels).double().numpy()
            fits[name] = [round(float(w), 4) for w in fit_logistic(x, y)]
            p = 1 / (1 + np.exp(-(fits[name][0] + x @ fits[name][1:])))
            told[f"brier_{name}"] = float(np.square(p - y).mean())
            for what, share in (("kept", p[y == 1] >= 0.5), ("refused", p[y == 0] < 0.5)):  # right and wrong first hits
                told[f"{what}_{name}"] = float(share.mean()) if share.size else 0.0
        return {"score": fits, **told}


def stacked(pictures: Sequence[Image.Image], side: int) -> Tensor:
    """uint8 [n, 3, side, side]"""
    return torch.from_numpy(np.stack([prepared(picture, side) for picture in pictures])).permute(0, 3, 1, 2)


def fit_logistic(
    x: np.ndarray,  # float64 [n, d]
    y: np.ndarray,  # [n] of 0 and 1
) -> np.ndarray:
    """Intercept and slopes of P(y = 1) = 1 / (1 + exp(-(w0 + x · w))), slopes at least 0: float64 [1 + d].

    Newton's method with a little weight decay, so that data that a line divides has an answer too; a slope that would
    be negative is 0.
    """
    used = np.ones(x.shape[1], bool)
    while True:
        rows = np.hstack([np.ones((len(x), 1)), x[:, used]])
        w = np.zeros(rows.shape[1])
        for _ in range(50):
            p = 1 / (1 + np.exp(-np.clip(rows @ w, -60, 60)))
            hessian = rows.T @ (rows * (p * (1 - p))[:, None]) + 1e-3 * np.eye(len(w))
            w -= np.linalg.solve(hessian, rows.T @ (p - y) + 1e-3 * w)
        if (w[1:] >= 0).all():
            out = np.zeros(1 + x.shape[1])
            out[np.flatnonzero(np.concatenate([[True], used]))] = w
            return out
        used[np.flatnonzero(used)[w[1:] < 0]] = False
