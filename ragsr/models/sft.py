"""The layers through which restoration networks take in their condition, under the names of the published weights.

    SPADE            normalise, then scale and shift by maps made from the condition     StableSR and iRAG (there: SFT)
    SPADEResBlock    the residual block of their U-Nets: it ends with a SPADE layer      StableSR and iRAG
    ResBlock         the same without a condition                                        their encoders, SUPIR
    ZeroSFT          the same for a skip connection and a control map                    SUPIR

The maps γ and β depend on the condition alone. `modulation` makes them, with one convolution for both, and whoever has
them may pass them in its place: once a step is enough, for every chain and both halves of classifier-free guidance that
share the condition. A condition of batch b serves features of batch k · b, in which it repeats.

Source: iRAG, Sec. 3.3.1; Park et al., Semantic Image Synthesis with Spatially-Adaptive Normalization, CVPR 2019, Eq. 1;
Yu et al., Scaling Up to Excellence (SUPIR), CVPR 2024, Sec. 3.1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ragsr.ops import group_norm_sft

GROUPS = 32
HIDDEN = 128  # channels between the condition and its maps


class Modulation(NamedTuple):
    """The maps of one layer, [b, C, H, W] each."""

    gamma: Tensor
    beta: Tensor

    def for_batch(self, batch: int) -> "Modulation":
        """Repeated along the batch; one map for all is left as it is, since the op broadcasts it."""
        own = self.gamma.shape[0]
        if own in (1, batch):
            return self
        if batch % own:
            raise ValueError(f"the condition has batch {own} and the features {batch}; it must divide that")
        return Modulation(*(map_.repeat(batch // own, 1, 1, 1) for map_ in self))


def make_modulation(
    condition: Tensor,  # [b, K, h, w]
    size: tuple[int, int] | None,
    shared: nn.Module,
    to_gamma: nn.Conv2d,
    to_beta: nn.Conv2d,
) -> Modulation:
    """γ and β as the two halves of one convolution's result, which the op reads in place."""
    if size is not None and tuple(condition.shape[2:]) != tuple(size):
        condition = F.interpolate(condition, size=size, mode="bilinear", align_corners=False)
    weight = torch.cat((to_gamma.weight, to_beta.weight))
    bias = None if to_gamma.bias is None or to_beta.bias is None else torch.cat((to_gamma.bias, to_beta.bias))
    return Modulation(*F.conv2d(shared(condition), weight, bias, padding=1).chunk(2, dim=1))


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class SPADE(nn.Module):
    """GN(x) · (1 + γ) + β, with γ and β convolved from a condition."""

    def __init__(self, channels: int, condition_channels: int) -> None:
        super().__init__()
        self.param_free_norm = nn.GroupNorm(GROUPS, channels)  # it has parameters, against its published name
        self.mlp_shared = nn.Sequential(conv3(condition_channels, HIDDEN), nn.ReLU())
        self.mlp_gamma = conv3(HIDDEN, channels)
        self.mlp_beta = conv3(HIDDEN, channels)

    def modulation(self, condition: Tensor, size: tuple[int, int] | None = None) -> Modulation:
        """The maps for a condition [b, K, h, w]; with `size`, for features of that size: it is interpolated."""
        return make_modulation(condition, size, self.mlp_shared, self.mlp_gamma, self.mlp_beta)

    def forward(self, x: Tensor, condition: Tensor | Modulation, residual: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W], with `residual` added.

        A condition of another size is interpolated; maps that were made before must have the size of `x`.
        Raises `ValueError` for those, and for a batch that the condition's does not divide.
        """
        if not isinstance(condition, Modulation):
            condition = self.modulation(condition, (x.shape[2], x.shape[3]))
        gamma, beta = condition.for_batch(x.shape[0])
        norm = self.param_free_norm
        # under autocast features come in half precision and weights do not; the op takes one dtype
        weight, bias, gamma, beta = (map_.to(x.dtype) for map_ in (norm.weight, norm.bias, gamma, beta))
        residual = None if residual is None else residual.to(x.dtype)
        return group_norm_sft(x, GROUPS, weight, bias, gamma, beta, norm.eps, residual=residual)


class ResBlock(nn.Module):
    """skip(x) + h: two convolutions with the time embedding between them, as all these networks have it."""

    def __init__(self, inputs: int, outputs: int, embedding_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, inputs), nn.SiLU(), conv3(inputs, outputs))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_channels, outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, outputs), nn.SiLU(), nn.Identity(), conv3(outputs, outputs)
        )  # the weights were trained with a dropout of 0 in the third place
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, inputs, H, W], embedding [B, E] -> [B, outputs, H, W]."""
        return self.skip_connection(x) + self.branch(x, embedding)

    def branch(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The way through the convolutions."""
        h: Tensor = self.out_layers(self.in_layers(x) + self.emb_layers(embedding)[..., None, None])
        return h


class SPADEResBlock(ResBlock):
    """skip(x) + SPADE(h): the condition comes last."""

    def __init__(self, inputs: int, outputs: int, embedding_channels: int, condition_channels: int) -> None:
        super().__init__(inputs, outputs, embedding_channels)
        self.spade = SPADE(outputs, condition_channels)

    def forward(  # type: ignore[override]  # it needs the condition too
        self, x: Tensor, embedding: Tensor, condition: Tensor | Modulation
    ) -> Tensor:
        """x [B, inputs, H, W], embedding [B, E] -> [B, outputs, H, W]; for the condition see `SPADE`."""
        return self.spade(self.branch(x, embedding), condition, residual=self.skip_connection(x))


class ZeroSFT(nn.Module):
    """Join a decoder's state d with a skip h and a control map c: s · SFT([d, h + conv(c)]) + (1 − s) · [d, h]."""

    def __init__(self, control_channels: int, skip_channels: int, state_channels: int = 0) -> None:
        super().__init__()
        channels = state_channels + skip_channels
        self.param_free_norm = nn.GroupNorm(GROUPS, channels)
        self.mlp_shared = nn.Sequential(conv3(control_channels, HIDDEN), nn.SiLU())
        self.zero_mul = conv3(HIDDEN, channels)
        self.zero_add = conv3(HIDDEN, channels)
        self.zero_conv = nn.Conv2d(control_channels, skip_channels, 1)
        for layer in (self.zero_mul, self.zero_add, self.zero_conv):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(
        self,
        control: Tensor,  # [B, K, H, W]
        skip: Tensor,  # [B, C2, H, W]
        state: Tensor | None = None,  # [B, C1, H, W]; the middle block has none
        scale: float = 1.0,
    ) -> Tensor:  # [B, C1 + C2, H, W]
        gamma, beta = make_modulation(control, None, self.mlp_shared, self.zero_mul, self.zero_add)
        added = self.zero_conv(control)
        x, x2 = (skip + added, None) if state is None else (state, skip + added)
        norm, mix, residual = self.param_free_norm, None, None
        if scale != 1:  # the op mixes in the skip with the control added; what that is too much goes out again
            before = 0 if state is None else state.shape[1]
            mix, residual = scale, (scale - 1) * F.pad(added, (0, 0, 0, 0, before, 0))
        return group_norm_sft(x, GROUPS, norm.weight, norm.bias, gamma, beta, norm.eps, None, residual, x2, mix)
