"""The sampler of iRAG's release, for results that shall equal those of its checkpoints. Elsewhere use any other one.

It keeps two lists for n steps, and they disagree: the network is told round(i · 999 / (n − 1)), the update takes ᾱ at
i · (1000 // n). The last update goes from ᾱ_0 to ᾱ_0, so that it changes nothing, and noise of σ ≈ 0.03 stays.

Source: the behaviour of the released code, recorded; J. Song et al., Denoising Diffusion Implicit Models, ICLR 2021,
Eq. 12 with η = 0.
"""

from typing import NamedTuple

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class Step(NamedTuple):
    prev_sample: Tensor
    pred_original_sample: Tensor


class IRAGCompatScheduler(SchedulerMixin, ConfigMixin):
    """DDIM, η = 0, with the mismatched lists of the release. The network predicts noise."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> None:
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64)
        self.alphas_cumprod = (1 - roots**2).cumprod(0).float()
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """The timesteps that the network is told, falling; and ᾱ before and after each step."""
        count, trained = num_inference_steps, self.config.num_train_timesteps
        if not 2 <= count <= trained:
            raise ValueError(f"{count} steps were asked for; this sampler takes 2 to {trained}")
        told = (torch.arange(count, dtype=torch.float64) * (trained - 1) / (count - 1)).round().long()
        here = self.alphas_cumprod[torch.arange(0, trained, trained // count)][:count]
        self.timesteps = told.flip(0).to(device)
        self._alphas = torch.stack((here, torch.cat((here[:1], here[:-1])))).flip(1)  # [2, count]: before, after

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        return sample

    def add_noise(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t · sample + √(1 − ᾱ_t) · noise, for timesteps [B]."""
        alpha = self.alphas_cumprod.to(sample)[timesteps.cpu()].view(-1, *[1] * (sample.ndim - 1))
        return alpha.sqrt() * sample + (1 - alpha).sqrt() * noise

    def step(self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, **_: object) -> Step:
        """One step from `sample` at that timestep, given the predicted noise."""
        i = int((self.timesteps == int(timestep)).nonzero()[0])
        before, after = self._alphas[:, i].to(sample)
        original = (sample - (1 - before).sqrt() * model_output) / before.sqrt()
        return Step(after.sqrt() * original + (1 - after).sqrt() * model_output, original)
