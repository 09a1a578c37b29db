"""Hamming search among a million codes on a GPU: every width, few and many queries, one nearest code and thousands."""

import pytest
import torch
from gpu import checks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9, 16, 32, 100, 128])
@pytest.mark.parametrize("kind", checks.KINDS)
def test_exact(kind, width):
    codes = checks.hard_codes(kind, 1_000_000, width, "cuda")
    checks.assert_nearest(codes, (1, 64, 1000), (1, 4, 100, 1024, 5000))


@pytest.mark.parametrize("n", [1, 63, 1025, 99_991])
def test_every_code_is_near_enough(n):
    """k = N, where no code may be missing or doubled."""
    for width in (2, 8, 33):
        checks.assert_nearest(checks.hard_codes("random", n, width, "cuda"), (1, 9), (n,))
