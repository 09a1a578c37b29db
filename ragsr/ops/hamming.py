"""Hamming search over packed binary codes: exact, ordered, the same bits on every backend.

A code of n bits is stored in W = ceil(n/8) bytes in little bit order: bit j of byte i is component 8i + j, as
`numpy.packbits(bitorder="little")` and faiss store it; the last byte is padded with zeros.

    d(a, b) = popcount(a xor b)

The k nearest codes are sorted by (distance, index), so ties go to the lowest index. That order is total: every
algorithm and every device must return the same answer, and tests compare with `==`.

Source: the matching of iRAG (Sec. 3.1), which the paper times in Table 6.
"""

import torch
from torch import Tensor

from ragsr.ops._library import claim, define

MAX_WIDTH = 128  # bytes per code: 1024 bits
BLOCK = 1 << 24  # bytes of working memory that a block of the plain forms may take


# ------------------------------------------------------------------ public names


def pack_bits(x: Tensor) -> Tensor:
    """Pack the signs of `x` [..., n] into bytes: uint8 [..., ceil(n/8)], bit = x > 0, little bit order.

    Any real dtype; zero and NaN give a 0 bit, `bool` is taken as it is. n >= 1.
    """
    check_pack_bits(x)
    return torch.ops.ragsr.pack_bits(x)


def hamming_distance(
    queries: Tensor,  # uint8 [Q, W]
    codes: Tensor,  # uint8 [N, W]
) -> Tensor:  # int32 [Q, N]
    """The number of differing bits between every query and every code: int32 [Q, N]."""
    check_codes("hamming_distance", queries, codes)
    return torch.ops.ragsr.hamming_distance(queries, codes)


def hamming_topk(
    queries: Tensor,  # uint8 [Q, W]
    codes: Tensor,  # uint8 [N, W]
    k: int,
) -> tuple[Tensor, Tensor]:  # int32 [Q, k], int64 [Q, k]
    """The k nearest codes of every query, sorted by (distance, index): distances int32 [Q, k], indices int64 [Q, k].

    Exact, 1 <= k <= N, W from 1 to 128 bytes; both tensors on one device. Raises `ValueError` for a wrong shape or k,
    `TypeError` for a wrong dtype.
    """
    check_codes("hamming_topk", queries, codes)
    check_k("hamming_topk", k, codes.shape[0])
    distance, index = torch.ops.ragsr.hamming_topk(queries, codes, k)
    return distance, index


# ------------------------------------------------------------------ plain PyTorch


def pack_bits_plain(x: Tensor) -> Tensor:
    bits = x > 0
    n = x.shape[-1]
    bits = torch.nn.functional.pad(bits, (0, -n % 8)).unflatten(-1, (-1, 8))
    weights = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=x.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def hamming_distance_plain(queries: Tensor, codes: Tensor) -> Tensor:
    distance = queries.new_empty(queries.shape[0], codes.shape[0], dtype=torch.int32)
    rows = max(1, BLOCK // max(1, codes.numel()))
    for start in range(0, queries.shape[0], rows):
        part = slice(start, start + rows)
        for column in range(0, codes.shape[0], BLOCK // MAX_WIDTH):
            block = slice(column, column + BLOCK // MAX_WIDTH)
            xor = queries[part, None] ^ codes[None, block]
            distance[part, block] = popcount(xor).sum(-1, dtype=torch.int32)
    return distance


def hamming_topk_plain(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep the k smallest keys d·N + i, block after block: the key holds the order (distance, index) in one integer."""
    n = codes.shape[0]
    indices = torch.arange(n, device=codes.device)
    rows = max(1, BLOCK // max(1, min(n, BLOCK // MAX_WIDTH) * codes.shape[1]))
    nearest = []
    for start in range(0, queries.shape[0], rows):
        best = queries.new_empty(len(queries[start : start + rows]), 0, dtype=torch.int64)
        for column in range(0, n, BLOCK // MAX_WIDTH):
            block = slice(column, column + BLOCK // MAX_WIDTH)
            distance = hamming_distance_plain(queries[start : start + rows], codes[block])
            best = torch.cat((best, distance * n + indices[block]), dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1, largest=False).values
        nearest.append(best)
    keys = torch.cat(nearest) if nearest else queries.new_empty(0, k, dtype=torch.int64)
    return (keys // n).to(torch.int32), keys % n


def popcount(x: Tensor) -> Tensor:
    """Set bits of every byte: pairs, then nibbles, then the byte."""
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F


# ------------------------------------------------------------------ checks


def check_pack_bits(x: Tensor) -> None:
    if x.dtype.is_complex:
        raise TypeError(f"pack_bits: x is {x.dtype}; it takes the sign of real numbers (or bool)")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"pack_bits: x has shape {tuple(x.shape)}; it needs at least one component in the last dimension"
        )


def check_codes(op: str, queries: Tensor, codes: Tensor) -> None:
    for name, x in (("queries", queries), ("codes", codes)):
        if x.dtype != torch.uint8:
            raise TypeError(
                f"{op}: {name} is {x.dtype}; codes are packed bytes (uint8): pack them with ragsr.ops.pack_bits"
            )
        if x.ndim != 2:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; it must be [rows, bytes]")
    if queries.shape[1] != codes.shape[1]:
        raise ValueError(
            f"{op}: queries have {queries.shape[1]} bytes and codes {codes.shape[1]}; "
            "both must come from one encoder with one code length"
        )
    if not 1 <= codes.shape[1] <= MAX_WIDTH:
        raise ValueError(f"{op}: codes have {codes.shape[1]} bytes; 1 to {MAX_WIDTH} are allowed (8 to 1024 bits)")
    if queries.device != codes.device:
        raise ValueError(f"{op}: queries are on {queries.device} and codes on {codes.device}; move them to one device")


def check_k(op: str, k: int, n: int) -> None:
    if k < 1 or k > n:
        raise ValueError(f"{op}: k is {k} with {n} candidates; k must lie between 1 and the number of candidates")


# ------------------------------------------------------------------ fake and registration


def pack_bits_fake(x: Tensor) -> Tensor:
    check_pack_bits(x)
    return x.new_empty(*x.shape[:-1], (x.shape[-1] + 7) // 8, dtype=torch.uint8)


def hamming_distance_fake(queries: Tensor, codes: Tensor) -> Tensor:
    check_codes("hamming_distance", queries, codes)
    return queries.new_empty(queries.shape[0], codes.shape[0], dtype=torch.int32)


def hamming_topk_fake(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_codes("hamming_topk", queries, codes)
    check_k("hamming_topk", k, codes.shape[0])
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


define("pack_bits(Tensor x) -> Tensor", plain=pack_bits_plain, fake=pack_bits_fake)
define(
    "hamming_distance(Tensor queries, Tensor codes) -> Tensor",
    plain=hamming_distance_plain,
    fake=hamming_distance_fake,
)
define(
    "hamming_topk(Tensor queries, Tensor codes, int k) -> (Tensor, Tensor)",
    plain=hamming_topk_plain,
    fake=hamming_topk_fake,
)


def hamming_topk_triton(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from ragsr.kernels import hamming  # here, so that importing the ops does not import Triton

    return hamming.hamming_topk(queries, codes, k)


claim("hamming_topk", hamming_topk_triton)
