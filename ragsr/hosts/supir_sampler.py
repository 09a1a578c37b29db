"""SUPIR's sampler: Euler steps in σ, each after a little fresh noise, with a guidance that follows σ.

    x̂ = x + 1.003 sqrt(σ̂² − σ²) · noise,   σ̂ = 1.1 σ             for the default churn of 5 in 50 steps
    d = x̂ − σ_q ε(x̂ / sqrt(1 + σ_q²), t)                         (σ_q, t): the trained level that is nearest to σ̂
    ε = ε_u + s(σ̂) (ε_c − ε_u)                                   s: 4 at the largest σ, 7.5 at 0
    control counts c(σ)                                          c: linear in σ, as asked for; by default 1
    d = d − (σ / σ_max)^restore · (d − centre)                    if asked for, to stay near the first stage
    x = x̂ + (σ' − σ̂) (x̂ − d) / σ̂

The levels σ are those of Stable Diffusion's thousand timesteps; the network is told the timestep of the *churned* σ̂.

Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, Alg. 2; SUPIR, Sec. 3.3.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

LEVELS = 1000
FIRST_BETA, LAST_BETA = 0.00085, 0.012
SIGMA_MAX = 14.6146
MOST_CHURN = 2**0.5 - 1
RESTORED_UNTIL = 0.05  # the last σ' for which the estimate is drawn to the centre


@cache
def levels() -> Tensor:
    """σ of every timestep, ascending, float32 [1000]."""
    betas = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, LEVELS, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, dim=0)
    return ((1 - signal) / signal).sqrt().float()


def nearest_level(sigma: float) -> tuple[int, float]:
    """The timestep whose σ is nearest, and that σ."""
    timestep = int((levels() - sigma).abs().argmin())
    return timestep, levels()[timestep].item()


def guidance_at(sigma: float, last: float = 7.5, first: float = 4.0) -> float:
    """Linear in σ from `first` at the largest to `last` at 0; a weak `last` is never exceeded."""
    return linear_in(sigma, min(first, last), last)


def linear_in(sigma: float, first: float, last: float) -> float:
    """`first` at the largest σ, `last` at 0."""
    return last + (first - last) * sigma / SIGMA_MAX


@dataclass(frozen=True)
class Schedule:
    """The numbers of a run."""

    steps: int = 50
    churn: float = 5.0
    churn_noise: float = 1.003
    restore: float = -1.0  # exponent of the pull to the centre; 0 and below: none

    @cached_property
    def sigmas(self) -> list[float]:
        """σ of every step, descending, and the 0 after them."""
        timesteps = [(LEVELS - 1) * (self.steps - i) // self.steps for i in range(self.steps)]
        return [*levels()[timesteps].tolist(), 0.0]

    def churned_sigma(self, i: int) -> float:
        return self.sigmas[i] * (1 + min(self.churn / self.steps, MOST_CHURN))

    def churned(self, x: Tensor, i: int, noise: Tensor) -> Tensor:
        """`x` with noise added up to the churned σ."""
        added = (self.churned_sigma(i) ** 2 - self.sigmas[i] ** 2) ** 0.5
        return x + self.churn_noise * added * noise

    def step(self, x: Tensor, predicted: Tensor, i: int, centre: Tensor | None = None) -> Tensor:
        """One Euler step from the churned `x`, given the noise predicted in it and, for `restore`, the centre."""
        sigma, then, churned = self.sigmas[i], self.sigmas[i + 1], self.churned_sigma(i)
        clean = x - nearest_level(churned)[1] * predicted
        if centre is not None and self.restore > 0 and then > RESTORED_UNTIL:
            clean = clean - (sigma / SIGMA_MAX) ** self.restore * (clean - centre)
        return x + (then - churned) / churned * (x - clean)


class RestoreEDM:
    """One run, in float32; a step's level is [σ̂, σ]. The centre is the clean latent that the run starts with."""

    def __init__(self, schedule: Schedule, strength: float = 1.0) -> None:
        self.schedule, self.strength = schedule, strength
        self.steps = min(max(int(schedule.steps * strength), 1), schedule.steps)
        self.identity = f"RestoreEDM{schedule}{self.steps}"
        self._centre: Tensor | None = None
        self._seen: Tensor | None = None  # the churned latent of the step under way

    def fresh(self) -> "RestoreEDM":
        return RestoreEDM(self.schedule, self.strength)

    def level(self, step: int) -> Tensor:
        number = self._number(step)
        return torch.tensor([self.schedule.churned_sigma(number), self.schedule.sigmas[number]])

    def start(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """A whole run starts from noise alone, a part of one from the noised latent."""
        self._centre = clean.float()
        sigma = self.schedule.sigmas[self._number(0)]
        noise = draw(self._centre, generator)
        return noise * (1 + sigma**2) ** 0.5 if self.steps == self.schedule.steps else self._centre + sigma * noise

    def noised(self, clean: Tensor, step: int, generator: torch.Generator) -> Tensor:
        return clean.float() + self.schedule.churned_sigma(self._number(step)) * draw(clean.float(), generator)

    def model_input(self, latent: Tensor, step: int, generator: torch.Generator) -> Tensor:
        self._seen = self.schedule.churned(latent, self._number(step), draw(latent, generator))
        return self._seen

    def advance(self, prediction: Tensor, latent: Tensor, step: int, generator: torch.Generator) -> Tensor:
        assert self._seen is not None, "model_input comes before advance"
        return self.schedule.step(self._seen, prediction, self._number(step), self._centre)

    def _number(self, step: int) -> int:
        return step + self.schedule.steps - self.steps


def draw(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
