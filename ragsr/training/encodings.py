"""Examples as the stage `diffusion` learns from them: encoded once, since encoder and reference stage stand still.

A latent is cut where the picture is cut, at multiples of eight pixels. Turning comes first: the latent of a turned
picture is another one.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ragsr.errors import InputError
from ragsr.files import replacing
from ragsr.training.examples import WITHOUT, Batch, Example, load_example
from ragsr.training.objectives import DiffusionObjective, signed
from ragsr.training.pairs import SIDE
from ragsr.training.photos import pixels_to_tensor, turned

ENCODER = "encoder.json"  # beside the encodings: what they were made by
PICTURES, LATENTS = ("truth", "intermediate"), ("z", "z_low", "z_inter")
CELL = 8  # pixels to a latent's place


def make_encodings(
    objective: DiffusionObjective, examples: Sequence[Path], folder: Path, seed: int, half: bool
) -> list[Path]:
    """One file per example; those that are there are kept, if the same networks made them. `half`: under bfloat16."""
    check_encoder(objective, folder)
    paths = [folder / path.name for path in examples]
    missing = [pair for pair in enumerate(zip(examples, paths, strict=True)) if not pair[1][1].exists()]
    for number, (source, path) in tqdm(missing, unit="example", desc="encoding", disable=None):
        generator = np.random.default_rng((seed, number))
        batch = whole_example(load_example(source), int(generator.integers(8)), generator.random() >= WITHOUT)
        device = next(objective.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            encoded = objective.encoded({name: x.to(device) for name, x in batch.items()})
        kept = {name: to_pixels(encoded[name]) for name in PICTURES}
        kept |= {name: encoded[name][0].half().cpu().numpy() for name in LATENTS}
        with replacing(path) as temporary:
            np.savez(temporary, allow_pickle=False, **kept)
    return paths


def whole_example(example: Example, way: int, with_reference: bool) -> Batch:
    """A batch of one, uncut, laid down in one of eight ways."""
    batch = {"truth": pixels_to_tensor(example.truth), "low": pixels_to_tensor(example.low)}
    if with_reference:
        batch["clues"] = torch.from_numpy(example.clues).float()[None]
    return {name: turned(x, way) for name, x in batch.items()}


def to_pixels(picture: Tensor) -> np.ndarray:
    """[1, 3, H, W] in [-1, 1] -> uint8 [H, W, 3]"""
    pixels = ((picture[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(1, 2, 0).cpu().numpy()


def check_encoder(objective: DiffusionObjective, folder: Path) -> None:
    made_by = {"autoencoder": fingerprint(objective.vae), "reference": fingerprint(objective.reference)}
    path = folder / ENCODER
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(made_by, indent=2) + "\n")
    elif json.loads(path.read_text()) != made_by:
        raise InputError(
            f"{folder}: was made by another autoencoder or reference stage; choose another --out, or remove it"
        )


def fingerprint(net: nn.Module) -> int:
    """A checksum of all weights."""
    return zlib.crc32(b"".join(x.detach().cpu().float().numpy().tobytes() for x in net.state_dict().values()))


class Encodings:
    """The batches of a run, drawn by step."""

    def __init__(self, paths: Sequence[Path], side: int, batch: int, seed: int) -> None:
        self.paths, self.side, self.batch, self.seed = paths, side, batch, seed

    def draw(self, *number: int) -> Batch:
        """The batch of that step: pictures [B, 3, S, S] and latents [B, c, S/8, S/8]."""
        generator = np.random.default_rng((self.seed, *number))
        drawn = [self._draw_one(generator) for _ in range(self.batch)]
        return {name: torch.cat([one[name] for one in drawn]) for name in drawn[0]}

    def _draw_one(self, generator: np.random.Generator) -> Batch:
        places = (SIDE - self.side) // CELL + 1
        top, left = (int(generator.integers(places)) for _ in range(2))
        rows, columns = (slice(one, one + self.side // CELL) for one in (top, left))
        fine = tuple(slice(one.start * CELL, one.stop * CELL) for one in (rows, columns))
        with load_encoding(self.paths[int(generator.integers(len(self.paths)))]) as file:
            pictures = {name: signed(pixels_to_tensor(file[name][fine])) for name in PICTURES}
            latents = {name: torch.from_numpy(file[name][:, rows, columns])[None].float() for name in LATENTS}
        return pictures | latents


def load_encoding(path: Path) -> "np.lib.npyio.NpzFile":
    try:
        file: np.lib.npyio.NpzFile = np.load(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is damaged ({error}); remove it, and it is made again") from error
    return file
