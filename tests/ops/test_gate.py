import runpy
import shutil

import pytest
import torch
from contract import LargestTensor, assert_compiles, assert_gradients, assert_opcheck, assert_precise, run_driver
from golden import golden_cases

from ragsr.ops import _operands, adain, cosine_gate, gated_blend
from ragsr.ops.gate import FLAT
from ragsr.testing import inputs


@pytest.mark.parametrize("op", ["cosine_gate", "adain", "gated_blend"])
@pytest.mark.parametrize("contract", [assert_precise, assert_opcheck, assert_gradients])
def test_contract(op, contract):
    contract(op)


def test_compiles():
    assert_compiles(lambda h, r: cosine_gate(h, r, [3, 4]), torch.randn(2, 9, 5), torch.randn(2, 7, 5))
    assert_compiles(adain, torch.randn(2, 9, 5), torch.randn(2, 7, 5))
    assert_compiles(gated_blend, torch.randn(2, 9), torch.randn(2, 9), torch.rand(9))


@pytest.mark.parametrize("op", ["cosine_gate", "adain", "gated_blend"])
def test_number_of_threads_changes_no_bit(op):
    """Sums are taken tile by tile and joined in the order of the tiles."""
    threads = torch.get_num_threads()
    try:
        for args in inputs(op):
            found = []
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                found.append(getattr(torch.ops.ragsr, op)(*args).clone())
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_tiles_without_torch(tmp_path):
    assert "cases" in run_driver("tokens", tmp_path)


def test_debug_looks_at_values(monkeypatch):
    x, nan = torch.rand(1, 9, 4), torch.full((1, 9, 4), float("nan"))
    gated_blend(x, x, x + 2)
    monkeypatch.setattr(_operands, "DEBUG", True)
    for call, message in (
        (lambda: cosine_gate(x, nan), "cosine_gate: h_ref holds NaN"),
        (lambda: adain(nan, x), "adain: x holds NaN"),
        (lambda: gated_blend(x, nan, x), "gated_blend: ref holds NaN"),
        (lambda: gated_blend(x, x, nan), "gated_blend: gate holds NaN"),
        (lambda: gated_blend(x, x, 0 * x + 2), r"gated_blend: gate lies in \[2, 2\]; it must lie in \[0, 1\]"),
        (lambda: gated_blend(x, x, -0.5 - 0 * x), r"gate lies in \[-0.5, -0.5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    gated_blend(x, x, x)
    adain(x, x)
    cosine_gate(x, x)
    torch.compile(gated_blend, fullgraph=True, backend="eager")(x, x, x + 2)  # a graph does not look


@pytest.mark.parametrize(("value", "looks"), [("1", True), ("0", False), ("", False)])
def test_debug_is_asked_for_by_the_environment(monkeypatch, value, looks):
    monkeypatch.setenv("RAGSR_DEBUG", value)
    assert runpy.run_path(_operands.__file__)["DEBUG"] is looks


# ------------------------------------------------------------------ cosine_gate


@pytest.mark.parametrize("case", [c for c in golden_cases("refir_gate") if c.name != "degenerate"], ids=str)
def test_golden_gate(case):
    x, y, mask = (case.tensors[name] for name in ("x", "y", "mask"))
    gate = cosine_gate(x.flatten(2).transpose(1, 2), y.flatten(2).transpose(1, 2))
    torch.testing.assert_close(gate.view_as(mask), mask, rtol=0, atol=case.config["atol_per_output"]["mask"])


def test_mean_direction_equals_the_full_matrix_of_cosines():
    h, h_ref = torch.randn(2, 40, 8).double(), torch.randn(2, 30, 8).double()
    cosines = torch.cosine_similarity(h[:, :, None], h_ref[:, None], dim=-1)
    for gate, part in zip(cosine_gate(h, h_ref, [10, 20]).unbind(1), cosines.split([10, 20], dim=2), strict=True):
        mean = part.mean(2)
        low, high = mean.aminmax(dim=1, keepdim=True)
        torch.testing.assert_close(gate, (mean - low) / (high - low), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [63, 64, 65, 1000])
def test_images_are_read_where_they_lie(tokens, dtype):
    """[B, C, H, W] seen as tokens gives the bits of contiguous tokens: the same tiles in the same order."""
    image, reference = (torch.randn(2, 37, 1, n).to(dtype) + 0.5 for n in (tokens, tokens + 3))
    h, h_ref = (x.flatten(2).transpose(1, 2) for x in (image, reference))
    lengths = [tokens, 3]
    assert torch.equal(cosine_gate(h, h_ref, lengths), cosine_gate(h.contiguous(), h_ref.contiguous(), lengths))


def test_gate_never_holds_more_than_the_features():
    h, h_ref = (torch.randn(1, 16, n).transpose(1, 2) for n in (20_000, 30_000))
    with LargestTensor() as largest:
        assert cosine_gate(h, h_ref).shape == (1, 1, 20_000)
    assert largest.numel <= h_ref.numel()


def test_flat_maps_give_zero_and_let_no_gradient_through():
    h = torch.randn(1, 1, 8).expand(1, 12, 8).clone().requires_grad_()
    gate = cosine_gate(h, torch.randn(1, 5, 8))
    gate.sum().backward()
    assert not gate.any()
    assert not h.grad.any()
    nearly = torch.ones(1, 12, 2)
    nearly[0, 3, 0] += FLAT / 4
    assert not cosine_gate(nearly, torch.tensor([[[1.0, 0.0]]])).any()


def test_nan_is_not_hidden_as_a_flat_map():
    h = torch.randn(1, 4, 3)
    h[0, 2] = float("nan")
    assert cosine_gate(h, torch.randn(1, 4, 3)).isnan().any()


def test_half_features_give_a_float32_gate_and_no_reference_an_empty_one():
    assert cosine_gate(torch.randn(1, 9, 4).half(), torch.randn(1, 3, 4).half()).dtype == torch.float32
    assert cosine_gate(torch.randn(2, 9, 4), torch.randn(2, 0, 4)).shape == (2, 0, 9)


@pytest.mark.parametrize(
    ("h", "h_ref", "lengths", "match"),
    [
        ((2, 3, 4), (1, 3, 4), None, r"h has shape \(2, 3, 4\) and h_ref \(1, 3, 4\)"),
        ((1, 4, 3, 3), (1, 4, 3, 3), None, r"x\.flatten\(2\)"),
        ((1, 0, 4), (1, 3, 4), None, "at least one token"),
        ((1, 3, 4), (1, 5, 4), [2, 2], r"ref_lengths is \[2, 2\] and the references have 5 tokens together"),
        ((1, 3, 4), (1, 5, 4), [5, 0], "one positive length per reference"),
    ],
)
def test_gate_errors(h, h_ref, lengths, match):
    with pytest.raises(ValueError, match=match):
        cosine_gate(torch.zeros(h), torch.zeros(h_ref), lengths)


# ------------------------------------------------------------------ adain


@pytest.mark.parametrize("case", [c for c in golden_cases("adain") if c.name.startswith("heads")], ids=str)
def test_golden_adain(case):
    out = adain(case.tensors["content"], case.tensors["style"])
    torch.testing.assert_close(out, case.tensors["out"], rtol=0, atol=case.config["atol_per_output"]["out"])


def test_statistics_become_those_of_the_style():
    x, style = torch.randn(2, 500, 3), 4 * torch.randn(2, 60, 3) + 1000
    out = adain(x, style)
    torch.testing.assert_close(out.mean(1), style.mean(1))
    torch.testing.assert_close(out.std(1), style.std(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("mean", [0.0, 1000.0, -30_000.0])
def test_small_deviations_around_a_large_mean(mean):
    x, style = torch.randn(2, 777, 5) + mean, torch.randn(2, 500, 5)
    wanted = adain(x.double(), style.double())
    resolution = abs(mean) * 2**-23  # of the input itself, in units of its deviation
    torch.testing.assert_close(adain(x, style).double(), wanted, rtol=0, atol=1e-5 + 2 * resolution)


def test_one_token():
    style = torch.randn(2, 7, 3)
    torch.testing.assert_close(adain(torch.randn(2, 1, 3), style), style.mean(1, keepdim=True))
    only = torch.randn(2, 1, 3)
    out = adain(torch.randn(2, 500, 3), only)  # variance 0: all but the eps goes
    torch.testing.assert_close(out, only.expand_as(out), rtol=0, atol=0.02)


@pytest.mark.parametrize(("x", "style"), [((3,), (3,)), ((2, 3), (2, 4)), ((2, 5, 3), (1, 5, 3)), ((2, 3), (0, 3))])
def test_adain_errors(x, style):
    with pytest.raises(ValueError, match="may differ in the number of tokens alone"):
        adain(torch.zeros(x), torch.zeros(style))


# ------------------------------------------------------------------ gated_blend


def test_blend_keeps_or_takes_where_the_gate_says():
    own, ref = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    gate = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0])
    out = gated_blend(own, ref, gate)
    assert torch.equal(out[..., [0, 3]], own[..., [0, 3]])
    torch.testing.assert_close(out[..., [1, 4]], ref[..., [1, 4]])
    torch.testing.assert_close(out[..., 2], (own + ref)[..., 2] / 2)


def test_blend_of_images_with_one_gate_per_pixel():
    """channels_last and a gate that broadcasts over the channels, which are then innermost in memory."""
    own, ref = (torch.randn(2, 5, 7, 9).to(memory_format=torch.channels_last) for _ in range(2))
    gate = torch.rand(2, 1, 7, 9)
    out = gated_blend(own, ref.contiguous(), gate)
    assert out.stride() == own.stride()
    torch.testing.assert_close(out, own + gate * (ref - own))


def test_blend_takes_the_float32_gate_of_half_features():
    own = torch.randn(2, 9, 4).bfloat16()
    out = gated_blend(own, own + 1, torch.rand(2, 9, 1))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("own", "ref", "gate", "error", "match"),
    [
        (torch.zeros(2, 3), torch.zeros(3), torch.zeros(()), ValueError, "they must be equal"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), ValueError, r"broadcast to the features \(2, 3\)"),
        (torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(2, 3), ValueError, r"gate has shape \(2, 3\)"),
        (torch.zeros(3), torch.zeros(3), torch.zeros(1, 3), ValueError, "must broadcast"),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3).half(), TypeError, "gate is torch.float16; it must be float32"),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3, device="meta"), ValueError, "gate is on meta"),
    ],
)
def test_blend_errors(own, ref, gate, error, match):
    with pytest.raises(error, match=match):
        gated_blend(own, ref, gate)
