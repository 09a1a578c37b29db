"""What the references give to the tiles of a step: who runs the sources, and when.

    SourcesFirst     each goes by itself before the first tile that looks at it, unless the cache knows what it leaves
    SourcesBeside    all go in one batch with the first tile (mode "batched"); what they leave serves the others

What a source left is held until the last tile of the step that looks at it, so each is run or fetched once a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from ragsr.chains import (
    ChainPlan,
    ChainState,
    Condition,
    Host,
    Mode,
    PairedChains,
    Record,
    ReferenceCache,
    Sampler,
    SourceChain,
    Sources,
)
from ragsr.pipelines.refir_tiles import Place


@dataclass(frozen=True)
class Encoded:
    """A picture as the network is told of it."""

    clean: Tensor  # [1, C, h, w]
    condition: Condition


class Tile(NamedTuple):
    """A part of the target, and what it looks at."""

    place: Place
    used: tuple[int, ...]  # numbers of the sources
    weights: Tensor  # float32 [len(used)]: strength times share


class Predictor(Protocol):
    """The network's predictions for the tiles of a step, which come in their order."""

    def begin(self, step: int, tiles: Sequence[Tile]) -> None: ...

    def predict(self, number: int, seen: Tensor, condition: Condition) -> Tensor:
        """For tile `number`, of which the network sees `seen` [1, C, h, w]."""
        ...


class Alone:
    """No sources."""

    def __init__(self, host: Host, sampler: Sampler, guidance: float | None) -> None:
        self.host, self.sampler, self.guidance = host, sampler, guidance

    def begin(self, step: int, tiles: Sequence[Tile]) -> None:
        self.level = self.sampler.level(step)

    def predict(self, number: int, seen: Tensor, condition: Condition) -> Tensor:
        return self.host.predict([seen], self.level, [condition], self.guidance)[0]


class SourcesFirst(Alone):
    def __init__(
        self,
        host: Host,
        state: ChainState,
        plan: ChainPlan,
        sampler: Sampler,  # not yet begun
        sources: Sequence[Encoded],
        guidance: float | None,
        seed: int,
        mode: Mode,
        cache: ReferenceCache,
    ) -> None:
        super().__init__(host, sampler, guidance)
        self.state, self.plan = state, plan
        self.chains = [
            SourceChain(host, state, plan, sampler, one.clean, one.condition, guidance, seed, mode, cache)
            for one in sources
        ]

    def begin(self, step: int, tiles: Sequence[Tile]) -> None:
        super().begin(step, tiles)
        self.step, self.tiles = step, tiles
        self.held: dict[int, Record] = {}
        self.joined: tuple[tuple[int, ...], Sources] | None = None  # of the last tile: its neighbour may have the same

    def predict(self, number: int, seen: Tensor, condition: Condition) -> Tensor:
        tile = self.tiles[number]
        if not tile.used or not self.plan.injects(self.step, self.sampler.steps):
            return super().predict(number, seen, condition)
        with self.state.injecting(self._join(number)):
            return super().predict(number, seen, condition)

    def _join(self, number: int) -> Sources:
        tile = self.tiles[number]
        if self.joined is None or self.joined[0] != tile.used:
            self.joined = None  # its memory is needed
            self.joined = tile.used, Sources.join([self._record(r) for r in tile.used], tile.weights)
            wanted = {r for other in self.tiles[number + 1 :] if other.used != tile.used for r in other.used}
            self.held = {r: record for r, record in self.held.items() if r in wanted}
        return replace(self.joined[1], weights=tile.weights)

    def _record(self, source: int) -> Record:
        if source not in self.held:
            self.held[source] = self.chains[source].record(self.step)
        return self.held[source]


class SourcesBeside(Alone):
    """Neither reads nor fills the cache: in a batch of another size the same numbers are rounded differently."""

    def __init__(
        self,
        host: Host,
        state: ChainState,
        plan: ChainPlan,
        sampler: Sampler,  # not yet begun
        sources: Sequence[Encoded],  # of the tiles' size
        guidance: float | None,
        seed: int,
    ) -> None:
        super().__init__(host, sampler, guidance)
        self.state, self.plan = state, plan
        cleans, conditions = [one.clean for one in sources], [one.condition for one in sources]
        self.chains = PairedChains(host, state, plan, sampler, cleans, conditions, guidance, seed)

    def begin(self, step: int, tiles: Sequence[Tile]) -> None:
        super().begin(step, tiles)
        self.step, self.tiles = step, tiles
        self.records: list[Record] = []

    def predict(self, number: int, seen: Tensor, condition: Condition) -> Tensor:
        tile = self.tiles[number]
        if number == 0:  # looks at all, at some with weight 0
            keep = len(self.tiles) > 1
            prediction, self.records = self.chains.predict(seen, condition, self.level, self.step, tile.weights, keep)
            return prediction
        if not tile.used or not self.plan.injects(self.step, self.sampler.steps):
            return super().predict(number, seen, condition)
        with self.state.injecting(Sources.join([self.records[r] for r in tile.used], tile.weights)):
            return super().predict(number, seen, condition)
