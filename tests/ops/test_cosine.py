import shutil

import pytest
import torch
from contract import LargestTensor, assert_compiles, assert_opcheck, assert_precise, run_driver
from torch.nn import functional as F

from ragsr.ops import cosine, cosine_topk
from ragsr.ops._library import owns
from ragsr.testing import assert_matches_plain, inputs, strided

NAN, INF = float("nan"), float("inf")
needs_kernels = pytest.mark.skipif(not owns("keep_best", "CPU"), reason="ragsr._cpu is not loaded")


def test_contract():
    assert_precise("cosine_topk")
    assert_opcheck("cosine_topk", differentiable=False)


def test_compiles():
    assert_compiles(lambda q, r: cosine_topk(q, r, 2)[0], torch.randn(3, 5), torch.randn(9, 5))


def test_scores_carry_no_gradient():
    score, _ = cosine_topk(torch.randn(3, 5, requires_grad=True), torch.randn(9, 5), 2)
    assert not score.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_cosines_of_the_rows_they_point_at(dtype):
    queries, refs = torch.randn(7, 33).to(dtype), torch.randn(100, 33).to(dtype)
    score, index = cosine_topk(queries, refs, 5)
    every = F.normalize(queries.double(), dim=1) @ F.normalize(refs.double(), dim=1).T
    assert score.dtype == torch.float32
    assert index.dtype == torch.int64
    torch.testing.assert_close(score.double(), every.gather(1, index), rtol=0, atol=1e-6)
    torch.testing.assert_close(score.double(), every.topk(5).values, rtol=0, atol=1e-6)


def test_steps_match_plain():
    assert_precise("unit_rows")
    assert_opcheck("unit_rows", differentiable=False)
    assert_opcheck("keep_best", differentiable=False)
    for dtype in (torch.float32, torch.float64):  # of halves few are apart: these are all ties
        for args in inputs("keep_best", dtype=dtype):
            assert_matches_plain("keep_best", *args)


def all_steps(rows: int, columns: int) -> list[cosine.Steps]:
    """The plain form's, and those of the kernels that are there."""
    ops = torch.ops.ragsr
    plain = cosine.Steps(rows, columns, cosine.unit, cosine.product, cosine.keep_best_plain)
    kernels = cosine.Steps(rows, columns, ops.unit_rows, cosine.product_cpu, ops.keep_best)
    return [plain, kernels]


@pytest.mark.parametrize(("rows", "columns"), [(256, 8192), (4, 7), (1, 1), (11, 33)])
@pytest.mark.parametrize("k", [1, 4, 16, 17, 50])
def test_ties_go_to_the_lowest_index_in_any_blocks(rows, columns, k):
    axes = torch.eye(3)[torch.randint(0, 3, (50,))] * torch.tensor([1.0, -1.0])[torch.randint(0, 2, (50, 1))]
    every = axes[:11] @ axes.T  # -1, 0 and 1, exactly
    wanted = every.sort(dim=1, descending=True, stable=True)
    for steps in all_steps(rows, columns):
        score, index = cosine.stream(axes[:11], axes, k, steps)
        assert torch.equal(index, wanted.indices[:, :k])
        assert torch.equal(score, wanted.values[:, :k])


@pytest.mark.parametrize("form", [cosine_topk, cosine.cosine_topk_plain])
def test_nan_ranks_below_every_number(form):
    """A reference with NaN, or of infinite length, is only taken when nothing else is left, by its index."""
    refs = torch.tensor([[NAN, 0.0], [-1.0, 0.0], [INF, 1.0], [1.0, 0.0], [-NAN, 1.0], [0.0, 1.0]])
    score, index = form(torch.tensor([[2.0, 0.0], [NAN, 1.0]]), refs, 6)
    assert index.tolist() == [[3, 5, 1, 0, 2, 4], [0, 1, 2, 3, 4, 5]]
    assert score[0, :3].tolist() == [1, 0, -1]
    assert score[0, 3:].isnan().all()
    assert score[1].isnan().all()


@pytest.mark.parametrize("k", [1, 5, 17, 300])
def test_special_scores_keep_their_order_in_any_vector(k):
    special = torch.tensor([0.0, -0.0, NAN, -NAN, INF, -INF, 1e-42, -1e-42])
    scores = special[torch.randint(0, 8, (7, 300))]
    scores[5:] = torch.tensor([[NAN], [-INF]])
    none = torch.empty(7, 0, dtype=torch.int64)
    assert_matches_plain("keep_best", none, scores, 2**32 - 300, k)


@needs_kernels
@pytest.mark.parametrize("k", [1, 4, 40])
def test_blocks_of_the_cpu_are_the_plain_form(k):
    """More references than one block takes, and more queries where k is large."""
    signs = torch.randint(-1, 2, (2100, 4)).float()  # few different ones: many scores tie
    score, index = cosine_topk(signs, signs, k)
    wanted = (F.normalize(signs, dim=1) @ F.normalize(signs, dim=1).T).double()
    torch.testing.assert_close(score.double(), wanted.topk(k).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(wanted.gather(1, index), score.double(), rtol=0, atol=1e-6)


@needs_kernels
def test_other_product_and_no_features(monkeypatch):
    queries, refs = torch.randn(9, 70), torch.randn(40, 70)
    wanted = cosine_topk(queries, refs, 3)
    monkeypatch.setattr(cosine, "ONEDNN", False)
    torch.testing.assert_close(cosine_topk(queries, refs, 3), wanted)
    score, index = cosine_topk(queries[:, :0], refs[:, :0], 2)
    assert score.tolist() == [[0, 0]] * 9
    assert index.tolist() == [[0, 1]] * 9


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_selection_on_cpu_and_gpu_sorts_like_a_stable_sort(tmp_path):
    """The CUDA kernel's phases too, run on the host."""
    assert "cases" in run_driver("cosine", tmp_path)


def test_zero_and_negative_zero_are_one_score():
    query, refs = torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.0, 1.0], [0.0, 0.0], [0.0, -1.0], [-1.0, 0.0]])
    score, index = cosine_topk(query, refs, 4)
    assert index.tolist() == [[0, 1, 2, 3]]
    assert score.tolist() == [[0, 0, 0, -1]]


def test_keys_order_floats_as_numbers():
    score = torch.tensor([-float("inf"), -2.5, -1e-30, 0.0, 1e-40, 3.0, float("inf")])
    keys = cosine.order_keys(score, torch.arange(7))
    assert torch.equal(keys.argsort(), torch.arange(7))
    assert torch.equal(cosine.read_keys(keys)[0], score)


def test_never_stores_all_pairs(monkeypatch):
    monkeypatch.setattr(cosine, "ROWS", 64)
    monkeypatch.setattr(cosine, "COLUMNS", 512)
    queries, refs = torch.randn(256, 4), torch.randn(4096, 4)
    with LargestTensor() as largest:
        cosine.cosine_topk_plain(queries, refs, 3)
    assert largest.numel < 256 * 4096 / 10
    with LargestTensor() as largest:
        cosine.cosine_topk_cpu(torch.randn(8192, 4), refs.repeat(4, 1), 3)
    assert largest.numel <= 1 << 22


def test_strided_views():
    queries, refs = torch.randn(4, 6), torch.randn(20, 6)
    assert torch.equal(cosine_topk(strided(queries), strided(refs), 3)[1], cosine_topk(queries, refs, 3)[1])


@pytest.mark.parametrize(
    ("queries", "refs", "k", "error", "match"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), 1, ValueError, r"\(2, 3\) and refs \(4, 5\).*equally many features"),
        (torch.zeros(3), torch.zeros(4, 3), 1, ValueError, r"must be \[rows, features\]"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 5, ValueError, "k is 5 with 4 candidates"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 0, ValueError, "k is 0"),
        (torch.zeros(2, 3), torch.zeros(4, 3).half(), 1, TypeError, "refs is torch.float16 and queries torch.float32"),
        (torch.zeros(2, 3).int(), torch.zeros(4, 3).int(), 1, TypeError, "queries is torch.int32; it must be float16"),
        (torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), 1, ValueError, "refs is on meta and queries on cpu"),
    ],
)
def test_errors(queries, refs, k, error, match):
    with pytest.raises(error, match=match):
        cosine_topk(queries, refs, k)
