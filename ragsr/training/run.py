"""One training: what learns, its optimiser, its moving average, and where it stands.

Every number a step draws comes from (seed, step, part of the step, process). A run that was stopped goes on where its
last checkpoint stands, and on the CPU ends with the same bits as one that ran through: the checkpoint keeps weights,
average and the moments of Adam as they are.
"""

from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ragsr.errors import InputError
from ragsr.files import replacing
from ragsr.training.checkpoint import (
    distributed,
    give_moments,
    like,
    moments_of,
    part,
    read_checkpoint,
    share_at,
    write_checkpoint,
)
from ragsr.training.examples import Batch

CLIP = 1.0  # norm of a gradient
AVERAGE = 0.999  # decay of the moving average, reached as the run goes on
BAD_BATCH = "bad_batch.safetensors"
Draw = Callable[..., Batch]  # of numbers


@dataclass(frozen=True)
class Settings:
    """All that a run depends on beside its photos and what it begins with."""

    stage: str  # autoencoder, diffusion or joint
    steps: int
    size: str = "small"
    batch: int = 8  # crops at a time
    accumulate: int = 1  # times that many for one step
    side: int = 192  # of a crop
    rate: float = 2e-4  # of AdamW at its highest
    warm_up: int = 200  # steps
    seed: int = 0
    precision: str = "fp32"  # or bf16, under autocast
    predicts: str = "x0"  # or noise
    alpha: float = 1.0  # of L_final, in `joint`
    picture: float = 1.0  # share of the picture in L_final; at 0 nothing is decoded
    perceptual: float = 0.0  # share of the perceptual distance
    gan: float = 0.0  # share of the adversarial loss
    sampling_steps: int = 10  # when the model is used
    timesteps: str = "any"  # or own: those of `sampling_steps`, reached by the network's own answers

    def rate_at(self, step: int) -> float:
        return self.rate * share_at(step, self.steps, self.warm_up)


class Run:
    """An objective in training: a module that turns a batch and a generator into losses."""

    def __init__(self, settings: Settings, objective: nn.Module, device: torch.device, out: Path) -> None:
        self.settings, self.step, self.out = settings, 0, out
        self.objective = objective.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload] # stubs
        self.learning = {name: x for name, x in objective.named_parameters() if x.requires_grad}
        self.optimiser = torch.optim.AdamW(self.learning.values(), betas=(0.9, 0.99), weight_decay=1e-4)
        self.model, self.rank, self.main = distributed(
            self.objective, self.optimiser, find_unused_parameters=True
        )  # a batch may be without references
        self.device = next(iter(self.learning.values())).device  # of several processes, each has its own
        self.average = {name: x.detach().clone() for name, x in self.learning.items()}

    def train_step(self, draw: Draw) -> dict[str, float]:
        """One step of AdamW on all parts of a step together: the mean losses."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate_at(self.step)
        self.optimiser.zero_grad()
        count = self.settings.accumulate
        told: dict[str, float] = {}
        for number in range(count):
            for name, value in self._learn_from(draw, number).items():
                told[name] = told.get(name, 0.0) + value / count
        nn.utils.clip_grad_norm_(self.learning.values(), CLIP)
        self.optimiser.step()
        self.step += 1
        self._follow()
        return told

    def _learn_from(self, draw: Draw, number: int) -> dict[str, float]:
        """Add the gradients of one part of the step."""
        batch = {name: x.to(self.device) for name, x in draw(self.step, number, self.rank).items()}
        losses = self.losses(batch, number)
        if not losses["loss"].isfinite():
            raise InputError(self._keep(batch, float(losses["loss"].detach())))
        (losses["loss"] / self.settings.accumulate).backward()
        return {name: float(value.detach()) for name, value in losses.items()}

    def losses(self, batch: Batch, number: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_of(self.settings.seed, self.step, number, self.rank))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            found: dict[str, Tensor] = self.model(batch, generator)
        return found

    def _keep(self, batch: Batch, loss: float) -> str:
        """Write a batch that led nowhere: what to say about it."""
        with replacing(self.out / BAD_BATCH) as temporary:
            save_file({name: x.contiguous() for name, x in batch.items()}, temporary, {"step": str(self.step)})
        return (
            f"the loss is {loss} in step {self.step}; its batch is kept as {self.out / BAD_BATCH}. "
            "Go on from the last checkpoint with a lower --rate or with --precision fp32"
        )

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(AVERAGE, (1 + self.step) / (10 + self.step))
        for name, value in self.learning.items():
            self.average[name].lerp_(value, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, what learns has the weights of the moving average, and gradients are not kept."""
        own = {name: x.detach().clone() for name, x in self.learning.items()}
        with torch.no_grad():
            self._take(self.average)
            try:
                yield
            finally:
                self._take(own)

    @torch.no_grad()
    def _take(self, weights: dict[str, Tensor]) -> None:
        for name, x in self.learning.items():
            x.copy_(weights[name])

    def save(self, path: Path) -> None:
        """Write the checkpoint; nothing half-written is ever seen."""
        tensors: dict[str, Tensor] = {f"net.{name}": x for name, x in self.learning.items()}
        tensors |= {f"average.{name}": x for name, x in self.average.items()}
        tensors |= moments_of(self.optimiser, self.learning)
        moved = {name: x for name, x in self.learning.items() if x in self.optimiser.state}
        counts = {name: int(self.optimiser.state[x]["step"]) for name, x in moved.items()}
        write_checkpoint(path, tensors, self.settings, step=self.step, counts=counts)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of a run with the same settings; `InputError` says which differ."""
        tensors, notes = read_checkpoint(path, self.settings)
        weights, average = part(tensors, "net."), part(tensors, "average.")
        if set(weights) != set(self.learning) or any(weights[n].shape != x.shape for n, x in self.learning.items()):
            raise InputError(f"{path}: has other weights than this model; give the --init it was begun with")
        self._take(weights)
        self.average = {name: like(average[name], x) for name, x in self.learning.items()}
        give_moments(self.optimiser, self.learning, tensors, literal_eval(notes["counts"]))
        self.step = int(notes["step"])


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, 63 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
