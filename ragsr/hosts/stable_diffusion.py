"""Stable Diffusion 1.5 and 2, alone or with a ControlNet of the kind "tile", and the x4 upscaler.

    host             U-Net                   decoder self-attentions   head dim
    SD 1.5           859.5 M parameters      9                         40, 80, 160
    SD 2             865.9 M                 9                         64
    x4 upscaler      473.4 M                 3, all at the lowest      128

Any pipeline with these parts serves: text to image, img2img, ControlNet.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ragsr.chains import Condition, Defaults
from ragsr.errors import InputError
from ragsr.hosts.common import DiffusersHost

LOW_SEED = 0  # the noise on the upscaler's low-quality picture is part of the condition, the same in every run


class StableDiffusionHost(DiffusersHost):
    name = "Stable Diffusion"


class UpscalerHost(DiffusersHost):
    """`StableDiffusionUpscalePipeline`: beside the latent the network sees the low-quality picture, as small."""

    name = "Stable Diffusion x4 upscaler"

    def __init__(self, pipe: Any, noise_level: int = 20) -> None:
        super().__init__(pipe)
        most = pipe.config.max_noise_level
        if not 0 <= noise_level <= most:
            raise InputError(f"noise_level is {noise_level}; this upscaler knows 0 to {most}")
        self.noise_level = noise_level

    @property
    def defaults(self) -> Defaults:
        return Defaults(guidance=9.0)

    def identity(self) -> str:
        return f"{super().identity()}/{self.noise_level}"

    def condition(self, picture: Tensor, latent: Tensor, prompt: Any, negative_prompt: Any) -> Condition:
        low = F.interpolate(picture.float(), latent.shape[-2:], mode="bicubic", antialias=True) * 2 - 1
        noise = torch.randn(low.shape, generator=torch.Generator().manual_seed(LOW_SEED)).to(low)
        level = torch.tensor([self.noise_level], device=low.device)
        noisy = self.pipe.low_res_scheduler.add_noise(low, noise, level).to(self.device, self.dtype)
        return replace(super().condition(picture, latent, prompt, negative_prompt), spatial={"low": noisy})

    def _network(self, level: Tensor, latents: Tensor, told: dict[str, Tensor], spatial: dict[str, Tensor]) -> Tensor:
        seen = torch.cat((latents, spatial["low"]), dim=1)
        noise_level = torch.full((seen.shape[0],), self.noise_level, dtype=torch.long, device=seen.device)
        return self.pipe.unet(
            seen,
            level,
            encoder_hidden_states=told["prompt_embeds"],
            class_labels=noise_level,
            return_dict=False,
        )[0]
