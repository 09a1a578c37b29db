import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from contract import HALF, assert_compiles, assert_gradients, assert_opcheck, assert_precise
from torch.nn import functional as F

from ragsr.env import cpu_kernel
from ragsr.ops import group_norm_sft, sft
from ragsr.testing import assert_matches_plain, inputs


@pytest.mark.parametrize("op", ["sft", "group_norm_sft_forward"])
@pytest.mark.parametrize("contract", [assert_precise, assert_opcheck, assert_gradients])
def test_contract(op, contract):
    contract(op)


def backward_arguments(*args):
    """Of `group_norm_sft_backward`, from the arguments of a forward."""
    args = (*args, *(1e-5, None, None, None, None)[len(args) - 6 :])
    out, mean, rstd = torch.ops.ragsr.group_norm_sft_forward(*args)
    activation, _, x2, raw_mix = args[7:]
    return torch.randn_like(out), *args[:6], mean, rstd, activation, x2, raw_mix


def backward_arguments_of(case: int):
    return backward_arguments(*inputs("group_norm_sft_forward")[case])


def assert_backward_precise():
    for dtype in (torch.float32, *HALF):
        for args in inputs("group_norm_sft_forward", dtype=dtype):
            assert_matches_plain("group_norm_sft_backward", *backward_arguments(*args))


def test_only_wanted_gradients():
    for args in map(backward_arguments_of, range(3, 6)):
        everything = torch.ops.ragsr.group_norm_sft_backward(*args)
        for wanted in product((False, True), repeat=3):
            of_x, of_gamma, of_beta = wanted
            assert_matches_plain("group_norm_sft_backward", *args, *wanted)
            found = torch.ops.ragsr.group_norm_sft_backward(*args, *wanted)
            for got, whole, asked in zip(found, everything, (of_x, True, True, of_gamma, of_beta, of_x), strict=True):
                torch.testing.assert_close(got, whole if asked else whole.new_empty(0), rtol=0, atol=0)


def test_gradients_of_what_requires_them():
    """Any subset of the inputs, as PyTorch composes it; without activation the gradient of β is that of the result."""
    x, gamma, beta, residual = torch.randn(4, 2, 4, 5, 3)
    tensors = {"x": x, "weight": torch.randn(4), "bias": torch.randn(4), "gamma": gamma, "beta": beta, "r": residual}
    above = torch.randn_like(x)
    for activation in (None, "relu"):
        for chosen in [("x",), ("gamma",), ("beta", "r"), ("weight", "bias"), ("x", "beta"), tuple(tensors)]:
            t = {name: a.detach().requires_grad_(name in chosen) for name, a in tensors.items()}
            composed = F.group_norm(t["x"], 2, t["weight"], t["bias"]) * (1 + t["gamma"]) + t["beta"]
            composed = (composed.relu() if activation else composed) + t["r"]
            leaves = [t[name] for name in chosen]
            args = t["x"], 2, t["weight"], t["bias"], t["gamma"], t["beta"], 1e-5, activation, t["r"]
            found = torch.autograd.grad(group_norm_sft(*args), leaves, above)
            torch.testing.assert_close(found, torch.autograd.grad(composed, leaves, above))


def test_contract_of_the_backward():
    assert_backward_precise()
    for i, args in enumerate(inputs("group_norm_sft_forward")):
        tests = ("test_schema", "test_faketensor", *(["test_aot_dispatch_dynamic"] if i % 3 == 0 else []))
        op = torch.ops.ragsr.group_norm_sft_backward.default
        torch.library.opcheck(op, backward_arguments(*args), test_utils=tests)


def test_compiles():
    x, x2, residual = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3), torch.randn(2, 6, 5, 3)
    vector, map_ = torch.randn(6), torch.randn(2, 6, 5, 3)
    assert_compiles(sft, x, torch.randn(4, 1, 1), torch.randn(2, 4, 5, 3))
    assert_compiles(
        lambda x, x2, w, m, r: group_norm_sft(x, 3, w, w, m, m[:, :, :1, :1], 1e-5, "silu", r, x2, 0.4),
        *(x, x2, vector, map_, residual),
    )


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_large_mean_does_not_drown_the_spread(layout):
    x = torch.randn(2, 6, 80, 80)  # a channel is longer than a tile
    x[:, :, 0] *= 100  # and its beginning not like the rest
    x = (x + 1000 * x.std()).to(memory_format=layout)
    ones, zeros = torch.ones(6), torch.zeros(1, 6, 1, 1)
    out, _, rstd = torch.ops.ragsr.group_norm_sft_forward(x, 2, ones, 0 * ones, zeros, zeros)
    wanted = F.group_norm(x.double(), 2)
    assert (out - wanted).abs().max() < 1e-3  # 1000 / σ has ten bits of 24
    spread = x.double().reshape(2, 2, -1).std(2, correction=0)
    torch.testing.assert_close(rstd.double(), 1 / spread, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("first", "second", "size"), [(9, 12, (61, 67)), (4, 3, (97, 101))])
def test_a_group_of_several_tiles(first, second, size):
    """Of some whole rows, or of parts of some, with the seam inside of one."""
    x, x2, map_ = torch.randn(2, first, *size), torch.randn(2, second, *size), torch.randn(2, first + second, *size)
    x = x + torch.arange(first).view(-1, 1, 1)  # no tile has the mean of another
    args = x, 1, *torch.randn(2, first + second), map_, map_.flip(1), 1e-5, "silu", map_.flip(2), x2, 0.3
    assert_matches_plain("group_norm_sft_forward", *args)
    assert_matches_plain("group_norm_sft_backward", *backward_arguments(*args))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_long_sums_keep_their_digits(layout):
    """4,096 equal terms, each of which a sum in one go would round the same way."""
    x = torch.randn(1, 32, 64, 64).to(memory_format=layout)
    args = x, 8, torch.ones(32), torch.zeros(32), torch.zeros_like(x), torch.zeros_like(x), 1e-5
    _, mean, rstd = torch.ops.ragsr.group_norm_sft_forward(*args)
    given = torch.full_like(x, 0.1), *args[:6], mean, rstd, None, None, None
    _, _, of_bias, *_ = torch.ops.ragsr.group_norm_sft_backward(*given)
    exact = torch.full((32,), 4096 * 0.1).double()
    torch.testing.assert_close(of_bias.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 4, 80, 80), (3, 40, 9, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_number_of_threads_gives_the_same_bits(shape, layout):
    x, gamma, beta = (torch.randn(shape).to(memory_format=layout) for _ in range(3))
    args = x, 2, *torch.randn(2, shape[1]), gamma, beta, 1e-5, "silu", None, None, 0.3
    given = backward_arguments(*args)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            ops = torch.ops.ragsr
            found.append((*ops.group_norm_sft_forward(*args), *ops.group_norm_sft_backward(*given)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=0)


def assert_rounds_to_even(dtype: torch.dtype) -> None:
    """β + residual is all that is left where x is constant: of any size, from subnormal numbers to infinity and NaN."""
    torch.manual_seed(0)
    for layout in (torch.contiguous_format, torch.channels_last):
        shape = 2, 39, 53, 41  # whole vectors and a rest
        patterns = torch.randint(-(1 << 15), 1 << 15, (2, *shape), dtype=torch.int16)
        patterns[..., :20] &= -0x7F01  # close to zero: sums are subnormal, too
        beta, residual = (x.view(dtype).to(memory_format=layout) for x in patterns)
        x, vector = torch.zeros(shape, dtype=dtype).to(memory_format=layout), torch.zeros(39, dtype=dtype)
        out = group_norm_sft(x, 3, 1 + vector, vector, torch.zeros_like(x), beta, residual=residual)
        wanted = (0 + beta.float() + residual.float()).to(dtype)
        assert torch.equal(out.isnan(), wanted.isnan())
        assert torch.equal(*(torch.where(y.isnan(), 0, y.view(torch.int16)) for y in (out, wanted)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_to_even(dtype):
    assert_rounds_to_even(dtype)


EVERY_INPUT = """
import sys, torch; sys.path.insert(0, sys.argv[1])
from contract import assert_precise
from ops.test_sft import assert_backward_precise, assert_rounds_to_even
assert_precise("group_norm_sft_forward")
assert_backward_precise()
assert_rounds_to_even(torch.float16)
assert_rounds_to_even(torch.bfloat16)
"""


@pytest.mark.parametrize("kernel", ["portable", "avx2"])
def test_other_instruction_sets(kernel):
    if kernel == "avx2" and cpu_kernel() not in ("avx2", "avx512"):
        pytest.skip("this machine has no AVX2, or there is no compiled library")
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", EVERY_INPUT, tests], env=os.environ | {"RAGSR_CPU": kernel}, check=True)


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
