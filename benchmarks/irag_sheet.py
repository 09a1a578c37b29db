"""Contact sheets for irag_evidence.py: whole pictures, and the most textured square of each, pixel by pixel."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from PIL import Image

from ragsr.image import image_to_tensor
from ragsr.sheet import Cell, contact_sheet

SIDE = 256  # of the squares
STEP = 8  # pixels between the squares that are tried
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Shown:
    """One photo of a sheet. Pictures with captions, in the order of the sheet; the last one is the reference."""

    name: str
    truth: Image.Image
    cells: list[Cell]


def why_not(folder: Path) -> str | None:
    """Sheets show photos that are not ours to give away, so they must not lie among what is."""
    if folder.resolve().is_relative_to(ROOT):
        return f"{folder} lies in the repository; the photos may not be part of it: name a folder elsewhere"
    return None


def write_sheets(folder: Path, name: str, shown: Sequence[Shown]) -> list[Path]:
    """NAME.png and NAME_squares.png."""
    folder.mkdir(parents=True, exist_ok=True)
    sheets = {name: contact_sheet([one.cells for one in shown])}
    sheets[f"{name}_squares"] = contact_sheet([squares(one) for one in shown], height=SIDE)
    paths = [folder / f"{stem}.png" for stem in sheets]
    for path, sheet in zip(paths, sheets.values(), strict=True):
        sheet.save(path)
    return paths


def squares(shown: Shown) -> list[Cell]:
    """The same square of every picture. Of the reference, which shows the scene from elsewhere, all of it."""
    box = most_textured(shown.truth)
    *pictures, reference = shown.cells
    return [*((picture.crop(box), caption) for picture, caption in pictures), reference]


def most_textured(picture: Image.Image, side: int = SIDE) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the square with the greatest mean square of the gradient."""
    width, height = min(side, picture.width), min(side, picture.height)
    grey = image_to_tensor(picture).mean(1, keepdim=True)
    across, down = grey[..., :-1, 1:] - grey[..., :-1, :-1], grey[..., 1:, :-1] - grey[..., :-1, :-1]
    energy = F.pad(across.square() + down.square(), (0, 1, 0, 1))
    means = F.avg_pool2d(energy, (height, width), STEP)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return left * STEP, top * STEP, left * STEP + width, top * STEP + height
