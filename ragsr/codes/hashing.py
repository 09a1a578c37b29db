"""Learned codes: a small network whose features a trained head turns into bits.

    picture -> 160 × 160 -> MobileNet -> less the mean, of length one: the feature -> head (1024) -> signs: the code

A model is a folder, as `ragsr train hash` writes it:

    config.json        what the network is, how it was calibrated, and where its backbone lies
    head.safetensors   the head
    backbone.safetensors, or a file elsewhere that several models share

Source: Qiu et al., "Unsupervised hashing with contrastive information bottleneck", IJCAI 2021; iRAG Sec. 3.1.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ragsr.codes.encoder import CodeEncoder
from ragsr.codes.features import FeatureExtractor, squashed
from ragsr.codes.mobilenet import MobileNet
from ragsr.errors import InputError
from ragsr.files import replacing
from ragsr.models.loading import load_into, load_weights
from ragsr.ops import pack_bits

ASSETS = Path(__file__).parent.parent / "assets" / "hash"
SHIPPED = ("hash-16", "hash-64", "hash-256")
CONFIG, BACKBONE, HEAD = "config.json", "backbone.safetensors", "head.safetensors"
WIDTH, SIDE, HIDDEN = 0.25, 160, 1024


class Backbone(nn.Module):
    """float32 [B, 3, S, S] in [0, 1] to features [B, size] of length one."""

    def __init__(self, width: float = WIDTH) -> None:
        super().__init__()
        self.net = MobileNet(width)
        self.size = self.net.size
        self.centre = nn.Parameter(torch.zeros(self.size))  # features after a ReLU lie in a cone; from here, all around

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.net(x) - self.centre, dim=1)


def make_head(size: int, bits: int, hidden: int = HIDDEN) -> nn.Sequential:
    """Features [B, size] of length one times √size, so that their entries are near 1, to logits [B, bits]."""
    return nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, bits))


class OwnFeatures(FeatureExtractor):
    """The backbone as an extractor. Pictures pass one by one, so that none depends on its neighbours."""

    name = "own"

    def __init__(self, backbone: Backbone, side: int = SIDE) -> None:
        self.backbone, self.side, self.size = backbone.eval(), side, backbone.size
        self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a gap of the stubs
        self.preprocessing = f"rgb, bilinear {side}x{side}"

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pictures = (squashed([image], self.side).contiguous(memory_format=torch.channels_last) for image in images)
        return torch.cat([self.backbone(x) for x in pictures] or [torch.empty(0, self.size)])


class HashEncoder(CodeEncoder):
    """A trained encoder. `config` holds `bits`, `score` (see `relevance`) and `threshold`."""

    version = 1

    def __init__(self, name: str, extractor: FeatureExtractor, head: nn.Module, config: dict[str, Any]) -> None:
        self.name, self.extractor, self.head, self.config = name, extractor, head.eval(), config
        self.bits, self.features, self.preprocessing = config["bits"], extractor.size, extractor.preprocessing
        self.threshold = config["threshold"]
        self.folder: Path | None = None  # of a model that does not ship

    @property
    def source(self) -> str:
        return self.name if self.folder is None else str(self.folder)

    @torch.no_grad()
    def describe(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        features = self.extractor(images)
        rows = [self.head(row * math.sqrt(self.features)) for row in features.split(1)]
        return pack_bits(torch.cat(rows or [torch.empty(0, self.bits)])), features

    def score(self, distance: int, cosine: float | None = None) -> float:
        """The estimated probability that a reference shows the same scene (see `relevance`)."""
        return relevance(self.config["score"], distance / self.bits, cosine)


def relevance(fit: dict[str, Any], share: float, cosine: float | None) -> float:
    """The probability that query and reference show the same scene.

    `share` of the bits differ, `cosine` is that of the features. A logistic function, fitted on held-out scenes
    (`ragsr.training.hash_score`) to the first hit of degraded queries, half of which have a reference: intercept, then
    slopes, each of its sign.
    """
    if cosine is None:
        a, by_share = fit["distance"]
        logit = a - by_share * share
    else:
        a, by_share, by_cosine = fit["both"]
        logit = a - by_share * share + by_cosine * cosine
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, logit))))


# ------------------------------------------------------------------ files


def load_hash(folder: str | Path) -> HashEncoder:
    """A model as `save_hash` wrote it. Raises `InputError` that names the file.

    One that does not ship is named by its bits and what its weights are, so that codes of two never pass for one.
    """
    folder = Path(folder).resolve()
    config = read_config(folder)
    backbone, head = Backbone(config["width"]), make_head(int(1024 * config["width"]), config["bits"], config["hidden"])
    paths = folder / config["backbone"], folder / HEAD
    for module, path in zip((backbone, head), paths, strict=True):
        load_into(module, load_weights(path), str(path))
    shipped = folder.parent == ASSETS.resolve()
    name = folder.name if shipped else f"hash-{config['bits']}-{digest(paths)}"
    encoder = HashEncoder(name, OwnFeatures(backbone, config["side"]), head, config)
    encoder.folder = None if shipped else folder
    return encoder


def save_hash(folder: Path, backbone: Backbone, head: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a folder that `load_hash` reads; the weights in `dtype`."""
    for name, module in ((BACKBONE, backbone), (HEAD, head)):
        weights = {key: x.detach().to(dtype).contiguous() for key, x in module.state_dict().items()}
        with replacing(folder / name) as temporary:
            save_file(weights, temporary)
            temporary.chmod(0o644)  # it comes readable for its owner alone
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps({"model": "hash", "backbone": BACKBONE, **config}, indent=2) + "\n")


def digest(paths: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: holds no {CONFIG}; name a folder that ragsr train hash wrote") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); copy the model again") from None
    if not isinstance(config, dict) or config.get("model") != "hash":
        raise InputError(f'{path}: is not of a hash encoder; it must say "model": "hash"')
    try:
        numbers = config["bits"], config["width"], config["hidden"], config["side"]
        [*_] = config["score"]["distance"], config["score"]["both"]
        sound = all(0 < float(n) <= 4096 for n in (*numbers, config["threshold"])) and isinstance(
            config["backbone"], str
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or config["bits"] % 8 or config["side"] % 32:
        raise InputError(
            f"{path}: must give model, backbone, bits (a multiple of 8), width, hidden, side (a multiple of 32), "
            "score and threshold; copy the model again"
        )
    return config
