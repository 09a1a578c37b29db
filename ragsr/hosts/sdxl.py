"""Stable Diffusion XL, alone or with a ControlNet of the kind "tile": 2567.5 M parameters, 36 decoder self-attentions.

The network is also told a pooled embedding of the prompt and six numbers: the size of the picture before and after
cropping, which are its own, and the corner of the crop, which is 0.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ragsr.chains import Condition, Defaults
from ragsr.errors import InputError
from ragsr.hosts.common import DiffusersHost

NAMES = ("prompt_embeds", "text_embeds")  # [1, L, C] and, pooled, [1, C]


class SDXLHost(DiffusersHost):
    name = "Stable Diffusion XL"

    @property
    def defaults(self) -> Defaults:
        return super().defaults._replace(guidance=5.0)

    def condition(self, picture: Tensor, latent: Tensor, prompt: Any, negative_prompt: Any) -> Condition:
        told = super().condition(picture, latent, prompt, negative_prompt)
        height, width = picture.shape[-2:]
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=self.device, dtype=self.dtype)
        return replace(
            told,
            positive=told.positive | {"time_ids": sizes},
            negative=told.negative | {"time_ids": sizes},
        )

    def embed(self, prompt: Any, negative_prompt: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Prompts are text, or the tensors of `NAMES` by name. Without a negative one the model's own rule holds."""
        positive = self._both(prompt)
        if negative_prompt is None and self.pipe.config.force_zeros_for_empty_prompt:
            return positive, {name: torch.zeros_like(x) for name, x in positive.items()}
        return positive, self._both(negative_prompt)

    def _both(self, prompt: Any) -> dict[str, Tensor]:
        if isinstance(prompt, Mapping) and set(prompt) == set(NAMES):
            return {name: prompt[name].to(self.device, self.dtype) for name in NAMES}
        if not isinstance(prompt, str | None):
            raise InputError(
                f"a prompt for {self.name} is text, or a dictionary of tensors named {' and '.join(NAMES)}"
            )
        if getattr(self.pipe, "text_encoder_2", None) is None:
            raise InputError(f"this model was loaded without text encoders; give {' and '.join(NAMES)} as tensors")
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompt or "", device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": tokens.to(self.dtype), "text_embeds": pooled.to(self.dtype)}
