"""group_norm_sft in CUDA C++, in each of its regimes: right, alike on every run, beside itself, in a graph."""

import pytest
import torch
from gpu import checks

from ragsr.testing import TOLERANCES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

REGIMES = ("block", "cluster", "grid", "split")
SHAPES = [(1, 64, 8, 8), (1, 320, 64, 64), (2, 640, 31, 33), (1, 960, 32, 32)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def arguments(shape, layout=torch.contiguous_format, dtype=torch.float32, joined=False):
    torch.manual_seed(0)
    x, gamma, beta, residual = (
        torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout) for _ in range(4)
    )
    weight, bias = torch.randn(2, shape[1], device="cuda").to(dtype)
    x2 = None
    if joined:  # a seam in the middle of a group
        x, x2 = (half.contiguous(memory_format=layout) for half in (3 * x + 1000).split((24, shape[1] - 24), dim=1))
    return x, 32, weight, bias, gamma, beta, 1e-5, "silu", residual, x2, 0.7 if joined else None


def forced(regime, args):
    """The result in that regime; skips where the library lacks it, or the device cannot do these features so."""
    run = getattr(torch.ops.ragsr, "group_norm_sft_forward_as", None)
    if run is None:
        pytest.skip("ragsr was built without CUDA C++")
    try:
        return run(regime, *args)
    except RuntimeError as error:
        if "in the regime that was asked for" not in str(error):
            raise
        pytest.skip(f"this device cannot do {list(args[0].shape)} as {regime}")


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels-last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_right_and_alike_on_every_run(regime, shape, layout, joined):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        args = arguments(shape, layout, dtype, joined)
        checks.poison("cuda")
        found = forced(regime, args)
        wide = [a.cpu().double() if isinstance(a, torch.Tensor) else a for a in args]
        want = torch.ops.ragsr.group_norm_sft_forward(*wide)
        rtol, atol = TOLERANCES[dtype]
        torch.testing.assert_close(found[0].cpu().double(), want[0], rtol=rtol, atol=atol * 10 if joined else atol)
        checks.assert_same_bits_again(lambda *a: forced(regime, a), args)


@pytest.mark.parametrize("regime", REGIMES)
def test_on_several_streams_at_once(regime):
    args = arguments((1, 320, 64, 64), dtype=torch.float16)
    want = forced(regime, args)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(forced(regime, args))
    torch.cuda.synchronize()
    assert all(checks.same_bits(one, want) for one in found)


@pytest.mark.parametrize("regime", REGIMES)
def test_in_a_graph(regime):
    args = arguments((1, 320, 64, 64), dtype=torch.float16)
    want = forced(regime, args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forced(regime, args)
    for _ in range(3):
        found[0].zero_()
        graph.replay()
        assert checks.same_bits(found, want)
