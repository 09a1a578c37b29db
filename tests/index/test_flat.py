"""FlatIndex in memory: exact answers, holes, refusals, and searches while others write."""

import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from index.counting import Counted, assert_answers, random_codes

from ragsr.search import FlatIndex

if FlatIndex is None:
    pytest.skip("ragsr._index was not built", allow_module_level=True)

MEGABYTE = 8192  # codes of 128 bytes: from there on codes lie in several segments, and files are mapped


def filled(codes: np.ndarray) -> tuple[FlatIndex, Counted]:
    index, model = FlatIndex(codes.shape[1]), Counted(codes.shape[1])
    assert index.add(codes) == model.add(codes) == 0
    return index, model


@pytest.mark.parametrize("width", [1, 2, 3, 8, 12, 20, 32, 125, 128])
@pytest.mark.parametrize("n", [1, 63, 1000])
def test_answers_agree_with_counting(width, n):
    index, model = filled(random_codes(n, width, values=2 if width > 8 else 256))
    assert_answers(index, model, random_codes(5, width, seed=1), min(n, 10), 3 * width)
    assert_answers(index, model, model.codes[:1], n, 8 * width)


def test_many_segments():
    index, model = FlatIndex(128), Counted(128)
    for part in range(7):
        codes = random_codes(MEGABYTE // 2 + part, 128, seed=part, values=2)
        assert index.add(codes) == model.add(codes)
    for part in range(50):
        codes = random_codes(part % 3, 128, seed=part)
        assert index.add(codes) == model.add(codes)
    assert_answers(index, model, random_codes(3, 128, values=2), 20, 40)
    model.remove(np.arange(0, 20_000, 3))
    index.remove(np.arange(0, 20_000, 3))
    assert_answers(index, model, random_codes(3, 128, values=2), 200, 40)


@pytest.mark.parametrize("gone", [range(500), range(10, 1000), [*range(0, 1000, 2)], [999], [0]])
def test_removed_codes_never_return(gone):
    codes = random_codes(1000, 2, values=2)
    codes[:500] = 0  # all nearest to the query, so that dropping them from a few more than k is not enough
    index, model = filled(codes)
    index.remove(np.array(gone))
    model.remove(np.array(gone))
    assert_answers(index, model, np.zeros((3, 2), np.uint8), min(len(index), 7), 4)
    assert_answers(index, model, random_codes(3, 2), len(index), 16)
    assert f"removed={len(gone)}" in repr(index)
    assert index.add(codes[:1]) == 1000  # an id is given out once


def test_removing_is_all_or_nothing():
    index, _ = filled(random_codes(10, 4))
    index.remove([4])
    for ids, problem in [([1, 10], "id 10 was never"), ([-1], "id -1 was never"), ([1, 4], "id 4 was removed before")]:
        with pytest.raises(ValueError, match=f"nothing was removed: {problem}.*0 to 9"):
            index.remove(ids)
    with pytest.raises(ValueError, match="id 1 is named twice"):
        index.remove([1, 1])
    assert len(index) == 9
    index.remove([])
    index.remove(np.array([9, 0], np.uint8))
    assert len(index) == 7


def test_views_are_read_as_they_are():
    codes = random_codes(60, 16)
    index, model = filled(np.ascontiguousarray(codes[::3, ::2]))
    strided = FlatIndex(8)
    strided.add(codes[::3, ::2])
    queries = codes[1::7, 1::2]
    assert not queries.flags.c_contiguous
    assert_answers(index, model, queries, 5, 20)
    assert_answers(strided, model, queries, 5, 20)
    read_only = codes[:, :8].copy()
    read_only.flags.writeable = False
    assert index.search(read_only, 1)[0].shape == (60, 1)
    assert index.search(read_only[:0], 1)[1].shape == (0, 1)
    assert index.range_search(read_only[:0], 1)[0].tolist() == [0]


def test_refusals():
    index = FlatIndex(8)
    codes = random_codes(5, 8)
    with pytest.raises(ValueError, match="the index is empty: add codes"):
        index.search(codes, 1)
    assert index.range_search(codes, 64)[0].tolist() == [0] * 6
    index.add(codes)
    for k in (0, -1, 6):
        with pytest.raises(ValueError, match=f"k is {k}, and the index holds 5 codes"):
            index.search(codes, k)
    index.remove([0])
    with pytest.raises(ValueError, match="k is 5, and the index holds 4"):
        index.search(codes, 5)
    for radius in (-1, 65):
        with pytest.raises(ValueError, match=f"radius is {radius}; .* 0 to 64 bits"):
            index.range_search(codes, radius)
    for call in (index.add, lambda wrong: index.search(wrong, 1), lambda wrong: index.range_search(wrong, 1)):
        with pytest.raises(TypeError, match=r"int32 \[5, 8\].*uint8 \[rows, 8\]"):
            call(codes.astype(np.int32))
        with pytest.raises(ValueError, match=r"uint8 \[5, 7\].*uint8 \[rows, 8\]"):
            call(codes[:, :7])
        with pytest.raises(ValueError, match=r"uint8 \[8\].*uint8 \[rows, 8\]"):
            call(codes[0])
        with pytest.raises(TypeError, match=r"uint8 \[rows, 8\]"):
            call(None)
    with pytest.raises(TypeError, match="ids are float64"):
        index.remove([0.5])
    with pytest.raises(ValueError, match=r"FlatIndex\.open"):
        index.commit()
    for width in (0, -1, 129):
        with pytest.raises(ValueError, match=f"width is {width} bytes; 1 to 128"):
            FlatIndex(width)
    assert (len(index), index.width) == (4, 8)


def test_searches_see_a_whole_prefix_while_others_write():
    """Code i holds the number i: what a search returns tells which adds it saw. Blocks of 100 are added and their
    first ten removed; a search must see a multiple of the block, and never a removed code without its block."""
    index = FlatIndex(8)
    blocks = 0
    index.add(np.zeros((1, 8), np.uint8))
    stop = threading.Event()
    problems: list[str] = []
    seen: set[int] = set()

    def read() -> None:
        last = 0
        while not stop.is_set():
            _, _, ids = index.range_search(np.zeros((1, 8), np.uint8), 64)
            ids = np.sort(ids)
            highest = int(ids[-1])
            numbers = np.arange(highest + 1)
            expected = numbers[(numbers == 0) | ((numbers - 1) % 100 >= 10)]
            last_block = np.arange(highest - 99, highest - 89)
            if highest % 100 or highest < last:
                problems.append(f"{highest} after {last}")
            if not np.array_equal(np.setdiff1d(ids, last_block), np.setdiff1d(expected, last_block)):
                problems.append("holes in the prefix")
            if highest and np.isin(last_block, ids).sum() not in (0, 10):
                problems.append("half a removal")
            distance, number = index.search(np.zeros((2, 8), np.uint8), 1)
            if distance.any() or number.any():
                problems.append("lost code 0")
            last = highest
            seen.add(highest)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    while len(seen) < 20 and blocks < 3000 and not problems:  # until the searches have met that many states
        time.sleep(0.001)
        numbers = np.arange(1 + 100 * blocks, 101 + 100 * blocks, dtype="<i8")
        first = index.add(numbers.view(np.uint8).reshape(100, 8))
        assert first == 1 + 100 * blocks
        index.remove(np.arange(first, first + 10))
        blocks += 1
    stop.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert len(seen) >= 5  # the searches did run in between
    assert len(index) == 1 + 90 * blocks


class Sequences(RuleBasedStateMachine):
    """Any order of add, remove, search, save, load, open, commit and losing the process."""

    files = 0

    @initialize(width=st.sampled_from([1, 8, 128]))
    def start(self, width):
        self.index, self.model, self.committed = FlatIndex(width), Counted(width), None
        self.width = width
        Sequences.files += 1
        self.path = str(self.folder / f"{Sequences.files}.index")

    @rule(n=st.sampled_from([0, 1, 5, 100, MEGABYTE + 1]), seed=st.integers(0, 9))
    def add(self, n, seed):
        codes = random_codes(n if self.width == 128 else min(n, 100), self.width, seed=seed, values=2)
        assert self.index.add(codes) == self.model.add(codes)

    @rule(seed=st.integers(0, 9), part=st.sampled_from([0.01, 0.5, 0.95]))
    def remove(self, seed, part):
        live = np.flatnonzero(self.model.live)
        ids = np.random.default_rng(seed).permutation(live)[: int(np.ceil(part * len(live)))]
        self.index.remove(ids)
        self.model.remove(ids)

    @rule(mmap=st.booleans())
    def save_and_load(self, mmap):
        if self.committed is not None:
            self.index.close()
        self.index.save(self.path)
        self.index, self.committed = FlatIndex.load(self.path, mmap=mmap), None

    @rule()
    def save_and_open(self):
        if self.committed is not None:
            self.index.close()
        self.index.save(self.path)
        self.index, self.committed = FlatIndex.open(self.path), self.model.copy()

    @precondition(lambda self: self.committed is not None)
    @rule()
    def commit(self):
        self.index.commit()
        self.committed = self.model.copy()

    @precondition(lambda self: self.committed is not None)
    @rule()
    def lose_the_process(self):
        self.index.close()
        self.index, self.model = FlatIndex.open(self.path), self.committed.copy()

    @invariant()
    def answers(self):
        if not hasattr(self, "index"):
            return
        queries = random_codes(2, self.width, seed=len(self.model.codes), values=2)
        assert_answers(self.index, self.model, queries, min(9, len(self.index)), self.width // 4)


def test_any_sequence_of_calls(tmp_path):
    machine = type("Sequences", (Sequences,), {"folder": tmp_path})
    machine.TestCase.settings = settings(
        max_examples=40, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase().runTest()
