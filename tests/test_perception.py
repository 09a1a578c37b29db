"""NIQE and HaarPSI: what must hold on real photos, whatever the exact numbers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage import data

from ragsr.cli import main
from ragsr.errors import InputError
from ragsr.metrics import NaturalModel, fit_niqe, haarpsi, niqe
from ragsr.metrics.niqe import skewed_fit

ASTRONAUT = Image.fromarray(data.astronaut())


def noisy(image: Image.Image, strength: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, strength, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


# ------------------------------------------------------------------ HaarPSI


def test_equal_images_are_one():
    assert haarpsi(ASTRONAUT, ASTRONAUT) == pytest.approx(1, abs=1e-9)
    flat = torch.full((1, 3, 32, 48), 0.3)
    assert haarpsi(flat, flat) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("worse", [blurred, noisy])
def test_haarpsi_falls_with_distortion(worse):
    scores = [haarpsi(ASTRONAUT, worse(ASTRONAUT, strength)) for strength in (1, 4, 16)]
    assert 1 > scores[0] > scores[1] > scores[2] > 0
    assert haarpsi(worse(ASTRONAUT, 4), ASTRONAUT) == pytest.approx(scores[1])  # it has no direction


def test_haarpsi_sees_colour():
    gray = ASTRONAUT.convert("L").convert("RGB")
    assert haarpsi(ASTRONAUT, gray) < 0.99


def test_haarpsi_refuses_other_sizes():
    with pytest.raises(InputError, match="512x512 and 511x512"):
        haarpsi(ASTRONAUT, ASTRONAUT.crop((0, 0, 511, 512)))


# ------------------------------------------------------------------ NIQE


def test_the_fit_recovers_a_known_distribution():
    torch.manual_seed(0)
    is_right = torch.rand(1, 200, 500) < 2 / 3  # each side has a share of the draws in proportion to its scale
    normal = torch.randn(1, 200, 500, dtype=torch.float64).abs()
    shape, left, right = skewed_fit(torch.where(is_right, 2 * normal, -normal))
    assert shape.item() == pytest.approx(2, abs=0.05)  # 2 is the normal distribution
    assert (right / left).item() == pytest.approx(2, rel=0.02)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((1, 200, 500)).double()
    assert skewed_fit(laplace)[0].item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("image", [data.chelsea, data.coffee, data.astronaut])
def test_distorted_photos_are_less_natural(image):
    photo = Image.fromarray(image())
    small = photo.resize((photo.width // 4, photo.height // 4), Image.Resampling.BICUBIC)
    enlarged = small.resize(photo.size, Image.Resampling.BICUBIC)
    assert niqe(photo) < niqe(enlarged)
    assert niqe(photo) < niqe(noisy(photo, 25))
    assert niqe(photo) < niqe(blurred(photo, 3))


def test_a_model_of_ones_own(tmp_path):
    photos = [ASTRONAUT, Image.fromarray(data.chelsea()), Image.fromarray(data.coffee())]
    photos += [blurred(photo, 0.5) for photo in photos]
    model = fit_niqe(photo.transpose(way) for photo in photos for way in Image.Transpose)
    model.save(tmp_path / "own.safetensors")
    again = NaturalModel.load(tmp_path / "own.safetensors")
    assert torch.equal(model.covariance, again.covariance)
    assert niqe(ASTRONAUT, again) < niqe(blurred(ASTRONAUT, 2), again)


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least 96 pixels; this image is 95x512"):
        niqe(ASTRONAUT.crop((0, 0, 95, 512)))
    with pytest.raises(InputError, match="too few"):
        fit_niqe([ASTRONAUT.crop((0, 0, 100, 100))])
    with pytest.raises(InputError, match="no model of natural photos"):
        NaturalModel.load(tmp_path / "nothing.safetensors")


def test_fitted_from_the_command_line(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number, way in enumerate(Image.Transpose):
        Image.fromarray(data.hubble_deep_field()).transpose(way).save(tmp_path / "photos" / f"hubble_{number}.png")
        ASTRONAUT.transpose(way).save(tmp_path / "photos" / f"{number}.png")
        Image.fromarray(data.coffee()).transpose(way).save(tmp_path / "photos" / f"coffee_{number}.png")
    ASTRONAUT.resize((200, 200)).save(tmp_path / "photos" / "small.png")
    command = ["train", "niqe", "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "model"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["photos"] == 3 * len(Image.Transpose)  # without the small one
    assert NaturalModel.load(tmp_path / "model" / "model.safetensors").mean.shape == (36,)
    assert "photos, none of which is part" in (tmp_path / "model" / "README.md").read_text()
