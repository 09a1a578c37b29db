"""The source chain: one reference's way through a run, and what each step of it leaves for the target.

    denoise    the reference is denoised beside the target, from the first step on, as in the paper
    noised     in each injected step the network sees the clean latent, noised to the level of that step
    fast       noised, and one pass without guidance whose keys and values serve both halves of the target's guidance
    batched    denoise, with the network's passes for both chains in one batch; see `ragsr.pipelines.refir`

    steps        0 ······· first injected ······· last
    denoise      ███████████████████████████████████
    noised                 █████████████████████████
    fast                   ▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄      half a pass each
    cache hit                                             nothing

Where the chain does not go on from a pass, the pass ends at the last layer in which the plan injects.

Source: ReFIR Sec. 3.2. That the chain depends on nothing of the target, and so may be kept, is in its Eq. 1 to 3.
"""

import hashlib
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ragsr.chains.cache import ReferenceCache
from ragsr.chains.host import Condition, Host, Sampler
from ragsr.chains.plan import ChainPlan
from ragsr.chains.state import ChainState, Record

Mode = Literal["denoise", "noised", "fast", "batched"]
MODES = ("denoise", "noised", "fast", "batched")
FORMAT = 1  # of records on disk
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
        injected = plan.layers, plan.layer_weight, plan.gate_source  # says what a record holds
        settings = (FORMAT, host.identity(), injected, mode, self.guidance, sampler.identity, self.seed)
        self.key = digest(settings, [clean, *tensors_of(condition)])
        self._restart()

    def _restart(self) -> None:
        self.sampler = self.sampler.fresh()
        self.generator = torch.Generator().manual_seed(self.seed)
        self.next = 0  # the step whose input the walk holds
        self.latent = self.clean

    def record(self, step: int) -> Record:
        """What the target takes at this step."""
        kept = self.cache.get(self.key, step, self.clean.device)
        if kept is not None:
            return kept
        if self.mode != "denoise":
            generator = torch.Generator().manual_seed(self.seed)  # one noise for all steps
            return self._record(self.sampler.noised(self.clean, step, generator), step)
        seen = self.cache.seen(self.key, step)
        return self._walk_to(step) if seen is None else self._record(seen.to(self.clean.device), step)

    def _walk_to(self, step: int) -> Record:
        """Denoise up to and with this step; what the network sees on the way is kept, so that it need not go again."""
        if step < self.next:
            self._restart()
        if self.next == 0:
            self.latent = self.sampler.start(self.clean, self.generator)
        record = Record()
        while self.next <= step:
            seen = self.sampler.model_input(self.latent, self.next, self.generator)
            if self.plan.injects(self.next, self.sampler.steps):
                self.cache.keep_seen(self.key, self.next, seen)
                with self.state.recording() as record:
                    prediction = self._predict(seen, self.next)
                self.cache.put(self.key, self.next, record)
            else:
                prediction = self._predict(seen, self.next)
            self.latent = self.sampler.advance(prediction, self.latent, self.next, self.generator)
            self.next += 1
        return record

    def _record(self, seen: Tensor, step: int) -> Record:
        """One pass, as far as the record goes."""
        with self.state.recording(whole=False) as record:
            self._predict(seen, step)
        self.cache.put(self.key, step, record)
        return record

    def _predict(self, seen: Tensor, step: int) -> Tensor:
        return self.host.predict([seen], self.sampler.level(step), [self.condition], self.guidance)[0]


def source_seed(seed: int, plan: ChainPlan) -> int:
    """The seed of a source chain's random numbers: the target's, where the plan shares them."""
    return seed if plan.noise == "shared" else (seed + APART) % (1 << 63)


def tensors_of(condition: Condition) -> Iterable[Tensor]:
    for part in (condition.positive, condition.negative, condition.spatial):
        yield from (part[name] for name in sorted(part))


def digest(settings: tuple[Any, ...], tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256(repr(settings).encode())
    for x in tensors:
        found.update(f"{x.dtype}{tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
