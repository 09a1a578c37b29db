"""A perceptual distance: how differently a fixed network sees two pictures.

The network is the user's choice: the file of a VGG in torchvision's naming (`features.0.weight`, ...), a published
MobileNet v1 (`codes.mobilenet.read_mobilenet`), or a folder that `ragsr train hash` wrote, whose backbone is small.
After each of its stages the features of every place are brought to length one, and their squared difference is
averaged; stages count alike. It is a loss in training, and a metric with a network that was not trained with.

Source: R. Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018, Eq. 1, with
equal weights.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragsr.codes.hashing import load_hash
from ragsr.codes.mobilenet import ARRAYS, load_mobilenet
from ragsr.errors import InputError
from ragsr.metrics.fidelity import Picture, as_tensor, size_text
from ragsr.models.loading import load_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which VGG was trained with
STAGES = 4  # of the network, finest first; what is deeper hardly sees textures


class PerceptualDistance(nn.Module):
    """`stages`: what leads from one set of features to the next. Pictures [B, 3, H, W] in [0, 1] -> [B]."""

    mean: Tensor
    std: Tensor

    def __init__(self, stages: list[nn.Module], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages).eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, made: Tensor, truth: Tensor) -> Tensor:
        a, b = (made - self.mean) / self.std, (truth - self.mean) / self.std
        distances = []
        for stage in self.stages:
            a, b = stage(a), stage(b)
            distances.append((F.normalize(a.float()) - F.normalize(b.float())).square().sum(1).mean((1, 2)))
        return torch.stack(distances).mean(0)


class FeatureMeasure:
    """The distance of two pictures as a metric: 0 for equal ones."""

    def __init__(self, network: Path, device: str | torch.device = "cpu") -> None:
        self.distance = load_perceptual(network).to(device)

    @torch.no_grad()
    def __call__(self, image: Picture, truth: Picture) -> float:
        """Raises `InputError` for images of different sizes."""
        x, y = (as_tensor(one).float().to(self.distance.mean.device) for one in (image, truth))
        if x.shape != y.shape:
            raise InputError(f"features are of images of one size; these are {size_text(x)} and {size_text(y)}")
        return float(self.distance(x, y))


def load_perceptual(path: Path) -> PerceptualDistance:
    """From a folder or a file, see above; `InputError` for anything else."""
    if path.is_dir() or path.name.endswith(ARRAYS):
        return PerceptualDistance(until_strides(mobilenet_layers(path)), (0.5,) * 3, (0.5,) * 3)
    return PerceptualDistance(vgg_stages(load_weights(path), str(path)), MEAN, STD)


def mobilenet_layers(path: Path) -> list[nn.Module]:
    if path.is_dir():
        return list(load_hash(path).extractor.backbone.net.layers)  # type: ignore[attr-defined] # of a HashEncoder
    return list(load_mobilenet(path).layers)


def until_strides(layers: list[nn.Module]) -> list[nn.Module]:
    """Convolutions in groups, each of which begins where the sides are halved."""
    groups: list[list[nn.Module]] = []
    for layer in layers:
        if getattr(layer, "stride", None) == (2, 2) or not groups:
            groups.append([])
        groups[-1].append(layer)
    return [nn.Sequential(*group) for group in groups[:STAGES]]


def vgg_stages(weights: Mapping[str, Tensor], source: str) -> list[nn.Module]:
    """The convolutions of a VGG: their numbers tell where it pools, since a ReLU follows each and a pool counts too."""
    numbers = sorted(int(name.split(".")[1]) for name in weights if is_convolution(name, weights[name]))
    if not numbers:
        raise InputError(f"{source}: holds no features.0.weight and so on; name the weights of a VGG, as torchvision's")
    groups: list[list[nn.Module]] = [[]]
    for before, number in zip([None, *numbers], numbers, strict=False):
        if before is not None and number - before == 3:
            groups.append([nn.MaxPool2d(2)])
        groups[-1] += [convolution(weights, f"features.{number}", source), nn.ReLU()]
    return [nn.Sequential(*group) for group in groups[:STAGES]]


def is_convolution(name: str, x: Tensor) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[0] == "features" and parts[1].isdigit() and parts[2] == "weight" and x.ndim == 4


def convolution(weights: Mapping[str, Tensor], name: str, source: str) -> nn.Conv2d:
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if weight.shape[2:] != (3, 3) or bias is None:
        raise InputError(f"{source}: {name} is no 3x3 convolution with a bias; name the weights of a VGG without norms")
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return layer
