"""What hosts built from diffusers pipelines share: the auto-encoder, the scheduler's run, the walk over the U-Net."""

import copy
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ragsr.chains import Condition, Defaults, Layer, Sampler
from ragsr.chains.host import predict_in_halves
from ragsr.errors import InputError

Part = Literal["encoder", "middle", "decoder"]
DTYPE_SINCE = 0, 40  # the version of diffusers that renamed torch_dtype; an older one would ignore the new name
SAMPLES = 16  # numbers of each weight that a model is recognised by


class DiffusersHost:
    """A latent diffusion model held by a diffusers pipeline, with or without one ControlNet.

    `control_scale` weighs the ControlNet, whose hint is the photo itself: it is meant for those of the kind "tile".
    """

    name = "diffusers"
    weights: tuple[str, ...] = ("unet", "controlnet", "vae")  # the parts that what is cached of a reference depends on

    def __init__(self, pipe: Any, control_scale: float = 1.0) -> None:
        self.pipe = pipe
        self.control_scale = control_scale
        self.network: nn.Module = pipe.unet
        self.latent_stride = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self.multiple = self.latent_stride
        check_controlnet(self.controlnet)

    @property
    def defaults(self) -> Defaults:
        """With a hint the network may start from noise; without one it must keep some of the photo."""
        return Defaults(guidance=7.5, strength=0.5 if self.controlnet is None else 1.0)

    @property
    def mixes_levels(self) -> bool:
        return True

    def parts(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}

    @property
    def controlnet(self) -> Any:
        return getattr(self.pipe, "controlnet", None)

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device  # where diffusers computes, also when weights wait on the CPU

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.unet.dtype

    def enable_model_cpu_offload(self, device: Any = None) -> None:
        self.pipe.enable_model_cpu_offload(**({} if device is None else {"device": device}))

    def release(self) -> None:
        self.pipe.maybe_free_model_hooks()

    def identity(self) -> str:
        models = [getattr(self.pipe, name, None) for name in self.weights]
        tiled = self.pipe.vae.use_tiling  # a little different at the edges
        return f"{self.name}/{self.control_scale}/{tiled}/{fingerprint([m for m in models if m is not None])}"

    def self_attentions(self, gate_source: str) -> list[Layer]:
        return list(unet_layers(self.pipe.unet, gate_source))

    def encode(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """The mode of the posterior: no random numbers."""
        vae = self.pipe.vae
        with upcast(vae):
            latent = vae.encode(picture.to(self.device, vae.dtype) * 2 - 1).latent_dist.mode()
        return (latent * vae.config.scaling_factor).to(self.dtype)

    def decode(self, latent: Tensor) -> Tensor:
        vae = self.pipe.vae
        with upcast(vae):
            picture = vae.decode((latent.to(vae.dtype)) / vae.config.scaling_factor, return_dict=False)[0]
        return picture.float() / 2 + 0.5

    def colours(self, photo: Tensor, clean: Tensor) -> Tensor:
        return photo

    def condition(self, picture: Tensor, latent: Tensor, prompt: Any, negative_prompt: Any) -> Condition:
        positive, negative = self.embed(prompt, negative_prompt)
        hint = {"hint": picture.to(self.device, self.dtype)} if self.controlnet is not None else {}
        return Condition(positive, negative, hint)

    def embed(self, prompt: Any, negative_prompt: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embeddings of both prompts by the names that the network's call knows them by."""
        return {"prompt_embeds": self._embedded(prompt)}, {"prompt_embeds": self._embedded(negative_prompt)}

    def _embedded(self, prompt: str | Tensor | None) -> Tensor:
        """A prompt, or its embeddings [1, L, C], as embeddings."""
        if isinstance(prompt, Tensor):
            return prompt.to(self.device, self.dtype)
        if getattr(self.pipe, "text_encoder", None) is None:
            raise InputError("this model was loaded without a text encoder; give the prompts as embeddings [1, L, C]")
        return self.pipe.encode_prompt(prompt or "", self.device, 1, False)[0].to(self.dtype)

    def sampler(self, steps: int, strength: float) -> Sampler:
        return DiffusersSampler(self.pipe.scheduler, steps, strength, self.device)

    def predict(
        self, inputs: Sequence[Tensor], level: Tensor, conditions: Sequence[Condition], guidance: float | None
    ) -> list[Tensor]:
        return predict_in_halves(partial(self._network, level), inputs, conditions, guidance)

    def _network(self, level: Tensor, latents: Tensor, told: dict[str, Tensor], spatial: dict[str, Tensor]) -> Tensor:
        told = dict(told)
        given: dict[str, Any] = {"encoder_hidden_states": told.pop("prompt_embeds"), "return_dict": False}
        if told:
            given["added_cond_kwargs"] = told
        if self.controlnet is not None:
            down, mid = self.controlnet(
                latents, level, controlnet_cond=spatial["hint"], conditioning_scale=self.control_scale, **given
            )
            given |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.pipe.unet(latents, level, **given)[0]


def import_diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise InputError('diffusion models need diffusers; install it with pip install "ragsr[diffusion]"') from None
    return diffusers


def dtype_option(dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The type of weights as diffusers' `from_pretrained` and `from_single_file` take it."""
    if dtype is None:
        return {}
    installed = tuple(int(part) for part in import_diffusers().__version__.split(".")[:2])
    return {"dtype" if installed >= DTYPE_SINCE else "torch_dtype": dtype}


def check_controlnet(controlnet: Any) -> None:
    kinds = [kind.__name__ for kind in type(controlnet).__mro__]
    if controlnet is not None and "ControlNetModel" not in kinds:
        raise InputError(
            f"the ControlNet is a {kinds[0]}; one ControlNetModel (of the kind tile) is what this host knows"
        )


# ------------------------------------------------------------------ the U-Net


def unet_layers(unet: Any, gate_source: str) -> Iterator[Layer]:
    """True self-attentions of a `UNet2DConditionModel`: with `only_cross_attention`, attn1 looks at the text."""
    for part, name, block, stride in unet_blocks(unet):
        for j, transformer in enumerate(getattr(block, "attentions", None) or ()):
            tap = (name, block) if gate_source == "block" else (f"{name}.resnets.{j}", block.resnets[j])
            for n, inner in enumerate(getattr(transformer, "transformer_blocks", ())):
                if not inner.only_cross_attention:
                    where = f"{name}.attentions.{j}.transformer_blocks.{n}.attn1"
                    yield Layer(where, inner.attn1, part, stride, *tap)


def unet_blocks(unet: Any) -> Iterator[tuple[Part, str, Any, int]]:
    """Blocks in the order of execution, each with latent pixels per pixel of its features."""
    lowest = len(unet.down_blocks) - 1
    for i, block in enumerate(unet.down_blocks):
        yield "encoder", f"down_blocks.{i}", block, 2**i
    if unet.mid_block is not None:
        yield "middle", "mid_block", unet.mid_block, 2**lowest
    for i, block in enumerate(unet.up_blocks):
        yield "decoder", f"up_blocks.{i}", block, 2 ** (lowest - i)


def fingerprint(models: Sequence[nn.Module]) -> str:
    """A digest of the names, shapes and some of the numbers of all weights."""
    digest = hashlib.sha256()
    for model in models:  # one by one: each may wait on another device
        some = []
        for name, weight in model.named_parameters():
            digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
            some.append(weight.detach().flatten()[:: max(1, weight.numel() // SAMPLES)].float())
        digest.update(torch.cat(some).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


@contextmanager
def upcast(vae: Any) -> Iterator[None]:
    """A float16 auto-encoder whose numbers overflow works in float32 while within."""
    if vae.dtype != torch.float16 or not vae.config.force_upcast:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)


# ------------------------------------------------------------------ the run


class DiffusersSampler:
    """One run of a diffusers scheduler. The scheduler that was handed in is not touched."""

    def __init__(self, scheduler: Any, steps: int, strength: float, device: torch.device) -> None:
        if not hasattr(scheduler, "add_noise"):
            raise InputError(
                f"{type(scheduler).__name__} cannot noise a picture to a step's level, where a restoration begins; "
                "take a scheduler of Stable Diffusion, such as DDIM"
            )
        self._set = copy.deepcopy(scheduler)
        self._set.set_timesteps(steps, device=device)
        order = getattr(self._set, "order", 1)
        kept = min(max(int(steps * strength), 1), steps)  # img2img: the last part of the schedule
        self.timesteps = self._set.timesteps[(steps - kept) * order :]
        self.steps = len(self.timesteps)
        settings = sorted((name, str(value)) for name, value in scheduler.config.items())
        self.identity = f"{type(scheduler).__name__}{settings}{self.timesteps.tolist()}"
        self._begin()

    def _begin(self) -> None:
        self._scheduler = copy.deepcopy(self._set)
        self._draws = "generator" in inspect.signature(self._scheduler.step).parameters

    def fresh(self) -> "DiffusersSampler":
        other = copy.copy(self)
        other._begin()
        return other

    def level(self, step: int) -> Tensor:
        return self.timesteps[step]

    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return self._noise(clean, 0, generator)

    def noised(self, clean: Tensor, step: int, generator: torch.Generator) -> Tensor:
        untouched = copy.deepcopy(self._set)  # schedulers count their calls
        return untouched.scale_model_input(self._noise(clean, step, generator), self.timesteps[step])

    def _noise(self, clean: Tensor, step: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        return copy.deepcopy(self._set).add_noise(clean, noise, self.timesteps[step : step + 1])

    def model_input(self, latent: Tensor, step: int, generator: torch.Generator) -> Tensor:
        return self._scheduler.scale_model_input(latent, self.timesteps[step])

    def advance(self, prediction: Tensor, latent: Tensor, step: int, generator: torch.Generator) -> Tensor:
        draws = {"generator": generator} if self._draws else {}
        return self._scheduler.step(prediction, self.timesteps[step], latent, **draws, return_dict=False)[0]
