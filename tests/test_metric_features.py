"""The distance of deep features: against the formula written out, with each kind of network, and as a metric."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from skimage import data
from tiny_vgg import vgg
from torch.nn import functional as F

from ragsr.codes.mobilenet import MobileNet
from ragsr.errors import InputError
from ragsr.metrics import load_measures
from ragsr.metrics.features import load_perceptual

HASH = Path(__file__).parents[1] / "ragsr" / "assets" / "hash" / "hash-64"
ASTRONAUT = Image.fromarray(data.astronaut()).resize((128, 128))


def unit(x):
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)  # ReLU may leave nothing


def test_the_formula_written_out(tmp_path):
    path = vgg(tmp_path)
    made, truth = torch.rand(2, 2, 3, 32, 32).double().unbind()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[:, None, :, None, None].unbind()
    w = {name: x.double() for name, x in load_file(path).items()}

    def seen(x):
        x = (x - mean) / std
        for number in (0, 2):
            x = F.relu(F.conv2d(x, w[f"features.{number}.weight"], w[f"features.{number}.bias"], padding=1))
        yield x
        yield F.relu(F.conv2d(F.max_pool2d(x, 2), w["features.5.weight"], w["features.5.bias"], padding=1))

    stages = [((unit(a) - unit(b)) ** 2).sum(1).mean((1, 2)) for a, b in zip(seen(made), seen(truth), strict=True)]
    assert torch.allclose(load_perceptual(path)(made.float(), truth.float()).double(), sum(stages) / 2, rtol=1e-4)


def published(folder):
    """A MobileNet of width 0.25 as a graph in floats and the names of its arrays."""
    torch.manual_seed(0)
    layers, operations, arrays = MobileNet().layers, [], {}
    for number, layer in enumerate(layers):
        deep = layer.groups > 1
        weight = layer.weight.detach().permute((1, 2, 3, 0) if deep else (0, 2, 3, 1))
        arrays |= {f"t{2 * number}": weight.numpy(), f"t{2 * number + 1}": layer.bias.detach().numpy()}
        name = "DEPTHWISE_CONV_2D" if deep else "CONV_2D"
        operations.append({"op": name, "inputs": [99, 2 * number, 2 * number + 1]})
    np.savez(folder / "net_dequant.npz", **arrays)
    (folder / "net_graph.json").write_text(json.dumps({"ops": [*operations, {"op": "AVERAGE_POOL_2D"}]}))
    return folder / "net_dequant.npz", layers


def test_a_published_mobilenet(tmp_path):
    path, layers = published(tmp_path)
    distance = load_perceptual(path)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(distance.stages[0](x), layers[:3](x))  # until the sides are halved again
    assert len(distance.stages) == 4


@pytest.mark.parametrize("name", ["net_dequant.npz", "net_graph.json"])
def test_a_damaged_mobilenet(tmp_path, name):
    path, _ = published(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    with pytest.raises(InputError, match="is no MobileNet that can be read"):
        load_perceptual(path)


NETWORKS = {"vgg": vgg, "published": lambda folder: published(folder)[0], "hash": lambda _: HASH}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_what_looks_worse_is_farther(tmp_path, network):
    measure = load_measures(["features"], network=network(tmp_path))["features"]
    distances = [measure(ASTRONAUT.filter(ImageFilter.GaussianBlur(radius)), ASTRONAUT) for radius in (0, 1, 3)]
    assert distances[0] == 0 < distances[1] < distances[2]


def test_other_sizes_are_refused():
    measure = load_measures(["features"], network=HASH)["features"]
    with pytest.raises(InputError, match="128x128 and 128x127"):
        measure(ASTRONAUT, ASTRONAUT.crop((0, 0, 128, 127)))


def test_a_network_is_needed(tmp_path):
    with pytest.raises(InputError, match=r"--features FILE\|DIR"):
        load_measures(["features"])
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"holds no features\.0\.weight"):
        load_measures(["features"], network=tmp_path / "other.safetensors")
