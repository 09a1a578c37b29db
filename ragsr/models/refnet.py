"""`refnet`: reference-based ×4 super-resolution, learned; one of the two that `ragsr.models.auto` chooses from.

Registration is that of `transfer` (`ragsr.models.alignment`: `ops.correlation_topk` finds, `ops.gather_fold` brings
over). What is taken from the references, and what is added without them, a small network decides (`FusionNet`), which
looks at the photo in its four quarter turns.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ragsr.errors import InputError
from ragsr.models.alignment import CONTEXT, align, enlarge_low
from ragsr.models.fusion import FusionNet
from ragsr.models.loading import CONFIG, WEIGHTS, load_into, load_weights, read_folder, save_folder
from ragsr.models.views import PreparedReferences, check_image, views_of

ASSET = Path(__file__).parent.parent / "assets" / "refnet"
REAL = ASSET.parent / "refnet-real"  # trained with noise and compression
RICH = ASSET.parent / "rich"  # the diffusion stage that ships, with a reference stage of its own
MOST = 1024  # of anything in a config


class RefNet:
    """The model `refnet`: ×4, deterministic; every image [1, 3, H, W] float32 in [0, 1]."""

    name = "refnet"
    context = CONTEXT  # the network itself looks 26 pixels far

    def __init__(self, net: FusionNet) -> None:
        self.net = net.eval()
        self.scale = net.scale

    @classmethod
    def load(cls, folder: str | Path = ASSET, scale: int = 4) -> "RefNet":
        """A model as `save_model` wrote it; without a folder, the one that ships.

        Raises `InputError` for another scale than the model's and for weights that do not fit.
        """
        folder = Path(folder)
        config = read_config(folder)
        net = FusionNet(**config)
        if scale != net.scale:
            raise InputError(f"the model {folder} enlarges {net.scale} times, not {scale} times; use scale {net.scale}")
        load_into(net, load_weights(folder / WEIGHTS), str(folder / WEIGHTS))
        return cls(net)

    def save(self, folder: Path) -> None:
        """Write a folder that `load` reads."""
        save_model(folder, self.net)

    def prepare(self, references: Sequence[Tensor]) -> PreparedReferences:
        """References of any sizes from 8 × 8 pixels, each [1, 3, H, W]; more than 4 megapixels are reduced to 4."""
        return PreparedReferences(tuple(views_of(reference, self.scale) for reference in references))

    @torch.no_grad()
    def __call__(self, low: Tensor, prepared: PreparedReferences) -> tuple[Tensor, Tensor]:
        """Restore low [1, 3, h, w]: the image [1, 3, 4h, 4w], and how much came from the references [1, 1, 4h, 4w]."""
        check_image("the low-quality image", low, 1)
        clues = [one.clues for one in align(low, prepared, self.scale)]
        restored, weight = ensemble(self.net.to(low.device), low, enlarge_low(low, self.scale), clues)
        return restored.clamp(0, 1), weight


def ensemble(net: FusionNet, low: Tensor, enlarged: Tensor, clues: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean over the four quarter turns of the input, each turned back.

    Source: Timofte et al., Seven ways to improve example-based single image super resolution, CVPR 2016, Sec. 3.6.
    """
    image, weight = torch.zeros_like(enlarged), torch.zeros_like(enlarged[:, :1])
    for turn in range(4):
        found = net(*(x.rot90(turn, (2, 3)) for x in (low, enlarged)), [x.rot90(turn, (2, 3)) for x in clues])
        image, weight = (total + x.rot90(-turn, (2, 3)) / 4 for total, x in zip((image, weight), found, strict=True))
    return image, weight


def save_model(folder: Path, net: FusionNet, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that `RefNet.load` reads."""
    save_folder(folder, {"model": RefNet.name, **net.config}, net, dtype)


def read_config(folder: Path) -> dict[str, int]:
    """The arguments of `FusionNet`."""
    config = read_folder(folder)
    if not isinstance(config, dict) or config.pop("model", None) != RefNet.name:
        raise InputError(f'{folder / CONFIG}: is not of the model {RefNet.name}; it must say "model": "{RefNet.name}"')
    names = inspect.signature(FusionNet).parameters
    if set(config) != set(names) or not all(type(n) is int and 0 < n <= MOST for n in config.values()):
        raise InputError(f"{folder / CONFIG}: must give {', '.join(names)}, each a number from 1 to {MOST}")
    return config
