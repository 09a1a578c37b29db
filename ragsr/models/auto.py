"""`auto`: `refnet` for a photo that was only reduced, `refnet-real` for one with blur, noise or compression, and a mean
of both where it is hard to tell; what `ragsr restore` uses unless told otherwise.

    photo ─▶ Gate ─▶ share        restored = (1 - share) · refnet + share · refnet-real

The photo is judged once, as a whole. Both models see the same registered references, and one that has no part in the
result does not run.

Source: Jacobs, Jordan, Nowlan and Hinton, Adaptive mixtures of local experts, Neural Computation 3, 1991 (the gate).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ragsr.errors import InputError
from ragsr.models.alignment import align, enlarge_low
from ragsr.models.loading import CONFIG, WEIGHTS, load_into, load_weights, read_folder, save_folder
from ragsr.models.refnet import ASSET as REFNET
from ragsr.models.refnet import REAL, RefNet, ensemble
from ragsr.models.views import PreparedReferences, check_image

ASSET = REFNET.parent / "auto"
SURE = 0.25  # a share below it is 0, and one above 1 - SURE is 1: a second model would hardly change the result there
CONTRAST = 16.0  # which brings detail to about one
LEAST = 1e-2  # of that, before the logarithm
WINDOW, WINDOWS = 128, 4  # of a large photo, WINDOWS² squares of that side are judged


class Gate(nn.Module):
    """How much of the result is to come from the model for bad photos: low [B, 3, h, w] in [0, 1] -> share [B].

    It sees what a mean over 3 × 3 pixels takes away, where noise and the edges of JPEG's blocks are, or, after a blur,
    nothing is; and of what it finds there it knows how much there is in the whole photo.
    """

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Conv2d(a, channels, 3, padding=1) for a in (3, channels, channels))
        self.verdict = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 1))

    def forward(self, low: Tensor) -> Tensor:
        return self.logit(low).sigmoid()

    def logit(self, low: Tensor) -> Tensor:
        x = CONTRAST * (low - F.avg_pool2d(F.pad(low, (1, 1, 1, 1), mode="replicate"), 3, 1))
        for layer in self.body:
            x = F.leaky_relu(layer(x), 0.1)
        return self.verdict((x.abs().mean((2, 3)) + LEAST).log())[:, 0]


class Auto:
    """The model `auto`: ×4, deterministic; every image [1, 3, H, W] float32 in [0, 1]."""

    name = "auto"
    context = RefNet.context

    def __init__(self, gate: Gate, clean: RefNet, bad: RefNet) -> None:
        self.gate, self.clean, self.bad = gate.eval(), clean, bad
        self.scale = clean.scale

    @classmethod
    def load(cls, folder: str | Path = ASSET, scale: int = 4) -> "Auto":
        """The gate of that folder, as `save_gate` wrote it, and the two models that ship.

        Raises `InputError` for another scale than 4 and for weights that do not fit.
        """
        if scale != 4:
            raise InputError(f"model 'auto' enlarges 4 times, not {scale} times; use scale 4")
        folder, gate = Path(folder), Gate()
        if read_folder(folder) != {"model": cls.name}:
            raise InputError(f'{folder / CONFIG}: is not of the model {cls.name}; it must say "model": "{cls.name}"')
        load_into(gate, load_weights(folder / WEIGHTS), str(folder / WEIGHTS))
        return cls(gate, RefNet.load(), RefNet.load(REAL))

    def prepare(self, references: Sequence[Tensor]) -> PreparedReferences:
        """As `RefNet.prepare`; both models see the same."""
        return self.clean.prepare(references)

    @torch.no_grad()
    def share_of(self, low: Tensor) -> float:
        """How bad the photo [1, 3, h, w] is: the share of `refnet-real` in its result, 0 or 1 where that is clear."""
        check_image("the low-quality image", low, 1)
        share = float(self.gate.to(low.device)(windows(low)).mean())
        return 0.0 if share < SURE else 1.0 if share > 1 - SURE else share

    @torch.no_grad()
    def restore(self, low: Tensor, prepared: PreparedReferences, share: float) -> tuple[Tensor, Tensor]:
        """Restore low [1, 3, h, w], or a part of a photo, with that share."""
        check_image("the low-quality image", low, 1)
        enlarged, clues = enlarge_low(low, self.scale), [one.clues for one in align(low, prepared, self.scale)]
        image, weight = torch.zeros_like(enlarged), torch.zeros_like(enlarged[:, :1])
        for model, part in ((self.clean, 1 - share), (self.bad, share)):
            if part > 0:
                found = ensemble(model.net.to(low.device), low, enlarged, clues)
                image, weight = image + part * found[0], weight + part * found[1]
        return image.clamp(0, 1), weight

    def __call__(self, low: Tensor, prepared: PreparedReferences) -> tuple[Tensor, Tensor]:
        """Restore low [1, 3, h, w]: the image [1, 3, 4h, 4w], and how much came from the references [1, 1, 4h, 4w]."""
        return self.restore(low, prepared, self.share_of(low))

    def for_photo(
        self, low: Tensor, prepared: PreparedReferences
    ) -> Callable[[Tensor, slice, slice, tuple[int, int, int, int]], tuple[Tensor, Tensor]]:
        """Judge the photo once for all its tiles: see `ragsr.pipelines.refsr.PhotoModel`."""
        share = self.share_of(low)
        return lambda part, rows, columns, margins: self.restore(part, prepared, share)


def windows(low: Tensor) -> Tensor:
    """The photo [1, 3, h, w], or of a large one squares that are spread over it evenly: [N, 3, WINDOW, WINDOW].

    So the time it takes to judge a photo does not grow with it.
    """
    height, width = low.shape[-2:]
    if height * width <= (WINDOW * WINDOWS) ** 2 or min(height, width) < WINDOW:
        return low
    tops, lefts = ([round(i * (size - WINDOW) / (WINDOWS - 1)) for i in range(WINDOWS)] for size in (height, width))
    return torch.cat([low[..., top : top + WINDOW, left : left + WINDOW] for top in tops for left in lefts])


def save_gate(folder: Path, gate: Gate) -> None:
    """Write a folder that `Auto.load` reads."""
    save_folder(folder, {"model": Auto.name}, gate)
