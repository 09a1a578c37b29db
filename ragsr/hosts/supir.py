"""SUPIR, the largest of ReFIR's hosts: SDXL, steered by a copy of its encoder. You bring the weights.

    base     an SDXL in one file      sd_xl_base_1.0_0.9vae.safetensors, hub: stabilityai/stable-diffusion-xl-base-1.0
    supir    SUPIR-v0Q or SUPIR-v0F   by SUPIR's authors, github.com/Fanghua-Yu/SUPIR: control, adapters, second encoder
    config   a folder                 *.json and *.txt of the base's hub page: configurations and tokenizers

**Licence.** SUPIR's authors allow non-commercial use only, and their licence names the architecture beside the weights.
This adapter was written from the paper, from the names and shapes of the weights and from recorded inputs and outputs,
without their code. Nothing of theirs is contained, hosted or downloaded here. Whether and for what you may use their
weights is between you and their licence.

Prompts are text: a caption of the photo, to which words of quality are added. No captioner is needed or loaded.

Published settings: 50 steps, guidance from 4 to 7.5, colours by wavelets from the first stage, which is what the VAE
makes of the clean latent: the photo without its noise. `Steering` names the others. The VAE works in float32
where the rest is float16, in which it would overflow.

Source: Yu et al., Scaling Up to Excellence: Practicing Model Scaling for Photo-Realistic Image Restoration In the Wild,
CVPR 2024.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
from ragsr.hosts.supir_sampler import RestoreEDM, Schedule, guidance_at, linear_in, nearest_level

QUALITY = "sharp, highly detailed photograph, fine natural texture, true colours"
NEGATIVE = "blurry, noisy, low resolution, compression artefacts, smeared, oversharpened, painting"
SIZE = 1024  # what the network is told of the picture's size, whatever it is: so it was trained
SIZES = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # before cropping, corner of the crop, after it
SIZE_CHANNELS = 256  # per number
MULTIPLE = 64


@dataclass(frozen=True)
class Steering:
    """How a run is steered, as published. Raises `InputError` for values that make no sense.

    control_scale   how much of the control is used at the end of a run, and
    control_start   at its beginning; between them it is linear in σ. None: the same
    guidance_start  the guidance at the beginning; at the end it is that of the call
    restore         pulls the estimate to the clean latent by (σ / σ_max)^restore, wholly at first and hardly in the
                    end: the smaller, the nearer to the photo; 0 and below do not pull
    churn           noise that is added before each step, as a share of it: churn / steps, at most 0.41
    churn_noise     times which this noise is drawn
    """

    control_scale: float = 1.0
    control_start: float | None = None
    guidance_start: float = 4.0
    restore: float = -1.0
    churn: float = 5.0
    churn_noise: float = 1.003

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and name != "restore" and value < 0:
                raise InputError(f"{name} is {value}; it must not be negative")

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Steering":
        """Raises `InputError` for a name that is not there."""
        for name in options:
            if name not in STEERING:
                raise InputError(f"SUPIR has no option {name!r}; it has: {', '.join(STEERING)}")
        return cls(**options)

    def control_at(self, sigma: float) -> float:
        first = self.control_scale if self.control_start is None else self.control_start
        return linear_in(sigma, first, self.control_scale)


STEERING = tuple(field.name for field in fields(Steering))


class SUPIRHost(SDXLHost):
    """A pipeline of SUPIR's parts; `load` makes one."""

    name = "SUPIR"
    weights = ("unet", "control", "robust_vae")

    def __init__(self, pipe: Any, steering: Steering | None = None) -> None:
        self.steering = Steering() if steering is None else steering
        super().__init__(pipe, self.steering.control_scale)
        self.multiple = MULTIPLE

    @property
    def mixes_levels(self) -> bool:
        return self.steering.control_start is None  # a batch has one weight of the control

    @property
    def defaults(self) -> Defaults:
        return Defaults(guidance=7.5, plan="released-supir")

    @classmethod
    def load(
        cls,
        supir: str | Path,
        base: str | Path | None,
        config: str | Path | None,
        dtype: torch.dtype = torch.float32,
        **steering: Any,
    ) -> "SUPIRHost":
        """From three paths of your own, see the top of this file; `steering` as in `Steering`.

        Raises `InputError` where a file is missing or damaged, is a pickle that holds code, or has the wrong weights.
        """
        import_diffusers()
        from ragsr.hosts.supir_files import BASE_FROM, CONFIG_FROM, load_pipeline

        if base is None or config is None:
            raise InputError(
                f"{supir}: SUPIR needs SDXL besides: its file as base=, published at {BASE_FROM}, and a folder as "
                f"config=, from {CONFIG_FROM}"
            )
        steered = Steering.of(steering)
        return cls(load_pipeline(Path(supir), Path(base), Path(config), dtype), steered)

    def identity(self) -> str:
        return f"{super().identity()}/{self.steering}"

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

    def colours(self, photo: Tensor, clean: Tensor) -> Tensor:
        return self.decode(clean)

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
        told = self.steering
        return RestoreEDM(Schedule(steps, told.churn, told.churn_noise, told.restore), strength)

    def predict(
        self, inputs: Sequence[Tensor], level: Tensor, conditions: Sequence[Condition], guidance: float | None
    ) -> list[Tensor]:
        """The noise in `inputs`, whose level is [σ̂, σ], or [len(inputs), 2]; the guidance is that of σ = 0."""
        levels = level.reshape(-1, 2).tolist()
        nearest = [nearest_level(churned) for churned, _ in levels]
        timesteps = torch.tensor([timestep for timestep, _ in nearest])
        known = [sigma for _, sigma in nearest] * (len(inputs) // len(nearest))
        scaled = [(x / (1 + sigma**2) ** 0.5).to(self.dtype) for x, sigma in zip(inputs, known, strict=True)]
        churned, sigma = levels[0]
        now = None if guidance is None else guidance_at(churned, guidance, self.steering.guidance_start)
        network = partial(self._steered, timesteps, self.steering.control_at(sigma))
        return predict_in_halves(network, scaled, conditions, now)

    def _steered(
        self, level: Tensor, scale: float, latents: Tensor, told: dict[str, Tensor], spatial: dict[str, Tensor]
    ) -> Tensor:
        timesteps = level.to(latents.device).expand(latents.shape[0])
        control = self.pipe.control(spatial["low"], timesteps, latents, told["context"], told["vector"])
        return self.pipe.unet(latents, timesteps, told["context"], told["vector"], control, scale)


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
