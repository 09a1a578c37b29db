"""The paper's Table 6, both rows: 80,000 queries matched with 26,500 references, by hash codes and by features.

    pytest benchmarks/test_retrieval.py -k hash --benchmark-json=benchmarks/results/table6_hash.json
    pytest benchmarks/test_retrieval.py -k vgg --benchmark-json=benchmarks/results/table6_vgg.json

The hash row takes about a minute on two cores, the VGG row about eight, most of it one matrix product of 17 TFLOP.
The VGG features have the size of those that the paper means (4096, not negative); their values are random, since
neither way of matching looks at them.

Codes are matched in one call, and in calls of 64 queries as the paper does. What a peer keeps of the references (an
index, ±1 as floats, features of length 1) is made before; ours is given bytes, or features as they are, and does all of
it in every round: a code is changed before each, so that the table of all answers is built anew. Each peer's distances
are compared with ours first. Slow peers are timed on the first queries: `extra_info` says on how many, and `seconds`
there is the time for all 80,000.
"""

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from peers import Ask
from torch import Tensor

from ragsr import ops
from ragsr.ops._library import PLAIN_FORMS

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

QUERIES, REFERENCES, BATCH = 80_000, 26_500, 64
BYTES, FEATURES = 2, 4096
ALL = QUERIES


def our_codes(codes: Tensor, k: int) -> Ask:
    return lambda queries: ops.hamming_topk(queries, codes, k)[0]


def our_features(refs: Tensor, k: int) -> Ask:
    return lambda queries: ops.cosine_topk(queries, refs, k)[0]


# name -> how it is set up, and how many queries it is timed on
BY_HASH = {
    "ragsr": (our_codes, ALL),
    "faiss-cpu IndexBinaryFlat": (peers.faiss_codes, ALL),
    "usearch exact": (peers.usearch_codes, 1280),
    "NumPy": (peers.numpy_codes, 1280),
    "±1 matmul, topk": (peers.matmul_codes, 6400),
}
BY_FEATURES = {
    "ragsr": (our_features, ALL),
    "faiss-cpu IndexFlatIP": (peers.faiss_features, 4096),
    "usearch exact": (peers.usearch_features, 64),
    "NumPy": (peers.numpy_features, 4096),
    "matmul, topk": (peers.torch_features, 4096),
}


# ------------------------------------------------------------------ the data, once


@pytest.fixture(scope="module")
def codes() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randint(0, 256, (rows, BYTES), dtype=torch.uint8) for rows in (QUERIES, REFERENCES))


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor]:
    """1.7 GB; nobody makes a second copy of all queries."""
    torch.manual_seed(0)
    return tuple(torch.randn(rows, FEATURES).relu_() for rows in (QUERIES, REFERENCES))


# ------------------------------------------------------------------ the two rows


@pytest.mark.parametrize("name", BY_HASH)
@pytest.mark.parametrize("calls", ["one call", "calls of 64"])
@pytest.mark.parametrize("k", [1, 4])
def test_hash(benchmark: Any, codes: tuple[Tensor, Tensor], k: int, calls: str, name: str) -> None:
    peer, timed = BY_HASH[name]
    if calls == "calls of 64" and name != "ragsr":
        timed = min(timed, 200 * BATCH)
    queries, references = codes[0][:timed], codes[1]
    ask = installed(peer, references, k)
    batches = queries.split(BATCH if calls == "calls of 64" else timed)
    found = torch.cat([torch.as_tensor(ask(batch)).int() for batch in batches])
    if name == "ragsr":
        some = slice(None, None, 160)  # the plain form would take half a minute for all
        assert torch.equal(found[some], PLAIN_FORMS["hamming_topk"](queries[some], references, k)[0])
    assert torch.equal(found, ops.hamming_topk(queries, references, k)[0]), f"{name}: other distances than ours"
    ours = name == "ragsr"
    measure(
        benchmark, lambda: [ask(batch) for batch in batches], timed, 50 if ours else 3, references if ours else None
    )
    benchmark.group = f"hash, k={k}, {calls}"
    benchmark.extra_info["storage bytes"] = REFERENCES * BYTES * (32 if "±1" in name else 1)


@pytest.mark.parametrize("name", BY_FEATURES)
def test_vgg(benchmark: Any, features: tuple[Tensor, Tensor], name: str) -> None:
    peer, timed = BY_FEATURES[name]
    queries, references = features[0][:timed], features[1]
    ask = installed(peer, references, 1)
    other = our_features if name != "ragsr" else peers.torch_features
    found, wanted = (torch.as_tensor(one(queries[:64])) for one in (ask, other(references, 1)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    measure(benchmark, lambda: ask(queries), timed, 1)
    benchmark.group = "vgg, k=1"
    benchmark.extra_info["storage bytes"] = REFERENCES * FEATURES * 4


def installed(peer: Callable[[Tensor, int], Ask], references: Tensor, k: int) -> Ask:
    try:
        return peer(references, k)
    except ImportError as missing:
        pytest.skip(f"{missing.name} is not installed: pip install 'ragsr[bench]'")


def measure(benchmark: Any, run: Callable[[], Any], timed: int, rounds: int, known: Tensor | None = None) -> None:
    """`known`: codes of which one is changed before every round, so that no table is left from the one before."""

    def forget() -> None:
        if known is not None:
            known[0, 0] += 1  # to a value that has not been there: several galleries are kept

    benchmark.pedantic(run, setup=forget, rounds=rounds, iterations=1)
    seconds = benchmark.stats.stats.median * QUERIES / timed
    threads = torch.get_num_threads()
    benchmark.extra_info |= {"queries timed": timed, "seconds": seconds, "threads": threads}
