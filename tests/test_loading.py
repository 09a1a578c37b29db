"""Weights from files: plain data is read, code is refused, and differences are named."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ragsr.errors import InputError
from ragsr.models.loading import check_weights, load_into, load_weights


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))


WEIGHTS = tiny().state_dict()
ESCAPED: list[str] = []


class Bomb:
    def __reduce__(self):
        return ESCAPED.append, ("code ran",)


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".PTH"])
def test_reads_what_was_written(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(WEIGHTS, path) if suffix == ".safetensors" else torch.save(WEIGHTS, path)
    found = load_weights(path)
    assert list(found) == list(WEIGHTS) or suffix == ".safetensors"  # which sorts the names
    assert found.keys() == WEIGHTS.keys()
    for name, x in WEIGHTS.items():
        assert torch.equal(found[name], x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"params": w},
        lambda w: {"model": {"state_dict": w}},
        lambda w: {"params": {"old": torch.zeros(1)}, "params_ema": w},
    ],
)
def test_unwraps(tmp_path, wrap):
    torch.save(wrap(WEIGHTS), tmp_path / "x.pt")
    assert load_weights(tmp_path / "x.pt").keys() == WEIGHTS.keys()


def test_gives_plain_tensors_for_parameters(tmp_path):
    torch.save(dict(tiny().named_parameters()), tmp_path / "x.pt")
    assert not any(x.requires_grad for x in load_weights(tmp_path / "x.pt").values())


def test_code_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": WEIGHTS, "callback": Bomb()}, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"x\.ckpt: besides tensors it holds .*code would have to run.*save_file"):
        load_weights(tmp_path / "x.ckpt")
    assert ESCAPED == []


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    endless: dict[str, object] = {"epoch": 1}
    endless["model"] = endless
    torch.save(endless, tmp_path / "x.pt")
    with pytest.raises(InputError, match="its entry 'epoch' is int"):
        load_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
@pytest.mark.parametrize("content", [b"", b"this is text, and no weights", b"PK\x03\x04 cut off", b"\x80\x02}q\x00X"])
def test_damaged_files_are_named(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"bad{suffix}: damaged.*again"):
        load_weights(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_half_files_are_named(tmp_path, suffix):
    path = tmp_path / f"half{suffix}"
    save_file(WEIGHTS, path) if suffix == ".safetensors" else torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"half{suffix}: damaged"):
        load_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no weights"),
        ({"state_dict": {}}, "holds no weights"),
        (torch.zeros(3), "holds no weights"),
        ({"optimizer": {"lr": 1}}, "its entry 'optimizer' is dict"),
        ({1: torch.zeros(3)}, "its entry 1 is Tensor"),
    ],
)
def test_files_without_weights_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=rf"x\.pt: .*{message}"):
        load_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.pt", "gone.pt: there is no such file"),
        ("folder.pt", "no such file"),
        ("x.onnx", "read from .safetensors"),
    ],
)
def test_refuses_paths(tmp_path, name, message):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(InputError, match=message):
        load_weights(tmp_path / name)


# ------------------------------------------------------------------ comparing and loading


def without(name: str) -> dict[str, torch.Tensor]:
    return {n: x for n, x in WEIGHTS.items() if n != name}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (without("0.bias"), r"net: 0\.bias is missing \(1 of 4"),
        ({}, r"0\.weight is missing \(4 of 4"),
        ({"extra": torch.zeros(1), **WEIGHTS}, r"extra is unexpected \(1 of 4"),
        ({"extra": torch.zeros(1), **without("1.weight")}, r"1\.weight is missing \(2 of 4"),
        (
            {**WEIGHTS, "1.weight": torch.zeros(2, 5, 1, 1), "0.weight": torch.zeros(4)},
            r"0\.weight has shape \(4,\), and the model needs \(4, 3, 3, 3\) \(2 of 4",
        ),
    ],
)
def test_names_the_first_difference(weights, message):
    with pytest.raises(InputError, match=message):
        check_weights("net", tiny(), weights)


def test_optional_names_may_be_missing_or_there():
    check_weights("net", tiny(), {**without("1.bias"), "copy.bias": torch.zeros(9)}, optional=("copy.", "1.bias"))
    with pytest.raises(InputError, match=r"1\.weight has shape"):
        check_weights("net", tiny(), {**WEIGHTS, "1.weight": torch.zeros(1)}, optional=("1.",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_weights_are_widened(dtype):
    net = tiny()
    narrow = {name: (2 * x).to(dtype) for name, x in WEIGHTS.items()}
    load_into(net, {**narrow, "copy.x": torch.zeros(1)}, "net", optional=("copy.",))
    for name, x in net.state_dict().items():
        assert x.dtype == torch.float32
        assert torch.equal(x, narrow[name].float())


def test_a_refused_file_changes_nothing():
    net = tiny()
    with pytest.raises(InputError):
        load_into(net, {**{n: x + 1 for n, x in WEIGHTS.items()}, "1.bias": torch.zeros(3)}, "net")
    assert torch.equal(net.state_dict()["0.weight"], WEIGHTS["0.weight"])
