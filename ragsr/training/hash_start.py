"""What a hash training begins with, and whom it learns from."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ragsr.codes.hashing import BACKBONE, SHIPPED, Backbone, load_hash
from ragsr.codes.mobilenet import MobileNet
from ragsr.errors import InputError
from ragsr.models.loading import load_into

GRAPH, ARRAYS = "_graph.json", "_dequant.npz"
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
    weights = read_mobilenet(path)
    net = MobileNet(len(weights["layers.0.bias"]) / 32)
    load_into(net, weights, str(path))
    return Teacher(net)


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


def read_mobilenet(path: Path) -> dict[str, Tensor]:
    """The weights of `codes.mobilenet.MobileNet` from a TensorFlow Lite graph that was written out in floats.

    NAME_dequant.npz holds the arrays (tI for tensor I), NAME_graph.json beside it the operations in their order.
    """
    graph_path = path.with_name(path.name.removesuffix(ARRAYS) + GRAPH)
    if not path.name.endswith(ARRAYS) or not path.is_file() or not graph_path.is_file():
        raise InputError(f"{path}: a MobileNet comes as NAME{ARRAYS} with NAME{GRAPH} beside it")
    arrays = np.load(path)
    weights: dict[str, Tensor] = {}
    for operation in json.loads(graph_path.read_text())["ops"]:
        if operation["op"] == "AVERAGE_POOL_2D":
            break
        kernel, bias = (torch.from_numpy(arrays[f"t{i}"].astype(np.float32)) for i in operation["inputs"][1:3])
        deep = operation["op"] == "DEPTHWISE_CONV_2D"  # [1, h, w, channels], else [out, h, w, in]
        name = f"layers.{len(weights) // 2}"
        weights[f"{name}.weight"] = kernel.permute(3, 0, 1, 2) if deep else kernel.permute(0, 3, 1, 2)
        weights[f"{name}.bias"] = bias
    return {name: x.contiguous() for name, x in weights.items()}
