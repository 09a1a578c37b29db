import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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


WIDTHS = [1, 2, 3, 4, 5, 8, 12, 16, 20, 25, 32, 64, 125, 128]
EDGES = [1, 63, 513, 1025]  # around the blocks of 512 codes that the kernels work on


def adversarial_codes(kind: str, rows: int, width: int) -> torch.Tensor:  # uint8 [rows, width]
    """Sets in which most distances tie, or the first codes say nothing about the later ones."""
    codes = random_codes(rows, width, seed=rows)
    if kind == "equal":
        codes[:] = codes[0].clone()
    elif kind == "duplicates":
        codes = codes[torch.arange(rows) % 3]
    elif kind == "clusters":
        codes = codes & random_codes(rows, width, seed=1) & random_codes(rows, width, seed=2)
        codes[rows // 2 :] ^= 0xFF
    elif kind == "one distance":
        codes = torch.zeros_like(codes)
        codes[torch.arange(rows), torch.arange(rows) % width] = 1
    elif kind == "nearer and nearer":  # the bound never stops falling
        bits = torch.arange(8 * width) >= torch.linspace(0, 8 * width, rows)[:, None]
        codes = ops.pack_bits(bits)
    return codes


@pytest.fixture
def threads():
    """Sets the number of threads; puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["random", "equal", "duplicates", "clusters", "one distance", "nearer and nearer"])
def test_every_width_and_edge_is_the_plain_form(kind, width, threads):
    for i, n in enumerate(EDGES):
        codes = adversarial_codes(kind, n, width)
        queries = torch.cat((codes[: 13 * (i % 2)], random_codes(3, width)))  # few are scanned, many are sliced
        distance, index = hamming.hamming_topk_plain(queries, codes, n)
        threads(1 + i // 2)
        for k in {1, min(4, n), min(100, n), n}:
            found = ops.hamming_topk(queries, codes, k)
            assert torch.equal(found[0], distance[:, :k]), f"distances of n={n}, k={k}"
            assert torch.equal(found[1], index[:, :k]), f"indices of n={n}, k={k}"


@pytest.mark.parametrize("kind", ["random", "duplicates", "clusters"])
@pytest.mark.parametrize(("q", "width", "k"), [(900, 1, 3), (900, 1, 100), (3000, 2, 1), (3000, 2, 4), (3000, 2, 7)])
def test_all_answers_at_once_are_the_plain_form(kind, q, width, k):
    """So many queries of so few bits that the table of all possible queries is built."""
    queries, codes = random_codes(q, width, seed=q), adversarial_codes(kind, 700, width)
    torch.testing.assert_close(
        ops.hamming_topk(queries, codes, k), hamming.hamming_topk_plain(queries, codes, k), rtol=0, atol=0
    )


@pytest.mark.parametrize("width", [1, 2])
def test_a_gallery_may_change_between_calls(width):
    """After a few calls the table of all answers is kept; a byte changed in place, at any end, must be seen."""
    codes, queries = random_codes(3000, width), random_codes(600, width, seed=1)
    for call in range(60):
        if call % 10 == 9:
            row = [0, -1, 1777][call // 10 % 3]
            codes[row] = queries[call]
        k = [1, 4, 3, 16][call % 4]
        wanted = hamming.hamming_topk_plain(queries[:64], codes, k)
        torch.testing.assert_close(ops.hamming_topk(queries[:64], codes, k), wanted, rtol=0, atol=0)
    ops.hamming_topk(queries, codes, 4)
    shorter = codes[:-1]
    wanted = hamming.hamming_topk_plain(queries, shorter, 4)
    torch.testing.assert_close(ops.hamming_topk(queries, shorter, 4), wanted, rtol=0, atol=0)


def test_threads_share_the_tables_of_several_galleries():
    galleries = [random_codes(2000, 2, seed=seed) for seed in range(5)]
    queries = random_codes(64, 2, seed=9)
    wanted = [hamming.hamming_topk_plain(queries, codes, 4) for codes in galleries]

    def search(start: int) -> bool:
        found = [ops.hamming_topk(queries, galleries[(start + i) % 5], 4) for i in range(200)]
        return all(torch.equal(f[1], wanted[(start + i) % 5][1]) for i, f in enumerate(found))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(search, range(4)))


@pytest.mark.parametrize(("q", "width", "k"), [(1, 8, 5), (20, 8, 5), (20, 12, 40), (1, 4, 20_000)])
def test_parts_of_the_codes_are_merged_in_order(q, width, k, threads):
    threads(2)
    codes = adversarial_codes("clusters", 70_000, width)
    queries = torch.cat((codes[:1], random_codes(q - 1, width)))
    found = ops.hamming_topk(queries, codes, k)
    threads(1)
    whole = ops.hamming_topk(queries, codes, k)
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    torch.testing.assert_close(found, hamming.hamming_topk_plain(queries, codes, k), rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 3, 8, 20, 32, 125])
def test_nothing_is_read_beside_the_codes(width):
    """The same answer when the codes lie between bytes that would change it."""
    room = torch.zeros(600 * width + 200, dtype=torch.uint8)
    codes = room[101 : 101 + 600 * width].view(600, width)
    codes.copy_(random_codes(600, width))
    queries = 255 - codes[:20]
    wanted = ops.hamming_topk(queries, codes.clone(), 9)
    room[:101] = room[101 + 600 * width :] = 0xFF
    torch.testing.assert_close(ops.hamming_topk(queries, codes, 9), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", ["portable", "neon", "avx2", "avx512"])
def test_each_instruction_set_passes_the_tests_above(kernel):
    environment = os.environ | {"RAGSR_CPU": kernel}
    call = "from ragsr import ops; import torch; x = torch.zeros(1, 1, dtype=torch.uint8); ops.hamming_topk(x, x, 1)"
    probe = [sys.executable, "-c", call]
    started = subprocess.run(probe, env=environment, capture_output=True, text=True)
    if "but this machine has" in started.stderr:
        pytest.skip(f"this machine has no {kernel}")
    assert started.returncode == 0, started.stderr
    names = "plain_form or parts or beside or stable"
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names]
    done = subprocess.run(tests, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


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
