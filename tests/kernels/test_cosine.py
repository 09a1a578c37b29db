"""The Triton kernel, on a GPU or in Triton's interpreter, against the plain form: the same bits."""

import pytest
import torch

from ragsr.ops import cosine as plain
from ragsr.testing import devices, inputs

kernel = pytest.importorskip("ragsr.kernels.cosine", reason="Triton is not installed")
DEVICE = devices()[-1]


@pytest.mark.parametrize("largest_k", [64, 2])  # in registers; most by writing all keys
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_what_the_plain_form_keeps(largest_k, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "LARGEST_K", largest_k)
    for args in inputs("keep_best", DEVICE, dtype):
        assert torch.equal(kernel.keep_best(*args), plain.keep_best_plain(*args))


def test_zeros_infinities_and_nan():
    special = torch.tensor([0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-42, -1e-42])
    scores = special[torch.randint(0, 8, (5, 40))].to(DEVICE)
    none = torch.empty(5, 0, dtype=torch.int64, device=DEVICE)
    for k in (1, 6, 40):
        assert torch.equal(kernel.keep_best(none, scores, 7, k), plain.keep_best_plain(none, scores, 7, k))
