"""Several references, and windows around what is expected, against the whole matrix of scores."""

import time

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ragsr.ops import correlation_topk, match_near
from ragsr.testing import inputs, strided
from tests import contract
from tests.ops.test_match import naive_scores

SETTINGS = {"k": 3, "patch": 3, "padding": 1, "eps": 1e-12}


def scores_in_windows(a: Tensor, b: list[Tensor], prior: Tensor, window: int, patch: int, padding: int) -> list[Tensor]:
    """The whole matrix of every reference, and -inf wherever no window is."""
    found = []
    for number, one in enumerate(b):
        rows, columns = (n + 2 * padding - patch + 1 for n in one.shape[2:])
        y, x = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
        image, row, column = prior.unbind(2)
        inside = (image.clamp(0, len(b) - 1) == number)[..., None]
        for at, centre, length in ((y, row, rows), (x, column, columns)):
            first = (centre.clamp(0, length - 1) - window).clamp(max=length - 2 * window - 1).clamp(min=0)[..., None]
            inside = inside & (at >= first) & (at <= first + 2 * window)
        found.append(naive_scores(a, one, patch, padding, 1e-12).masked_fill(~inside, -torch.inf))
    return found


# ------------------------------------------------------------------ the definition


def test_several_references_are_one_long_list():
    a = torch.randn(2, 4, 5, 6)
    b = [torch.randn(2, 4, 7, 3), torch.randn(2, 4, 1, 1), torch.randn(2, 4, 4, 9)]
    sizes = torch.tensor([x.shape[2] * x.shape[3] for x in b])
    score, index, image = correlation_topk(a, b, **SETTINGS)
    matrix = torch.cat([naive_scores(a, x, 3, 1, 1e-12) for x in b], dim=2)
    wanted, place = matrix.topk(3)
    torch.testing.assert_close(score, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(index + (sizes.cumsum(0) - sizes)[image], place)
    assert torch.equal(correlation_topk(a, b[:1], **SETTINGS)[1], correlation_topk(a, b[0], **SETTINGS)[1])


def test_equal_scores_go_to_the_earliest_reference_and_there_to_the_lowest_index():
    a, other = torch.randn(1, 3, 6, 7), torch.randn(1, 3, 5, 5)
    _, index, image = correlation_topk(a, [other, a, a], 2, padding=0)
    assert torch.equal(image[0], torch.tensor([1, 2]).expand(20, 2))
    assert torch.equal(index[0], torch.arange(20)[:, None].expand(20, 2))
    one = torch.ones(1, 1, 6, 7)
    prior = torch.tensor([[[5, 1, 2]]]).expand(1, 20, 3)  # of the references 0 and 1 the nearest
    score, index, image = correlation_topk(one, [one, one], 4, padding=0, prior=prior, window=1)
    assert (index == torch.tensor([1, 2, 3, 6])).all()
    assert (image == 1).all()
    assert (score == score[0, 0, 0]).all()


@pytest.mark.parametrize("number", range(len(inputs("correlation_topk_near"))))
def test_windows_hold_the_largest_of_the_matrix(number):
    a, b, prior, window, k, patch, padding, _ = inputs("correlation_topk_near")[number]
    if not len(a):
        return
    score, index, image = correlation_topk(a, b, k, patch, padding, prior=prior, window=window)
    matrices = scores_in_windows(a, b, prior, window, patch, padding)
    torch.testing.assert_close(score, torch.cat(matrices, dim=2).topk(k).values, rtol=1e-5, atol=1e-6)
    for number, matrix in enumerate(matrices):
        here = image == number
        own = matrix.gather(2, torch.where(here, index, 0))
        torch.testing.assert_close(own[here], score[here], rtol=1e-5, atol=1e-6)


def test_a_window_over_everything_is_the_search_everywhere():
    a, b = torch.randn(2, 7, 6, 5), torch.randn(2, 7, 9, 4)
    wanted = correlation_topk(a, b, **SETTINGS)
    for far in (-(1 << 62), 0, 1 << 62):
        prior = torch.full((2, 30, 2), far)
        found = correlation_topk(a, b, **SETTINGS, prior=prior, window=1 << 40)
        torch.testing.assert_close(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


def test_a_window_wholly_outside_holds_the_nearest_corner():
    a, b = torch.randn(1, 2, 1, 1), torch.randn(1, 2, 6, 8)
    for row, column, wanted in [(-50, -1, 0), (-3, 99, 7), (6, -7, 40), (1 << 60, 1 << 60, 47)]:
        prior = torch.tensor([[[row, column]]])
        assert correlation_topk(a, b, prior=prior, window=0)[1].item() == wanted


def test_blocks_do_not_change_the_answer(monkeypatch):
    arguments = inputs("correlation_topk_near")[1]
    whole = match_near.correlation_topk_near_plain(*arguments)
    monkeypatch.setattr(match_near, "BLOCK", 1)
    for found, wanted in zip(match_near.correlation_topk_near_plain(*arguments), whole, strict=True):
        torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------ the kernel of the CPU


def test_a_small_window_costs_little():
    """25 of 4096 positions, nine times the products each: the time of this thread must fall at least fourfold."""
    a = torch.randn(1, 64, 64, 64)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    prior = torch.stack((y, x), dim=2).view(1, -1, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        everywhere, near = (least(lambda w=w: correlation_topk(a, a, **w)) for w in ({}, {"prior": prior, "window": 2}))
    finally:
        torch.set_num_threads(threads)
    assert near < everywhere / 4


def least(run) -> float:
    times = []
    for _ in range(3):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times)


def test_threads_and_neighbours_do_not_change_a_bit():
    a, b, prior, *settings = inputs("correlation_topk_near")[1]
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            answers.append(torch.ops.ragsr.correlation_topk_near(a, b, prior, *settings))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*answers, strict=True))
    flat = torch.ones(1, 9, 5, 40)  # all scores are equal, wherever they stand in a vector or a group
    score, _ = correlation_topk(flat, flat, 7, 2, 0, prior=torch.zeros(1, 4 * 39, 2).long(), window=3)
    assert (score == score[0, 0, 0]).all()


# ------------------------------------------------------------------ the frame


def test_matches_plain_in_every_dtype():
    contract.assert_precise("correlation_topk_near")


def test_opcheck():
    contract.assert_opcheck("correlation_topk_near")


def test_compiles_into_one_graph():
    def search(a: Tensor, b: Tensor, c: Tensor, prior: Tensor) -> Tensor:
        score, index, image = correlation_topk(a, [b, c], 2)
        near, place, number = correlation_topk(a, [b, c], 1, prior=prior, window=1)
        return score * (index + image) + near * (place + number)

    maps = torch.randn(2, 3, 7, 5), torch.randn(2, 3, 6, 9), torch.randn(2, 3, 4, 4)
    contract.assert_compiles(search, *maps, torch.randint(0, 5, (2, 35, 3)))


@pytest.mark.parametrize("windows", [False, True])
def test_gradient_of_the_score(windows):
    torch.manual_seed(0)
    a, b, c = (torch.randn(2, 2, 3, n, dtype=torch.float64).requires_grad_() for n in (4, 3, 5))
    more = {"prior": torch.randint(0, 4, (2, 12, 3)), "window": 1} if windows else {}
    assert gradcheck(
        lambda a, b, c: correlation_topk(a, [b, c], 2, **more)[0], (a, strided(b.detach()).requires_grad_(), c)
    )


# ------------------------------------------------------------------ bad input

MAP = torch.zeros(1, 2, 4, 4)
PRIOR = torch.zeros(1, 16, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("b", "more", "error", "message"),
    [
        ([], {}, ValueError, "b holds no reference"),
        ([MAP, MAP[0]], {}, ValueError, r"b\[1\] has shape \(2, 4, 4\)"),
        ([MAP, MAP.double()], {}, TypeError, r"b\[1\] torch.float64"),
        ([MAP, MAP], {"k": 33}, ValueError, "k is 33 with 32 candidates"),
        (MAP, {"prior": PRIOR}, ValueError, "window is missing"),
        (MAP, {"window": 1}, ValueError, "prior is missing"),
        (MAP, {"prior": PRIOR, "window": -1}, ValueError, "window is -1"),
        (MAP, {"prior": PRIOR.int(), "window": 1}, ValueError, "prior is torch.int32"),
        ([MAP], {"prior": PRIOR, "window": 1}, ValueError, r"\(1, 16, 3\): reference, row, column"),
        (MAP, {"prior": PRIOR[:, 1:], "window": 1}, ValueError, r"it must be int64 \(1, 16, 2\): row, column"),
        (MAP, {"prior": PRIOR, "window": 1, "k": 10}, ValueError, "k is 10 with 9 candidates"),
    ],
)
def test_refuses(b, more, error, message):
    with pytest.raises(error, match=message):
        correlation_topk(MAP, b, **more)
