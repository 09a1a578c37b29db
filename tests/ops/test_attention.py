import functools
from typing import Any

import pytest
import torch
from contract import (
    assert_compiles,
    assert_gradients,
    assert_opcheck,
    assert_precise,
    gradients,
)
from golden import Case, golden_cases
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ragsr.ops import _operands, adain, separate_attention
from ragsr.ops._library import PLAIN_FORMS
from ragsr.ops._operands import wide
from ragsr.ops.attention_affine import separate_attention_affine
from ragsr.testing import TOLERANCES, assert_matches_plain, inputs, peak_bytes, strided


@pytest.mark.parametrize("contract", [assert_precise, assert_opcheck, assert_gradients])
def test_contract(contract):
    contract("separate_attention")


def results(b: int, h: int, n: int, d: int, references: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Attention to own tokens and to each reference, and gates of which every second image has none open."""
    gate = torch.rand(b, references, n) / references
    gate[: b // 2] = 0
    return torch.randn(b, h, n, d), list(torch.randn(references, b, h, n, d)), gate


KERNELS = torch.ops.ragsr.blend_reference, torch.ops.ragsr.finish_attention
PLAIN = PLAIN_FORMS["blend_reference"], PLAIN_FORMS["finish_attention"]


def blended(steps: tuple[Any, Any], own: Tensor, others: list[Tensor], gate: Tensor, align: bool) -> Tensor:
    """One reference after the other into memory that is poisoned before."""
    blend, finish = steps
    fused = torch.full_like(own, float("nan"), dtype=wide(own).dtype)
    for r, other in enumerate(others[:-1]):
        blend(fused, own, other, gate, r)
    out = fused if own.dtype == fused.dtype else torch.full_like(own, float("nan"))
    finish(out, fused, own, others[-1], gate, align)
    return out


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("align", [True, False])
def test_what_follows_the_matrix_products(dtype, align):
    relative, absolute = TOLERANCES[dtype]
    for sizes in [(1, 1, 1, 8, 1), (2, 3, 63, 40, 1), (3, 2, 200, 7, 3), (0, 2, 4, 8, 1), (2, 2, 130, 21, 2)]:
        own, others, gate = results(*sizes)
        own, others = own.to(dtype), [x.to(dtype) for x in others]
        wanted = blended(PLAIN, own.double(), [x.double() for x in others], gate.double(), align)
        heads_last = own.transpose(1, 2).contiguous().transpose(1, 2)
        for layout in (own, heads_last, strided(own)):
            for shares in (gate, strided(gate)):
                found = blended(KERNELS, layout, [strided(x) for x in others], shares, align)
                torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)
                assert torch.equal(found[: sizes[0] // 2], own[: sizes[0] // 2])


def test_number_of_threads_changes_no_bit_of_what_follows():
    args, threads, found = results(3, 2, 200, 7, 3), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(blended(KERNELS, *args, align=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_steps_keep_to_their_schemas():
    own, others, gate = results(2, 2, 9, 8, 2)
    fused = torch.empty_like(own)
    torch.library.opcheck(torch.ops.ragsr.blend_reference.default, (fused, own, others[0], gate, 0))
    out = torch.empty_like(own)
    torch.library.opcheck(torch.ops.ragsr.finish_attention.default, (out, fused, own, others[1], gate, True))


def test_interleaved_batch_is_read_in_place():
    """[target, source, target, source] with heads that are views of merged channels, as inside a layer."""
    q, k, v = (torch.randn(4, 70, 3 * 16).view(4, 70, 3, 16).transpose(1, 2) for _ in range(3))
    own, ref, gate = slice(0, None, 2), slice(1, None, 2), torch.rand(2, 1, 70)
    parts = q[own], k[own], v[own], k[ref], v[ref]
    out = separate_attention(*parts, gate)
    assert out.stride() == torch.empty_like(q[own]).stride()
    torch.testing.assert_close(out, separate_attention(*(x.contiguous() for x in parts), gate))


def test_contract_of_the_backward():
    for q, k, v, k_ref, v_ref, gate, *options in inputs("separate_attention")[1::3]:
        options = (*options, *(None, None, True, "separate")[len(options) :])
        args = torch.randn_like(q), q, k, v, k_ref, v_ref, gate, *options
        assert_matches_plain("separate_attention_backward", *args)
        torch.library.opcheck(torch.ops.ragsr.separate_attention_backward.default, args)


def test_compiles():
    q, k, v = torch.randn(3, 2, 2, 9, 8).unbind()
    k_ref, v_ref = torch.randn(2, 2, 2, 7, 8).unbind()
    gate = torch.rand(2, 2, 9) / 2
    assert_compiles(lambda *x: separate_attention(*x, ref_lengths=[3, 4]), q, k, v, k_ref, v_ref, gate)
    assert_compiles(lambda *x: separate_attention(*x, None, mode="concat"), q, k, v, k_ref, v_ref)


# ------------------------------------------------------------------ recorded originals


def heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(2, (n, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def inject(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """The batch [target, source, target, source] of the originals; the mask is resized to the tokens' grid."""
    mask, own, ref = case.tensors["mask"], slice(0, None, 2), slice(1, None, 2)
    if "H" in case.config:
        mask = F.interpolate(mask, (case.config["H"], case.config["W"]), mode="bilinear", align_corners=False)
    gate = case.config["scale_s"] * case.config.get("layer_weight_w", 1.0) * mask.flatten(2)
    out = torch.empty_like(q)
    out[own] = separate_attention(q[own], k[own], v[own], k[ref], v[ref], gate)
    out[ref] = plain_attention(q[ref], k[ref], v[ref])
    return merged(out)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return separate_attention(q, k, v, k[:, :, :0], v[:, :, :0], q.new_empty(q.shape[0], 0, q.shape[2]))


@pytest.mark.parametrize("case", golden_cases("refir_injection") + golden_cases("refir_injection_supir"), ids=str)
def test_golden_injection(case):
    limits, given = case.config["atol_per_output"], case.tensors
    if "q" in given:
        out = inject(given["q"], given["k"], given["v"], case)
    else:
        w = case.weights()
        q, k, v = (heads(F.linear(given["hidden_states"], w[f"to_{x}.weight"]), case.config["heads"]) for x in "qkv")
        project = w["to_out.0.weight"], w["to_out.0.bias"]
        out = F.linear(inject(q, k, v, case), *project)
        plain = F.linear(merged(plain_attention(q, k, v)), *project)
        torch.testing.assert_close(plain, given["plain_out"], rtol=0, atol=limits["plain_out"])
    torch.testing.assert_close(out, given["out"], rtol=0, atol=limits["out"])


@pytest.mark.parametrize("case", [c for c in golden_cases("supir_zerosft") if c.name.startswith("cross")], ids=str)
def test_golden_cross_attention(case):
    w, given, n = case.weights(), case.tensors, case.config["heads"]
    x, context = (
        F.group_norm(given[name], 32, w[f"{norm}.weight"], w[f"{norm}.bias"]).flatten(2).transpose(1, 2)
        for name, norm in (("x", "norm1"), ("context", "norm2"))
    )
    q, k, v = (heads(F.linear(t, w[f"attn.to_{p}.weight"]), n) for t, p in ((x, "q"), (context, "k"), (context, "v")))
    out = F.linear(merged(plain_attention(q, k, v)), w["attn.to_out.0.weight"], w["attn.to_out.0.bias"])
    out = given["x"] + case.config["control_scale"] * out.transpose(1, 2).view_as(given["x"])
    torch.testing.assert_close(out, given["out"], rtol=0, atol=case.config["atol_per_output"]["out"])


# ------------------------------------------------------------------ the definition


def naive(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(scale * q @ k.mT, dim=-1) @ v


def example(*, refs: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(3, 2, 3, 13, 8, dtype=dtype).unbind()
    k_ref, v_ref = torch.randn(2, 2, 3, 7 * refs, 8, dtype=dtype).unbind()
    return q, k, v, k_ref, v_ref, torch.rand(2, refs, 13, dtype=dtype) / max(1, refs)


@pytest.mark.parametrize("align", [True, False])
def test_each_reference_has_a_softmax_of_its_own(align):
    q, k, v, k_ref, v_ref, gate = example()
    own, (g1, g2) = naive(q, k, v), gate[:, :, None, :, None].unbind(1)
    one, two = naive(q, k_ref[:, :, :5], v_ref[:, :, :5]), naive(q, k_ref[:, :, 5:], v_ref[:, :, 5:])
    wanted = (1 - g1 - g2) * own + g1 * one + g2 * two
    out = separate_attention(q, k, v, k_ref, v_ref, gate, [5, 9], align=align)
    torch.testing.assert_close(out, adain(wanted, own) if align else wanted)


def test_concat_and_replace():
    q, k, v, k_ref, v_ref, gate = example()
    both = torch.cat((k, k_ref), 2), torch.cat((v, v_ref), 2)
    for unused in (gate, None):
        out = separate_attention(q, k, v, k_ref, v_ref, unused, [5, 9], scale=0.5, mode="concat")
        torch.testing.assert_close(out, naive(q, *both, 0.5))
        out = separate_attention(q, k, v, k_ref, v_ref, unused, [5, 9], mode="replace")
        torch.testing.assert_close(out, naive(q, k_ref, v_ref))


def test_equal_references_share_their_weight():
    q, k, v, k_ref, v_ref, gate = example(refs=1)
    three = [x.repeat(1, 1, 3, 1) for x in (k_ref, v_ref)]
    out = separate_attention(q, k, v, *three, gate.repeat(1, 3, 1) / 3, [7, 7, 7])
    torch.testing.assert_close(out, separate_attention(q, k, v, k_ref, v_ref, gate))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_reference_that_is_off_changes_no_bit(dtype):
    q, k, v, k_ref, v_ref, gate = example(dtype=dtype)
    gate[0] = 0
    out = separate_attention(q, k, v, k_ref, v_ref, gate.float(), [5, 9])
    plain = separate_attention(q, k, v, k_ref, v_ref, torch.zeros_like(gate), [5, 9], align=False)
    assert torch.equal(plain_attention(q, k, v), plain)
    assert torch.equal(out[0], plain[0])
    assert not torch.equal(out[1], plain[1])


def test_gradient_of_the_gate_starts_at_zero_too():
    q, k, v, k_ref, v_ref, gate = example()
    zero = torch.zeros_like(gate).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda g: separate_attention(q, k, v, k_ref, v_ref, g, [5, 9]), zero, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_the_references(dtype):
    """It holds the own attention, one reference's and the blend, and no weights [N, M]."""
    peaks, tokens = {}, 700
    for refs in (1, 2, 4):
        q, k, v = torch.randn(3, 1, tokens, 2, 16, dtype=dtype).transpose(2, 3).unbind()
        k_ref, v_ref = torch.randn(2, 1, tokens * refs, 2, 16, dtype=dtype).transpose(2, 3).unbind()
        args = q, k, v, k_ref, v_ref, torch.rand(1, refs, tokens) / refs, [tokens] * refs
        separate_attention(*args)
        peaks[refs] = peak_bytes(functools.partial(separate_attention, *args))
    assert 2 * q.numel() * q.element_size() < peaks[1] < tokens * tokens * q.element_size()
    assert peaks[1] == peaks[2] == peaks[4]


def test_memory_of_the_gradient_grows_with_the_tokens_alone():
    def peak(tokens: int) -> int:
        args = [x.requires_grad_() for x in torch.randn(5, 1, 1, tokens, 8).unbind()]
        gate = torch.rand(1, 1, tokens, requires_grad=True)
        return peak_bytes(lambda: gradients(separate_attention, (*args, gate)))

    peak(64)
    assert peak(4096) < 2.5 * peak(2048)


@pytest.mark.parametrize("mode", ["separate", "concat", "replace"])
@pytest.mark.parametrize("align", [True, False])
def test_gradients_are_those_of_the_formula(mode, align):
    """Against PyTorch's gradients of soft-maxes written out; every input, several references of different lengths."""

    def formula(q, k, v, k_ref, v_ref, gate):
        if mode == "concat":
            return naive(q, torch.cat((k, k_ref), 2), torch.cat((v, v_ref), 2), 0.4)
        if mode == "replace":
            return naive(q, k_ref, v_ref, 0.4)
        own, parts = naive(q, k, v, 0.4), zip(k_ref.split([5, 9], 2), v_ref.split([5, 9], 2), strict=True)
        shares = gate[:, :, None, :, None].unbind(1)
        out = (1 - sum(shares)) * own
        out = out + sum(share * naive(q, *ref, 0.4) for share, ref in zip(shares, parts, strict=True))
        if not align:
            return out
        std, wanted = ((x.var(2, keepdim=True) + 1e-5).sqrt() for x in (out, own))
        return (out - out.mean(2, keepdim=True)) / std * wanted + own.mean(2, keepdim=True)

    args = [x.requires_grad_() for x in example()]
    found = gradients(lambda *x: separate_attention(*x, [5, 9], scale=0.4, align=align, mode=mode), args)
    torch.testing.assert_close(found, gradients(formula, args))
    assert mode != "separate" or found[-1].abs().min() > 0


def test_gradients_below_a_mode_of_the_dispatcher():
    """Such as this counter's, which switches autograd off for whoever runs below it."""
    args = [x.requires_grad_() for x in example()]
    wanted = gradients(separate_attention, (*args, [5, 9]))
    with FlopCounterMode(display=False):
        assert all(map(torch.equal, gradients(separate_attention, (*args, [5, 9])), wanted))


def test_autocast_does_not_reach_inside():
    args = [x.requires_grad_() for x in example(dtype=torch.float32)]
    wanted, grads = separate_attention(*args, [5, 9]), gradients(separate_attention, (*args, [5, 9]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(separate_attention(*args, [5, 9]), wanted)
        torch.testing.assert_close(gradients(separate_attention, (*args, [5, 9])), grads, rtol=0, atol=0)


def test_result_lies_like_the_queries():
    q, k, v = (torch.randn(2, 9, 3, 8).transpose(1, 2) for _ in range(3))
    assert plain_attention(q, k, v).stride() == q.stride()


def test_one_reference_is_shared_by_a_batch():
    q, k, v, k_ref, v_ref, gate = example(refs=1)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (k_ref, v_ref)]
    out = separate_attention(q, k, v, *shared, gate)
    assert torch.equal(out, separate_attention(q, k, v, *(x.contiguous() for x in shared), gate))


# ------------------------------------------------------------------ errors

Q, GATE = torch.zeros(2, 3, 5, 8), torch.zeros(2, 1, 5)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k": Q[0]}, ValueError, r"k has shape \(3, 5, 8\) beside q \(2, 3, 5, 8\)"),
        ({"k_ref": Q[:1]}, ValueError, r"k_ref has shape \(1, 3, 5, 8\).*expand"),
        ({"v_ref": Q[:, :, :4]}, ValueError, "k_ref has 5 tokens and v_ref 4"),
        ({"k": Q[:, :, :0], "v": Q[:, :, :0]}, ValueError, "k has no tokens"),
        ({"k_ref": Q[:, :, :0], "v_ref": Q[:, :, :0], "mode": "replace"}, ValueError, "k_ref has no tokens"),
        ({"gate": GATE[:, :, :4]}, ValueError, r"gate has shape \(2, 1, 4\).*here \(2, 1, 5\)"),
        ({"gate": None}, ValueError, "gate is None"),
        ({"gate": GATE.half()}, TypeError, "gate is torch.float16; it must be float32"),
        ({"ref_lengths": [2, 2]}, ValueError, r"ref_lengths is \[2, 2\] and the references have 5 tokens"),
        ({"ref_lengths": [2, 3]}, ValueError, r"here \(2, 2, 5\)"),
        ({"mode": "mixed"}, ValueError, 'mode is "mixed"; it must be one of separate, concat, replace'),
        ({"v": Q.half()}, TypeError, "v is torch.float16 and q torch.float32"),
        ({"q": Q.int()}, TypeError, "q is torch.int32"),
    ],
)
def test_errors(change, error, match):
    args = {"q": Q, "k": Q, "v": Q, "k_ref": Q, "v_ref": Q, "gate": GATE}
    with pytest.raises(error, match=match):
        separate_attention(**(args | change))


def test_debug_looks_at_values(monkeypatch):
    separate_attention(Q, Q, Q, Q, Q, GATE + 2)
    monkeypatch.setattr(_operands, "DEBUG", True)
    with pytest.raises(ValueError, match=r"gate lies in \[2, 2\]"):
        separate_attention(Q, Q, Q, Q, Q, GATE + 2)
    with pytest.raises(ValueError, match="v holds NaN"):
        separate_attention(Q, Q, Q * float("nan"), Q, Q, GATE)
    with pytest.raises(ValueError, match="separate_attention_affine: k_ref holds NaN"):
        separate_attention_affine(Q, Q, Q, Q * float("nan"), Q, GATE)
    separate_attention(Q, Q, Q, Q, Q, GATE + 1)
