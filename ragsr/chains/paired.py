"""Both chains in one batch: every pass of the network carries the target and its sources.

It costs what `denoise` costs without a cache, in fewer and larger passes. All pictures must be of one size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ragsr.chains.host import Condition, Host, Sampler
from ragsr.chains.plan import ChainPlan
from ragsr.chains.source import source_seed
from ragsr.chains.state import ChainState


class PairedChains:
    """The source chains of one run, taken along by the target's passes."""

    def __init__(
        self,
        host: Host,
        state: ChainState,
        plan: ChainPlan,
        sampler: Sampler,
        cleans: Sequence[Tensor],  # R encoded references [1, C, h, w]
        conditions: Sequence[Condition],
        guidance: float | None,
        seed: int,
        weights: Tensor,  # float32 [R]
    ) -> None:
        self.host, self.state, self.plan = host, state, plan
        self.conditions, self.guidance, self.weights = conditions, guidance, weights
        self.samplers = [sampler.fresh() for _ in cleans]
        self.generators = [torch.Generator().manual_seed(source_seed(seed, plan)) for _ in cleans]
        starts = zip(self.samplers, cleans, self.generators, strict=True)
        self.latents = [own.start(clean, generator) for own, clean, generator in starts]

    def predict(self, seen: Tensor, condition: Condition, level: Tensor, step: int) -> Tensor:
        """The target's prediction; the sources advance by a step."""
        chains = list(zip(self.samplers, self.latents, self.generators, strict=True))
        inputs = [seen, *(own.model_input(latent, step, generator) for own, latent, generator in chains)]
        conditions = [condition, *self.conditions]
        if self.plan.injects(step, self.samplers[0].steps):
            with self.state.paired(self.weights):
                target, *sources = self.host.predict(inputs, level, conditions, self.guidance)
        else:
            target, *sources = self.host.predict(inputs, level, conditions, self.guidance)
        self.latents = [
            own.advance(prediction, latent, step, generator)
            for prediction, (own, latent, generator) in zip(sources, chains, strict=True)
        ]
        return target
