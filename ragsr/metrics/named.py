"""Metrics by name: what an evaluation prints, which direction is better, and where each number comes from."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ragsr.errors import InputError
from ragsr.metrics.extra import EXTRA, FID, ExtraMeasure, Metric, import_pyiqa
from ragsr.metrics.fidelity import Picture, find_preset, psnr, ssim
from ragsr.metrics.haarpsi import haarpsi
from ragsr.metrics.niqe import niqe

FEATURES = "features"
Measure = Callable[[Picture, Picture], float]  # of an image and the truth
METRICS = {
    "psnr": Metric("PSNR", higher=True, compares=True, unit="dB", digits=2),
    "ssim": Metric("SSIM", higher=True, compares=True),
    "haarpsi": Metric("HaarPSI", higher=True, compares=True),
    "niqe": Metric("NIQE", higher=False, compares=False, digits=3),
    FEATURES: Metric("Deep features", higher=False, compares=True),
    **EXTRA,
}
USUAL = ("psnr", "ssim", "haarpsi", "niqe")  # those that need no extra
BY_PRESET = ("psnr", "ssim")


def find_metric(name: str) -> Metric:
    """The metric of that name. Raises `InputError` with the list."""
    if name not in METRICS:
        raise InputError(f"there is no metric {name!r}; there are: {', '.join(METRICS)}")
    return METRICS[name]


def load_measures(
    names: Sequence[str] = USUAL,
    preset: str = "refir",
    device: str | torch.device = "cpu",
    network: Path | None = None,
) -> dict[str, Measure]:
    """What computes the metrics of these names for one image; FID, which is of sets, is not among them.

    `network` is what "features" looks with, see `ragsr.metrics.features`. Raises `InputError` for unknown names and
    presets, and for a metric whose extra or network is missing.
    """
    find_preset(preset)
    for name in names:
        find_metric(name)
    if FID in names:  # found missing now, not after hours
        import_pyiqa(FID)
    own: dict[str, Measure] = {
        "psnr": partial(psnr, preset=preset),
        "ssim": partial(ssim, preset=preset),
        "haarpsi": haarpsi,
        "niqe": lambda image, _: niqe(image),
    }
    if FEATURES in names:
        own[FEATURES] = feature_measure(network, device)
    return {name: own.get(name) or ExtraMeasure(name, device) for name in dict.fromkeys(names) if name != FID}


def feature_measure(network: Path | None, device: str | torch.device) -> Measure:
    from ragsr.metrics.features import FeatureMeasure  # which imports models

    if network is None:
        raise InputError(
            "the metric features needs a network (--features FILE|DIR): weights of a VGG in torchvision's naming, "
            "a MobileNet v1 as NAME_dequant.npz, or what ragsr train hash wrote"
        )
    return FeatureMeasure(network, device)


def title(name: str, preset: str) -> str:
    """How a metric is called beside its numbers: with the preset, if that has a say in it, and the unit."""
    metric = find_metric(name)
    told = f"{metric.title} ({preset})" if name in BY_PRESET else metric.title
    return f"{told}, {metric.unit}" if metric.unit else told


def describe(name: str, preset: str, network: str | None = None) -> dict[str, Any]:
    """What a saved number needs beside it; `network` is the name of what "features" looked with."""
    metric = find_metric(name)
    source = f"preset {preset}: {find_preset(preset).source}" if name in BY_PRESET else "ragsr, on whole images"
    if name == FEATURES and network:
        source = f"ragsr, on whole images, with {network}"
    return {
        "title": metric.title,
        "unit": metric.unit,
        "better": "higher" if metric.higher else "lower",
        "computed": f"pyiqa {pyiqa_version()}, on whole images" if name in EXTRA else source,
    }


def pyiqa_version() -> str:
    try:
        return version("pyiqa")
    except PackageNotFoundError:
        return "of an unknown version"
