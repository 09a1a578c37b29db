"""What the chains need of a restoration model, which is then called their host.

    photo ──▶ encode ──▶ start ──▶ [ model_input ──▶ predict ──▶ advance ] × steps ──▶ decode ──▶ picture
               Host      Sampler       Sampler        Host       Sampler                Host

A host is one network with its auto-encoder; it holds no state of a run. A sampler is one run's way through the noise
levels and may hold state, so every chain has its own, from `Host.sampler` or `Sampler.fresh`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Layer(NamedTuple):
    """One self-attention of the network, a diffusers `Attention`, and where the features of its gate are found."""

    name: str  # the module's path in the network
    attention: Any
    part: Literal["encoder", "middle", "decoder"]
    stride: int  # latent pixels per token, along a side
    tap_name: str  # layers with one tap share one gate
    tap: nn.Module  # its first argument, a tensor [B, C, H, W], is what the gate compares


class Defaults(NamedTuple):
    """How a host is meant to be run."""

    steps: int = 50
    guidance: float = 5.0
    strength: float = 1.0  # the share of the noise levels that is run
    colour: str = "wavelet"  # see `ragsr.colour`
    plan: str = "paper"  # see `ragsr.chains.plan`
    prompt: str = ""
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Condition:
    """What the network is told about one picture besides its latent. Names are the host's own.

    positive, negative  one tensor [1, ...] per name for each half of the guidance: embeddings of the prompt, ...
    spatial             tensors [1, C, k·h, k·w], k whole, that lie over the latent [1, C', h, w], for both halves
    """

    positive: dict[str, Tensor]
    negative: dict[str, Tensor] = field(default_factory=dict)
    spatial: dict[str, Tensor] = field(default_factory=dict)

    def crop(self, rows: slice, columns: slice, latent_size: tuple[int, int]) -> "Condition":
        """The condition of a part of the picture, in pixels of the latent."""
        return replace(self, spatial={n: crop(x, rows, columns, latent_size) for n, x in self.spatial.items()})


def crop(x: Tensor, rows: slice, columns: slice, latent_size: tuple[int, int]) -> Tensor:
    down, across = x.shape[-2] // latent_size[0], x.shape[-1] // latent_size[1]
    return x[..., rows.start * down : rows.stop * down, columns.start * across : columns.stop * across]


class Sampler(Protocol):
    """Goes through the noise levels of one run, step 0 first. Random numbers come from the generator alone."""

    steps: int
    identity: str  # its kind and settings: part of the key of what is cached

    def fresh(self) -> "Sampler":
        """The same run, not yet begun."""
        ...

    def level(self, step: int) -> Tensor:
        """The step's noise level in the form `Host.predict` takes it: a timestep or a sigma."""
        ...

    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """The latent to begin with: [1, C, h, w]."""
        ...

    def noised(self, clean: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """What the network would see at this step if the run ended in `clean`."""
        ...

    def model_input(self, latent: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """What the network sees at this step: the latent, scaled or churned."""
        ...

    def advance(self, prediction: Tensor, latent: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """The latent of the next step."""
        ...


class Host(Protocol):
    """A restoration model that references can be injected into."""

    name: str  # the class of hosts, for messages
    multiple: int  # both sides of a picture must be multiples of it
    latent_stride: int  # pixels of a picture per pixel of its latent
    network: nn.Module

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        ...

    @property
    def defaults(self) -> Defaults: ...

    @property
    def mixes_levels(self) -> bool:
        """Whether inputs of several noise levels can go through the network in one batch."""
        ...

    def parts(self) -> dict[str, nn.Module]:
        """Everything with weights, by name; the network among it."""
        ...

    def enable_model_cpu_offload(self, device: Any = None) -> None:
        """Parts wait on the CPU and visit the GPU one at a time."""
        ...

    def release(self) -> None:
        """After a run: parts that are to wait on the CPU go back there."""
        ...

    def identity(self) -> str:
        """Which model this is, weights included: part of the key of what is cached."""
        ...

    def self_attentions(self, gate_source: str) -> list[Layer]:
        """All true self-attentions in the order of execution; `gate_source` is "block" or "resnet"."""
        ...

    def encode(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """[1, 3, H, W] in [0, 1] -> the clean latent [1, C, h, w]."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """[1, C, h, w] -> [1, 3, H, W], float32, about [0, 1]."""
        ...

    def colours(self, photo: Tensor, clean: Tensor) -> Tensor:
        """The picture [1, 3, H, W] whose colours the result is given: the photo, or what its clean latent shows."""
        ...

    def condition(self, picture: Tensor, latent: Tensor, prompt: Any, negative_prompt: Any) -> Condition:
        """What the network is told about this picture, [1, 3, H, W] in [0, 1], with its clean latent."""
        ...

    def sampler(self, steps: int, strength: float) -> Sampler:
        """`steps` noise levels; of these the last share `strength` is run, from the noised clean latent."""
        ...

    def predict(
        self, inputs: Sequence[Tensor], level: Tensor, conditions: Sequence[Condition], guidance: float | None
    ) -> list[Tensor]:
        """One pass of the network over pictures of one size, with classifier-free guidance, in one batch.

        The batch is ordered [first_u, second_u, ..., first_c, second_c, ...]; `guidance` None leaves the
        unconditional half out. `predict_in_halves` does the batching. `level` is that of all inputs; without guidance
        it may also be one for each, stacked, if the host `mixes_levels`.
        """
        ...


Half = Callable[[Tensor, dict[str, Tensor], dict[str, Tensor]], Tensor]


def predict_in_halves(
    network: Half,  # (latents [B, C, h, w], embeddings, spatial), each in the batch's order -> prediction [B, C, h, w]
    inputs: Sequence[Tensor],
    conditions: Sequence[Condition],
    guidance: float | None,
) -> list[Tensor]:
    """Guided predictions of pictures of one size: unconditional half first, out = u + guidance · (c − u)."""
    halves = [[c.positive for c in conditions]]
    if guidance is not None:
        halves.insert(0, [c.negative for c in conditions])
    told = stack([half for each in halves for half in each])
    spatial = stack([c.spatial for _ in halves for c in conditions])
    out = network(torch.cat([*inputs] * len(halves)), told, spatial)
    if guidance is not None:
        without, conditional = out.chunk(2)
        out = without + guidance * (conditional - without)
    return list(out.split(1))


def stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
