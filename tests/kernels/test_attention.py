"""Separate attention in one kernel and from parts, on a GPU or in Triton's interpreter, against the plain form."""

import sys
import types

import pytest
import torch
from golden import Case, golden_cases
from torch import Tensor
from torch.nn import functional as F
from torch.utils import deterministic

from ragsr.ops import attention as plain
from ragsr.ops.attention_affine import fold_into_linear, separate_attention_affine_plain
from ragsr.testing import devices, inputs, strided

kernel = pytest.importorskip("ragsr.kernels.attention", reason="Triton is not installed")
from ragsr.kernels import attention_table as table  # noqa: E402  after the skip

DEVICE = devices()[-1]
DTYPES = (torch.float16,) if DEVICE == "cuda" else (torch.float16, torch.float32)  # on a GPU float32 is composite
SMALL = table.Blocks(queries=32, keys=32, warps=4, stages=2, park=False)  # so that small tensors have many tiles


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """Whoever reads what was never written shows it."""
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # it is this that fills; cuBLAS may warn
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["fused", "fused, parked", "composite"])
def owner(request, monkeypatch):
    blocks = SMALL._replace(park=request.param == "fused, parked")
    name = request.param.split(",")[0]
    monkeypatch.setattr(kernel, "blocks_for", lambda *_: blocks)
    monkeypatch.setattr(kernel, "owner_of", lambda *_: table.Owner(name, "the test says so"))
    return name


def run(*args, lengths=None, scale=None, align=True, mode="separate") -> Tensor:
    lengths = plain.reference_lengths("test", args[3].shape[2], lengths)
    return kernel.separate_attention(*args, lengths, scale, align, mode)


def example(
    n: int, length: int, references: list[int], head_dim: int, dtype: torch.dtype = torch.float32, heads: int = 1
) -> tuple[Tensor, ...]:
    """Two images; the first has its gate at 0."""
    torch.manual_seed(0)
    tokens = (n, length, length, sum(references), sum(references))
    q, k, v, k_ref, v_ref = (torch.randn(2, heads, t, head_dim, device=DEVICE).to(dtype) for t in tokens)
    gate = torch.rand(2, len(references), n, device=DEVICE) / max(1, len(references))
    gate[0] = 0
    return q, k, v, k_ref, v_ref, gate


def doubled(args):
    return [a.double() if isinstance(a, Tensor) else a for a in args]


# ------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("owner", "head_dim"),
    [
        *(("fused", d) for d in (8, 40, 64, 80, 128, 160)),
        ("fused, parked", 80),
        ("fused, parked", 248),
        ("composite", 40),
    ],
    indirect=["owner"],
)
def test_error_is_that_of_pytorch(head_dim, owner):
    """At most twice the error of the plain form, which is PyTorch's attention, in the same dtype."""
    for dtype in DTYPES:
        args = example(37, 45, [33, 5], head_dim, dtype)
        truth = plain.separate_attention_plain(*doubled(args), [33, 5])
        ours = (run(*args, lengths=[33, 5]).double() - truth).abs()
        pytorch = (plain.separate_attention_plain(*args, [33, 5]).double() - truth).abs()
        assert ours.max() <= 2 * pytorch.max()
        assert ours.square().mean() <= 4 * pytorch.square().mean()


@pytest.mark.parametrize("owner", ["fused", "composite"], indirect=True)
def test_all_inputs(owner):
    for q, *rest in inputs("separate_attention", DEVICE, DTYPES[-1]):
        if owner == "composite" or q.shape[3] % 8 == 0:
            names = ("lengths", "scale", "align", "mode")
            options = dict(zip(names, rest[5:], strict=False))
            found = run(q, *rest[:5], **options)
            wanted = plain.separate_attention_plain(*doubled((q, *rest)))
            tolerance = 5e-3 if DEVICE == "cuda" else 2e-5
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)
            assert found.stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("mode", ["concat", "replace"])
def test_one_softmax(mode, owner):
    for dtype in DTYPES:
        *tensors, _ = example(33, 47, [70], 40, dtype)
        found = run(*tensors, None, mode=mode, scale=-0.3)
        wanted = plain.separate_attention_plain(*doubled(tensors), None, None, -0.3, mode=mode)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-3 if dtype == torch.float16 else 1e-5)


def test_a_large_common_value_costs_no_digits_of_the_statistics(owner):
    q, k, v, k_ref, v_ref, gate = example(100, 70, [50], 16)
    args = q, k, v + 300, k_ref, v_ref + 300, gate
    if DEVICE == "cpu":
        torch.testing.assert_close(
            run(*args), plain.separate_attention_plain(*doubled(args)).float(), rtol=0, atol=2e-3
        )


# ------------------------------------------------------------------ recorded originals


@pytest.mark.parametrize("case", [c for c in golden_cases("refir_injection") if "q" in c.tensors], ids=str)
@pytest.mark.skipif(DEVICE == "cuda", reason="recorded in float32, which the fused kernel has in the interpreter alone")
def test_golden_injection(case: Case, monkeypatch):
    monkeypatch.setattr(kernel, "owner_of", lambda *_: table.Owner("fused", "the test says so"))
    mask = case.tensors["mask"]
    mask = F.interpolate(mask, (case.config["H"], case.config["W"]), mode="bilinear", align_corners=False)
    gate = case.config["scale_s"] * case.config["layer_weight_w"] * mask.flatten(2)
    (q, k, v), own, ref = (case.tensors[x] for x in "qkv"), slice(0, None, 2), slice(1, None, 2)
    out = run(q[own], k[own], v[own], k[ref], v[ref], gate).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, case.tensors["out"][own], rtol=0, atol=case.config["atol_per_output"]["out"])


@pytest.mark.parametrize("owner", ["fused", "composite"], indirect=True)
@pytest.mark.skipif(DEVICE == "cuda", reason="recorded in float32, which the fused kernel has in the interpreter alone")
def test_golden_injection_of_supir(owner):
    """A whole attention module, its smallest case: 35 tokens, three heads of 40."""
    case = min(golden_cases("refir_injection_supir"), key=lambda c: c.tensors["hidden_states"].numel())
    weights, x, own, ref = case.weights(), case.tensors["hidden_states"], slice(0, None, 2), slice(1, None, 2)
    heads = case.config["heads"], -1
    q, k, v = (F.linear(x, weights[f"to_{p}.weight"]).unflatten(2, heads).transpose(1, 2) for p in "qkv")
    gate = case.config["scale_s"] * case.tensors["mask"].flatten(2)
    out = run(q[own], k[own], v[own], k[ref], v[ref], gate).transpose(1, 2).flatten(2)
    out = F.linear(out, weights["to_out.0.weight"], weights["to_out.0.bias"])
    torch.testing.assert_close(out, case.tensors["out"][own], rtol=0, atol=case.config["atol_per_output"]["out"])


# ------------------------------------------------------------------ bits


def test_a_reference_that_is_off_changes_no_bit(owner):
    for dtype in DTYPES:
        q, k, v, k_ref, v_ref, gate = example(41, 50, [9, 40], 24, dtype, heads=2)
        k_ref[0], v_ref[0] = float("nan"), float("inf")  # the image that does not look must not see
        out = run(q, k, v, k_ref, v_ref, gate, lengths=[9, 40])
        own = run(q, k, v, k_ref[:, :, :0], v_ref[:, :, :0], gate[:, :0])
        assert torch.equal(out[0], own[0])
        assert not torch.equal(out[1], own[1])


def test_the_same_bits_every_time(owner):
    args = example(70, 70, [33], 16, DTYPES[0])
    first = run(*args)
    assert all(torch.equal(run(*args), first) for _ in range(2))


def test_tensors_are_read_where_they_lie(owner):
    """The layouts of a layer: heads inside the channels, target and source in turn, one reference for all; and gaps."""
    dtype = DTYPES[0]
    x = torch.randn(4, 20, 3, 2, 16, device=DEVICE).to(dtype)  # [target, source, …], tokens, q k v, heads
    q, k, v = (y.transpose(1, 2) for y in x.unbind(2))
    gate = torch.rand(2, 1, 20, device=DEVICE)
    layouts = [
        (q[0::2], k[0::2], v[0::2], k[1::2], v[1::2], gate),
        (q[0::2], k[0::2], v[0::2], k[1:2].expand(2, -1, -1, -1), v[1:2].expand(2, -1, -1, -1), gate),
        tuple(strided(y) for y in (q[0::2], k[0::2], v[0::2], k[1::2], v[1::2], gate)),
        (*(y.transpose(2, 3).contiguous().transpose(2, 3) for y in (q[:2], k[:2], v[:2], k[2:], v[2:])), gate),
    ]
    for args in layouts:
        dense = run(*(y.contiguous() for y in args))
        torch.testing.assert_close(run(*args), dense, rtol=0, atol=0)


def test_result_lies_between_untouched_neighbours(monkeypatch, owner):
    """The kernel writes its own elements and no others, also where the last tile is short."""
    args = example(21, 21, [9], 40, DTYPES[0])
    room = torch.full((2, 1, 23, 48), 7.0, device=DEVICE, dtype=DTYPES[0])
    view = room[:, :, 1:22, 4:44]
    wanted, fresh = run(*args), torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: view if x is args[0] else fresh(x))
    assert torch.equal(run(*args), wanted)
    outside = torch.ones_like(room, dtype=torch.bool)
    outside[:, :, 1:22, 4:44] = False
    assert (room[outside] == 7).all()


# ------------------------------------------------------------------ folded into a linear layer


def test_affine_folds_into_the_next_layer(owner):
    q, k, v, k_ref, v_ref, gate = example(37, 45, [33, 5], 16, heads=2)
    args = (q, k, v, k_ref, v_ref, gate) if owner == "composite" or DEVICE == "cpu" else ()
    if not args:
        args = (*(x.half() for x in (q, k, v, k_ref, v_ref)), gate)
    close = {"rtol": 0, "atol": 2e-5 if args[0].dtype == torch.float32 else 1e-2}
    found = kernel.separate_attention_affine(*args, [33, 5], None)
    for got, want in zip(found, separate_attention_affine_plain(*doubled(args), [33, 5]), strict=True):
        torch.testing.assert_close(got.double(), want, **close)
    out, gain, shift = found
    assert torch.equal(gain[0], torch.ones_like(gain[0]))
    assert not shift[0].any()
    layer = torch.nn.Linear(32, 7, device=DEVICE, dtype=args[0].dtype)
    weight, bias = fold_into_linear(layer.weight, layer.bias, gain, shift)
    assert torch.equal(weight[0], layer.weight)
    assert torch.equal(bias[0], layer.bias)
    folded = torch.baddbmm(bias[:, None], out.transpose(1, 2).flatten(2), weight.mT)
    torch.testing.assert_close(folded, layer(run(*args, lengths=[33, 5]).transpose(1, 2).flatten(2)), **close)


# ------------------------------------------------------------------ the table


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [(8, (16, 0)), (16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (120, (128, 0)), (160, (128, 32))],
)
def test_parts_hold_the_head_dim(head_dim, parts):
    assert table.parts_of(head_dim) == parts


def test_every_head_dim_has_blocks_on_every_gpu():
    for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]:
        for head_dim in range(8, table.LARGEST + 1, 8):
            assert head_dim <= sum(table.parts_of(head_dim)) <= table.LARGEST
            assert table.blocks_for(capability, head_dim).keys >= 16


def test_the_table_says_why(monkeypatch):
    half = torch.float16
    assert "not measured yet" in table.owner_of(half, 64, (9, 0)).reason
    assert table.owner_of(half, 7, (9, 0)).name == "composite"
    assert "multiples of 8 up to 256; q has 7" in table.owner_of(half, 7, (9, 0)).reason
    assert "q is torch.float64" in table.owner_of(torch.float64, 64, (9, 0)).reason
    assert "8.0; this GPU has 7.5" in table.owner_of(half, 64, (7, 5)).reason
    monkeypatch.setattr(table, "FORCED", "fused")
    with pytest.raises(ValueError, match="RAGSR_ATTENTION is fused, but the fused kernel takes head dims"):
        table.owner_of(half, 7, (9, 0))
    monkeypatch.setattr(table, "FORCED", "flash")
    with pytest.raises(ValueError, match="RAGSR_ATTENTION is 'flash'; it must be fused, composite or xformers"):
        table.owner_of(half, 64, (9, 0))


def test_xformers_is_called_the_way_it_wants(monkeypatch):
    """Its tensors are [B, N, H, D]; a stand-in takes its place, so that the layout alone is tested."""

    def memory_efficient_attention(q, k, v, scale):
        assert q.shape == (2, 21, 3, 16)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    args = example(21, 30, [9], 16, heads=3)
    monkeypatch.setattr(kernel, "owner_of", lambda *_: table.Owner("composite", "the test says so"))
    wanted = run(*args)
    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    monkeypatch.setattr(table, "FORCED", "xformers")
    torch.testing.assert_close(run(*args), wanted)


def test_strides_too_far_apart_are_named():
    q = torch.empty_strided((1, 1, 2, 8), (0, 0, 1 << 25, 1), dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=r"q has strides .* pass it contiguous"):
        kernel.check_strides(q=q)
