"""The layers of SUPIR's networks: those of SDXL's U-Net under their published names, and one of SUPIR's own.

ZeroCrossAttn  the decoder's state looks at the control map
Block          layers in a row; DecoderBlock: a row whose joints with the control maps are handed in
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ragsr.models.sft import GROUPS, ResBlock, conv3

CROSS_HEAD = 64  # width of a head where the decoder looks at the control map


@dataclass(frozen=True)
class Sizes:
    """The defaults are SDXL's."""

    channels: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4)
    depths: tuple[int, ...] = (0, 2, 10)  # transformer layers per level; the middle has the last level's
    context: int = 2048  # width of a text token
    vector: int = 2816  # pooled text and the sizes of the picture
    head: int = 64
    latent: int = 4

    @property
    def block_out_channels(self) -> tuple[int, ...]:  # what diffusers calls it
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def embedding(self) -> int:
        return 4 * self.channels

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(channels, depth), from full resolution down."""
        return list(zip(self.block_out_channels, self.depths, strict=True))


SDXL = Sizes()


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class ZeroCrossAttn(nn.Module):
    """x + s · attention(GN(x) to GN(control)), over all positions of the two maps."""

    def __init__(self, channels: int, control_channels: int) -> None:
        super().__init__()
        self.attn = Attention(channels, control_channels, heads=channels // CROSS_HEAD, dim_head=CROSS_HEAD)
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.norm2 = nn.GroupNorm(GROUPS, control_channels)

    def forward(self, x: Tensor, control: Tensor, scale: float = 1.0) -> Tensor:
        looked_up = self.attn(positions(self.norm1(x)), encoder_hidden_states=positions(self.norm2(control)))
        return x + scale * looked_up.transpose(1, 2).view_as(x)


def positions(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H·W, C]"""
    return x.flatten(2).transpose(1, 2)


def transformer(channels: int, depth: int, sizes: Sizes) -> Transformer2DModel:
    return Transformer2DModel(
        num_attention_heads=channels // sizes.head,
        attention_head_dim=sizes.head,
        in_channels=channels,
        num_layers=depth,
        cross_attention_dim=sizes.context,
        norm_num_groups=GROUPS,
        use_linear_projection=True,
    )


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs))


class Block(nn.ModuleList):
    """Layers in a row, each given what it takes beside the features."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            x = run(layer, x, embedding, context)
        return x


class DecoderBlock(nn.ModuleList):
    """A residual block, a transformer or none, an upsampler or none; the joints before them are the network's."""

    def forward(
        self,
        h: Tensor,
        skip: Tensor,
        control: Tensor,
        joints: Iterator[nn.Module],  # the next is a ZeroSFT, and before an upsampler a ZeroCrossAttn
        scale: float,
        embedding: Tensor,
        context: Tensor,
        size: Sequence[int],  # of the next skip
    ) -> Tensor:
        h = next(joints)(control, skip, h, scale)
        for layer in self:
            if isinstance(layer, Upsample):
                h = layer(next(joints)(h, control, scale), size)
            else:
                h = run(layer, h, embedding, context)
        return h


def run(layer: nn.Module, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
    match layer:
        case ResBlock():
            return layer(x, embedding)
        case Transformer2DModel():
            return layer(x, encoder_hidden_states=context, return_dict=False)[0]
        case _:
            return layer(x)
