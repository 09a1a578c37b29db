"""What the network sees at each step: crops by themselves, and pairs with their references."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ragsr.errors import InputError
from ragsr.training.pairs import large, load_pair
from ragsr.training.photos import Crops, Photo, pixels_to_tensor, turned

Batch = tuple[Tensor, tuple[Tensor, ...]]  # truth [B, 3, H, W] and, per reference, clues [B, 6, H, W]
DROPPED = 0.1  # share of the pairs whose references are taken away


class Samples:
    """The batches of a run: plain crops, and from the stage `reference` on also pairs."""

    def __init__(self, side: int, batch: int, seed: int, photos: Sequence[Photo], pairs: Sequence[Path] = ()) -> None:
        self.side, self.batch, self.seed = side, batch, seed
        self.crops = Crops(photos, side)
        self.pairs = [load_pair(path) for path in pairs]

    def draw(self, step: int) -> list[Batch]:
        """What the network sees at that step."""
        generator = np.random.default_rng((self.seed, step))
        if not self.pairs:
            return [(self.crops.draw(self.batch, generator), ())]
        with_reference = self.batch // 2
        drawn = [self._draw_pair(generator) for _ in range(with_reference)]
        plain = [self.crops.draw(self.batch - with_reference, generator)]
        plain += [truth for truth, clues in drawn if not len(clues)]
        return [(torch.cat(plain), ()), *grouped([one for one in drawn if len(one[1])])]

    def _draw_pair(self, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Truth [1, 3, S, S] and clues [R, 6, S, S], cropped, turned, in any order, sometimes without references."""
        pair = self.pairs[generator.integers(len(self.pairs))]
        top, left = (4 * int(generator.integers((n - self.side) // 4 + 1)) for n in pair.truth.shape[:2])  # same phase
        square = slice(top, top + self.side), slice(left, left + self.side)
        way, order = int(generator.integers(8)), generator.permutation(len(pair.clues))
        clues = pair.clues[order][:, :, *square] if generator.random() >= DROPPED else pair.clues[:0, :, *square]
        return turned(pixels_to_tensor(pair.truth[square]), way), turned(torch.from_numpy(clues).float(), way)


def grouped(drawn: Sequence[tuple[Tensor, Tensor]]) -> list[Batch]:
    """One batch per number of references."""
    batches: list[Batch] = []
    for count in sorted({len(clues) for _, clues in drawn}):
        chosen = [(truth, clues) for truth, clues in drawn if len(clues) == count]
        stacked = torch.stack([clues for _, clues in chosen], dim=1)  # [R, B, 6, S, S]
        batches.append((torch.cat([truth for truth, _ in chosen]), tuple(stacked)))
    return batches


def hold_out(photos: Sequence[Photo], count: int, seed: int) -> tuple[list[Photo], list[Photo]]:
    """Photos to train on, and those of `count` scenes to validate with; scenes with several views train."""
    often = Counter(photo.scene for photo in photos)
    single = sorted(photo.scene for photo in photos if often[photo.scene] == 1 and large(photo))
    if len(single) <= count:
        raise InputError(f"{len(single)} large photos are too few; training needs more than {count}, to validate with")
    held = set(np.random.default_rng(seed).choice(single, count, replace=False).tolist())
    return [p for p in photos if p.scene not in held], [p for p in photos if p.scene in held]
