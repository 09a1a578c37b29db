import pytest
import torch
from contract import LargestTensor, assert_compiles, assert_opcheck, assert_precise
from torch.nn import functional as F

from ragsr.ops import cosine, cosine_topk
from ragsr.testing import strided


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


@pytest.mark.parametrize(("rows", "columns"), [(256, 8192), (4, 7), (1, 1)])
def test_ties_go_to_the_lowest_index_in_any_blocks(monkeypatch, rows, columns):
    monkeypatch.setattr(cosine, "ROWS", rows)
    monkeypatch.setattr(cosine, "COLUMNS", columns)
    axes = torch.eye(3)[torch.randint(0, 3, (50,))] * torch.tensor([1.0, -1.0])[torch.randint(0, 2, (50, 1))]
    every = axes[:11] @ axes.T  # -1, 0 and 1, exactly
    wanted = every.sort(dim=1, descending=True, stable=True)
    score, index = cosine_topk(axes[:11], axes, 50)
    assert torch.equal(index, wanted.indices)
    assert torch.equal(score, wanted.values)


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
