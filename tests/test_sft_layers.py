import pytest
import torch
from golden import golden_cases
from torch import nn
from torch.nn import functional as F

from ragsr.models.sft import SPADE, Modulation, SPADEResBlock, ZeroSFT

torch.manual_seed(0)


# ------------------------------------------------------------------ recorded originals, under their own names


def loaded(module, case):
    module.load_state_dict(case.weights())  # strict: the names are the published ones
    return module


@pytest.mark.parametrize("case", golden_cases("spade_layers"), ids=str)
@torch.no_grad()
def test_golden_spade(case):
    given, sizes = case.tensors, case.config
    if "emb" in given:
        block = SPADEResBlock(*(sizes[f"{n}_channels"] for n in ("in", "out", "emb", "label")))
        out = loaded(block, case)(given["x"], given["emb"], given["cond"])
    else:
        out = loaded(SPADE(sizes["channels"], sizes["label_channels"]), case)(given["x"], given["cond"])
    torch.testing.assert_close(out, given["out"], rtol=0, atol=sizes["atol_per_output"]["out"])


@pytest.mark.parametrize("case", [c for c in golden_cases("supir_zerosft") if c.name.startswith("case")], ids=str)
@torch.no_grad()
def test_golden_zero_sft(case):
    given, sizes = case.tensors, case.config
    layer = loaded(ZeroSFT(*(sizes[f"{n}_channels"] for n in ("label", "h", "concat"))), case)
    out = layer(given["c"], given["h"], given.get("h_ori"), sizes["control_scale"])
    torch.testing.assert_close(out, given["out"], rtol=0, atol=sizes["atol_per_output"]["out"])


# ------------------------------------------------------------------ one modulation for all


def spade():
    layer = SPADE(32, 5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return layer


def test_modulation_is_one_convolution_for_both(monkeypatch):
    layer, condition, convolutions = spade(), torch.randn(2, 5, 7, 6), []
    hidden = layer.mlp_shared(condition)
    wanted = layer.mlp_gamma(hidden), layer.mlp_beta(hidden)
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: convolutions.append(a) or conv2d(*a, **k))
    made = layer.modulation(condition)
    assert len(convolutions) == 2  # the shared one, and one for both maps
    torch.testing.assert_close(tuple(made), wanted)


def test_modulation_made_once_serves_every_chain():
    layer, condition, x = spade(), torch.randn(2, 5, 7, 6), torch.randn(6, 32, 7, 6)
    made = layer.modulation(condition)
    torch.testing.assert_close(layer(x, made), layer(x, condition.repeat(3, 1, 1, 1)))
    one = Modulation(*(map_[:1] for map_ in made))
    assert one.for_batch(6) is one  # the op broadcasts it
    torch.testing.assert_close(layer(x, one), layer(x, condition[:1].expand(6, -1, -1, -1)))
    with pytest.raises(ValueError, match="the condition has batch 2 and the features 3"):
        layer(x[:3], made)


def test_condition_of_another_size_is_interpolated_and_maps_are_not():
    layer, condition, x = spade(), torch.randn(1, 5, 4, 3), torch.randn(1, 32, 8, 6)
    larger = F.interpolate(condition, size=(8, 6), mode="bilinear")
    torch.testing.assert_close(layer(x, condition), layer(x, larger))
    with pytest.raises(ValueError, match=r"gamma has shape \(1, 32, 4, 3\); it must be \(1, 32, 8, 6\)"):
        layer(x, layer.modulation(condition))


def test_layers_train():
    block = SPADEResBlock(32, 64, 8, 5)
    out = block(torch.randn(2, 32, 4, 6), torch.randn(2, 8), torch.randn(2, 5, 2, 3))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


def test_a_new_zero_sft_is_a_group_norm():
    layer = ZeroSFT(5, 32, 64)
    control, skip, state = torch.randn(1, 5, 4, 4), torch.randn(1, 32, 4, 4), torch.randn(1, 64, 4, 4)
    wanted = F.group_norm(torch.cat((state, skip), dim=1), 32)
    torch.testing.assert_close(layer(control, skip, state), wanted)
