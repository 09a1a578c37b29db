"""`correlation_topk`: patch matching between feature maps, with one reference or several, everywhere or in windows.

What a score is stands in `ragsr.ops.match`, where the search everywhere is defined; that in windows is in
`ragsr.ops.match_near`. Several references are searched one after the other and their best matches compared.
"""

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ragsr.ops.match import check_k, check_maps, positions
from ragsr.ops.match_near import check_near


@overload
def correlation_topk(
    a: Tensor,  # [B, C, H, W]
    b: Tensor,  # [B, C, H', W']
    k: int = ...,
    patch: int = ...,
    padding: int = ...,
    eps: float = ...,
    *,
    prior: Tensor | None = ...,  # int64 [B, N, 2]: row, column
    window: int | None = ...,
) -> tuple[Tensor, Tensor]: ...  # score float32 [B, N, k], index int64 [B, N, k]


@overload
def correlation_topk(
    a: Tensor,
    b: Sequence[Tensor],  # R references [B, C, H_r, W_r]
    k: int = ...,
    patch: int = ...,
    padding: int = ...,
    eps: float = ...,
    *,
    prior: Tensor | None = ...,  # int64 [B, N, 3]: reference, row, column
    window: int | None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...  # the same, and the number of the reference int64 [B, N, k]


def correlation_topk(
    a: Tensor,
    b: Tensor | Sequence[Tensor],
    k: int = 1,
    patch: int = 3,
    padding: int = 1,
    eps: float = 1e-12,
    *,
    prior: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, ...]:
    """The k best matches in `b` of every patch of `a`: scores (a cosine, highest first) and positions.

    N = (H + 2·padding - patch + 1)·(W + 2·padding - patch + 1), row-major; so is the index, over the same kind of grid
    on `b`. With several references, of any sizes, the answer has a third part: in which of them each match lies; the
    index counts the positions of that one. Equal scores go to the earliest reference, in it to the lowest index.

    `prior` says where each match is expected, as row and column of a position, before them the number of the reference
    where there are several. Then only the positions at most `window` rows and columns from there are searched, at a
    cost in proportion to (2·window + 1)². A window that reaches over the edge is moved inside, or cut where the
    reference is smaller: all windows in a reference hold as many candidates, at least one. A number that names no
    reference names the nearest that exists.

    Scores are float32 (float64 for float64 inputs) and differentiable in `a` and `b`, as in TTSR's soft attention; the
    index is not. Never stores N×N'. Features are finite: what stands for a score that is not a number is not defined.
    Raises `ValueError` for a wrong shape, k, patch, padding or window, `TypeError` for a wrong dtype.
    """
    references = [b] if isinstance(b, Tensor) else list(b)
    check_maps(a, references, patch, padding, eps)
    if prior is not None or window is not None:
        prior, window = check_window(a, b, prior, window, k, patch, padding)
        found = torch.ops.ragsr.correlation_topk_near(a, references, prior, window, k, patch, padding, eps)
    else:
        found = search_everywhere(a, references, k, patch, padding, eps)
    score, index, image = found
    return (score, index) if isinstance(b, Tensor) else (score, index, image)


def search_everywhere(
    a: Tensor, references: list[Tensor], k: int, patch: int, padding: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of every reference, then of all: the sort is stable, so equal scores stay in the order of references."""
    candidates = [positions(b, patch, padding) for b in references]
    check_k(k, sum(candidates))
    found = [
        torch.ops.ragsr.correlation_topk(a, b, min(k, n), patch, padding, eps)
        for b, n in zip(references, candidates, strict=True)
    ]
    if len(found) == 1:
        return *found[0], torch.zeros_like(found[0][1])
    image = torch.cat([torch.full_like(index, number) for number, (_, index) in enumerate(found)], dim=2)
    score, index = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    score, order = (x[..., :k] for x in score.sort(dim=2, descending=True, stable=True))
    return score, index.gather(2, order), image.gather(2, order)


def check_window(
    a: Tensor,
    b: Tensor | Sequence[Tensor],
    prior: Tensor | None,
    window: int | None,
    k: int,
    patch: int,
    padding: int,
) -> tuple[Tensor, int]:
    """The prior with a number of the reference in front, and the window."""
    several = not isinstance(b, Tensor)
    if prior is None or window is None:
        missing = "prior" if prior is None else "window"
        raise ValueError(f"correlation_topk: prior and window belong together, and {missing} is missing")
    wanted = (a.shape[0], positions(a, patch, padding), 3 if several else 2)
    if prior.dtype != torch.int64 or tuple(prior.shape) != wanted:
        parts = "reference, row, column" if several else "row, column"
        raise ValueError(
            f"correlation_topk: prior is {prior.dtype} {tuple(prior.shape)}; it must be int64 {wanted}: {parts} of the "
            "expected match of every position of a"
        )
    if prior.device != a.device:
        raise ValueError(f"correlation_topk: prior is on {prior.device} and a on {a.device}; move them to one device")
    check_near([b] if isinstance(b, Tensor) else b, window, k, patch, padding)
    return prior if several else F.pad(prior, (1, 0)), window
