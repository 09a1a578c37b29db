"""The Triton kernels, on a GPU or in Triton's interpreter, against the plain form in float64; how they are cut; where
they read. And what a thread of the CUDA C++ forward does, on the host."""

import pytest
import torch
from torch import Tensor

from ragsr.ops.sft import (
    group_norm_sft_backward_plain,
    group_norm_sft_backward_triton,
    group_norm_sft_forward_plain,
    group_norm_sft_forward_triton,
)
from ragsr.testing import TOLERANCES, devices, inputs, strided

kernel = pytest.importorskip("ragsr.kernels.sft", reason="Triton is not installed")
launch = pytest.importorskip("ragsr.kernels.sft_launch", reason="Triton is not installed")
DEVICE = devices()[-1]
REGIMES = {  # small limits, so that small features take several tiles and parts
    "whole": {},
    "fused": {"WHOLE": 0, "FUSED_TILE": 256},
    "split": {"TILE": 128, "WIDEST": 16, "MIN_TILES": 1},
}


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    for name, value in REGIMES[request.param].items():
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(kernel, "FUSED_TILE", launch.FUSED_TILE)
    limit = 0 if request.param == "split" else 1 << 20
    monkeypatch.setattr(kernel, "chip", lambda _: launch.Chip(4, launch.Tuning(limit, limit, 4)))
    return request.param


def test_matches_plain(regime):
    for args in inputs("group_norm_sft_forward", DEVICE):
        if args[0].numel() < 1000:
            check(args)


@pytest.mark.parametrize("regime", ["split"], indirect=True)
def test_half_precision(regime):
    for args in inputs("group_norm_sft_forward", DEVICE, torch.float16)[3:5]:
        check(args)


@pytest.mark.parametrize("regime", ["fused", "split"], indirect=True)
@pytest.mark.parametrize("wanted", [(True, True, False), (False, False, True)], ids=["x, gamma", "beta"])
def test_only_wanted_gradients(regime, wanted):
    check(inputs("group_norm_sft_forward", DEVICE)[3], *wanted)


@pytest.mark.parametrize("limit", [0, 1 << 20], ids=["split", "fused"])
def test_larger_features_in_tiles_as_launched(limit, monkeypatch):
    monkeypatch.setattr(kernel, "chip", lambda _: launch.Chip(4, launch.Tuning(limit, limit, 4)))
    for args in inputs("group_norm_sft_forward", DEVICE):
        if args[0].numel() >= 1000:
            check(args)


NCHW, NHWC = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("regime", ["fused", "split"], indirect=True)
@pytest.mark.parametrize(
    ("batch", "members", "size", "layout"),
    [(8, 10, (1, 3), NHWC), (1, 20, (3, 4), NCHW), (1, 30, (2, 3), NHWC), (1, 60, (1, 3), NCHW)],
    ids=str,
)
def test_layers_read_in_place(regime, batch, members, size, layout):
    """γ and β as halves of one convolution's output, x and x2 as slices, a group across the seam."""
    torch.manual_seed(members)
    c = 2 * members
    both, source, source2, residual = (features(batch, n, *size, layout=layout) for n in (2 * c, c, c, c))
    x, x2, maps = source[:, 2 : 2 + members // 2], source2[:, : c - members // 2], both.chunk(2, dim=1)
    for view in (x, x2, *maps):
        assert launch.view_of(view).data is view
    check((x, 2, *torch.randn(2, c, device=DEVICE), *maps, 1e-5, "silu", residual, x2, 0.25))


def test_large_mean(regime):
    torch.manual_seed(0)
    x = torch.randn(1, 6, 9, 15, device=DEVICE) + 1000
    ones, map_ = torch.ones(6, device=DEVICE), torch.zeros(1, 6, 1, 1, device=DEVICE)
    args = x, 2, ones, ones, map_, map_, 1e-5, None, None, None, None
    _, mean, rstd = group_norm_sft_forward_triton(*args)
    _, wanted_mean, wanted_rstd = group_norm_sft_forward_plain(*doubles(args))
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=2e-7, atol=0)  # 0.0002 σ
    torch.testing.assert_close(rstd.double(), wanted_rstd, rtol=1e-5, atol=0)


def features(*shape: int, layout: torch.memory_format) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(memory_format=layout)


def check(args: tuple, *wanted: bool) -> None:
    args = (*args, *(1e-5, None, None, None, None)[len(args) - 6 :])
    out, mean, rstd = group_norm_sft_forward_triton(*args)
    agree((out, mean, rstd), group_norm_sft_forward_plain(*doubles(args)), args[0].dtype)
    grad = strided(torch.randn_like(out))
    args = grad, *args[:6], mean, rstd, args[7], *args[9:]
    right = group_norm_sft_backward_plain(*doubles(args), *wanted)
    agree(group_norm_sft_backward_triton(*args, *wanted), right, args[1].dtype)


def agree(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    relative, absolute = TOLERANCES[dtype]
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        scale = max(1.0, want.abs().max().item() if want.numel() else 0)  # sums over all positions grow with them
        torch.testing.assert_close(got.double(), want.double(), rtol=relative, atol=absolute * scale)


def doubles(args: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in args)


# ------------------------------------------------------------------ how features are cut

H200 = launch.Chip(132, launch.TUNING[90])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 320, 4096), (2, 1280, 64), (8, 640, 1024), (1, 256, 65536), (1, 128, 1048576)])
def test_plan(shape, channels_last):
    batch, channels, positions = shape
    z = launch.View(None, channels * positions, *((1, channels) if channels_last else (positions, 1)))
    how = launch.plan(H200, z, shape, 32, 2, kernel.FUSED_TILE)
    assert how.fused == (channels // 32 * positions * 2 <= 256 << 10 and (batch > 1 or positions == 4096))
    if not how.fused:  # the chip is full, and every position in exactly one part
        assert kernel.programs(how, batch, channels) >= 132
        assert (how.splits - 1) * how.span < positions <= how.splits * how.span
        assert how.span % how.PB == 0
    elif not how.whole and not channels_last:
        assert channels // 32 % how.CB == 0  # no lane idles


def test_positions_with_one_stride():
    x = torch.zeros(2, 6, 5, 7)
    assert launch.position_stride(x) == 1
    assert launch.position_stride(x.to(memory_format=torch.channels_last)) == 6
    assert launch.position_stride(x[:, 1:4]) == 1
    assert launch.position_stride(x[:, :, :1, :1].expand(2, 6, 5, 7)) == 0
    assert launch.position_stride(x[..., :4]) is None
    assert launch.position_stride(x[:, :, :, :1].expand(2, 6, 5, 7)) is None
    assert launch.position_stride(torch.zeros(3, 4)) == 1


def test_far_offsets_take_64_bits():
    sample = launch.View(None, 0, 1 << 24, 1)
    assert not launch.needs_64_bits((1, 64, 1 << 24), sample)
    assert launch.needs_64_bits((1, 128, 1 << 24), None, sample)
