"""Controllable feature wrapping: an autoencoder whose decoder also sees what its encoder saw of the low-quality image.

A latent at an eighth of the size cannot hold fine detail. Between two levels of the decoder, the features that the
encoder had at the same size are fused in, with a weight w that trades fidelity (1) against the freedom of the diffusion
model (0: the plain decoder):

    out = d + w · fuse([e, d])        d: the decoder's features, e: the encoder's

Modules bear the names of diffusers' `AutoencoderKL`, the fusion layers the published ones.

Source: Wang et al., Exploiting Diffusion Prior for Real-World Image Super-Resolution (StableSR), IJCV 2024, Sec. 3.2;
the dense blocks are those of Wang et al., ESRGAN, ECCVW 2018, Sec. 3.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  # a pipeline that loads looks for ModelMixin here
from torch import Tensor, nn
from torch.nn import functional as F

from ragsr.models.sft import GROUPS, conv3

PUBLISHED = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
LEVELS = (1, 2)  # where features are fused: half and quarter of the image's size
DAMPING = 0.2  # of the residuals in dense blocks
LEAK = 0.2
EPS = 1e-6  # of the autoencoder's group norms


class WrappingAutoencoder(AutoencoderKL):
    """`AutoencoderKL` with fusion layers in its decoder.

    `settings` are those of `AutoencoderKL`, where they differ from the published ones of Stable Diffusion 2.
    """

    def __init__(self, fusion_blocks: int = 2, **settings: Any) -> None:
        super().__init__(**(PUBLISHED | settings))
        self.register_to_config(fusion_blocks=fusion_blocks)
        widths = self.config.block_out_channels
        for level in LEVELS:
            layer = FusionLayer(widths[level], fusion_blocks)
            self.decoder.add_module(f"fusion_layer_{level}", layer)

    @staticmethod
    def _get_init_keys(_: type) -> set[str]:
        """Which settings a saved configuration may hold; diffusers looks at `__init__`, which passes most on."""
        return {"fusion_blocks", *AutoencoderKL._get_init_keys(AutoencoderKL)}

    def encode_with_features(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image [B, 3, H, W] in [-1, 1] -> moments [B, 2 · latent_channels, H/8, W/8] and the features of `LEVELS`."""
        features = []
        x = self.encoder.conv_in(image)
        for level, block in enumerate(self.encoder.down_blocks):
            for layer in block.resnets:
                x = layer(x, None)
            if level in LEVELS:
                features.append(x)
            for sampler in block.downsamplers or ():
                x = sampler(x)
        x = self.encoder.mid_block(x)
        x = self.encoder.conv_out(F.silu(self.encoder.conv_norm_out(x)))
        return self.quant_conv(x), features

    def decode_with_features(self, latent: Tensor, features: Sequence[Tensor], weight: float = 0.5) -> Tensor:
        """Latent [B, latent_channels, h, w], unscaled -> image [B, 3, 8h, 8w]; `weight` is w above."""
        deepest = len(self.decoder.up_blocks) - 1
        x = self.decoder.mid_block(self.decoder.conv_in(self.post_quant_conv(latent)))
        for i, block in enumerate(self.decoder.up_blocks):
            for layer in block.resnets:
                x = layer(x, temb=None)
            level = deepest - i
            if level in LEVELS and weight:
                fusion: FusionLayer = getattr(self.decoder, f"fusion_layer_{level}")
                x = x + weight * fusion(features[LEVELS.index(level)], x)
            for sampler in block.upsamplers or ():
                x = sampler(x)
        image: Tensor = self.decoder.conv_out(F.silu(self.decoder.conv_norm_out(x)))
        return image


class FusionLayer(nn.Module):
    """Features of the encoder and of the decoder, [B, C, H, W] each, to what is added to the latter."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.encode_enc_1 = ResidualBlock(2 * channels, channels)
        self.encode_enc_2 = nn.Sequential(*(DenseTriple(channels) for _ in range(blocks)))
        self.encode_enc_3 = ResidualBlock(channels, channels)

    def forward(self, of_encoder: Tensor, of_decoder: Tensor) -> Tensor:
        x = self.encode_enc_1(torch.cat((of_encoder, of_decoder), dim=1))
        out: Tensor = self.encode_enc_3(self.encode_enc_2(x))
        return out


class ResidualBlock(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, inputs, EPS), conv3(inputs, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, outputs, EPS), conv3(outputs, outputs)
        if inputs != outputs:
            self.conv_out = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_out(x) if hasattr(self, "conv_out") else x)


class DenseTriple(nn.Module):
    """Three dense blocks with a damped residual around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + DAMPING * self.rdb3(self.rdb2(self.rdb1(x)))
        return out


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees all that came before it, with a damped residual around them."""

    def __init__(self, channels: int, growth: int = 32) -> None:
        super().__init__()
        for i in range(4):
            self.add_module(f"conv{i + 1}", conv3(channels + i * growth, growth))
        self.conv5 = conv3(channels + 4 * growth, channels)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for i in range(4):
            convolution: Any = getattr(self, f"conv{i + 1}")
            seen = torch.cat((seen, F.leaky_relu(convolution(seen), LEAK)), dim=1)
        out: Tensor = x + DAMPING * self.conv5(seen)
        return out
