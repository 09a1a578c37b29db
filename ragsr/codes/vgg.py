"""VGG16 in plain layers: the features that ReFIR and iRAG search by.

Parameters are named as torchvision names them, so that its published ImageNet file loads. It is 528 MB and not part of
ragsr: `find_weights` says where it is looked for and how to get it.

Source: Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015, Table 1
(D); ReFIR's code (`pool5`: the last maps, averaged: 512); iRAG's (`fc`: the second hidden layer: 4096).
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ragsr.codes.features import FeatureExtractor, normalised, squashed
from ragsr.errors import InputError
from ragsr.models.loading import load_into, load_weights

LAYOUT = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # channels; 0: halve the sides
FILE = "vgg16-397923af.pth"
SIDE = 224


class VGG16(nn.Module):
    """float32 [B, 3, 224, 224], normalised as ImageNet: `pool5` [B, 512, 7, 7], `fc` [B, 4096]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for wide in LAYOUT:
            if wide:
                layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU()]
                channels = wide
            else:
                layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(  # in torchvision dropouts stand between: 0, 3 and 6 have parameters
            nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Identity(), nn.Linear(4096, 4096), nn.ReLU(), nn.Identity(),
            nn.Linear(4096, 1000),
        )  # fmt: skip

    def pool5(self, x: Tensor) -> Tensor:
        return self.features(x)

    def fc(self, x: Tensor) -> Tensor:
        return self.classifier[:5](self.pool5(x).flatten(1))


class VGGFeatures(FeatureExtractor):
    """`vgg16-512`: the average of `pool5` (ReFIR); `vgg16-4096`: `fc` (iRAG)."""

    preprocessing = f"rgb, bilinear {SIDE}x{SIDE}, ImageNet mean and deviation"

    def __init__(self, net: VGG16, size: int) -> None:
        self.net, self.size, self.name = net.eval(), size, f"vgg16-{size}"

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        x = normalised(squashed(images, SIDE))
        return self.net.fc(x) if self.size == 4096 else self.net.pool5(x).mean((2, 3))


@cache
def load_vgg16(path: Path) -> VGG16:
    """The network with the weights of a file."""
    with torch.device("meta"):
        net = VGG16()
    net.to_empty(device="cpu")
    load_into(net, load_weights(path), str(path))
    return net


def find_weights() -> Path:
    """torchvision's file where PyTorch keeps its downloads; `InputError` with the command that fetches it."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.is_file():
        url = f"https://download.pytorch.org/models/{FILE}"
        raise InputError(
            f"{path}: the weights of VGG16 are not there; fetch them (528 MB): "
            f"python -c \"import torch; torch.hub.load_state_dict_from_url('{url}')\""
        )
    return path
