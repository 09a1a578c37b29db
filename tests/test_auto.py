"""The model `auto`: which of two networks a photo gets, that it gets exactly that, and how its gate is trained."""

import json
import re

import numpy as np
import pytest
import torch
from pictures import write_samples
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data

from ragsr.cli import main
from ragsr.errors import InputError
from ragsr.image import image_to_tensor
from ragsr.models import load_model
from ragsr.models.alignment import enlarge_low
from ragsr.models.auto import ASSET, SURE, WINDOW, WINDOWS, Auto, Gate, save_gate, windows
from ragsr.models.loading import CONFIG, WEIGHTS
from ragsr.pipelines import RefSRPipeline
from ragsr.training import auto
from ragsr.training.auto import PART, Asked, Settings, parabola
from ragsr.training.degrade import STRONG, degrade_image
from ragsr.training.examples import SIDE, Example, ExampleMaker, Mix, make_examples
from ragsr.training.photos import find_photos, pixels_to_tensor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return Auto.load()


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(data.astronaut())


@pytest.fixture(scope="module")
def reduced(photo):
    """A quarter of the size, [1, 3, 64, 64], and nothing else was done to it."""
    return image_to_tensor(photo.crop((100, 0, 356, 256)).resize((64, 64), Image.Resampling.BICUBIC))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("photos"))


# ------------------------------------------------------------------ the choice


def test_reduced_photos_get_refnet_and_bad_ones_refnet_real(model, photo):
    crops = [photo.crop((x, y, x + 256, y + 256)) for x in (0, 128, 256) for y in (0, 128, 256)]
    clean = [model.share_of(image_to_tensor(one.resize((64, 64), Image.Resampling.BICUBIC))) for one in crops]
    generator = np.random.default_rng(0)
    bad = [model.share_of(image_to_tensor(degrade_image(one, generator, auto_recipe()))) for one in crops]
    assert np.mean(clean) < 0.2
    assert np.mean(bad) > 0.8


def auto_recipe():
    """As noisy as `STRONG` allows, always."""
    return type(STRONG)(scale=(4, 4), noise=(12, 18), jpeg=(35, 50), probability=1.0)


@pytest.mark.parametrize(("share", "names"), [(0.0, ["refnet"]), (1.0, ["refnet-real"])])
def test_where_the_choice_is_clear_one_model_runs(model, reduced, monkeypatch, share, names):
    monkeypatch.setattr(model, "share_of", lambda low: share)
    alone = load_model(names[0])
    prepared = model.prepare([reduced])
    asked = []
    for name, one in (("refnet", model.clean), ("refnet-real", model.bad)):
        monkeypatch.setattr(one.net, "forward", counted(one.net.forward, name, asked))
    for found, expected in zip(model(reduced, prepared), alone(reduced, alone.prepare([reduced])), strict=True):
        assert torch.equal(found, expected)
    assert set(asked) == set(names)


def counted(forward, name, asked):
    def wrapped(*args):
        asked.append(name)
        return forward(*args)

    return wrapped


def test_between_them_it_is_their_mean(model, reduced, monkeypatch):
    monkeypatch.setattr(model, "share_of", lambda low: 0.4)
    found = model(reduced, model.prepare([reduced]))
    one, other = (load_model(name) for name in ("refnet", "refnet-real"))
    clean, bad = (m(reduced, m.prepare([reduced])) for m in (one, other))
    for mean, a, b in zip(found, clean, bad, strict=True):
        torch.testing.assert_close(mean, (0.6 * a + 0.4 * b).clamp(0, 1), atol=1e-2, rtol=0)  # clamped before the mean
        assert (mean - (0.6 * a + 0.4 * b)).abs().mean() < 1e-4


@pytest.mark.parametrize(("logit", "share"), [(-4.0, 0.0), (-0.5, 0.3775), (0.5, 0.6225), (4.0, 1.0)])
def test_a_share_near_an_end_is_that_end(reduced, logit, share):
    gate = Gate()
    torch.nn.init.zeros_(gate.verdict[-1].weight)
    torch.nn.init.constant_(gate.verdict[-1].bias, logit)
    assert Auto(gate, load_model("refnet"), load_model("refnet-real")).share_of(reduced) == pytest.approx(
        share, abs=1e-4
    )
    assert 0 < SURE < 0.3775


def test_a_photo_is_judged_once_for_all_its_tiles(model, reduced, monkeypatch):
    judged = []

    def share_of(low):
        judged.append(tuple(low.shape))
        return 0.0

    monkeypatch.setattr(model, "share_of", share_of)
    restored, weight = RefSRPipeline(model, tile=64).restore(torch.cat((reduced, reduced), 3), model.prepare([]))
    assert judged == [(1, 3, 64, 128)]
    assert restored.shape == (1, 3, 256, 512)
    assert weight.shape == (1, 1, 256, 512)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (64, 80, (1, 3, 64, 80)),
        (WINDOW * WINDOWS, WINDOW * WINDOWS, (1, 3, WINDOW * WINDOWS, WINDOW * WINDOWS)),
        (WINDOW * WINDOWS + 1, WINDOW * WINDOWS, (WINDOWS**2, 3, WINDOW, WINDOW)),
        (4, 100000, (1, 3, 4, 100000)),
    ],
)
def test_a_large_photo_is_judged_by_some_squares(height, width, expected):
    assert windows(torch.zeros(1, 3, height, width)).shape == expected


def test_the_squares_reach_from_corner_to_corner():
    low = torch.arange(600.0)[:, None] * 1000 + torch.arange(700.0)
    found = windows(low[None, None].expand(1, 3, -1, -1))
    assert (found[0, 0, 0, 0], found[-1, 0, -1, -1]) == (low[0, 0], low[-1, -1])


def test_bad_input_is_refused(model):
    for shape in ((1, 1, 8, 8), (2, 3, 8, 8), (3, 8, 8)):
        with pytest.raises(InputError, match=r"the low-quality image has shape .* it must be \[1, 3, height, width\]"):
            model(torch.zeros(shape), model.prepare([]))


def test_a_folder_of_something_else_is_refused(tmp_path):
    save_gate(tmp_path, Gate())
    assert isinstance(load_model(tmp_path), Auto)
    (tmp_path / CONFIG).write_text(json.dumps({"model": "refnet"}))
    with pytest.raises(InputError, match='is not of the model auto; it must say "model": "auto"'):
        Auto.load(tmp_path)
    save_gate(tmp_path, Gate())
    weights = load_file(tmp_path / WEIGHTS)
    save_file(weights | {"verdict.2.weight": torch.zeros(1, 3)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"verdict\.2\.weight"):
        Auto.load(tmp_path)


def test_what_ships_has_a_card():
    told = json.loads((ASSET / "training.json").read_text())
    assert told["reached"]["auto"] > max(told["reached"][name] for name in ("refnet", "refnet-real"))
    assert "licence" in (ASSET / "README.md").read_text()


# ------------------------------------------------------------------ its training


def test_graded_examples_are_bad_by_degrees(folder):
    maker = ExampleMaker(find_photos(folder), Mix(degradation="graded", retrieved=0))
    truth, generator = Image.fromarray(data.astronaut()[:SIDE, :SIDE]), np.random.default_rng(0)
    plain = np.asarray(truth.resize((80, 80), Image.Resampling.BICUBIC)).astype(float)
    away = [np.abs(np.asarray(maker._degraded(truth, generator)) - plain).mean() for _ in range(90)]
    assert 20 <= sum(one == 0 for one in away) <= 40  # a third
    assert sum(0 < one < 4 for one in away) > 5
    assert sum(one > 6 for one in away) > 5


def test_a_recipe_grows_from_a_change_of_size_to_itself():
    nothing, whole = STRONG.weaker(0), STRONG.weaker(1)
    assert whole == STRONG
    assert (nothing.blur, nothing.noise, nothing.jpeg, nothing.probability) == ((0, 0), (0, 0), (95, 95), 0)
    assert nothing.scale == STRONG.scale


def random_example(seed):
    generator = np.random.default_rng(seed)
    return Example(
        generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
        generator.integers(0, 256, (SIDE // 4, SIDE // 4, 3), dtype=np.uint8),
        generator.normal(0, 0.1, (6, SIDE, SIDE)).astype(np.float16),
        "same",
    )


@pytest.mark.parametrize("told", [True, False])
def test_the_parabola_is_the_error_of_the_mean(told):
    example, models = random_example(1), [load_model(name).net for name in ("refnet", "refnet-real")]
    with torch.no_grad():
        found = parabola(models, example, told, CPU)
        middle = slice((SIDE - PART) // 2, (SIDE + PART) // 2)
        low = pixels_to_tensor(example.low[20:60, 20:60])
        clues = [torch.from_numpy(example.clues[:, middle, middle]).float()[None]] if told else []
        a, b = (net(low, enlarge_low(low, 4), clues)[0].clamp(0, 1) for net in models)
    truth = pixels_to_tensor(example.truth[middle, middle])
    for share in (0.0, 0.3, 1.0):
        wrong = auto.luma((1 - share) * a + share * b - truth).square().mean()
        (told_error,) = Asked(torch.zeros(1), found[None, None]).errors(torch.tensor([share])).flatten()
        torch.testing.assert_close(told_error, wrong, rtol=1e-4, atol=1e-7)


def test_it_learns_which_photos_are_bad(monkeypatch, tmp_path):
    """Noise in half of the photos, which the second model serves better."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(80, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64).clone()
    low[::2] += 0.1 * torch.randn(40, 3, 64, 64, generator=generator)
    better, worse = torch.tensor([0.01, -0.004, 0.004]), torch.tensor([0.01, 0.0, 0.004])
    asked = Asked(low.clamp(0, 1), torch.stack([better if i % 2 == 0 else worse for i in range(80)])[:, None])
    monkeypatch.setattr(auto, "make_examples", lambda *args: [])
    monkeypatch.setattr(auto, "ask", lambda *args: asked)
    monkeypatch.setattr(auto, "hold_out", lambda *args: ([], []))
    reached = auto.train(Settings(steps=60, batch=16, rate=1e-2), [], tmp_path, CPU)
    assert reached["auto"] == pytest.approx(reached["the better of both"], abs=0.05)
    assert reached["auto"] > max(reached["refnet"], reached["refnet-real"]) + 0.5


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    for name, value in {"HELD_OUT": 2, "CHECKS": 1}.items():
        monkeypatch.setattr(auto, name, value)
    command = ["train", "auto", "--data", str(folder), "--out", str(tmp_path), "--pairs", "2", "--steps", "2"]
    assert main([*command, "--batch", "2", "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"refnet", "refnet-real", "auto", "the better of both"} <= set(told)
    assert told["the better of both"] >= max(told["refnet"], told["refnet-real"])
    assert isinstance(Auto.load(told["model"]), Auto)
    card = json.loads((tmp_path / "model" / "training.json").read_text())
    assert card["settings"]["pairs"] == 2
    first = (tmp_path / "model" / WEIGHTS).read_bytes()
    monkeypatch.setattr(ExampleMaker, "make", None)  # what is on disk is not made again
    assert main([*command, "--batch", "2", "--device", "cpu"]) == 0
    assert "on photos that were held out" in capsys.readouterr().out
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == first


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pairs", "0", "--pairs is 0; it must be at least 1"),
        ("--steps", "-1", "--steps is -1; it must be at least 1"),
        ("--rate", "2", r"--rate is 2\.0; it must lie between 0 and 1"),
    ],
)
def test_bad_numbers_are_refused(option, value, message, folder, tmp_path, capsys):
    command = ["train", "auto", "--data", str(folder), "--out", str(tmp_path), option, value]
    assert main(command) == 2
    assert re.search(message, capsys.readouterr().err)


def test_examples_of_another_mix_are_refused(folder, tmp_path):
    make_examples(find_photos(folder), Mix(degradation="bicubic", retrieved=0), 1, tmp_path / "examples")
    with pytest.raises(InputError, match="made with other settings"):
        make_examples(find_photos(folder), auto.MIX, 1, tmp_path / "examples")
