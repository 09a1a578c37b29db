"""Patch matching and texture transfer against the formulas of TTSR and C2-Matching, written out the expensive way."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd import gradcheck

from ragsr.ops import correlation_topk, gather_fold, match
from ragsr.testing import assert_matches_plain, inputs, strided
from tests import contract
from tests.golden import FULL, golden_cases

OPS = ["correlation_topk", "gather_fold"]


def naive_scores(a: Tensor, b: Tensor, patch: int, padding: int, eps: float) -> Tensor:
    """The whole N×N' matrix at once."""
    a, b = (F.unfold(x, patch, padding=padding) for x in (a, b))
    a, b = (x / (x.norm(dim=1, keepdim=True) + eps) for x in (a, b))
    return a.mT @ b


def naive_transfer(features: Tensor, index: Tensor, patch: int, stride: int) -> Tensor:
    """Unfold, gather, fold, divide: TTSR as its paper tells it."""
    padding = (patch - stride) // 2
    patches = F.unfold(features, patch, padding=padding, stride=stride)
    moved = patches.gather(2, index.flatten(1)[:, None].expand(-1, patches.shape[1], -1))
    size = (index.shape[1] * stride, index.shape[2] * stride)
    return F.fold(moved, size, patch, padding=padding, stride=stride) / (patch // stride) ** 2


def nonempty(op: str) -> list[tuple[Any, ...]]:
    return [args for args in inputs(op) if args[0].numel()]


# ------------------------------------------------------------------ the definition


def test_scores_are_the_largest_of_the_whole_matrix():
    for a, b, k, patch, padding, eps in nonempty("correlation_topk"):
        score, index = correlation_topk(a, b, k, patch, padding, eps)
        matrix = naive_scores(a, b, patch, padding, eps)
        torch.testing.assert_close(score, matrix.topk(k).values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(matrix.gather(2, index), score, rtol=1e-5, atol=1e-6)


def test_blocks_do_not_change_the_answer(monkeypatch):
    arguments = (torch.randn(2, 6, 11, 13), torch.randn(2, 6, 17, 9), 4, 3, 1, 1e-12)
    score, index = match.correlation_topk_plain(*arguments)
    monkeypatch.setattr(match, "BLOCK", 7)
    score_blocks, index_blocks = match.correlation_topk_plain(*arguments)
    assert torch.equal(index, index_blocks)
    torch.testing.assert_close(score, score_blocks)


@pytest.mark.parametrize("block", [5, 4096])
@pytest.mark.parametrize("search", [torch.ops.ragsr.correlation_topk, match.correlation_topk_plain])
def test_ties_go_to_the_lowest_index(monkeypatch, search, block):
    monkeypatch.setattr(match, "BLOCK", block)
    one = torch.ones(1, 1, 6, 7)
    score, index = search(one, one, 3, 3, 0, 1e-12)
    assert (index == torch.arange(3)).all()
    assert (score == score[0, 0, 0]).all()


def test_a_patch_of_zeros_scores_zero():
    score, index = correlation_topk(torch.zeros(1, 2, 4, 4), torch.randn(1, 2, 4, 4))
    assert (score == 0).all()
    assert (index == 0).all()


def test_finds_a_shifted_copy():
    b = torch.randn(1, 4, 20, 24)
    score, index = correlation_topk(b[:, :, 3:15, 5:19], b, padding=0)
    y, x = torch.meshgrid(torch.arange(3, 13), torch.arange(5, 17), indexing="ij")
    assert torch.equal(index[0, :, 0], (y * 22 + x).flatten())
    torch.testing.assert_close(score, torch.ones_like(score))


def test_transfer_is_unfold_gather_fold():
    for args in nonempty("gather_fold"):
        torch.testing.assert_close(gather_fold(*args), naive_transfer(*args))


def test_identity_index_brings_the_features_back_inside():
    features = torch.randn(1, 3, 8, 10)
    index = torch.arange(20).view(1, 4, 5)
    found = gather_fold(features, index, patch=6, stride=2)
    torch.testing.assert_close(found[:, :, 2:-2, 2:-2], features[:, :, 2:-2, 2:-2])


# ------------------------------------------------------------------ the kernels of the CPU

# beyond one tile, panel, block and band: channels, the two maps, k, patch, padding
SEARCHES = [
    (5, (37, 81), (21, 70), 3, 7, 3),
    (17, (26, 13), (9, 140), 1, 3, 1),
    (3, (70, 9), (12, 35), 40, 1, 0),
    (2, (5, 6), (4, 4), 2, 3, 4),  # patches that lie wholly outside
]
FOLDS = [(11, (37, 20), (40, 9), 1), (9, (5, 6), (19, 7), 4), (2, (4, 3), (3, 5), 3)]  # channels, cells, grid, stride


def search_arguments(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    torch.manual_seed(0)
    maps = [(torch.randn(2, c, *s, dtype=dtype), torch.randn(2, c, *t, dtype=dtype)) for c, s, t, *_ in SEARCHES]
    return [(a, b, *settings, 1e-5) for (a, b), (_, _, _, *settings) in zip(maps, SEARCHES, strict=True)]


def fold_arguments() -> list[tuple[Any, ...]]:
    torch.manual_seed(0)
    return [
        (torch.randn(2, c, *(n * s for n in cells)), torch.randint(0, cells[0] * cells[1], (2, *grid)), 3 * s, s)
        for c, cells, grid, s in FOLDS
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_searches_match_plain(dtype):
    for args in search_arguments(dtype):
        assert_matches_plain("correlation_topk", *args)
    for args in inputs("correlation_topk_near", dtype=dtype):
        assert_matches_plain("correlation_topk_near", *args)


def test_large_transfers_match_plain():
    for features, index, patch, stride in fold_arguments():
        assert_matches_plain("gather_fold", features, index, patch, stride)
        grad = torch.randn_like(gather_fold(features, index, patch, stride))
        assert_matches_plain("gather_fold_backward", grad, index, *features.shape[2:], patch, stride)


@pytest.mark.parametrize("kernel", ["portable", "avx2"])
def test_every_instruction_set_matches_plain(kernel):
    code = "from tests.ops import test_match as t; t.test_large_searches_match_plain(t.torch.float32)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RAGSR_CPU": kernel, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_threads_do_not_change_a_bit():
    def run() -> list[Tensor]:
        found = [x for args in search_arguments(torch.float32) for x in correlation_topk(*args)]
        for args in fold_arguments():
            features = args[0].requires_grad_()
            out = gather_fold(*args)
            found += [out, *torch.autograd.grad(out.square().sum(), features)]
        return found

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(3)
        assert all(torch.equal(x, y) for x, y in zip(alone, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_repeated_texture_is_found_where_it_stands_first():
    texture = torch.randn(1, 4, 11, 7)
    wall = texture.repeat(1, 1, 5, 13)
    _, index = correlation_topk(wall, wall, padding=0)
    y, x = torch.meshgrid(torch.arange(53) % 11, torch.arange(89) % 7, indexing="ij")
    assert torch.equal(index[0, :, 0], (y * 89 + x).flatten())


def test_views_between_sentinels_are_read_alone():
    room = torch.full((2, 3, 12, 40), torch.nan)
    a, b = room[:1, :, 1:11, 3:37], room[1:, :, 2:9, 1:39]
    a.normal_(), b.normal_()
    assert torch.equal(correlation_topk(a, b)[1], correlation_topk(a.clone(), b.clone())[1])
    index = torch.randint(0, 7 * 38, (1, 5, 6))
    assert torch.equal(gather_fold(b, index), gather_fold(b.clone(), index))


# ------------------------------------------------------------------ the frame


@pytest.mark.parametrize("op", OPS)
def test_matches_plain_in_every_dtype(op):
    contract.assert_precise(op)


def test_dtypes_of_the_results():
    for dtype, wide in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ]:
        x = torch.randn(1, 2, 4, 4, dtype=dtype)
        score, index = correlation_topk(x, x)
        assert (score.dtype, index.dtype) == (wide, torch.int64)
        assert gather_fold(x, index.view(1, 4, 4)).dtype == dtype


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    contract.assert_opcheck(op)


def test_compiles_into_one_graph():
    def transfer(a: Tensor, b: Tensor) -> Tensor:
        score, index = correlation_topk(a, b)
        return gather_fold(b, index.view(-1, *a.shape[2:])) * score.view(-1, 1, *a.shape[2:])

    contract.assert_compiles(transfer, torch.randn(2, 3, 7, 5), torch.randn(2, 3, 6, 9))


@pytest.mark.parametrize(("padding", "eps"), [(1, 1e-12), (0, 0.1)])
def test_gradient_of_the_score(padding, eps):
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 3, 4, dtype=torch.float64), torch.randn(2, 1, 4, 3, dtype=torch.float64)
    assert gradcheck(
        lambda a, b: correlation_topk(a, b, 2, 3, padding, eps)[0], (a.requires_grad_(), strided(b).requires_grad_())
    )


def test_gradient_of_the_score_is_finite_at_zero():
    a, b = torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 2, 4, 4, requires_grad=True)
    correlation_topk(a, b)[0].sum().backward()
    assert (a.grad == 0).all()
    assert (b.grad == 0).all()


def test_gradient_of_the_transfer():
    contract.assert_gradients("gather_fold")


# ------------------------------------------------------------------ recorded originals


@pytest.mark.parametrize("case", golden_cases("correspondence"), ids=str)
def test_c2_matching(case):
    a, b = (F.normalize(case.tensors[f"input.{name}"], dim=1) for name in ("feat_in", "feat_ref"))
    score, index = correlation_topk(a, b, padding=0, eps=1e-5)
    sure = case.tensors["margin"] > 1e-5
    similarity = case.tensors["similarity"]
    atol = case.config["atol_per_output"]["similarity"]
    torch.testing.assert_close(score.view_as(similarity), similarity, rtol=0, atol=atol)
    assert torch.equal(index.view_as(sure)[sure], case.tensors["index"][sure])


@pytest.mark.skipif(not (FULL / "ttsr_tiny").is_dir(), reason="the full set of golden cases is not beside the checkout")
@pytest.mark.parametrize("prefix", ["", "other_size."])
def test_ttsr(prefix):
    golden = {
        name: x.float() if x.is_floating_point() else x
        for name, x in load_file(FULL / "ttsr_tiny/tensors.safetensors").items()
    }
    atol = json.loads((FULL / "ttsr_tiny/meta.json").read_text())["atol_per_output"]
    lq = vgg_levels(golden, golden["input.lq"])
    ref = vgg_levels(golden, golden["input.other_ref" if prefix else "input.ref"])
    refsr = vgg_levels(golden, golden["input.other_refsr" if prefix else "output.refsr"])

    def expect(name: str, found: Tensor) -> None:
        torch.testing.assert_close(found, golden[f"output.{prefix}{name}"], rtol=0, atol=atol[prefix + name])

    score, index = correlation_topk(lq[2], refsr[2])
    grid = index.view(-1, *lq[2].shape[2:])
    expect("S", score.view(-1, 1, *lq[2].shape[2:]))
    sure = golden[f"output.{prefix}margin"] > 1e-5
    assert torch.equal(index[..., 0][sure], golden[f"output.{prefix}argmax"][sure])
    expect("T_lv3", gather_fold(ref[2], grid, patch=3, stride=1))
    if not prefix:
        expect("T_lv2", gather_fold(ref[1], grid, patch=6, stride=2))
        expect("T_lv1", gather_fold(ref[0], grid, patch=12, stride=4))


def vgg_levels(golden: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """TTSR's three feature levels of an image in [-1, 1] (64, 128, 256 channels), from the recorded weights."""

    def convolve(x: Tensor, layer: str, padding: int = 1) -> Tensor:
        weight, bias = (golden[f"weights.core.LTE.{layer}.{part}"] for part in ("weight", "bias"))
        return F.conv2d(x, weight, bias, padding=padding)

    x = convolve((image + 1) / 2, "sub_mean", padding=0)
    level1 = convolve(x, "slice1.0").relu()
    x = F.max_pool2d(convolve(level1, "slice2.2").relu(), 2)
    level2 = convolve(x, "slice2.5").relu()
    x = F.max_pool2d(convolve(level2, "slice3.7").relu(), 2)
    return [level1, level2, convolve(x, "slice3.10").relu()]


# ------------------------------------------------------------------ bad input

MAP = torch.zeros(1, 2, 4, 4)
GRID = torch.zeros(1, 3, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((MAP.int(), MAP.int()), TypeError, "a is torch.int32"),
        ((MAP[0], MAP), ValueError, r"a has shape \(2, 4, 4\)"),
        ((MAP, MAP[:, :1]), ValueError, "batch and channels must be equal"),
        ((MAP, MAP.double()), TypeError, "convert one"),
        ((MAP, MAP, 17), ValueError, "k is 17 with 16 candidates"),
        ((MAP, MAP, 0), ValueError, "k is 0"),
        ((MAP, MAP[:, :, :2], 1, 3, 0), ValueError, "a patch of 3 does not fit"),
        ((MAP, MAP, 1, 0), ValueError, "patch 0"),
    ],
)
def test_correlation_topk_refuses(args, error, message):
    with pytest.raises(error, match=message):
        correlation_topk(*args)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((MAP.int(), GRID), TypeError, "features are torch.int32"),
        ((MAP, GRID.int()), TypeError, "index is torch.int32"),
        ((MAP, GRID[0]), ValueError, "index \\(3, 3\\)"),
        ((MAP, GRID, 4, 2), ValueError, "odd multiple of stride"),
        ((MAP, GRID, 9, 3), ValueError, "multiples of stride 3"),
        ((MAP, GRID + 16), IndexError, "index runs from 16 to 16; it must lie in 0 to 15"),
        ((MAP, GRID - 1), IndexError, "index runs from -1"),
    ],
)
def test_gather_fold_refuses(args, error, message):
    with pytest.raises(error, match=message):
        gather_fold(*args)
