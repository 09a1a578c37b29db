"""Our own small network: the layout of MobileNet v1 in plain layers, its normalisation folded into the convolutions.

Source: A. Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision applications", 2017,
Table 1. Strided layers pad as TensorFlow does (the odd pixel goes right and below), so that published weights fit.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragsr.errors import InputError
from ragsr.models.loading import load_into

GRAPH, ARRAYS = "_graph.json", "_dequant.npz"  # of a published one

# channels at width 1, and stride, of the layer that mixes channels
LAYOUT = (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)


class MobileNet(nn.Module):
    """float32 [B, 3, S, S] in [0, 1], S a multiple of 32, to the mean over all places: [B, 1024 · width]."""

    def __init__(self, width: float = 0.25) -> None:
        super().__init__()
        self.size = int(1024 * width)
        channels = int(32 * width)
        layers: list[nn.Module] = [Padded(3, channels, 2)]
        for full, stride in LAYOUT:
            wide = int(full * width)
            layers += [Padded(channels, channels, stride, groups=channels), Mixed(channels, wide)]
            channels = wide
        self.layers = nn.Sequential(*layers)
        for layer in layers:  # so that signals neither fade nor grow: nothing else normalises them
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type] # convolutions
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * 2 - 1).mean((2, 3))


class Padded(nn.Conv2d):
    """3 × 3, ReLU6; at stride 2 the padding is right and below alone."""

    def __init__(self, channels: int, wide: int, stride: int, groups: int = 1) -> None:
        super().__init__(channels, wide, 3, stride, padding=1 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (2, 2):
            x = F.pad(x, (0, 1, 0, 1))
        return F.relu6(super().forward(x))


class Mixed(nn.Conv2d):
    """1 × 1, ReLU6."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__(channels, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(super().forward(x))


# ------------------------------------------------------------------ published weights


def load_mobilenet(path: Path) -> MobileNet:
    """A published one, of whatever width."""
    weights = read_mobilenet(path)
    net = MobileNet(len(weights["layers.0.bias"]) / 32)
    load_into(net, weights, str(path))
    return net


def read_mobilenet(path: Path) -> dict[str, Tensor]:
    """The weights of `MobileNet` from a TensorFlow Lite graph that was written out in floats.

    NAME_dequant.npz holds the arrays (tI for tensor I), NAME_graph.json beside it the operations in their order.
    """
    graph_path = path.with_name(path.name.removesuffix(ARRAYS) + GRAPH)
    if not path.name.endswith(ARRAYS) or not path.is_file() or not graph_path.is_file():
        raise InputError(f"{path}: a MobileNet comes as NAME{ARRAYS} with NAME{GRAPH} beside it")
    try:
        return weights_of(json.loads(graph_path.read_text())["ops"], np.load(path))
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise InputError(f"{path}: with {graph_path.name} it is no MobileNet that can be read ({error})") from error


def weights_of(operations: Sequence[dict[str, Any]], arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for operation in operations:
        if operation["op"] == "AVERAGE_POOL_2D":
            break
        kernel, bias = (torch.from_numpy(arrays[f"t{i}"].astype(np.float32)) for i in operation["inputs"][1:3])
        deep = operation["op"] == "DEPTHWISE_CONV_2D"  # [1, h, w, channels], else [out, h, w, in]
        name = f"layers.{len(weights) // 2}"
        weights[f"{name}.weight"] = kernel.permute(3, 0, 1, 2) if deep else kernel.permute(0, 3, 1, 2)
        weights[f"{name}.bias"] = bias
    return {name: x.contiguous() for name, x in weights.items()}
