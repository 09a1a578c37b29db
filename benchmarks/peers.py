"""The other ways to search: faiss, usearch, NumPy and plain torch.

    ask = peer(codes, k)       sets up what a library keeps of the codes; not timed
    ask(queries)               the distances, or scores, [Q, k] in the order of the answer

All get the same number of threads, `torch.get_num_threads()`. Only the distances are returned: of equally distant codes
each takes whichever it likes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

CELLS = 1 << 26  # distances that torch and NumPy hold at a time

Ask = Callable[[Tensor], Any]


def threads() -> int:
    return torch.get_num_threads()


# ------------------------------------------------------------------ packed codes, uint8 [N, W]


def faiss_codes(codes: Tensor, k: int) -> Ask:
    import faiss

    faiss.omp_set_num_threads(threads())
    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(codes.numpy())
    return lambda queries: index.search(queries.numpy(), k)[0]


def usearch_codes(codes: Tensor, k: int) -> Ask:
    from usearch.index import MetricKind, search

    def ask(queries: Tensor) -> Any:
        found = search(codes.numpy(), queries.numpy(), k, MetricKind.Hamming, exact=True, threads=threads())
        return found.distances.reshape(len(queries), k)

    return ask


def numpy_codes(codes: Tensor, k: int) -> Ask:
    """`bitwise_count` of the widest words that fit, then `argpartition`; the queries divided among threads."""
    import numpy as np

    word = next(f"u{size}" for size in (8, 4, 2, 1) if codes.shape[1] % size == 0)
    b = codes.numpy().view(word)
    pool = ThreadPoolExecutor(threads())

    def one(query: Any) -> Any:
        bits = np.bitwise_count(query ^ b)
        distance = bits[:, 0] if bits.shape[1] == 1 else bits.sum(1, dtype=np.uint16)
        return np.sort(distance[np.argpartition(distance, k - 1)[:k]])

    def ask(queries: Tensor) -> Any:
        return np.stack(list(pool.map(one, queries.numpy().view(word))))

    return ask


def matmul_codes(codes: Tensor, k: int) -> Ask:
    """⟨±1, ±1⟩ = bits - 2 distance: a matrix product and `topk`, in the smallest type that is exact on the device."""
    bits = 8 * codes.shape[1]
    half = torch.bfloat16 if bits <= 256 else torch.float16  # hold whole numbers up to 256, and to 2048
    dtype = half if codes.is_cuda else torch.float32
    b = signs(codes, dtype)

    def ask(queries: Tensor) -> Tensor:
        rows = signs(queries, dtype).split(max(1, CELLS // len(b)))
        parts = [(part @ b.T).topk(k).values for part in rows]
        return ((bits - torch.cat(parts).float()) / 2).int()

    return ask


def popcount_codes(codes: Tensor, k: int) -> Ask:
    """xor of words, population count by sums of neighbours (PyTorch has none of its own), `topk`."""
    b = words(codes)

    def ask(queries: Tensor) -> Tensor:
        parts = []
        for rows in words(queries).split(max(1, CELLS // b.numel())):
            distance = popcount(rows[:, None] ^ b).sum(-1, dtype=torch.int32)
            parts.append(distance.topk(k, largest=False).values)
        return torch.cat(parts)

    return ask


def words(codes: Tensor) -> Tensor:  # uint8 [N, W] -> int64 [N, ceil(W / 8)]
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).contiguous().view(torch.int64)


def popcount(x: Tensor) -> Tensor:
    """Set bits of int64: of pairs, of nibbles, of bytes; the product adds the bytes up in the topmost."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56) & 0x7F


def signs(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Bits as ±1: [N, W] -> [N, 8 W]."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = (codes[..., None] >> places) & 1
    return bits.flatten(1).to(dtype) * 2 - 1


# ------------------------------------------------------------------ features, float32 [N, D]: cosines


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def faiss_features(refs: Tensor, k: int) -> Ask:
    import faiss

    faiss.omp_set_num_threads(threads())
    index = faiss.IndexFlatIP(refs.shape[1])
    index.add(unit(refs).numpy())
    return lambda queries: index.search(unit(queries).numpy(), k)[0]


def usearch_features(refs: Tensor, k: int) -> Ask:
    from usearch.index import MetricKind, search

    b = unit(refs).numpy()

    def ask(queries: Tensor) -> Any:
        found = search(b, unit(queries).numpy(), k, MetricKind.IP, exact=True, threads=threads())
        return 1 - found.distances.reshape(len(queries), k)

    return ask


def numpy_features(refs: Tensor, k: int) -> Ask:
    """A matrix product, then `partition`; the product takes its threads from NumPy's BLAS."""
    import numpy as np

    b = unit(refs).numpy()

    def ask(queries: Tensor) -> Any:
        rows = queries.split(max(1, CELLS // len(b)))
        return np.concatenate([np.sort(np.partition(unit(part).numpy() @ b.T, -k)[:, -k:])[:, ::-1] for part in rows])

    return ask


def torch_features(refs: Tensor, k: int) -> Ask:
    b = unit(refs)
    return lambda queries: torch.cat([(unit(part) @ b.T).topk(k).values for part in queries.split(CELLS // len(b))])
