import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragsr import ops
from ragsr.ops import hamming
from ragsr.testing import assert_matches_plain, devices, inputs, strided

OPS = ["pack_bits", "hamming_distance", "hamming_topk"]


def random_codes(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (rows, width), dtype=np.uint8))


def nearest_by_sorting(queries: torch.Tensor, codes: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """An answer that shares no code with ours: unpack, compare bit by bit, sort stably."""
    a, b = np.unpackbits(queries.numpy(), axis=1), np.unpackbits(codes.numpy(), axis=1)
    distance = (a[:, None] != b[None]).sum(-1)
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, order, 1), order


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("op", OPS)
def test_matches_plain(op, device):
    for args in inputs(op, device):
        assert_matches_plain(op, *args)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    for args in inputs(op, device)[:4]:
        torch.library.opcheck(getattr(torch.ops.ragsr, op), args)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_breaks(op, device):
    args = inputs(op, device)[1]
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), getattr(ops, op)(*args), rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    q=st.integers(0, 9),
    n=st.integers(1, 300),
    width=st.integers(1, 128),
    values=st.sampled_from([1, 2, 256]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_topk_is_a_stable_sort(q, n, width, values, seed, data):
    """Also where all codes are equal (values=1) or most distances tie (values=2)."""
    k = data.draw(st.integers(1, n))
    generator = np.random.default_rng(seed)
    queries, codes = (torch.from_numpy(generator.integers(0, values, (rows, width), dtype=np.uint8)) for rows in (q, n))
    distance, index = ops.hamming_topk(queries, codes, k)
    wanted_distance, wanted_index = nearest_by_sorting(queries, codes, k)
    assert distance.dtype == torch.int32
    assert index.dtype == torch.int64
    assert np.array_equal(distance.numpy(), wanted_distance)
    assert np.array_equal(index.numpy(), wanted_index)


def test_few_queries_split_over_the_codes_agree_with_one_scan():
    """One query over 300,000 codes is cut up among threads; ties must still go to the lowest index."""
    codes = random_codes(300_000, 2)
    query = codes[250_000:250_001]
    _, index = ops.hamming_topk(query, codes, 40)
    assert torch.equal(index[0], hamming.hamming_topk_plain(query, codes, 40)[1][0])
    assert index[0, 0] == int((codes == query).all(1).nonzero()[0])


def test_plain_form_in_small_blocks(monkeypatch):
    queries, codes = random_codes(7, 9), random_codes(1000, 9, seed=1)
    whole = hamming.hamming_topk_plain(queries, codes, 13), hamming.hamming_distance_plain(queries, codes)
    monkeypatch.setattr(hamming, "BLOCK", 4096)
    parts = hamming.hamming_topk_plain(queries, codes, 13), hamming.hamming_distance_plain(queries, codes)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool]
)
def test_pack_bits_is_numpy_packbits(dtype):
    x = torch.randn(5, 77).mul(3).to(dtype)
    wanted = np.packbits((x > 0).numpy(), axis=-1, bitorder="little")
    assert np.array_equal(ops.pack_bits(x).numpy(), wanted)
    assert np.array_equal(ops.pack_bits(strided(x)).numpy(), wanted)


def test_pack_bits_of_zero_and_nan_is_zero():
    assert ops.pack_bits(torch.tensor([0.0, -0.0, float("nan"), 1.0, float("inf"), -float("inf")])).item() == 0b011000


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.hamming_topk(torch.zeros(2, 8), random_codes(3, 8), 1),
            TypeError,
            "pack them with ragsr.ops.pack_bits",
        ),
        (
            lambda: ops.hamming_topk(random_codes(2, 8)[0], random_codes(3, 8), 1),
            ValueError,
            r"must be \[rows, bytes\]",
        ),
        (
            lambda: ops.hamming_topk(random_codes(2, 8), random_codes(3, 4), 1),
            ValueError,
            "queries have 8 bytes and codes 4",
        ),
        (lambda: ops.hamming_topk(random_codes(2, 8), random_codes(3, 8), 4), ValueError, "k is 4 with 3 candidates"),
        (lambda: ops.hamming_topk(random_codes(2, 8), random_codes(3, 8), 0), ValueError, "k is 0"),
        (lambda: ops.hamming_topk(random_codes(2, 8), random_codes(0, 8), 1), ValueError, "k is 1 with 0 candidates"),
        (lambda: ops.hamming_distance(random_codes(2, 129), random_codes(2, 129)), ValueError, "1 to 128 are allowed"),
        (lambda: ops.hamming_distance(random_codes(2, 0), random_codes(2, 0)), ValueError, "1 to 128 are allowed"),
        (
            lambda: ops.hamming_topk(random_codes(2, 8), random_codes(3, 8).to("meta"), 1),
            ValueError,
            "move them to one device",
        ),
        (lambda: ops.pack_bits(torch.zeros(3, dtype=torch.complex64)), TypeError, "sign of real numbers"),
        (lambda: ops.pack_bits(torch.zeros(3, 0)), ValueError, "at least one component"),
        (lambda: ops.pack_bits(torch.tensor(1.0)), ValueError, "at least one component"),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
