"""What a hash training begins with, and whom it learns from."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ragsr.codes.hashing import BACKBONE, SHIPPED, Backbone, load_hash
from ragsr.codes.mobilenet import ARRAYS, MobileNet, load_mobilenet, read_mobilenet
from ragsr.errors import InputError

FLOOR = 1e-3  # of a direction's variance, in shares of the mean


class Teacher(nn.Module):
    """Features as a larger network sees them: less their mean, their directions evened out by half, of length one."""

    def __init__(self, net: MobileNet) -> None:
        super().__init__()
        self.net = net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a gap of the stubs
        self.register_buffer("centre", torch.zeros(net.size))
        self.register_buffer("turn", torch.eye(net.size))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize((self.net(x) - self.centre) @ self.turn, dim=1)

    def fit(self, features: Tensor) -> None:
        """Learn mean and directions from raw features [n, size]."""
        self.centre = features.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov((features - self.centre).T))
        self.turn = directions * (variances.clamp_min(0) + FLOOR * variances.mean()) ** -0.25


def load_teacher(path: Path) -> Teacher:
    return Teacher(load_mobilenet(path))


def initial_backbone(init: str) -> dict[str, Tensor]:
    """The backbone of a shipped encoder, of a folder that `ragsr train hash` wrote, or of a MobileNet's file."""
    if init in SHIPPED or Path(init).is_dir():
        from ragsr.codes.encoder import load_encoder

        encoder = load_encoder(init) if init in SHIPPED else load_hash(init)
        return encoder.extractor.backbone.state_dict()  # type: ignore[attr-defined] # a HashEncoder
    if init.endswith(ARRAYS):
        weights = {f"net.{name}": x for name, x in read_mobilenet(Path(init)).items()}
        own = Backbone().state_dict()
        if any(name not in own or own[name].shape != x.shape for name, x in weights.items()):
            raise InputError(f"{init}: is of another architecture; the backbone is a MobileNet v1 of width 0.25")
        return weights
    raise InputError(f"{init}: begin with {', '.join(SHIPPED)}, a folder with {BACKBONE}, or NAME{ARRAYS}")
