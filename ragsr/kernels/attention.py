"""Separate attention on a GPU: in one kernel (`attention_kernel.py`) or from parts (`composite.py`), then AdaIN.

Which of them, and in what blocks, stands in `attention_table.py`. Both leave a `moments.Blended`: the blend and the
statistics from which `moments.align` makes AdaIN. Nothing here waits for the device.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ragsr.kernels import composite, moments
from ragsr.kernels.attention_kernel import separate_attention_kernel
from ragsr.kernels.attention_table import Blocks, blocks_for, owner_of, parts_of


def separate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor | None,
    lengths: list[int],
    scale: float | None,
    align: bool,
    mode: str,
) -> Tensor:
    """The op on a GPU: in one kernel, or from parts, as `attention_table.owner_of` says."""
    if q.numel() == 0:
        return torch.empty_like(q)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    whole, blend = parts(q)
    if mode == "concat" and k_ref.shape[2]:
        return whole(q, k, v, k_ref, v_ref, scale)
    if mode != "separate":
        k, v = (k, v) if mode == "concat" else (k_ref, v_ref)
        return whole(q, k, v, None, None, scale)
    statistics = align and bool(lengths)
    blended = blend(q, k, v, k_ref, v_ref, gate, lengths, scale, statistics=statistics)
    if statistics:
        moments.align(blended.out, moments.affine_of(blended), blended.out)
    return blended.out


def separate_attention_affine(
    q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, gate: Tensor, lengths: list[int], scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The blend before AdaIN, and AdaIN as gain and shift [B, H, D]; 1 and 0 where a row's gate is 0 throughout."""
    rows = (*q.shape[:2], q.shape[3])
    dtype = moments.wide(q)
    if q.numel() == 0:
        return torch.empty_like(q), q.new_ones(rows, dtype=dtype), q.new_zeros(rows, dtype=dtype)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    _, blend = parts(q)
    blended = blend(q, k, v, k_ref, v_ref, gate, lengths, scale, statistics=bool(lengths))
    if not lengths:
        return blended.out, q.new_ones(rows, dtype=dtype), q.new_zeros(rows, dtype=dtype)
    by = moments.affine_of(blended, fold=True)
    return blended.out, by.gain.view(rows), by.target.view(rows)


def parts(q: Tensor) -> tuple[Callable[..., Tensor], Callable[..., moments.Blended]]:
    """One soft-max, and the blend of several, by who owns this head dim and dtype on this GPU."""
    owner = owner_of(q.dtype, q.shape[3], capability_of(q))
    if owner.name == "fused":
        return fused_attention, fused_blend
    return composite.composite_attention, composite.composite_blend


def fused_blend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor,
    lengths: list[int],
    scale: float,
    *,
    statistics: bool,
) -> moments.Blended:
    """(1 − Σ g) · O_own + Σ g_r · O_r, not aligned, with the statistics that aligning it takes."""
    blocks = blocks_for(capability_of(q), q.shape[3])
    found = moments.empty_blended(torch.empty_like(q), blocks.queries, statistics=statistics)
    ends = ends_of(lengths, q) if len(set(lengths)) > 1 else None
    launch(blocks, q, k, v, k_ref, v_ref, gate, ends, found, (lengths[0] if lengths else 0, len(lengths)), scale)
    return found


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, k_more: Tensor | None, v_more: Tensor | None, scale: float
) -> Tensor:
    """One soft-max over the keys, and over more keys where there are any."""
    blocks = blocks_for(capability_of(q), q.shape[3])
    found = moments.empty_blended(torch.empty_like(q), blocks.queries, statistics=False)
    more = 0 if k_more is None else k_more.shape[2]
    k_more, v_more = (k, v) if k_more is None or v_more is None else (k_more, v_more)
    launch(blocks, q, k, v, k_more, v_more, None, None, found, (more, 0), scale)
    return found.out


def launch(
    blocks: Blocks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    gate: Tensor | None,  # None: one soft-max over both
    ends: Tensor | None,
    found: moments.Blended,
    references: tuple[int, int],  # tokens of each, how many
    scale: float,
) -> None:
    batch, heads, tokens, head_dim = q.shape
    first, second = parts_of(head_dim)
    unit = alignment(q, k, v, k_ref, v_ref, found.out)
    check_strides(q=q, k=k, v=v, k_ref=k_ref, v_ref=v_ref)
    own, fused = (None, None) if found.own is None or found.fused is None else (found.own.tiles, found.fused.tiles)
    park = blocks.park and gate is not None and references[1] > 0
    parked = torch.empty(q.shape, dtype=torch.float32, device=q.device) if park else None
    with torch.cuda.device_of(q):
        separate_attention_kernel[(moments.tile_count(tokens, blocks.queries) * batch * heads,)](
            *(q, k, v, k_ref, v_ref, gate, ends, found.out, parked, own, fused, found.touched),
            *(heads, tokens, k.shape[2], *references, scale * math.log2(math.e)),
            *(s for x in (q, k, v, k_ref, v_ref) for s in strides_in(unit, x)),
            *((0, 0, 0) if gate is None else gate.stride()),
            *strides_in(unit, found.out),
            D=head_dim,
            D1=first,
            D2=second,
            BM=blocks.queries,
            BN=blocks.keys,
            ALIGN=unit,
            BLEND=gate is not None,
            CONCAT=gate is None and references[0] > 0,
            MOMENTS=own is not None,
            PARK=park,
            PRECISION="ieee",  # for float32 in the interpreter; the half types have no other
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


def capability_of(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)  # in the interpreter as on an H100


def alignment(*tensors: Tensor) -> int:
    """8 if all rows are dense and start at multiples of 8 elements, so that 16 bytes load at once; or 1."""
    dense = all(x.stride(3) == 1 and not any(s % 8 or s >= 2**31 for s in outer_strides(x)) for x in tensors)
    return 8 if dense else 1


def outer_strides(x: Tensor) -> list[int]:
    """Of batch, head and token; 0 where there is only one, whatever the tensor says."""
    return [0 if x.shape[i] == 1 else x.stride(i) for i in range(3)]


def strides_in(unit: int, x: Tensor) -> list[int]:
    return [*(s // unit for s in outer_strides(x)), x.stride(3)]


def check_strides(**operands: Tensor) -> None:
    """Offsets inside a block of at most 128 tokens and 256 channels are 32-bit."""
    for name, x in operands.items():
        if 128 * abs(x.stride(2)) + 256 * abs(x.stride(3)) >= 2**31:
            raise ValueError(
                f"separate_attention: {name} has strides {x.stride()}, too far apart for the fused kernel; "
                "pass it contiguous"
            )


def ends_of(lengths: list[int], like: Tensor) -> Tensor:
    """int32 [R], the running sums, filled on the device: a copy from the host would wait, and could not be captured."""
    ends = [torch.full((1,), end, dtype=torch.int32, device=like.device) for end in itertools.accumulate(lengths)]
    return torch.cat(ends)
