import pytest
import torch
from contract import assert_opcheck, assert_precise
from torch import Tensor

from ragsr.ops import separate_attention
from ragsr.ops.attention_affine import fold_into_linear, separate_attention_affine


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(3, 2, 3, 13, 8, dtype=dtype).unbind()
    k_ref, v_ref = torch.randn(2, 2, 3, 14, 8, dtype=dtype).unbind()
    return q, k, v, k_ref, v_ref, torch.rand(2, 2, 13, dtype=dtype) / 2


def test_contract():
    assert_precise("separate_attention_affine")
    assert_opcheck("separate_attention_affine", differentiable=False)
    args = example(torch.float32)
    compiled = torch.compile(separate_attention_affine, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args, [5, 9]), separate_attention_affine(*args, [5, 9]), strict=True):
        assert torch.equal(got, want)


def test_affine_is_adain():
    args = example()
    out, gain, shift = separate_attention_affine(*args, ref_lengths=[5, 9])
    wanted = separate_attention(*args, ref_lengths=[5, 9])
    torch.testing.assert_close(out * gain[:, :, None] + shift[:, :, None], wanted)


def test_folded_layer_gives_what_the_layer_gives():
    args, layer = example(), torch.nn.Linear(24, 7, dtype=torch.float64)
    out, gain, shift = separate_attention_affine(*args, ref_lengths=[5, 9])
    wanted = layer(separate_attention(*args, ref_lengths=[5, 9]).transpose(1, 2).flatten(2))
    weight, bias = fold_into_linear(layer.weight, layer.bias, gain, shift)
    torch.testing.assert_close(torch.baddbmm(bias[:, None], out.transpose(1, 2).flatten(2), weight.mT), wanted)
    weight, shifted = fold_into_linear(layer.weight, None, gain, shift)
    torch.testing.assert_close(shifted + layer.bias, bias)


def test_a_reference_that_is_off_leaves_the_layer_as_it_is():
    *args, gate = example(torch.float32)
    gate[0] = 0
    out, gain, shift = separate_attention_affine(*args, gate, [5, 9])
    layer = torch.nn.Linear(24, 7)
    weight, bias = fold_into_linear(layer.weight, layer.bias, gain, shift)
    assert torch.equal(weight[0], layer.weight)
    assert torch.equal(bias[0], layer.bias)
    assert torch.equal(out[0], separate_attention(*args, torch.zeros_like(gate), [5, 9])[0])
    assert not torch.equal(weight[1], layer.weight)


def test_errors():
    *args, gate = example()
    with pytest.raises(NotImplementedError, match="use separate_attention"):
        separate_attention_affine(args[0].requires_grad_(), *args[1:], gate, [5, 9])[0].sum().backward()
    with pytest.raises(ValueError, match=r"gate has shape \(2, 1, 13\)"):
        separate_attention_affine(*args, gate[:, :1], [5, 9])
    with pytest.raises(ValueError, match=r"weight has shape \(7, 23\), gain \(2, 3, 8\)"):
        fold_into_linear(torch.zeros(7, 23), None, torch.ones(2, 3, 8), torch.ones(2, 3, 8))
