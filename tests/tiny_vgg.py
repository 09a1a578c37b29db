"""A VGG of three small convolutions, in torchvision's naming."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def vgg(folder: Path) -> Path:
    """Random weights of a very small VGG."""
    torch.manual_seed(0)
    weights = {}
    for number, (inputs, outputs) in {0: (3, 8), 2: (8, 8), 5: (8, 16)}.items():
        layer = torch.nn.Conv2d(inputs, outputs, 3)
        weights |= {f"features.{number}.{name}": x.detach() for name, x in layer.named_parameters()}
    save_file(weights, folder / "vgg.safetensors")
    return folder / "vgg.safetensors"
