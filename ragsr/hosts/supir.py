"""SUPIR, the largest of ReFIR's hosts: SDXL, steered by a copy of its encoder. You bring the weights.

    base     an SDXL in one file      sd_xl_base_1.0_0.9vae.safetensors, hub: stabilityai/stable-diffusion-xl-base-1.0
    supir    SUPIR-v0Q or SUPIR-v0F   by SUPIR's authors, github.com/Fanghua-Yu/SUPIR: control, adapters, second encoder
    config   a folder                 *.json and *.txt of the base's hub page: configurations and tokenizers

**Licence.** SUPIR's authors allow non-commercial use only, and their licence names the architecture beside the weights.
This adapter was written from the paper, from the names and shapes of the weights and from recorded inputs and outputs,
without their code. Nothing of theirs is contained, hosted or downloaded here. Whether and for what you may use their
weights is between you and their licence.

Prompts are text: a caption of the photo, to which words of quality are added. No captioner is needed or loaded.

Published settings: 50 steps, guidance from 4 to 7.5, colours from the first stage by wavelets. The VAE works in float32
where the rest is float16, in which it would overflow.

Source: Yu et al., Scaling Up to Excellence: Practicing Model Scaling for Photo-Realistic Image Restoration In the Wild,
CVPR 2024.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ragsr.chains import Condition, Defaults, Layer
from ragsr.chains.host import predict_in_halves
from ragsr.errors import InputError
from ragsr.hosts.common import Part, import_diffusers, upcast
from ragsr.hosts.sdxl import NAMES, SDXLHost
from ragsr.hosts.supir_sampler import RestoreEDM, Schedule, guidance_at, nearest_level

QUALITY = "sharp, highly detailed photograph, fine natural texture, true colours"
NEGATIVE = "blurry, noisy, low resolution, compression artefacts, smeared, oversharpened, painting"
SIZE = 1024  # what the network is told of the picture's size, whatever it is: so it was trained
SIZES = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # before cropping, corner of the crop, after it
SIZE_CHANNELS = 256  # per number
MULTIPLE = 64


class SUPIRHost(SDXLHost):
    """A pipeline of SUPIR's parts; `load` makes one. `restore` above 0 keeps the result near the first stage."""

    name = "SUPIR"
    weights = ("unet", "control")

    def __init__(self, pipe: Any, control_scale: float = 1.0, restore: float = -1.0) -> None:
        super().__init__(pipe, control_scale)
        self.multiple = MULTIPLE
        self.restore = restore

    @property
    def defaults(self) -> Defaults:
        return Defaults(guidance=7.5, plan="released-supir")

    @classmethod
    def load(
        cls,
        supir: str | Path,
        base: str | Path | None,
        config: str | Path | None,
        torch_dtype: torch.dtype = torch.float32,
    ) -> "SUPIRHost":
        """From three paths of your own, see the top of this file.

        Raises `InputError` where a file is missing or damaged, is a pickle that holds code, or has the wrong weights.
        """
        import_diffusers()
        from ragsr.hosts.supir_files import BASE_FROM, CONFIG_FROM, load_pipeline

        if base is None or config is None:
            raise InputError(
                f"{supir}: SUPIR needs SDXL besides: its file as base=, published at {BASE_FROM}, and a folder as "
                f"config=, from {CONFIG_FROM}"
            )
        return cls(load_pipeline(Path(supir), Path(base), Path(config), torch_dtype))

    def self_attentions(self, gate_source: str) -> list[Layer]:
        return [
            Layer(where, attention, part, stride, *tap)
            for part, name, block, stride in network_blocks(self.network)
            for where, attention, tap in block_layers(name, block, gate_source)
        ]

    def encode(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """By the encoder that is robust to degradation; the mode of the posterior, so no random numbers."""
        vae = self.pipe.robust_vae
        vae.use_tiling = self.pipe.vae.use_tiling  # who asks for tiles means both
        with upcast(vae):
            latent = vae.encode(picture.to(self.device, vae.dtype) * 2 - 1).latent_dist.mode()
        return (latent * vae.config.scaling_factor).to(self.dtype)

    def condition(self, picture: Tensor, latent: Tensor, prompt: Any, negative_prompt: Any) -> Condition:
        """`prompt` is a caption, to which words of quality are added, or a dictionary of tensors as for SDXL."""
        caption = prompt if isinstance(prompt, Mapping) else ", ".join(filter(None, (prompt, QUALITY)))
        negative = NEGATIVE if negative_prompt is None else negative_prompt
        return Condition(self._told(caption), self._told(negative), {"low": latent.to(self.device, self.dtype)})

    def _told(self, prompt: Any) -> dict[str, Tensor]:
        embedded = self._both(prompt)
        context, pooled = (embedded[name] for name in NAMES)
        return {"context": context, "vector": torch.cat((pooled, size_vector(self.device).to(self.dtype)), dim=1)}

    def sampler(self, steps: int, strength: float) -> RestoreEDM:
        return RestoreEDM(Schedule(steps, restore=self.restore), strength)

    def predict(
        self, inputs: Sequence[Tensor], level: Tensor, conditions: Sequence[Condition], guidance: float | None
    ) -> list[Tensor]:
        """The noise in `inputs`, whose level is σ; the guidance is that of σ = 0."""
        timestep, sigma = nearest_level(float(level))
        scaled = [(x / (1 + sigma**2) ** 0.5).to(self.dtype) for x in inputs]
        now = None if guidance is None else guidance_at(float(level), guidance)
        return predict_in_halves(partial(self._network, torch.tensor(timestep)), scaled, conditions, now)

    def _network(self, level: Tensor, latents: Tensor, told: dict[str, Tensor], spatial: dict[str, Tensor]) -> Tensor:
        timesteps = level.to(latents.device).expand(latents.shape[0])
        control = self.pipe.control(spatial["low"], timesteps, latents, told["context"], told["vector"])
        return self.pipe.unet(latents, timesteps, told["context"], told["vector"], control, self.control_scale)


def network_blocks(network: Any) -> Iterator[tuple[Part, str, Any, int]]:
    """Blocks in the order of execution, each with latent pixels per pixel of its features."""
    stride = 1
    for i, block in enumerate(network.input_blocks):
        stride *= 2 if hasattr(block[-1], "op") else 1
        yield "encoder", f"input_blocks.{i}", block, stride
    yield "middle", "middle_block", network.middle_block, stride
    for i, block in enumerate(network.output_blocks):
        yield "decoder", f"output_blocks.{i}", block, stride
        stride //= 2 if hasattr(block[-1], "conv") else 1


def block_layers(name: str, block: Any, gate_source: str) -> Iterator[tuple[str, Any, tuple[str, nn.Module]]]:
    """Path, self-attention and tap of the transformer of a block, which comes after its first residual block."""
    tap = (name, block) if gate_source == "block" else (f"{name}.0", block[0])
    for k, layer in enumerate(block):
        for n, inner in enumerate(getattr(layer, "transformer_blocks", ())):
            yield f"{name}.{k}.transformer_blocks.{n}.attn1", inner.attn1, tap


def size_vector(device: torch.device) -> Tensor:
    """[1, 1536]: 256 sines and cosines for each of the six numbers."""
    from diffusers.models.embeddings import get_timestep_embedding

    numbers = torch.tensor(SIZES, device=device)
    return get_timestep_embedding(numbers, SIZE_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0).view(1, -1)
