"""Small pictures for tests that only need different ones."""

from pathlib import Path

import numpy as np
from PIL import Image

SAMPLES = ("astronaut", "coffee", "chelsea", "rocket")


def picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    """Smooth colours, other ones for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_photos(folder: Path) -> Path:
    """0.png to 5.png, the last two in a folder below."""
    (folder / "deep").mkdir(parents=True)
    for seed in range(6):
        picture(seed).save(folder / ("deep" if seed > 3 else "") / f"{seed}.png")
    return folder


def write_samples(folder: Path) -> Path:
    """Four photos, as large as training needs them."""
    from skimage import data  # where training is tested, it is there

    for name in SAMPLES:
        photo = Image.fromarray(getattr(data, name)()).resize((480, 440), Image.Resampling.LANCZOS)
        photo.save(folder / f"{name}.png")
    return folder
