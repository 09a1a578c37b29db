"""MultiIndexHash: the answers of the scan, by buckets or by the plan."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index.counting import Counted, random_codes

from ragsr.search import FlatIndex, MultiIndexHash

if MultiIndexHash is None:
    pytest.skip("ragsr._index was not built", allow_module_level=True)


def clustered(n: int, width: int, centres: int, flips: int, seed: int = 0) -> np.ndarray:
    """uint8 [n, width]: each code is one of the centres with a few bits flipped."""
    draw = np.random.default_rng([seed, n, width])
    codes = random_codes(centres, width)[draw.integers(0, centres, n)]
    for _ in range(flips):
        codes[np.arange(n), draw.integers(0, width, n)] ^= 1 << draw.integers(0, 8, n, dtype=np.uint8)
    return codes


def assert_same(hash, index, queries: np.ndarray, k: int) -> None:
    wanted = index.search(queries, k)
    for plan in ("buckets", "auto", "scan"):
        found = hash.search(queries, k, plan)
        for wanted_part, part in zip(wanted, found, strict=True):
            assert part.dtype == wanted_part.dtype
            np.testing.assert_array_equal(part, wanted_part)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 12, 20, 32, 125])
@pytest.mark.parametrize("n", [1, 63, 1000])
def test_same_answers_as_the_scan(width, n):
    index = FlatIndex(width)
    index.add(clustered(n, width, 5, 3))
    queries = clustered(4, width, 5, 2, seed=1)
    hash = MultiIndexHash(index)
    for k in {1, min(n, 10)}:
        assert_same(hash, index, queries, k)


@settings(max_examples=40, deadline=None)
@given(
    width=st.sampled_from([1, 2, 4, 8]),
    n=st.integers(1, 300),
    values=st.sampled_from([1, 2, 4, 256]),
    parts=st.integers(3, 8),
    k=st.integers(1, 300),
    part_removed=st.sampled_from([0, 0.3, 0.9]),
    seed=st.integers(0, 99),
)
def test_any_set_of_codes(width, n, values, parts, k, part_removed, seed):
    """Among them all equal (one value), many ties (two) and more codes asked for than are near."""
    codes = random_codes(n, width, seed=seed, values=values)
    index, model = FlatIndex(width), Counted(width)
    index.add(codes)
    model.add(codes)
    gone = np.random.default_rng(seed).permutation(n)[: int(part_removed * n)]
    index.remove(gone)
    model.remove(gone)
    k = min(k, len(index))
    queries = random_codes(2, width, seed=seed + 1, values=values)
    hash = MultiIndexHash(index, parts=parts)
    assert (hash.parts, len(hash), hash.width) == (parts, len(index), width)
    distances, ids = hash.search(queries, k, "buckets")
    for row, query in enumerate(queries):
        wanted = model.sorted(query)
        np.testing.assert_array_equal(distances[row], wanted[0][:k])
        np.testing.assert_array_equal(ids[row], wanted[1][:k])
    assert_same(hash, index, queries, k)


def test_the_plan_takes_buckets_for_near_codes_and_the_scan_for_far_ones():
    index = FlatIndex(8)
    index.add(clustered(200_000, 8, 2000, 2))
    hash = MultiIndexHash(index)
    near, far = clustered(100, 8, 2000, 1, seed=1), random_codes(100, 8, seed=5)
    assert_same(hash, index, near, 10)
    assert_same(hash, index, far, 10)
    before = hash.scanned
    hash.search(near, 10)
    assert hash.scanned - before < 20
    before = hash.scanned
    hash.search(far, 10)
    assert hash.scanned - before == 100


def test_one_full_bucket_is_left_to_the_scan():
    index = FlatIndex(8)
    index.add(np.zeros((200_000, 8), np.uint8))
    hash = MultiIndexHash(index)
    found = hash.search(np.zeros((3, 8), np.uint8), 5)
    assert hash.scanned == 3
    assert found[1].tolist() == [[0, 1, 2, 3, 4]] * 3


def test_it_holds_one_moment():
    index = FlatIndex(8)
    codes = random_codes(100, 8)
    index.add(codes)
    index.remove([0])
    hash = MultiIndexHash(index)
    index.add(codes)
    index.remove([1])
    assert hash.search(codes[:2], 1)[1].ravel().tolist()[1] == 1
    assert 0 not in hash.search(codes[:1], 99)[1]
    assert repr(hash) == "MultiIndexHash(width=8, len=99, parts=10)"


def test_refusals():
    index = FlatIndex(8)
    with pytest.raises(ValueError, match="the index is empty"):
        MultiIndexHash(index).search(random_codes(1, 8), 1)
    codes = random_codes(3, 8)
    index.add(codes)
    hash = MultiIndexHash(index)
    with pytest.raises(ValueError, match="k is 4, and the index holds 3 codes"):
        hash.search(codes, 4)
    with pytest.raises(ValueError, match=r"uint8 \[3, 7\]"):
        hash.search(codes[:, :7], 1)
    with pytest.raises(ValueError, match="plan is 'best'; it is one of auto, buckets, scan"):
        hash.search(codes, 1, "best")
    for parts in (-1, 2, 65):
        with pytest.raises(ValueError, match=f"parts is {parts}; codes of 64 bits can be cut into 3 to 64"):
            MultiIndexHash(index, parts=parts)
    assert hash.search(codes[:0], 1)[0].shape == (0, 1)
