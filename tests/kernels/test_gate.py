"""The gate, AdaIN and the gated blend, on a GPU or in Triton's interpreter, against their plain forms."""

import pytest
import torch
from golden import golden_cases
from torch.utils import deterministic

from ragsr.ops import gate as plain
from ragsr.ops._operands import reference_lengths
from ragsr.testing import TOLERANCES, devices, inputs

kernel = pytest.importorskip("ragsr.kernels.gate", reason="Triton is not installed")
from ragsr.kernels import moments  # noqa: E402  after the skip

DEVICE = devices()[-1]
DTYPES = (torch.float64, torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # it is this that fills; cuBLAS may warn
    yield
    torch.use_deterministic_algorithms(False)


def cosine_gate(h, h_ref, lengths=None):
    return kernel.cosine_gate(h, h_ref, reference_lengths("test", h_ref.shape[1], lengths))


RUNS = {"cosine_gate": cosine_gate, "adain": moments.adain, "gated_blend": kernel.gated_blend}


@pytest.mark.parametrize("op", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_inputs(op, dtype):
    for args in inputs(op, DEVICE, dtype):
        found = RUNS[op](*args)
        doubled = (a.double() if isinstance(a, torch.Tensor) else a for a in args)
        wanted = getattr(plain, f"{op}_plain")(*doubled)
        relative, absolute = TOLERANCES[dtype]
        torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)
        if op != "cosine_gate":
            assert found.stride() == torch.empty_like(args[0]).stride()


# ------------------------------------------------------------------ the gate


@pytest.mark.parametrize("case", [c for c in golden_cases("refir_gate") if c.name != "degenerate"], ids=str)
def test_golden_gate(case):
    """[B, C, H, W] as it lies: the channels are the slow dimension."""
    x, y, mask = (case.tensors[name].to(DEVICE) for name in ("x", "y", "mask"))
    gate = cosine_gate(x.flatten(2).transpose(1, 2), y.flatten(2).transpose(1, 2))
    torch.testing.assert_close(gate.view_as(mask), mask, rtol=0, atol=case.config["atol_per_output"]["mask"])


def test_many_tiles_and_references(monkeypatch):
    monkeypatch.setattr(kernel, "MERGE", 2)  # fewer than there are tiles
    monkeypatch.setattr(kernel, "STRETCH", 2)
    monkeypatch.setattr(kernel, "TOKENS", 16)
    h, h_ref = torch.randn(1, 40, 70, device=DEVICE) + 0.3, torch.randn(1, 150, 70, device=DEVICE) + 0.3
    found = cosine_gate(h, h_ref, [100, 1, 49])
    wanted = plain.cosine_gate_plain(h.double(), h_ref.double(), [100, 1, 49])
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)
    assert torch.equal(cosine_gate(h, h_ref, [100, 1, 49]), found)


def test_flat_maps_give_zero_and_nan_is_not_hidden():
    h = torch.randn(1, 1, 8, device=DEVICE).expand(1, 150, 8).clone()
    assert not cosine_gate(h, torch.randn(1, 5, 8, device=DEVICE)).any()
    assert not cosine_gate(torch.zeros_like(h), torch.zeros_like(h)).any()
    for place in (2, 149):
        h = torch.randn(1, 150, 8, device=DEVICE)
        h[0, place] = float("nan")
        assert cosine_gate(h, torch.randn(1, 5, 8, device=DEVICE)).isnan().all()


# ------------------------------------------------------------------ AdaIN and blend


@pytest.mark.parametrize("case", [c for c in golden_cases("adain") if c.name.startswith("heads")], ids=str)
def test_golden_adain(case):
    content, style, out = (case.tensors[name].to(DEVICE) for name in ("content", "style", "out"))
    found = moments.adain(content, style)
    torch.testing.assert_close(found, out, rtol=0, atol=case.config["atol_per_output"]["out"])
    again = moments.adain(content, style)
    assert torch.equal(found, again)


def test_adain_keeps_its_digits_under_a_large_mean_and_takes_many_tiles(monkeypatch):
    monkeypatch.setattr(moments, "TILES", 2)
    x, style = torch.randn(1, 2, 500, 9, device=DEVICE) + 3000, 4 * torch.randn(1, 2, 330, 9, device=DEVICE) + 1000
    found = moments.adain(x, style)
    torch.testing.assert_close(found.double(), plain.adain_plain(x.double(), style.double()), rtol=0, atol=5e-3)


def test_adain_of_five_dimensions_reads_them_where_they_lie():
    x, style = torch.randn(2, 3, 2, 7, 5, device=DEVICE).transpose(0, 2), torch.randn(2, 3, 2, 4, 5, device=DEVICE)
    torch.testing.assert_close(moments.adain(x, style), plain.adain_plain(x, style), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("own", "gate", "dims"),
    [
        (torch.randn(2, 3, 5, 4), torch.rand(2, 1, 5, 1), 4),  # per token
        (torch.randn(2, 3, 5, 4), torch.rand(1, 1, 1, 1), 1),  # a number
        (torch.randn(2, 5, 3, 4).transpose(1, 2), torch.rand(2, 1, 5, 1), 4),
        (
            torch.randn(2, 3, 2, 3, 2, 2).transpose(0, 4)[::2],
            torch.rand(3, 1, 3, 1, 2),
            5,
        ),  # more than the kernel walks
    ],
)
def test_blend_walks_as_few_dimensions_as_it_can(own, gate, dims):
    own, gate = own.to(DEVICE), gate.to(DEVICE)
    ref = torch.randn_like(own)
    sizes, _ = kernel.joined(list(own.shape), [x.stride() for x in (own, ref, gate.expand_as(own))])
    assert min(len(sizes), 5) == dims
    found = kernel.gated_blend(own, ref, gate)
    torch.testing.assert_close(found, plain.gated_blend_plain(own, ref, gate), rtol=0, atol=1e-6)
    assert found.stride() == torch.empty_like(own).stride()
