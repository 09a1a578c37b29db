"""Every op on a GPU: its values, its gradients, its bits on every run, streams, graphs, and no waiting for the device.

Indices past 2³¹ are not tested: codes for them would take more memory than a GPU has.
"""

import pytest
import torch
from gpu import checks

from ragsr.testing import INPUTS

OPS = sorted(INPUTS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FORMS = [(op, dtype) for op in OPS for dtype in (DTYPES if checks.floating(op) else DTYPES[:1])]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def skip_exempt(op: str) -> None:
    if reason := checks.why_exempt(op):
        pytest.skip(reason)


@pytest.mark.parametrize(("op", "dtype"), FORMS, ids=lambda x: str(x).removeprefix("torch."))
def test_matches_plain(op, dtype):
    checks.assert_precise(op, "cuda", dtype)


@pytest.mark.parametrize("op", OPS)
def test_gradients(op):
    if not checks.assert_gradients(op, "cuda"):
        pytest.skip(f"{op} has no gradient")


@pytest.mark.parametrize("op", OPS)
def test_same_bits_on_every_run(op):
    for args in (checks.largest(op, "cuda"), checks.many(op, "cuda")):
        checks.assert_same_bits_again(checks.op_of(op), args)


@pytest.mark.parametrize("op", OPS)
def test_compiles(op):
    checks.assert_compiles(op, "cuda")


@pytest.mark.parametrize("op", OPS)
def test_keeps_to_its_stream(op):
    checks.assert_keeps_to_its_stream(op, checks.many(op, "cuda"))


@pytest.mark.parametrize("op", OPS)
def test_does_not_wait_for_the_device(op):
    skip_exempt(op)
    checks.assert_does_not_wait(op, checks.many(op, "cuda"))


@pytest.mark.parametrize("op", OPS)
def test_replays_in_a_graph(op):
    skip_exempt(op)
    for args in (checks.largest(op, "cuda"), checks.many(op, "cuda")):
        checks.assert_replays(op, args)
