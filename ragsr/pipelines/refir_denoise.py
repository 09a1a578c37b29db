"""The target chain of one run: from the noised photo to its restored latent, looking at what its sources leave."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ragsr.chains import (
    ChainPlan,
    ChainState,
    Condition,
    Host,
    Mode,
    PairedChains,
    ReferenceCache,
    Sampler,
    SourceChain,
    Sources,
    installed,
)
from ragsr.pipelines.refir_explain import DrawnFrom
from ragsr.pipelines.refir_memory import next_smaller
from ragsr.pipelines.refir_tiles import GateMaps, Place, latent_tiles, predict_in_tiles

StepCallback = Callable[[int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
Predict = Callable[[Tensor, int], Tensor]  # what the network sees, step -> its prediction


@dataclass(frozen=True)
class Run:
    """Settings of one run, checked."""

    plan: ChainPlan
    mode: Mode
    sampler: Sampler  # not yet begun
    guidance: float | None
    seed: int
    tile: int | None  # pixels of a side; None is the whole picture
    callback: StepCallback | None


@dataclass(frozen=True)
class Encoded:
    """A picture as the network is told of it."""

    clean: Tensor  # [1, C, h, w]
    condition: Condition


@dataclass(frozen=True)
class Denoiser:
    """Denoises one photo. Without sources no attention layer is touched."""

    host: Host
    cache: ReferenceCache
    run: Run
    target: Encoded
    sources: Sequence[Encoded]
    weights: Sequence[float]  # strength times share of each source
    gates: GateMaps | None  # listens, if the output is to tell
    drawn: DrawnFrom | None  # the same
    progress: dict[str, Any]  # options of tqdm

    def latent(self) -> Tensor:
        """The restored latent [1, C, h, w]. A run that finds no memory begins again in smaller tiles."""
        try:
            with installed(self.host, self.run.plan) if self.sources else nullcontext() as state:
                return self._walk(self._whole if state is None else self._with_sources(state))
        except torch.OutOfMemoryError:
            tile = None if self.run.mode == "batched" else next_smaller(self.run.tile, self._size())
            if tile is None:
                raise
        warnings.warn(f"the device is out of memory; going on in tiles of {tile} pixels", stacklevel=4)
        gates = None if self.gates is None else self.gates.clear()
        drawn = None if self.drawn is None else self.drawn.clear()
        return replace(self, run=replace(self.run, tile=tile), gates=gates, drawn=drawn).latent()

    def _size(self) -> tuple[int, int]:
        height, width = (side * self.host.latent_stride for side in self.target.clean.shape[-2:])
        return height, width

    def _walk(self, predict: Predict) -> Tensor:
        """Step by step from the noised photo."""
        from tqdm.auto import tqdm

        sampler, generator = self.run.sampler.fresh(), torch.Generator().manual_seed(self.run.seed)
        latent = sampler.start(self.target.clean, generator)
        for step in tqdm(range(sampler.steps), **self.progress):
            seen = sampler.model_input(latent, step, generator)
            latent = sampler.advance(predict(seen, step), latent, step, generator)
            if self.run.callback is not None:
                changed = self.run.callback(step, sampler.level(step), {"latents": latent})
                latent = (changed or {}).get("latents", latent)
        return latent

    def _whole(self, seen: Tensor, step: int) -> Tensor:
        """One pass over the whole target, in tiles where they are asked for."""
        size = seen.shape[-2], seen.shape[-1]
        side = max(size) if self.run.tile is None else self.run.tile // self.host.latent_stride
        level = self.run.sampler.level(step)

        def predict(place: Place) -> Tensor:
            self._look_at(place, size)
            condition = self.target.condition.crop(*place, size)
            return self.host.predict([seen[..., place[0], place[1]]], level, [condition], self.run.guidance)[0]

        return predict_in_tiles(predict, latent_tiles(*size, side), seen)

    def _look_at(self, place: Place, size: tuple[int, int]) -> None:
        if self.gates is not None:
            self.gates.place, self.gates.size = place, size

    def _with_sources(self, state: ChainState) -> Predict:
        """The prediction with references injected, as the mode says."""
        weights = torch.tensor(list(self.weights), device=self.target.clean.device)
        state.on_gate = None if self.gates is None else self.gates.note
        state.on_attention = None if self.drawn is None else self.drawn.note
        return self._beside(state, weights) if self.run.mode == "batched" else self._after(state, weights)

    def _after(self, state: ChainState, weights: Tensor) -> Predict:
        """In each injected step the sources go first, unless the cache knows what they leave."""
        run = self.run
        chains = [
            SourceChain(
                self.host,
                state,
                run.plan,
                run.sampler,
                source.clean,
                source.condition,
                run.guidance,
                run.seed,
                run.mode,
                self.cache,
            )
            for source in self.sources
        ]

        def predict(seen: Tensor, step: int) -> Tensor:
            if not run.plan.injects(step, run.sampler.steps):
                return self._whole(seen, step)
            with state.injecting(Sources.join([chain.record(step) for chain in chains], weights)):
                return self._whole(seen, step)

        return predict

    def _beside(self, state: ChainState, weights: Tensor) -> Predict:
        """All chains go together."""
        run = self.run
        cleans, conditions = [s.clean for s in self.sources], [s.condition for s in self.sources]
        pair = PairedChains(
            self.host, state, run.plan, run.sampler, cleans, conditions, run.guidance, run.seed, weights
        )

        def predict(seen: Tensor, step: int) -> Tensor:
            height, width = seen.shape[-2:]
            self._look_at((slice(0, height), slice(0, width)), (height, width))
            return pair.predict(seen, self.target.condition, run.sampler.level(step), step)

        return predict
