"""The target chain of one run: from the noised photo to its restored latent, looking at what its sources leave."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ragsr.chains import ChainPlan, ChainState, Host, Mode, ReferenceCache, Sampler, installed
from ragsr.pipelines.refir_explain import DrawnFrom
from ragsr.pipelines.refir_memory import next_smaller
from ragsr.pipelines.refir_references import Region, region_of
from ragsr.pipelines.refir_sources import Alone, Encoded, Predictor, SourcesBeside, SourcesFirst, Tile
from ragsr.pipelines.refir_tiles import GateMaps, Place, latent_tiles, predict_in_tiles

StepCallback = Callable[[int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


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
class Denoiser:
    """Denoises one photo. Without sources no attention layer is touched."""

    host: Host
    cache: ReferenceCache
    run: Run
    target: Encoded
    sources: Sequence[Encoded]
    regions: Sequence[Region]  # what the sources count for where; none without sources
    gates: GateMaps | None  # listens, if the output is to tell
    drawn: DrawnFrom | None  # the same
    progress: dict[str, Any]  # options of tqdm

    def latent(self) -> Tensor:
        """The restored latent [1, C, h, w]. A run that finds no memory begins again in smaller tiles."""
        try:
            with installed(self.host, self.run.plan) if self.sources else nullcontext() as state:
                return self._walk(self._predictor(state))
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

    def _predictor(self, state: ChainState | None) -> Predictor:
        run = self.run
        if state is None:
            return Alone(self.host, run.sampler, run.guidance)
        state.on_gate = None if self.gates is None else self.gates.note
        state.on_attention = None if self.drawn is None else self.drawn.note
        shared = self.host, state, run.plan, run.sampler, self.sources, run.guidance, run.seed
        return SourcesBeside(*shared) if run.mode == "batched" else SourcesFirst(*shared, run.mode, self.cache)

    def _walk(self, predictor: Predictor) -> Tensor:
        """Step by step from the noised photo."""
        from tqdm.auto import tqdm

        sampler, generator = self.run.sampler.fresh(), torch.Generator().manual_seed(self.run.seed)
        latent = sampler.start(self.target.clean, generator)
        tiles = self._tiles()
        for step in tqdm(range(sampler.steps), **self.progress):
            seen = sampler.model_input(latent, step, generator)
            predictor.begin(step, tiles)
            prediction = self._predict(predictor, tiles, seen, self.run.plan.injects(step, sampler.steps))
            latent = sampler.advance(prediction, latent, step, generator)
            if self.run.callback is not None:
                changed = self.run.callback(step, sampler.level(step), {"latents": latent})
                latent = (changed or {}).get("latents", latent)
        return latent

    def _tiles(self) -> list[Tile]:
        """The tiles of the target; without tiling there is one."""
        height, width = self.target.clean.shape[-2:]
        side = max(height, width) if self.run.tile is None else self.run.tile // self.host.latent_stride
        return [self._tile(i, place) for i, place in enumerate(latent_tiles(height, width, side))]

    def _tile(self, number: int, place: Place) -> Tile:
        """A tile looks at what its region looks at; in a batch of all chains the first tile has all beside it."""
        if not self.sources:
            return Tile(place, (), torch.zeros(0))
        y, x = ((part.start + part.stop) / 2 * self.host.latent_stride for part in place)
        weights = region_of(self.regions, x, y).weights
        takes_all = number == 0 and self.run.mode == "batched"
        used = tuple(r for r, weight in enumerate(weights) if weight > 0 or takes_all)
        return Tile(place, used, torch.tensor([weights[r] for r in used], device=self.target.clean.device))

    def _predict(self, predictor: Predictor, tiles: Sequence[Tile], seen: Tensor, injects: bool) -> Tensor:
        """The predictions for all tiles, blended."""
        size = seen.shape[-2], seen.shape[-1]

        def predict(number: int) -> Tensor:
            tile = tiles[number]
            for listener in (self.gates, self.drawn):
                if listener is not None and injects:
                    listener.look_at(tile.place, tile.used, tile.weights)
            condition = self.target.condition.crop(*tile.place, size)
            return predictor.predict(number, seen[..., tile.place[0], tile.place[1]], condition)

        return predict_in_tiles(predict, [tile.place for tile in tiles], seen)
