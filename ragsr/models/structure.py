"""The time-aware encoder: from latents to the feature maps that the SFT layers of a U-Net take as their condition.

Half a U-Net. It sees the latent of the low-quality image, and in iRAG also that of the intermediate reference result,
and the timestep: early steps need structure from its maps, late ones detail. One map per level of the U-Net, finest
first; with two latents the same weights run on both, and their maps are joined in channels, the low-quality one first.

Modules bear the names of the published weights.

Source: iRAG, Sec. 3.3.1, Eq. 4; Wang et al., Exploiting Diffusion Prior for Real-World Image Super-Resolution
(StableSR), IJCV 2024, Sec. 3.1.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from ragsr.models.sft import GROUPS, ResBlock, conv3

LONGEST = 10_000.0  # wavelength of the slowest sinusoid, in steps


class StructureEncoder(ModelMixin, ConfigMixin):
    """Latents and a timestep to feature maps. The defaults are the published sizes."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        channels: int = 256,
        out_channels: int = 256,
        channel_mult: tuple[int, ...] = (1, 1, 2, 2),
        layers_per_block: int = 2,
        heads: int = 4,
        attention_levels: int = 3,  # the finest levels, which have attention
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        embedded = 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, embedded), nn.SiLU(), nn.Linear(embedded, embedded))
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv3(in_channels, channels)])])
        width = channels
        for level, wanted in enumerate(widths):
            if level:
                self.input_blocks.append(nn.ModuleList([Halve(width)]))
            for _ in range(layers_per_block):
                block = nn.ModuleList([ResBlock(width, wanted, embedded)])
                if level < attention_levels:
                    block.append(AttentionBlock(wanted, heads))
                self.input_blocks.append(block)
                width = wanted
        self.middle_block = nn.ModuleList(
            [ResBlock(width, width, embedded), AttentionBlock(width, heads), ResBlock(width, width, embedded)]
        )
        self.fea_tran = nn.ModuleList([ResBlock(width, out_channels, embedded) for width in widths])

    def forward(
        self,
        latents: Tensor | Sequence[Tensor],  # [B, in_channels, h, w], each
        timesteps: Tensor,  # [B] or []
    ) -> list[Tensor]:  # per level [B, out_channels · latents, h / 2^level, w / 2^level]
        """The maps of every level, finest first; those of several latents are joined in channels, in their order.

        h and w must be multiples of 2^(levels - 1); `ValueError` otherwise.
        """
        each = [latents] if isinstance(latents, Tensor) else list(latents)
        batch = each[0].shape[0]
        maps = self._encode(torch.cat(each), timesteps.expand(batch).repeat(len(each)))
        return [torch.cat(one.split(batch), dim=1) for one in maps]

    def _encode(self, x: Tensor, timesteps: Tensor) -> list[Tensor]:
        step = 2 ** (len(self.config.channel_mult) - 1)
        if x.shape[2] % step or x.shape[3] % step:
            raise ValueError(
                f"latents are {x.shape[2]} x {x.shape[3]}; both sides must be multiples of {step}: pad the image to "
                "multiples of 64 pixels"
            )
        embedding = self.time_embed(sinusoids(timesteps, self.config.channels).to(x.dtype))
        maps = []
        for block in self.input_blocks:
            layers = list(block.children())
            if isinstance(layers[0], Halve):
                maps.append(x)
            x = run(layers, x, embedding)
        maps.append(run(self.middle_block.children(), x, embedding))
        return [layer(one, embedding) for layer, one in zip(self.fea_tran, maps, strict=True)]


def run(layers: Iterable[nn.Module], x: Tensor, embedding: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
    return x


def sinusoids(timesteps: Tensor, size: int) -> Tensor:
    """Timesteps [B] as float32 [B, size]: cosines, then sines, of geometrically falling frequencies."""
    half = size // 2
    frequencies = torch.exp(-math.log(LONGEST) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a map; `qkv` holds q, k and v of one head after another."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        tokens = self.qkv(self.norm(x).flatten(2))  # [B, 3C, N]
        q, k, v = tokens.unflatten(1, (self.heads, 3, -1)).transpose(-1, -2).unbind(2)  # [B, heads, N, C / heads]
        out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        return x + self.proj_out(out).view_as(x)


class Halve(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out
