"""Hamming top-k in Triton, for a GPU whose owner has no CUDA toolkit.

A kernel writes the key d·N + i of a tile of pairs; `torch.topk` keeps the k smallest keys. Keys are distinct and their
order is the order (distance, index), so the answer has the same bits as every other backend.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # codes per program
KEYS = 1 << 27  # keys held at a time: 1 GiB


@triton.jit
def hamming_keys_kernel(
    queries,  # int32 [Q, WORDS]
    codes,  # int32 [n, WORDS], the codes first … first + n - 1 of all
    keys,  # int64 [Q, n]
    n,
    total,
    first,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK)
    query = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    distance = tl.zeros([BLOCK], dtype=tl.int32)
    for word in tl.static_range(WORDS):
        code = tl.load(codes + row * WORDS + word, mask=inside, other=0)
        x = (code ^ tl.load(queries + query * WORDS + word)).to(tl.uint32, bitcast=True)
        x = x - ((x >> 1) & 0x55555555)  # set bits of pairs,
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)  # of nibbles,
        x = (x + (x >> 4)) & 0x0F0F0F0F  # of bytes;
        x = x + (x >> 8)
        x = x + (x >> 16)
        distance += (x & 0x3F).to(tl.int32)  # and of the word
    tl.store(keys + query * n + row, distance.to(tl.int64) * total + first + row, mask=inside)


def hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """queries uint8 [Q, W], codes uint8 [N, W] -> int32 [Q, k], int64 [Q, k], sorted by (distance, index)."""
    total = codes.shape[0]
    query_words, code_words = as_words(queries), as_words(codes)
    columns = min(total, KEYS)
    rows = max(1, KEYS // columns)
    nearest = [
        _nearest(query_words[start : start + rows], code_words, k, columns)
        for start in range(0, queries.shape[0], rows)
    ]
    keys = torch.cat(nearest) if nearest else queries.new_empty(0, k, dtype=torch.int64)
    return (keys // total).to(torch.int32), keys % total


def _nearest(queries: Tensor, codes: Tensor, k: int, columns: int) -> Tensor:
    """The k smallest keys of every query, int64 [Q, k], over blocks of `columns` codes."""
    best = queries.new_empty(queries.shape[0], 0, dtype=torch.int64)
    for first in range(0, codes.shape[0], columns):
        block = codes[first : first + columns]
        keys = best.new_empty(queries.shape[0], block.shape[0])
        hamming_keys_kernel[(queries.shape[0] * triton.cdiv(block.shape[0], BLOCK),)](
            queries, block, keys, block.shape[0], codes.shape[0], first, WORDS=codes.shape[1], BLOCK=BLOCK
        )
        best = torch.cat((best, keys), dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1, largest=False).values
    return best


def as_words(codes: Tensor) -> Tensor:
    """Packed bytes [rows, W] as contiguous, aligned int32 [rows, ceil(W/4)]; zero padding changes no distance."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)).contiguous()
    return (codes if codes.data_ptr() % 4 == 0 else codes.clone()).view(torch.int32)
