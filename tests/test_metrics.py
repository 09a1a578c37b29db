"""PSNR and SSIM against scikit-image with the settings of every preset, written out here once more."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ragsr.errors import InputError
from ragsr.metrics import PRESETS, hit_rate, mean_average_precision, psnr, recall, ssim

STUDIO = np.array([65.481, 128.553, 24.966]) / 255
GAUSSIAN = {
    "gaussian_weights": True,
    "sigma": 1.5,
    "use_sample_covariance": False,
}  # 11 pixels wide


@pytest.fixture(scope="module")
def pair():
    """A photo and a worse copy between the 8-bit steps: float64 [H, W, 3] in [0, 1], odd sizes."""
    photo = data.astronaut()[40:137, 60:191] / 255
    noise = np.random.default_rng(0).normal(0, 0.04, photo.shape)
    return photo, (photo + noise).clip(0, 1)


def tensor(x):
    return torch.from_numpy(x).permute(2, 0, 1)[None]


def bytes_of(x):
    return np.rint(x * 255) / 255


def studio(x):
    return x @ STUDIO + 16 / 255


def inside(x, border):
    return x[border : x.shape[0] - border, border : x.shape[1] - border]


def valid_mean(a, b, **settings):
    """scikit-image's SSIM map where the window of 11 lies inside the image."""
    full = structural_similarity(a, b, data_range=1, full=True, **settings)[1]
    return inside(full, 5).mean()


def test_refir(pair):
    a, b = (inside(studio(x), 4) for x in pair)
    assert psnr(*map(tensor, pair)) == pytest.approx(-10 * math.log10(((a - b) ** 2).mean() + 1e-8), abs=1e-9)
    wanted = valid_mean(bytes_of(a), bytes_of(b), **GAUSSIAN)
    assert ssim(*map(tensor, pair)) == pytest.approx(wanted, abs=1e-7)


def test_irag_is_scikit_image_with_its_defaults(pair):
    assert psnr(*map(tensor, pair), "irag") == pytest.approx(peak_signal_noise_ratio(*pair, data_range=1), abs=1e-9)
    wanted = structural_similarity(*pair, data_range=1, channel_axis=-1)
    assert ssim(*map(tensor, pair), "irag") == pytest.approx(wanted, abs=1e-9)


def test_c2(pair):
    a, b = (inside(studio(bytes_of(x)), 4) for x in pair)
    assert psnr(*map(tensor, pair), "c2") == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9)
    assert ssim(*map(tensor, pair), "c2") == pytest.approx(valid_mean(a, b, **GAUSSIAN), abs=1e-9)


def test_ttsr(pair):
    a, b = map(bytes_of, pair)
    error = ((a - b) @ np.array([65.738, 129.057, 25.064]) / 256) ** 2
    assert psnr(*map(tensor, pair), "ttsr") == pytest.approx(-10 * math.log10(error.mean()), abs=1e-9)
    wanted = np.mean([valid_mean(a[..., c], b[..., c], **GAUSSIAN) for c in range(3)])
    assert ssim(*map(tensor, pair), "ttsr") == pytest.approx(wanted, abs=1e-9)


def test_refir_counts_opposite_structure_as_zero():
    x = tensor(np.random.default_rng(1).random((40, 40, 3)))
    assert ssim(x, 1 - x, "c2") < 0 <= ssim(x, 1 - x, "refir")


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_images(pair, preset):
    x = tensor(pair[0])
    assert psnr(x, x, preset) == (pytest.approx(80) if preset == "refir" else math.inf)
    assert ssim(x, x, preset) == pytest.approx(1)


@pytest.mark.parametrize("preset", PRESETS)
def test_pictures_are_measured_like_tensors(pair, preset):
    pictures = [Image.fromarray(np.rint(x * 255).astype(np.uint8)) for x in pair]
    tensors = [tensor(bytes_of(x)) for x in pair]
    assert psnr(*pictures, preset) == pytest.approx(psnr(*tensors, preset), abs=1e-4)
    assert ssim(*pictures, preset) == pytest.approx(ssim(*tensors, preset), abs=1e-5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 3, 32, 40), (1, 3, 32, 41)), "different sizes .*: 40x32 and 41x32"),
        (((1, 3, 8, 40), (1, 3, 8, 40)), "nothing is left of 40x8"),
        (((3, 32, 32), (3, 32, 32)), r"must be \[1, 3, height, width\]; this one is \[3, 32, 32\]"),
    ],
)
@pytest.mark.parametrize("measure", [psnr, ssim])
def test_wrong_shapes(measure, shapes, message):
    with pytest.raises(InputError, match=message):
        measure(*map(torch.zeros, shapes))


def test_an_image_too_small_for_the_window():
    x = torch.zeros(1, 3, 18, 40)
    assert psnr(x, x) == pytest.approx(80)
    with pytest.raises(InputError, match=r"needs 11 pixels a side .* 32x10 are left"):
        ssim(x, x)


def test_nan_and_unknown_presets():
    x = torch.full((1, 3, 32, 32), math.nan)
    with pytest.raises(InputError, match="NaN"):
        psnr(x, x)
    with pytest.raises(InputError, match="no preset 'best'; there are: refir, irag, c2, ttsr"):
        psnr(x, x, "best")


def test_hit_rate():
    truth = [{"a"}, {"b", "c"}, {"d"}, ["e"]]
    hits = [["a", "x"], ["x", "c"], ["x", "y", "d"], ["x"]]
    assert [hit_rate(truth, hits, k) for k in (1, 2, 3)] == [0.25, 0.5, 0.75]
    with pytest.raises(InputError, match="0 right answers for 0 searches"):
        hit_rate([], [], 1)
    with pytest.raises(InputError, match="k is 0"):
        hit_rate(truth, hits, 0)


def test_recall_and_mean_average_precision():
    truth = [{"a", "b"}, {"c"}]
    hits = [["x", "a", "y", "b"], ["c", "x", "y"]]
    assert [recall(truth, hits, k) for k in (1, 2, 3, 4)] == [0.5, 0.75, 0.75, 1.0]
    assert mean_average_precision(truth, hits) == ((1 / 2 + 2 / 4) / 2 + 1) / 2
    assert mean_average_precision([{"a", "b"}], [["a"]]) == 0.5  # what is not found counts 0
    with pytest.raises(InputError, match="some searches have no right answer"):
        recall([{"a"}, set()], [["a"], ["b"]], 1)
