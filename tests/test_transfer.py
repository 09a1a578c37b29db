"""The training-free model: it gains from a true reference, loses nothing to a wrong one, and takes any size."""

import numpy as np
import pytest
import skimage.data
import torch
from torch import Tensor

from ragsr.errors import InputError
from ragsr.models import Transfer, load_model
from ragsr.models.registration import (
    Likeness,
    box,
    enlarge,
    evidence,
    fill,
    global_match,
    grid,
    interpolate,
    refine,
    warp,
)
from ragsr.models.resample import back_project, reduce, resize

MODEL = Transfer()


def photo(name: str) -> Tensor:
    image = np.asarray(getattr(skimage.data, name)(), dtype=np.float32) / 255
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def crop(x: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    return x[:, :, top : top + height, left : left + width].contiguous()


def psnr(x: Tensor, truth: Tensor) -> float:
    return float(-10 * torch.log10((x - truth)[:, :, 4:-4, 4:-4].square().mean()))


TRUTH = crop(photo("astronaut"), 40, 120, 192, 224)
LOW = reduce(TRUTH, 4)
ALONE = MODEL(LOW, MODEL.prepare([]))[0]


# ------------------------------------------------------------------ what the model promises


def test_back_projection_alone_beats_bicubic():
    assert psnr(ALONE, TRUTH) > psnr(resize(LOW, (192, 224)).clamp(0, 1), TRUTH) + 0.1


@pytest.mark.parametrize("zoom", [1.0, 1.6])
def test_a_true_reference_helps(zoom):
    other = crop(photo("astronaut"), 21, 97, 230, 290)
    reference = resize(other, (int(230 * zoom), int(290 * zoom))).clamp(0, 1) * 0.9
    restored, weight = MODEL(LOW, MODEL.prepare([reference]))
    assert psnr(restored, TRUTH) > psnr(ALONE, TRUTH) + 1
    assert weight.mean() > 0.2


@pytest.mark.parametrize("name", ["coffee", "chelsea"])
def test_a_wrong_reference_costs_nothing(name):
    restored, weight = MODEL(LOW, MODEL.prepare([crop(photo(name), 0, 0, 280, 320)]))
    assert psnr(restored, TRUTH) > psnr(ALONE, TRUTH) - 0.05
    assert weight.mean() < 0.01


def test_the_right_one_of_several_references_is_used():
    true = crop(photo("astronaut"), 21, 97, 230, 290)
    one = MODEL(LOW, MODEL.prepare([true]))[0]
    several = MODEL(LOW, MODEL.prepare([crop(photo("coffee"), 0, 0, 200, 200), true]))[0]
    assert abs(psnr(one, TRUTH) - psnr(several, TRUTH)) < 0.1


def test_the_same_every_time():
    prepared = MODEL.prepare([crop(photo("astronaut"), 21, 97, 160, 160)])
    for first, second in zip(MODEL(LOW, prepared), MODEL(LOW, prepared), strict=True):
        assert torch.equal(first, second)


def test_no_reference_gives_no_weight():
    restored, weight = MODEL(LOW, MODEL.prepare([]))
    assert restored.shape == TRUTH.shape
    assert weight.shape == TRUTH[:, :1].shape
    assert (weight == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (1, 40), (31, 33)])
@pytest.mark.parametrize("reference", [(8, 8), (9, 70), (64, 41)])
def test_any_size(size, reference):
    torch.manual_seed(0)
    restored, weight = MODEL(torch.rand(1, 3, *size), MODEL.prepare([torch.rand(1, 3, *reference)]))
    assert restored.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert weight.shape == (1, 1, 4 * size[0], 4 * size[1])
    for x in (restored, weight):
        assert 0 <= x.min() <= x.max() <= 1


def test_flat_images():
    restored, _ = MODEL(torch.full((1, 3, 12, 12), 0.5), MODEL.prepare([torch.full((1, 3, 40, 40), 0.5)]))
    torch.testing.assert_close(restored, torch.full_like(restored, 0.5))


# ------------------------------------------------------------------ its parts


def test_back_projection_agrees_with_the_input():
    error = [(reduce(back_project(resize(LOW, (192, 224)), LOW, n), 4) - LOW).square().mean() for n in (0, 1, 3)]
    assert error[0] > 2 * error[1] > 4 * error[2]


@pytest.mark.parametrize(("coarseness", "window", "smoothing"), [(1, 15, 7), (4, 16, 3)])
def test_a_shift_is_found_and_refined_to_half_a_pixel(coarseness, window, smoothing):
    wide = photo("coffee")
    query, reference = crop(wide, 60, 100, 96, 112), crop(wide, 51, 94, 160, 170)
    field = global_match(reduce(query, 4), reduce(reference, 4))
    middle = field[:, :, 6:-6, 6:-6]
    assert ((middle - torch.tensor([9 / 4, 6 / 4]).view(1, 2, 1, 1)).abs() <= 1).float().mean() > 0.9
    start = torch.full((1, 2, 96 // coarseness, 112 // coarseness), 8.0)
    found = refine(query, reference, start, (2, 1, 1, 0.5), window, smoothing)
    assert found.shape == start.shape
    found = interpolate(found, (96, 112))
    assert (found - torch.tensor([9.0, 6.0]).view(1, 2, 1, 1)).abs().mean() < 0.5
    assert Likeness(query, 15)(warp(reference, found)).median() > 0.95


def test_strided_windows_lie_around_the_middle_of_their_blocks():
    x = torch.rand(1, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    found = box(x, 8, stride=4)
    assert found.shape == (1, 1, 4, 6)
    torch.testing.assert_close(found[0, 0, 1, 2], x[0, 0, 2:10, 6:14].mean())
    torch.testing.assert_close(found[0, 0, 0, 0], x[0, 0, :6, :6].mean())  # what lies outside does not count


def test_enlarge_keeps_the_targets_where_they_are():
    field = grid(torch.zeros(1, 1, 5, 6)) * 0.5  # target + 1/2 = 1.5 (p + 1/2) - 1/4
    fine = enlarge(field, (20, 24), (4.4, 4.2))
    target = grid(fine) + fine + 0.5
    wanted = (1.5 * (grid(fine) + 0.5) / 4 - 0.25) * torch.tensor([4.4, 4.2]).view(1, 2, 1, 1)
    torch.testing.assert_close(target[:, :, 2:-2, 2:-2], wanted[:, :, 2:-2, 2:-2])


def test_evidence_is_for_fields_that_agree():
    torch.manual_seed(0)
    smooth = torch.full((1, 2, 20, 20), 5.0)
    chance = torch.randint(-20, 20, (1, 2, 20, 20)).float()
    assert (evidence(smooth, 10**9)[:, :, 6:-6, 6:-6] > 0.999).all()
    assert evidence(chance, 1600).max() < 0.2


def test_fill_takes_the_near_and_sure():
    field = torch.zeros(1, 2, 24, 24)
    field[..., 12:] = 9
    sure = torch.zeros(1, 1, 24, 24)
    sure[..., 2], sure[..., 21] = 1, 1
    filled = fill(field, sure)
    torch.testing.assert_close(filled[..., :6], torch.zeros(1, 2, 24, 6), atol=0.1, rtol=0)
    torch.testing.assert_close(filled[..., 18:], torch.full((1, 2, 24, 6), 9.0), atol=0.1, rtol=0)


# ------------------------------------------------------------------ bad input


def test_load_model():
    assert load_model("transfer", 4).name == "transfer"
    with pytest.raises(InputError, match="no model is named 'tranfser'; choose one of: auto, refnet, refnet-real, tra"):
        load_model("tranfser", 4)
    with pytest.raises(InputError, match="enlarges 4 times, not 3"):
        load_model("transfer", 3)


@pytest.mark.parametrize(
    ("low", "reference", "message"),
    [
        (torch.rand(3, 8, 8), torch.rand(1, 3, 9, 9), r"low-quality image has shape \(3, 8, 8\)"),
        (torch.rand(1, 1, 8, 8), torch.rand(1, 3, 9, 9), "low-quality image has shape"),
        (torch.full((1, 3, 8, 8), torch.nan), torch.rand(1, 3, 9, 9), "low-quality image contains NaN"),
        (LOW, torch.rand(1, 3, 7, 90), "reference has shape .* at least 8 pixels"),
        (LOW, torch.full((1, 3, 9, 9), torch.inf), "reference contains NaN or infinite"),
    ],
)
def test_refuses(low, reference, message):
    with pytest.raises(InputError, match=message):
        MODEL(low, MODEL.prepare([reference]))
