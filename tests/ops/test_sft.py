import pytest
import torch
from contract import assert_compiles, assert_gradients, assert_opcheck, assert_precise
from golden import golden_cases
from torch import Tensor
from torch.nn import functional as F

from ragsr.ops import group_norm_sft, sft
from ragsr.testing import assert_matches_plain, inputs


@pytest.mark.parametrize("op", ["sft", "group_norm_sft"])
@pytest.mark.parametrize("contract", [assert_precise, assert_opcheck, assert_gradients])
def test_contract(op, contract):
    contract(op)


def test_contract_of_the_backward():
    for args in inputs("group_norm_sft"):
        grad = torch.randn_like(group_norm_sft(*args))
        args = (*args, *(1e-5, None, None, None, None)[len(args) - 6 :])
        args = grad, *args[:8], *args[9:]  # without the residual
        assert_matches_plain("group_norm_sft_backward", *args)
        torch.library.opcheck(torch.ops.ragsr.group_norm_sft_backward.default, args)


def test_compiles():
    x, x2, residual = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3), torch.randn(2, 6, 5, 3)
    vector, map_ = torch.randn(6), torch.randn(2, 6, 5, 3)
    assert_compiles(sft, x, torch.randn(4, 1, 1), torch.randn(2, 4, 5, 3))
    assert_compiles(
        lambda x, x2, w, m, r: group_norm_sft(x, 3, w, w, m, m[:, :, :1, :1], 1e-5, "silu", r, x2, 0.4),
        *(x, x2, vector, map_, residual),
    )


# ------------------------------------------------------------------ recorded originals


def conv(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)


def norm(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def spade(x: Tensor, cond: Tensor, w: dict[str, Tensor], prefix: str = "", residual: Tensor | None = None) -> Tensor:
    shared = conv(cond, w, f"{prefix}mlp_shared.0").relu()
    gamma, beta = conv(shared, w, f"{prefix}mlp_gamma"), conv(shared, w, f"{prefix}mlp_beta")
    return group_norm_sft(x, 32, *norm(w, f"{prefix}param_free_norm"), gamma, beta, residual=residual)


def residual_block(x: Tensor, emb: Tensor, cond: Tensor, w: dict[str, Tensor]) -> Tensor:
    h = conv(F.silu(F.group_norm(x, 32, *norm(w, "in_layers.0"))), w, "in_layers.2")
    h = h + F.linear(F.silu(emb), *norm(w, "emb_layers.1"))[..., None, None]
    h = conv(F.silu(F.group_norm(h, 32, *norm(w, "out_layers.0"))), w, "out_layers.3")
    skip = conv(x, w, "skip_connection") if "skip_connection.weight" in w else x
    return spade(h, cond, w, "spade.", residual=skip)


@pytest.mark.parametrize("case", golden_cases("spade_layers"), ids=str)
def test_golden_spade(case):
    given, w = case.tensors, case.weights()
    if "emb" in given:
        out = residual_block(given["x"], given["emb"], given["cond"], w)
    else:
        out = spade(given["x"], given["cond"], w)
    torch.testing.assert_close(out, given["out"], rtol=0, atol=case.config["atol_per_output"]["out"])


@pytest.mark.parametrize("case", [c for c in golden_cases("supir_zerosft") if c.name.startswith("case")], ids=str)
def test_golden_zero_sft(case):
    given, w, s = case.tensors, case.weights(), case.config["control_scale"]
    control = conv(given["c"], w, "zero_conv")
    shared = F.silu(conv(given["c"], w, "mlp_shared.0"))
    modulation = *norm(w, "param_free_norm"), conv(shared, w, "zero_mul"), conv(shared, w, "zero_add")
    if "h_ori" in given:
        x, x2 = given["h_ori"], given["h"] + control
        control = torch.cat((torch.zeros_like(x), control), dim=1)
    else:
        x, x2 = given["h"] + control, None
    out = group_norm_sft(x, 32, *modulation, x2=x2, raw_mix=s, residual=(s - 1) * control)
    torch.testing.assert_close(out, given["out"], rtol=0, atol=case.config["atol_per_output"]["out"])


# ------------------------------------------------------------------ the definition


@pytest.mark.parametrize("activation", [None, "silu", "relu"])
def test_is_what_pytorch_composes(activation):
    x, x2, gamma, beta, residual = (torch.randn(2, c, 7, 5) for c in (6, 3, 9, 9, 9))
    weight, bias = torch.randn(2, 9)
    wanted = F.group_norm(torch.cat((x, x2), 1), 3, weight, bias) * (1 + gamma) + beta
    wanted = getattr(F, activation)(wanted) if activation else wanted
    mixed = 0.25 * wanted + 0.75 * torch.cat((x, x2), 1)
    out = group_norm_sft(x, 3, weight, bias, gamma, beta, activation=activation, residual=residual, x2=x2, raw_mix=0.25)
    torch.testing.assert_close(out, mixed + residual)


def test_a_large_mean_does_not_drown_the_spread():
    x = torch.randn(1, 4, 32, 32) + 1000
    ones, zeros = torch.ones(4), torch.zeros(1, 4, 1, 1)
    out = group_norm_sft(x, 2, ones, 0 * ones, zeros, zeros)
    torch.testing.assert_close(out.unflatten(1, (2, 2)).std((2, 3, 4)), torch.ones(1, 2), rtol=1e-3, atol=0)


def test_result_keeps_channels_last():
    x = torch.randn(2, 4, 5, 3).to(memory_format=torch.channels_last)
    zeros = torch.zeros(2, 4, 5, 3)
    out = group_norm_sft(x, 2, torch.ones(4), torch.zeros(4), zeros, zeros)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_sft_scales_and_shifts():
    x = torch.randn(2, 3, 5, 4)
    scale, shift = torch.randn(2, 3, 1, 1), torch.randn(3, 5, 4)
    torch.testing.assert_close(sft(x, scale, shift), scale * x + shift)


# ------------------------------------------------------------------ errors

X, VECTOR, MAP = torch.zeros(2, 4, 5, 3), torch.zeros(4), torch.zeros(2, 4, 5, 3)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": VECTOR}, ValueError, r"x has shape \(4,\); it must be \[batch, channels, ...\]"),
        ({"groups": 3}, ValueError, "groups is 3 with 4 channels"),
        ({"groups": 0}, ValueError, "groups is 0"),
        ({"x2": X[:, :, :4]}, ValueError, r"x2 \(2, 4, 4, 3\); they may differ in the channels alone"),
        ({"x2": X}, ValueError, r"weight has shape \(4,\); it must be \(8,\)"),
        ({"bias": X}, ValueError, "bias has shape"),
        ({"gamma": MAP[:, :1]}, ValueError, r"gamma has shape \(2, 1, 5, 3\); it must be \(2, 4, 5, 3\)"),
        ({"beta": VECTOR}, ValueError, "beta has shape"),
        ({"residual": MAP[:1]}, ValueError, r"residual has shape \(1, 4, 5, 3\)"),
        ({"activation": "gelu"}, ValueError, 'activation is "gelu"; it must be None, "silu" or "relu"'),
        ({"weight": VECTOR.half()}, TypeError, "weight is torch.float16 and x torch.float32"),
        ({"x": X.long()}, TypeError, "x is torch.int64"),
    ],
)
def test_group_norm_errors(change, error, match):
    args = {"x": X, "groups": 2, "weight": VECTOR, "bias": VECTOR, "gamma": MAP, "beta": MAP}
    with pytest.raises(error, match=match):
        group_norm_sft(**(args | change))


def test_sft_errors():
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\) and \(2,\); they must broadcast"):
        sft(torch.zeros(2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(TypeError, match=r"shift is torch\.float64 and x torch\.float32"):
        sft(torch.zeros(2), torch.zeros(2), torch.zeros(2).double())
