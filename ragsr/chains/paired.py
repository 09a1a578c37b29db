"""Both chains in one batch: every pass of the network carries the target and its sources.

It costs what `denoise` costs without a cache, in fewer and larger passes. All pictures of a batch must be of one size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ragsr.chains.host import Condition, Host, Sampler
from ragsr.chains.plan import ChainPlan
from ragsr.chains.source import source_seed
from ragsr.chains.state import ChainState, Record


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
    ) -> None:
        self.host, self.state = host, state
        self.conditions, self.guidance = conditions, guidance
        self.injected = plan.injected(sampler.steps)
        self.samplers = [sampler.fresh() for _ in cleans]
        self.generators = [torch.Generator().manual_seed(source_seed(seed, plan)) for _ in cleans]
        starts = zip(self.samplers, cleans, self.generators, strict=True)
        self.latents = [own.start(clean, generator) for own, clean, generator in starts]

    def predict(
        self,
        seen: Tensor,
        condition: Condition,
        level: Tensor,
        step: int,
        weights: Tensor,  # float32 [R]
        keep: bool = False,
    ) -> tuple[Tensor, list[Record]]:
        """The target's prediction; the sources advance by a step, as long as one is to come that looks at them.

        With `keep` also what each source leaves in an injected step, for further targets; else an empty list.
        """
        if step > self.injected[-1]:
            return self.host.predict([seen], level, [condition], self.guidance)[0], []
        chains = list(zip(self.samplers, self.latents, self.generators, strict=True))
        inputs = [seen, *(own.model_input(latent, step, generator) for own, latent, generator in chains)]
        conditions, records = [condition, *self.conditions], list[Record]()
        if step in self.injected:
            with self.state.paired(weights, keep) as records:
                target, *sources = self.host.predict(inputs, level, conditions, self.guidance)
        else:
            target, *sources = self.host.predict(inputs, level, conditions, self.guidance)
        self.latents = [
            own.advance(prediction, latent, step, generator)
            for prediction, (own, latent, generator) in zip(sources, chains, strict=True)
        ]
        return target, records
