"""Which model a name or a file is, and `refnet` as files: what was saved comes back, what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ragsr.errors import InputError
from ragsr.models import TTSR, Auto, RefNet, Transfer, load_model
from ragsr.models.alignment import enlarge_low
from ragsr.models.fusion import FusionNet
from ragsr.models.refnet import CONFIG, WEIGHTS, save_model
from ragsr.models.resample import reduce, resize
from ragsr.models.ttsr import TTSRNet

SIZE = {"channels": 4, "before": 2, "after": 1, "guide_blocks": 1, "scale": 4}
GOOD = {"model": "refnet", **SIZE}


def small(**other: int) -> FusionNet:
    """As if trained: no layer is zero."""
    torch.manual_seed(0)
    net = FusionNet(**{**SIZE, **other})
    with torch.no_grad():
        for x in net.parameters():
            if not x.any():
                x.normal_(0, 0.05)
    return net


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path, small())
    return tmp_path


def photo() -> Tensor:
    """Noise of several scales: [1, 3, 96, 96] in [0, 1]."""
    random = torch.Generator().manual_seed(2)
    parts = (resize(torch.rand(1, 3, n, n, generator=random), (96, 96)) for n in (12, 24, 96))
    return (sum(parts) / 3).clamp(0, 1)


# ------------------------------------------------------------------ names and files


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "X.PTH"])
def test_a_checkpoint_is_ttsr(tmp_path, name):
    torch.manual_seed(0)
    weights = TTSRNet(2, (1, 0, 1, 0)).state_dict()
    path = tmp_path / name
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save({"state_dict": weights}, path)
    for given in (path, str(path)):
        model = load_model(given)
        assert isinstance(model, TTSR)
        assert torch.equal(model.net.MainNet.conv12.weight, weights["MainNet.conv12.weight"])
    with pytest.raises(InputError, match="enlarges 4 times, not 2"):
        load_model(path, 2)


def test_a_folder_is_refnet(folder):
    for given in (folder, str(folder)):
        model = load_model(given)
        assert isinstance(model, RefNet)
        assert model.net.config == SIZE


def test_names():
    assert isinstance(load_model(), Auto)
    for name in ("refnet", "refnet-real"):
        assert isinstance(load_model(name), RefNet)
    assert isinstance(load_model("transfer"), Transfer)
    for name in ("auto", "refnet", "transfer"):
        with pytest.raises(InputError, match="enlarges 4 times, not 2"):
            load_model(name, 2)


def test_ttsr_by_name_asks_for_a_checkpoint():
    with pytest.raises(InputError, match=r"ttsr has no weights.* name the file of a checkpoint"):
        load_model("ttsr")


@pytest.mark.parametrize("given", ["swinir", Path("no/such/folder")])
def test_an_unknown_name_lists_what_there_is(given):
    with pytest.raises(
        InputError,
        match=f"named '{given}'; choose one of: auto, refnet, refnet-real, transfer, the folder .* checkpoint",
    ):
        load_model(given)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json; name the folder"):
        load_model(tmp_path)


# ------------------------------------------------------------------ refnet as files


@torch.no_grad()
def test_what_was_saved_comes_back(folder):
    saved, loaded = RefNet(small()), RefNet.load(folder)
    low = reduce(photo(), 4)
    wanted, found = (model(low, model.prepare([photo()])) for model in (saved, loaded))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    assert wanted[1].mean() > 0.1  # the reference was found, so the guide took part
    assert (wanted[0] - enlarge_low(low)).abs().mean() > 0.01


@torch.no_grad()
def test_a_turned_photo_gives_the_turned_picture(folder):
    """The ensemble of quarter turns has no preferred direction; the network alone has."""
    model, low = RefNet.load(folder), reduce(photo(), 4)
    upright = model(low, model.prepare([]))[0]
    lying = model(low.rot90(1, (2, 3)), model.prepare([]))[0]
    torch.testing.assert_close(lying, upright.rot90(1, (2, 3)), rtol=0, atol=1e-5)
    alone, turned = (model.net(x, enlarge_low(x))[0] for x in (low, low.rot90(1, (2, 3))))
    assert (turned - alone.rot90(1, (2, 3))).abs().max() > 0.01


def test_a_half_precision_file_is_widened(tmp_path):
    save_model(tmp_path, small(), torch.float16)
    assert {x.dtype for x in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    loaded = RefNet.load(tmp_path).net.state_dict()
    for name, x in small().state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], x.half().float())


def test_another_scale_is_refused(tmp_path):
    save_model(tmp_path, small(scale=2))
    assert RefNet.load(tmp_path, 2).scale == 2
    with pytest.raises(InputError, match="enlarges 2 times, not 4 times"):
        RefNet.load(tmp_path)


NUMBERS = r"config\.json: must give channels, before, after, guide_blocks, scale, each a number from 1 to 1024"
OTHER_MODEL = r'config\.json: is not of the model refnet; it must say "model": "refnet"'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": "refnet",', r"config\.json: is not JSON"),
        ("\udcff", r"config\.json: is not JSON"),  # a byte that is no UTF-8
        ('["refnet"]', OTHER_MODEL),
        (json.dumps(SIZE), OTHER_MODEL),
        (json.dumps({**GOOD, "model": "ttsr"}), OTHER_MODEL),
        (json.dumps({"model": "refnet"}), NUMBERS),
        (json.dumps({name: n for name, n in GOOD.items() if name != "after"}), NUMBERS),
        (json.dumps({**GOOD, "width": 3}), NUMBERS),
        (json.dumps({**GOOD, "before": "2"}), NUMBERS),
        (json.dumps({**GOOD, "before": 2.0}), NUMBERS),
        (json.dumps({**GOOD, "before": None}), NUMBERS),
        (json.dumps({**GOOD, "channels": 0}), NUMBERS),
        (json.dumps({**GOOD, "scale": -4}), NUMBERS),
        (json.dumps({**GOOD, "scale": True}), NUMBERS),
        (json.dumps({**GOOD, "channels": 1 << 40}), NUMBERS),
    ],
)
def test_a_broken_config_is_named(folder, content, message):
    (folder / CONFIG).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        RefNet.load(folder)


def test_a_missing_weight_file_is_named(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: there is no such file"):
        RefNet.load(folder)


def test_weights_of_another_size_are_refused(folder):
    (folder / CONFIG).write_text(json.dumps({**GOOD, "channels": 8}))
    with pytest.raises(
        InputError, match=r"model\.safetensors: head.weight has shape \(4, 3, 3, 3\), .* needs \(8, 3, 3, 3\)"
    ):
        RefNet.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"after.0.first.bias": torch.zeros(5), "head.bias": torch.zeros(3)},
            r"head\.bias has shape \(3,\)",
        ),
        ({"tail.bias": None, "before.1.second.bias": None}, r"before\.1\.second\.bias is missing \(2 of"),
        ({"extra": torch.zeros(1), "tail.weight": torch.zeros(1)}, r"tail\.weight has shape \(1,\)"),
        ({"extra": torch.zeros(1)}, r"extra is unexpected \(1 of"),
    ],
)
def test_the_first_difference_is_named(folder, change, message):
    """First in the order of the network, not of the file, which sorts the names."""
    weights = {**load_file(folder / WEIGHTS), **change}
    save_file({name: x for name, x in weights.items() if x is not None}, folder / WEIGHTS)
    with pytest.raises(InputError, match=message):
        RefNet.load(folder)
