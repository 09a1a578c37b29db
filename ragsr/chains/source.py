"""The source chain: one reference's way through a run, and what each step of it leaves for the target.

    denoise    the reference is denoised beside the target, from the first step on, as in the paper
    noised     in each injected step the network sees the clean latent, noised to the level of that step
    fast       noised, and one pass without guidance whose keys and values serve both halves of the target's guidance;
               two steps go through it together, a batch as large as the target's
    batched    denoise, with the network's passes for both chains in one batch; see `ragsr.pipelines.refir`

    steps        0 ······· first injected ······· last
    denoise      ███████████████████████████████████
    noised                 █████████████████████████
    fast                   ▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄      half a pass each
    cache hit                                             nothing

Where the chain does not go on from a pass, the pass ends at the last layer in which the plan injects: always, but in
`denoise` before its last step.

Source: ReFIR Sec. 3.2. That the chain depends on nothing of the target, and so may be kept, is in its Eq. 1 to 3.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ragsr.chains.cache import ReferenceCache
from ragsr.chains.host import Condition, Host, Sampler
from ragsr.chains.plan import ChainPlan
from ragsr.chains.state import ChainState, Record

Mode = Literal["denoise", "noised", "fast", "batched"]
MODES = ("denoise", "noised", "fast", "batched")
FORMAT = 2  # of records on disk
APART = 0x5DEECE66D  # between the seeds of chains with independent noise


class SourceChain:
    """Gives the record of each step in which the plan injects, from the cache or by a pass of the network."""

    def __init__(
        self,
        host: Host,
        state: ChainState,
        plan: ChainPlan,
        sampler: Sampler,  # a fresh one
        clean: Tensor,  # [1, C, h, w], the encoded reference
        condition: Condition,
        guidance: float | None,
        seed: int,
        mode: Mode,
        cache: ReferenceCache,
    ) -> None:
        self.host, self.state, self.plan, self.sampler = host, state, plan, sampler
        self.clean, self.condition = clean, condition
        self.guidance = None if mode == "fast" else guidance
        self.mode, self.cache = mode, cache
        self.seed = source_seed(seed, plan)
        self.injected = plan.injected(sampler.steps)
        shares = mode == "fast" and guidance is not None and host.mixes_levels
        self.together = 2 if shares else 1  # steps in one pass
        self.ahead: dict[int, Record] = {}  # by step, what the last pass left besides
        passes = None if self.together == 1 else self.injected  # which steps are in one
        holds = plan.layers, plan.layer_weight, plan.gate_source, passes  # says what a record holds
        settings = (FORMAT, host.identity(), holds, mode, self.guidance, sampler.identity, self.seed)
        self.key = digest(settings, [clean, *tensors_of(condition)])
        self._restart()

    def _restart(self) -> None:
        self.sampler = self.sampler.fresh()
        self.generator = torch.Generator().manual_seed(self.seed)
        self.next = 0  # the step whose input the walk holds
        self.latent = self.clean

    def record(self, step: int) -> Record:
        """What the target takes at this step."""
        if step in self.ahead:
            return self.ahead.pop(step)
        kept = self.cache.get(self.key, step, self.clean.device)
        if kept is not None:
            return kept
        if self.mode != "denoise":
            return self._from_clean(step)
        seen = self.cache.latent(self.key, step)
        return self._walk_to(step) if seen is None else self._record([seen.to(self.clean.device)], step)[0]

    def _from_clean(self, step: int) -> Record:
        """The step's own pass, or the one that it shares: always with the same steps, so that the bits are the same."""
        first = step - (step - self.injected[0]) % self.together
        seen = []
        for i in range(first, min(first + self.together, self.injected[-1] + 1)):
            generator = torch.Generator().manual_seed(self.seed)  # one noise for all steps
            seen.append(self.sampler.noised(self.clean, i, generator))
        self.ahead = dict(enumerate(self._record(seen, first), first))
        return self.ahead.pop(step)

    def _walk_to(self, step: int) -> Record:
        """Denoise up to and with this step; what the network sees on the way is kept, so that it need not go again."""
        if step < self.next:
            self._restart()
        if self.next == 0:
            self.latent = self.sampler.start(self.clean, self.generator)
        record = Record()
        while self.next <= step:
            now, self.next = self.next, self.next + 1
            seen = self.sampler.model_input(self.latent, now, self.generator)
            if now not in self.injected:
                prediction = self._predict([seen], now)
            else:
                self.cache.keep_latent(self.key, seen, now)
                if now == self.injected[-1]:  # the chain need not go on
                    return self._record([seen], now)[0]
                with self.state.recording() as record:
                    prediction = self._predict([seen], now)
                self.cache.put(self.key, now, record)
            self.latent = self.sampler.advance(prediction, self.latent, now, self.generator)
        return record

    def _record(self, seen: list[Tensor], first: int) -> list[Record]:
        """One pass for the steps from `first` on, one for each that is `seen`, as far as their records go."""
        with self.state.recording(whole=False) as record:
            self._predict(seen, first)
        records = [record] if len(seen) == 1 else [record.row(i) for i in range(len(seen))]
        self.cache.put(self.key, first, *records)
        return records

    def _predict(self, seen: list[Tensor], first: int) -> Tensor:
        levels = [self.sampler.level(step) for step in range(first, first + len(seen))]
        level = levels[0] if len(levels) == 1 else torch.stack(levels)
        return self.host.predict(seen, level, [self.condition] * len(seen), self.guidance)[0]


def source_seed(seed: int, plan: ChainPlan) -> int:
    """The seed of a source chain's random numbers: the target's, where the plan shares them."""
    return seed if plan.noise == "shared" else (seed + APART) % (1 << 63)


def tensors_of(condition: Condition) -> Iterable[Tensor]:
    for part in (condition.positive, condition.negative, condition.spatial):
        yield from (part[name] for name in sorted(part))


def encoded_once(
    cache: ReferenceCache,
    host: Host,
    picture: Tensor,  # [1, 3, H, W]
    seed: int,
    encode: Callable[[], Tensor],
) -> Tensor:  # [1, C, h, w]
    """The clean latent of a reference, from the cache if it was encoded before."""
    key = digest((FORMAT, host.identity(), seed), [picture])
    kept = cache.latent(key)
    if kept is not None:
        return kept.to(host.device)
    clean = encode()
    cache.keep_latent(key, clean)
    return clean


def digest(settings: tuple[Any, ...], tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256(repr(settings).encode())
    for x in tensors:
        found.update(f"{x.dtype}{tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
