"""The adapter for pyiqa, tried on a stand-in of the same interface: pyiqa itself needs torchvision."""

import json
import sys
import types

import pytest
import torch
from pictures import picture
from PIL import Image

from ragsr.cli import main
from ragsr.errors import InputError
from ragsr.metrics import METRICS, load_measures
from ragsr.metrics.extra import EXTRA, ExtraMeasure, FIDMeasure

LOWER = {"lpips": True, "dists": True, "clipiqa": False, "musiq": False, "fid": True}  # as pyiqa says
SIZE = (48, 40)


class StandIn(types.ModuleType):
    """`create_metric(name, device=)` gives what is called with tensors [N, 3, H, W] in [0, 1], FID with two folders."""

    def __init__(self, lower=LOWER):
        super().__init__("pyiqa")
        self.lower, self.created, self.calls = lower, [], []

    def create_metric(self, name, as_loss=False, device=None, **choices):
        assert not choices
        assert not as_loss
        self.created.append((name, device))
        return Model(self, name)


class Model:
    def __init__(self, module, name):
        self.module, self.name, self.lower_better = module, name, module.lower[name]

    def __call__(self, target, ref=None, **choices):
        assert not torch.is_grad_enabled() or self.name == "fid"
        self.module.calls.append((self.name, target, ref, choices))
        if self.name == "fid":
            return 12.5
        return target.mean().reshape(1, 1) if ref is None else (target - ref).abs().mean().reshape(1)


@pytest.fixture
def pyiqa(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    return module


@pytest.fixture
def pair():
    return picture(0, *SIZE), picture(1, *SIZE)


def test_every_metric_is_asked_as_pyiqa_wants_it(pyiqa, pair):
    measures = load_measures([*EXTRA, "psnr"])
    assert list(measures) == ["lpips", "dists", "clipiqa", "musiq", "psnr"]  # FID is of sets
    values = {name: measure(*pair) for name, measure in measures.items()}
    assert pyiqa.created == [(name, torch.device("cpu")) for name in ("lpips", "dists", "clipiqa", "musiq")]
    for name, image, truth, choices in pyiqa.calls:
        assert (image.shape, image.dtype, choices) == ((1, 3, *SIZE[::-1]), torch.float32, {})
        assert 0 <= image.min() < image.max() <= 1
        assert (truth is None) != METRICS[name].compares
    image, truth = (torch.tensor(list(x.tobytes()), dtype=torch.float64) / 255 for x in pair)
    assert values["lpips"] == pytest.approx(float((image - truth).abs().mean()), abs=1e-6)
    assert values["clipiqa"] == pytest.approx(float(image.mean()), abs=1e-6)


def test_directions_are_those_of_pyiqa(monkeypatch):
    assert {name: not metric.higher for name, metric in EXTRA.items()} == LOWER
    monkeypatch.setitem(sys.modules, "pyiqa", StandIn(LOWER | {"musiq": True}))
    with pytest.raises(InputError, match="reads musiq the other way around"):
        ExtraMeasure("musiq")


def test_fid_compares_folders(pyiqa, pair, tmp_path):
    for name, pictures in {"made": pair, "truth": pair, "one": pair[:1]}.items():
        (tmp_path / name).mkdir()
        for number, one in enumerate(pictures):
            one.save(tmp_path / name / f"{number}.png")
    measure = FIDMeasure()
    assert measure(tmp_path / "made", tmp_path / "truth") == 12.5
    folders = str(tmp_path / "made"), str(tmp_path / "truth")
    assert pyiqa.calls == [("fid", *folders, {"num_workers": 0, "verbose": False})]
    with pytest.raises(InputError, match="two sets of at least 2 pictures"):
        measure(tmp_path / "made", tmp_path / "one")


def test_images_that_do_not_fit(pyiqa, pair):
    with pytest.raises(InputError, match="LPIPS compares images of one size; these are 48x40 and 40x48"):
        ExtraMeasure("lpips")(pair[0], pair[1].transpose(Image.Transpose.ROTATE_90))
    ExtraMeasure("musiq")(pair[0], pair[1].transpose(Image.Transpose.ROTATE_90))  # it does not look at the truth


@pytest.mark.parametrize("name", EXTRA)
def test_without_pyiqa(monkeypatch, name):
    """Said before anything is restored."""
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(InputError, match=rf'{EXTRA[name].title} needs pyiqa .*: pip install "ragsr\[metrics\]"'):
        load_measures(["psnr", name])


def test_weights_that_cannot_be_downloaded(pyiqa, monkeypatch):
    def fails(name, **choices):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(pyiqa, "create_metric", fails)
    with pytest.raises(InputError, match=r"pyiqa cannot load dists \(<urlopen error no network>\)"):
        ExtraMeasure("dists")


def test_eval_restore_with_extras(pyiqa, tmp_path, capsys):
    """Through the command: LPIPS per photo, FID per method over all that it restored."""
    (tmp_path / "single").mkdir()
    (tmp_path / "lq_bicubic_x4").mkdir()
    (tmp_path / "lq_degraded_x4").mkdir()
    (tmp_path / "retrieval_truth.json").write_text("{}")
    for number in range(2):
        picture(number, *SIZE).save(tmp_path / f"single/{number}.png")
        picture(number, SIZE[0] // 4, SIZE[1] // 4).save(tmp_path / f"lq_bicubic_x4/{number}.png")
    command = ["eval", "restore", "--data", str(tmp_path), "--groups", "single", "--reference", "none"]
    assert main([*command, "--metric", "lpips", "fid", "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["metrics"]["lpips"]["computed"].startswith("pyiqa ")
    assert found["mean"]["none"]["fid"] == 12.5
    assert set(found["mean"]["none"]["intervals"]) == {"lpips"}
    assert [name for name, *_ in pyiqa.calls].count("lpips") == 4
    folders = [target.rsplit("/", 2)[-2:] for name, target, *_ in pyiqa.calls if name == "fid"]
    assert folders == [["bicubic", "made"], ["none", "made"]]
    assert [name for name, _ in pyiqa.created] == ["lpips", "fid"]
    told = capsys.readouterr().out
    assert "FID ↓" in told
    assert "12.50" in told
