"""The Triton kernel, on a GPU or in Triton's interpreter, against the plain form: the same bits."""

import pytest
import torch

from ragsr.ops import hamming as plain
from ragsr.testing import devices, inputs

kernel = pytest.importorskip("ragsr.kernels.hamming", reason="Triton is not installed")
DEVICE = devices()[-1]


@pytest.mark.parametrize("keys", [1 << 27, 700])  # all keys at once; in blocks of 700
def test_topk_matches_plain(keys, monkeypatch):
    monkeypatch.setattr(kernel, "KEYS", keys)
    for queries, codes, k in inputs("hamming_topk", DEVICE):
        found = kernel.hamming_topk(queries, codes, k)
        torch.testing.assert_close(found, plain.hamming_topk_plain(queries, codes, k), rtol=0, atol=0)


def test_unaligned_codes_are_read_whole():
    bytes_ = torch.arange(1 + 40 * 8, dtype=torch.int32, device=DEVICE).to(torch.uint8)
    codes = bytes_[1:].view(40, 8)  # starts at an odd address
    found = kernel.hamming_topk(codes, codes, 3)
    torch.testing.assert_close(found, plain.hamming_topk_plain(codes, codes, 3), rtol=0, atol=0)
