"""Codes go to faiss and come back; without faiss a sentence says so."""

import sys

import numpy as np
import pytest
from index.counting import random_codes

import ragsr.search
from ragsr.errors import InputError
from ragsr.search import FlatIndex, from_faiss, to_faiss

if FlatIndex is None:
    pytest.skip("ragsr._index was not built", allow_module_level=True)


def index_of(n: int, width: int, gone: list[int]) -> FlatIndex:
    index = FlatIndex(width)
    index.add(random_codes(n, width))
    index.remove(gone)
    return index


def assert_equal(one, other) -> None:
    assert one.width == other.width
    np.testing.assert_array_equal(one.ids(), other.ids())
    np.testing.assert_array_equal(one.codes(one.ids()), other.codes(other.ids()))


def test_ids_and_codes():
    index = index_of(10, 3, [2, 9])
    assert index.ids().tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(index.codes([8, 0, 8]), random_codes(10, 3)[[8, 0, 8]])
    assert index.codes([]).shape == (0, 3)
    for missing in (2, 10, -1):
        with pytest.raises(IndexError, match=f"no code with id {missing}"):
            index.codes([missing])


@pytest.mark.parametrize("gone", [[], [0, 7, 99], [*range(99)]])
@pytest.mark.parametrize("width", [2, 8, 32])
def test_there_and_back(width, gone, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(ragsr.search, "CARRIED", 40)
    index = index_of(100, width, gone)
    carried = to_faiss(index)
    assert carried.ntotal == len(index)
    queries = random_codes(5, width, seed=1)
    distances, _ = carried.search(queries, len(index))
    np.testing.assert_array_equal(distances, index.search(queries, len(index))[0])
    assert_equal(from_faiss(carried), index)


def test_an_empty_index():
    pytest.importorskip("faiss")
    assert len(from_faiss(to_faiss(FlatIndex(8)))) == 0


def test_refusals():
    faiss = pytest.importorskip("faiss")
    with pytest.raises(InputError, match=r"IndexBinaryHNSW cannot be read; IndexBinaryFlat can"):
        from_faiss(faiss.IndexBinaryHNSW(64, 4))
    for ids, problem in [([3, 3], "all different"), ([-1, 2], "0 or more"), ([0, 1 << 40], "mostly holes")]:
        index = faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(64))
        index.add_with_ids(random_codes(2, 8), np.array(ids))
        with pytest.raises(InputError, match=problem):
            from_faiss(index)


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (to_faiss, from_faiss):
        with pytest.raises(InputError, match="faiss is not installed: pip install faiss-cpu"):
            call(FlatIndex(8))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(ragsr.search, "FlatIndex", None)
    with pytest.raises(InputError, match=r"ragsr\._index was not built"):
        to_faiss(None)
