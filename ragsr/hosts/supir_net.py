"""SUPIR's networks: SDXL's U-Net, steered by a copy of its encoder that sees the low-quality latent.

    z_t ─▶ encoder + middle ─────────────────▶ decoder ─▶ ε        LightGLVUNet
             │ skips, middle                      ▲
             ▼                                    │ ZeroSFT(control, skip, decoder state), before every decoder block
    z_t ─▶ encoder + middle ─▶ 10 control maps ───┘ ZeroCrossAttn(decoder state, control), before every upsampler
    z_lq ─▶ 3×3 ▲                                                  GLVControl

The transformers are those of diffusers, whose parameter names are the published ones; so are all others here. A decoder
block is given the decoder's state first, its residual block the joined state that ZeroSFT gives: there ReFIR listens.

Source: Yu et al., Scaling Up to Excellence: Practicing Model Scaling for Photo-Realistic Image Restoration In the Wild
(SUPIR), CVPR 2024, Sec. 3.1; Podell et al., SDXL, 2023, for the U-Net. Written from these papers and from the names and
shapes of the published weights; for the licence of the originals see `ragsr.hosts.supir`.
"""

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ragsr.hosts.supir_layers import (
    SDXL,
    Block,
    DecoderBlock,
    Downsample,
    Sizes,
    Upsample,
    ZeroCrossAttn,
    mlp,
    transformer,
)
from ragsr.models.sft import GROUPS, ResBlock, ZeroSFT, conv3

PER_LEVEL = 2  # residual blocks of the encoder; the decoder has one more


class Encoder(nn.Module):
    """The way down and the middle, which both networks have."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.config = sizes
        self.time_embed = mlp(sizes.channels, sizes.embedding)
        self.label_emb = nn.Sequential(mlp(sizes.vector, sizes.embedding))
        self.input_blocks = nn.ModuleList([Block([conv3(sizes.latent, sizes.channels)])])
        self.skips = [sizes.channels]  # channels of every input block's result
        before = sizes.channels
        for level, (channels, depth) in enumerate(sizes.levels):
            for _ in range(PER_LEVEL):
                self._add([ResBlock(before, channels, sizes.embedding), *self._attention(channels, depth)], channels)
                before = channels
            if level < len(sizes.levels) - 1:
                self._add([Downsample(channels)], channels)
        channels, depth = sizes.levels[-1]
        ends = (ResBlock(channels, channels, sizes.embedding) for _ in range(2))
        self.middle_block = Block([next(ends), transformer(channels, depth, sizes), next(ends)])

    def _add(self, layers: list[nn.Module], channels: int) -> None:
        self.input_blocks.append(Block(layers))
        self.skips.append(channels)

    def _attention(self, channels: int, depth: int) -> list[nn.Module]:
        return [transformer(channels, depth, self.config)] if depth else []

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def embed(self, timesteps: Tensor, vector: Tensor) -> Tensor:
        """timesteps [B], vector [B, sizes.vector] -> [B, E]"""
        waves = get_timestep_embedding(timesteps, self.config.channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.time_embed(waves.to(vector.dtype)) + self.label_emb(vector)

    def encode(self, x: Tensor, embedding: Tensor, context: Tensor, hint: Tensor | None = None) -> list[Tensor]:
        """The results of all input blocks, then of the middle one."""
        maps: list[Tensor] = []
        for block in self.input_blocks:
            x = block(x, embedding, context)
            if hint is not None and not maps:
                x = x + hint
            maps.append(x)
        return [*maps, self.middle_block(x, embedding, context)]


class GLVControl(Encoder):
    """The copy that sees the low-quality latent; ten maps, from full resolution down, the middle one last."""

    def __init__(self, sizes: Sizes = SDXL) -> None:
        super().__init__(sizes)
        self.input_hint_block = nn.Sequential(conv3(sizes.latent, sizes.channels))
        for parameter in self.input_hint_block.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        low: Tensor,  # latent of the low-quality image [B, 4, h, w]
        timesteps: Tensor,  # [B]
        x: Tensor,  # [B, 4, h, w]
        context: Tensor,  # [B, N, sizes.context]
        vector: Tensor,  # [B, sizes.vector]
    ) -> list[Tensor]:
        return self.encode(x, self.embed(timesteps, vector), context, self.input_hint_block(low))


class LightGLVUNet(Encoder):
    """SDXL's U-Net whose decoder takes in the control maps."""

    def __init__(self, sizes: Sizes = SDXL) -> None:
        super().__init__(sizes)
        self.output_blocks = nn.ModuleList()
        before, skips = sizes.levels[-1][0], list(self.skips)
        joints: list[nn.Module] = [ZeroSFT(before, before)]
        for level, (channels, depth) in reversed(list(enumerate(sizes.levels))):
            for i in range(PER_LEVEL + 1):
                skip = skips.pop()
                joints.append(ZeroSFT(skip, skip, before))
                layers = [ResBlock(before + skip, channels, sizes.embedding), *self._attention(channels, depth)]
                before = channels
                if level and i == PER_LEVEL:
                    joints.append(ZeroCrossAttn(channels, skip))
                    layers.append(Upsample(channels))
                self.output_blocks.append(DecoderBlock(layers))
        self.project_modules = nn.ModuleList(reversed(joints))  # the published order: the last one used comes first
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, sizes.channels), nn.SiLU(), conv3(sizes.channels, sizes.latent))

    def forward(
        self,
        x: Tensor,  # [B, 4, h, w]
        timesteps: Tensor,  # [B]
        context: Tensor,  # [B, N, sizes.context]
        vector: Tensor,  # [B, sizes.vector]
        control: Sequence[Tensor],  # of GLVControl
        scale: float = 1.0,  # how much of the control is used
    ) -> Tensor:  # [B, 4, h, w]
        embedding = self.embed(timesteps, vector)
        *skips, h = self.encode(x, embedding, context)
        *controls, middle = control
        joints = iter(reversed(self.project_modules))
        h = next(joints)(middle, h, scale=scale)
        for block in self.output_blocks:
            skip = skips.pop()
            size = (skips or [skip])[-1].shape[2:]
            h = block(h, skip, controls.pop(), joints, scale, embedding, context, size)
        return self.out(h)
