import pytest
import torch
from golden import golden_cases

from ragsr.colour import low_frequencies, match_colour
from ragsr.errors import InputError


@pytest.mark.parametrize("case", [c for c in golden_cases("adain") if c.name.startswith("colour")], ids=str)
def test_golden_colour(case):
    given, limits = case.tensors, case.config["atol_per_output"]
    content, style = given["content"], given["style"]
    found = {
        "adain_raw": match_colour(content, style, "adain"),
        "adain_clamped": match_colour(content, style).clamp(0, 1),
        "wavelet": match_colour(content, style, "wavelet"),
        "low": low_frequencies(content),
        "high": content - low_frequencies(content),
    }
    for name, image in found.items():
        torch.testing.assert_close(image, given[name], rtol=0, atol=limits[name])


def test_none_changes_nothing():
    content = torch.rand(1, 3, 4, 5)
    assert match_colour(content, torch.rand(1, 3, 9, 9), "none") is content


def test_adain_takes_a_style_of_any_size():
    content, style = torch.rand(2, 3, 31, 17), 0.5 * torch.rand(2, 3, 8, 90)
    out = match_colour(content, style)
    torch.testing.assert_close(out.mean((2, 3)), style.mean((2, 3)))


@pytest.mark.parametrize("method", ["adain", "wavelet"])
@pytest.mark.parametrize("size", [(1, 1), (1, 63), (33, 20)])
def test_a_colour_cast_is_taken_away(method, size):
    style = torch.rand(1, 3, *size)
    cast = style + torch.tensor([0.1, -0.2, 0.05]).view(1, 3, 1, 1)
    torch.testing.assert_close(match_colour(cast, style, method), style, rtol=0, atol=1e-5)


def test_errors():
    image = torch.rand(1, 3, 8, 8)
    with pytest.raises(InputError, match='method is "wavelets"; it must be one of adain, wavelet, none'):
        match_colour(image, image, "wavelets")
    with pytest.raises(InputError, match="both must be"):
        match_colour(image, image[0])
    with pytest.raises(InputError, match=r"size \(8, 8\), not \(4, 8\); resize it"):
        match_colour(image, image[:, :, :4], "wavelet")
