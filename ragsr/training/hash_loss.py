"""What trains a hash encoder.

Two views of each of B photos are coded, and the codes of one photo shall agree: contrastive learning on the codes
themselves, and the probabilities of the bits drawn together.

Source: Qiu et al., "Unsupervised hashing with contrastive information bottleneck", IJCAI 2021 (CIBHash), Eq. 3 and 10;
Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020, Eq. 1 (NT-Xent);
Park et al., "Relational knowledge distillation", CVPR 2019 (`relations`). iRAG Sec. 3.1 prints the loss without the
KL term, which its code has.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TAU = 0.3
KL_WEIGHT = 0.001
TINY = 1e-8  # inside the logarithms of the KL term


class StraightSign(torch.autograd.Function):
    """+1 where p ≥ 0.5, else −1; the gradient passes as if nothing had happened (straight-through).

    At exactly 0.5 the original gives 0, which no bit can hold; ours is +1.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        return torch.where(p >= 0.5, 1.0, -1.0).to(p.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def straight_sign(p: Tensor) -> Tensor:
    """Probabilities of bits to codes of ±1 (`StraightSign`)."""
    return StraightSign.apply(p)


def nt_xent(one: Tensor, other: Tensor, tau: float = TAU) -> Tensor:
    """Each of the 2B rows [B, D] shall find its partner among the 2B − 1 others, by exp(cosine / tau): a scalar."""
    rows = F.normalize(torch.cat([one, other]), dim=1)
    likeness = (rows @ rows.T / tau).fill_diagonal_(-torch.inf)
    return F.cross_entropy(likeness, torch.arange(len(rows), device=rows.device).roll(len(one)))


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of independent bits, summed over the bits and averaged over the batch; q gets no gradient."""
    q = q.detach()
    ones = p * ((p + TINY) / (q + TINY)).log()
    zeros = (1 - p) * ((1 - p + TINY) / (1 - q + TINY)).log()
    return (ones + zeros).sum(1).mean()


def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    """(KL(p ‖ q) + KL(q ‖ p)) / 2, in each term the second without gradient."""
    return (bernoulli_kl(p, q) + bernoulli_kl(q, p)) / 2


def hash_loss(p: Tensor, q: Tensor, tau: float = TAU, weight: float = KL_WEIGHT) -> Tensor:
    """The loss of two views of B photos, given the probabilities of their bits [B, bits]."""
    return nt_xent(straight_sign(p), straight_sign(q), tau) + weight * symmetric_kl(p, q)


def relations(features: Tensor, teacher: Tensor, tau: float = 0.1) -> Tensor:
    """How far the likenesses within a batch [N, D] depart from those that a teacher [N, D'] sees; both of length one.

    The mean KL divergence between the rows of soft-max(cosine / tau), each without the photo itself.
    """
    here, there = (x @ x.T / tau for x in (features, teacher))
    alone = torch.eye(len(features), dtype=torch.bool, device=features.device)
    here, there = (x.masked_fill(alone, -1e4).log_softmax(1) for x in (here, there))
    return (there.exp() * (there - here)).sum(1).mean()


def use_of_bits(codes: Tensor) -> Tensor:
    """What keeps the bits of a batch of codes [N, bits] of ±1 even and apart: 0 where every bit is one in half of the
    codes and no two go together.

    The mean squared mean of a bit, and the mean squared covariance of two.
    """
    centred = codes - codes.mean(0)
    together = centred.T @ centred / len(codes)
    return codes.mean(0).square().mean() + (together - together.diag().diag()).square().mean()


def balance(codes: Tensor) -> dict[str, float]:
    """How well codes [n, bits] of ±1 use their bits.

    `bits_off`: mean distance of the share of ones from a half. `bits_tied`: mean absolute correlation of two bits; what
    never changes counts as tied to everything.
    """
    centred = codes - codes.mean(0)
    spread = centred.square().mean(0).sqrt()
    tied = (centred.T @ centred / len(codes)).abs() / (spread[:, None] * spread).clamp_min(1e-6)
    dead = (spread < 1e-6).float()
    tied = torch.maximum(tied.clamp_max(1), torch.maximum(dead[:, None], dead))
    bits = codes.shape[1]
    others = (tied.sum() - tied.diagonal().sum()) / (bits * (bits - 1))
    return {"bits_off": float((codes.mean(0) / 2).abs().mean()), "bits_tied": float(others)}
