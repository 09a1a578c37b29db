"""The Triton kernels, on a GPU or in Triton's interpreter, against the plain forms in float64."""

import pytest
import torch

from ragsr.ops import fold as plain_fold
from ragsr.ops import match as plain
from ragsr.ops import match_near as plain_near
from ragsr.testing import TOLERANCES, devices, inputs

kernel = pytest.importorskip("ragsr.kernels.match", reason="Triton is not installed")
boxes = pytest.importorskip("ragsr.kernels.match_boxes", reason="Triton is not installed")
near_kernel = pytest.importorskip("ragsr.kernels.match_near", reason="Triton is not installed")
fold_kernel = pytest.importorskip("ragsr.kernels.fold", reason="Triton is not installed")
DEVICE = devices()[-1]
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))  # the interpreter's is wrong


def assert_matches(found, wanted, dtype):
    relative, absolute = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scratch", "every"), [(1 << 28, 1), (1, 3)])  # all products at once; a row against a row
def test_topk_matches_plain(monkeypatch, dtype, scratch, every):
    monkeypatch.setattr(kernel, "SCRATCH", scratch)
    for a, b, *settings in inputs("correlation_topk", DEVICE, dtype)[::every]:
        score, index = kernel.correlation_topk(a, b, *settings)
        wanted = plain.correlation_topk_plain(a.double(), b.double(), *settings)
        assert_matches(score, wanted[0], torch.float32)
        torch.testing.assert_close(index, wanted[1], rtol=0, atol=0)


@pytest.mark.parametrize("scratch", [1 << 28, 1])
def test_ties_go_to_the_lowest_index(monkeypatch, scratch):
    monkeypatch.setattr(kernel, "SCRATCH", scratch)
    one = torch.ones(1, 1, 4, 20, device=DEVICE)
    score, index = kernel.correlation_topk(one, one, 3, 3, 0, 1e-12)
    assert (index == torch.arange(3, device=DEVICE)).all()
    assert (score == score[0, 0, 0]).all()


# boxes that hold all windows; only those of equal ones; a tile at a time; none, but the sums
@pytest.mark.parametrize(("spare", "scratch"), [(3, 1 << 26), (0, 1 << 26), (3, 1 << 15), (3, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_match_plain(monkeypatch, dtype, spare, scratch):
    monkeypatch.setattr(boxes, "SPARE", spare)
    monkeypatch.setattr(boxes, "SCRATCH", scratch)
    for a, b, prior, *settings in inputs("correlation_topk_near", DEVICE, dtype)[
        3 :: 1 if dtype == torch.float32 else 2
    ]:
        found = near_kernel.correlation_topk_near(a, b, prior, *settings)
        wanted = plain_near.correlation_topk_near_plain(a.double(), [x.double() for x in b], prior, *settings)
        assert_matches(found[0], wanted[0], torch.float32)
        for got, want in zip(found[1:], wanted[1:], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_windows_give_ties_to_the_lowest_index():
    one, b = torch.ones(1, 1, 3, 3, device=DEVICE), torch.ones(1, 1, 5, 20, device=DEVICE)
    prior = torch.tensor([0, 1, 9], device=DEVICE).expand(1, 1, 3)
    score, index, _ = near_kernel.correlation_topk_near(one, [b], prior, 9, 3, 3, 0, 1e-12)  # 54 of them
    assert (index == torch.arange(3, device=DEVICE)).all()
    assert (score == score[0, 0, 0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_fold_matches_plain(dtype):
    for features, index, patch, stride in inputs("gather_fold", DEVICE, dtype):
        found = fold_kernel.gather_fold(features, index, patch, stride)
        assert found.dtype == dtype
        assert_matches(found, plain_fold.gather_fold_plain(features.double(), index, patch, stride), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_fold_backward_matches_plain(dtype):
    for features, index, patch, stride in inputs("gather_fold", DEVICE, dtype):
        grad = torch.randn(
            *features.shape[:2], index.shape[1] * stride, index.shape[2] * stride, device=DEVICE, dtype=dtype
        )
        settings = (index, *features.shape[2:], patch, stride)
        found = fold_kernel.gather_fold_backward(grad, *settings)
        assert found.dtype == dtype
        assert_matches(found, plain_fold.gather_fold_backward_plain(grad.double(), *settings), dtype)
        assert torch.equal(found, fold_kernel.gather_fold_backward(grad, *settings))


def test_an_index_outside_reads_nothing():
    features = torch.ones(1, 1, 4, 4, device=DEVICE)
    index = torch.tensor([[[-1, 16], [1 << 40, -(1 << 40)]]], device=DEVICE)
    assert (fold_kernel.gather_fold(features, index, 3, 1) == 0).all()
    grad = torch.ones(1, 1, 2, 2, device=DEVICE)
    assert (fold_kernel.gather_fold_backward(grad, index, 4, 4, 3, 1) == 0).all()
