"""A small fast autoencoder: pictures to latents at an eighth of the size, and back, by plain 3x3 convolutions.

The family of TAESD (O. B. Bohan), in the form of its newest members: no normalisation but in the blocks at the coarsest
level, whose input is first added to what a wider branch with group norms makes of it. Layers bear the names of its
published files, so that `taef2_encoder.pth` and `taef2_decoder.pth` load as they are.

To a pipeline it looks like `AutoencoderKL`: pictures in [-1, 1], a distribution that is a point.
"""

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from ragsr.errors import InputError
from ragsr.models.loading import load_into, load_weights
from ragsr.models.sft import conv3

GROUPS = 4  # of the norms
WIDER = 4  # times the width inside the branch
LEVELS = 3  # halvings
LIMIT = 3.0  # latents are bent to stay within


class TinyAutoencoder(ModelMixin, ConfigMixin):
    """The defaults are the published sizes of TAEF2."""

    @register_to_config
    def __init__(
        self, latent_channels: int = 32, width: int = 64, blocks: int = 3, scaling_factor: float = 1.0
    ) -> None:
        super().__init__()
        encoder: list[nn.Module] = [conv3(3, width), Block(width)]
        decoder: list[nn.Module] = [Bend(), conv3(latent_channels, width), nn.ReLU()]
        for level in range(LEVELS):
            coarsest = level == LEVELS - 1
            encoder += [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)]
            encoder += [Block(width, coarsest) for _ in range(blocks)]
            decoder += [Block(width, level == 0) for _ in range(blocks)]
            decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.encoder = nn.Sequential(*encoder, conv3(width, latent_channels))
        self.decoder = nn.Sequential(*decoder, Block(width), conv3(width, 3))

    def encode(self, image: Tensor) -> AutoencoderKLOutput:
        """[B, 3, H, W] in [-1, 1] -> the latent [B, latent_channels, H/8, W/8]; its distribution has no spread."""
        latent = self.encoder((image + 1) / 2)
        return AutoencoderKLOutput(
            latent_dist=DiagonalGaussianDistribution(torch.cat((latent, latent), dim=1), deterministic=True)
        )

    def decode(self, latent: Tensor) -> DecoderOutput:
        """[B, latent_channels, h, w] -> [B, 3, 8h, 8w], in [-1, 1] where the latent is one of a picture."""
        return DecoderOutput(sample=2 * self.decoder(latent) - 1)


class Block(nn.Module):
    """Three convolutions beside an identity; `pooled`: with the wider branch before them."""

    def __init__(self, width: int, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv3(width, width), nn.ReLU(), conv3(width, width), nn.ReLU(), conv3(width, width))
        self.pool: nn.Sequential | None = None
        if pooled:
            inner = WIDER * width
            self.pool = nn.Sequential(
                nn.Conv2d(width, inner, 1, bias=False),
                nn.GroupNorm(GROUPS, inner),
                nn.ReLU(),
                nn.Conv2d(inner, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class Bend(nn.Module):
    """Latents beyond `LIMIT` are bent back; what is near 0 stays."""

    def forward(self, latent: Tensor) -> Tensor:
        return LIMIT * torch.tanh(latent / LIMIT)


def load_published(folder: Path) -> TinyAutoencoder:
    """Of a folder with one file *_encoder.pth and one *_decoder.pth (or .safetensors), as they are published.

    Raises `InputError` for anything else.
    """
    weights: dict[str, Tensor] = {}
    for half in ("encoder", "decoder"):
        files = sorted(path for path in folder.glob(f"*_{half}.*") if path.suffix in (".pth", ".safetensors"))
        if len(files) != 1:
            raise InputError(
                f"{folder}: holds {len(files)} files *_{half}.pth or .safetensors; name a folder with one encoder and "
                "one decoder, such as taef2_encoder.pth and taef2_decoder.pth"
            )
        weights |= {f"{half}.{name}": x for name, x in load_weights(files[0]).items()}
    last = weights.get("encoder.14.bias")
    made = TinyAutoencoder(latent_channels=32 if last is None else len(last))
    load_into(made, weights, str(folder))
    return made
