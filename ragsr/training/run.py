"""One training: what learns, its optimiser, its moving average, and where it stands.

Every number a step draws comes from (seed, step, part of the step, process). A run that was stopped goes on where its
last checkpoint stands, and on the CPU ends with the same bits as one that ran through: the checkpoint keeps weights,
average and the moments of Adam as they are.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ragsr.errors import InputError
from ragsr.files import replacing
from ragsr.training.examples import Batch
from ragsr.training.refsr import like, part, read_state

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
    perceptual: float = 0.0  # share of the perceptual distance
    gan: float = 0.0  # share of the adversarial loss
    sampling_steps: int = 10  # when the model is used

    def rate_at(self, step: int) -> float:
        """Up along a line, down along half a cosine."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        progress = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Run:
    """An objective in training: a module that turns a batch and a generator into losses."""

    def __init__(self, settings: Settings, objective: nn.Module, device: torch.device, out: Path) -> None:
        self.settings, self.step, self.out = settings, 0, out
        self.objective = objective.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload] # stubs
        self.learning = {name: x for name, x in objective.named_parameters() if x.requires_grad}
        self.optimiser = torch.optim.AdamW(self.learning.values(), betas=(0.9, 0.99), weight_decay=1e-4)
        self.model, self.rank, self.main = distributed(self.objective, self.optimiser)
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
        tensors = {f"net.{name}": x.detach() for name, x in self.learning.items()}
        tensors |= {f"average.{name}": x for name, x in self.average.items()}
        for name, parameter in self.learning.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimiser.state:
                    tensors[f"adam.{moment}.{name}"] = self.optimiser.state[parameter][moment]
        counts = {name: int(self.optimiser.state[x]["step"]) for name, x in self.learning.items() if self._moved(x)}
        notes = {"step": str(self.step), "settings": json.dumps(asdict(self.settings)), "counts": json.dumps(counts)}
        with replacing(path) as temporary:
            save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, metadata=notes)

    def _moved(self, parameter: Tensor) -> bool:
        return parameter in self.optimiser.state

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of a run with the same settings; `InputError` says which differ."""
        tensors, notes = read_state(path)
        before, now = json.loads(notes["settings"]), asdict(self.settings)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed or "counts" not in notes:
            told = ", ".join(f"{name} {before.get(name)} there and {now[name]} here" for name in changed)
            raise InputError(
                f"{path}: is of another run ({told or 'of another kind'}); give its options or another --out"
            )
        weights, average = part(tensors, "net."), part(tensors, "average.")
        if set(weights) != set(self.learning) or any(weights[n].shape != x.shape for n, x in self.learning.items()):
            raise InputError(f"{path}: has other weights than this model; give the --init it was begun with")
        self._take(weights)
        self.average = {name: like(average[name], x) for name, x in self.learning.items()}
        for name, count in json.loads(notes["counts"]).items():
            parameter = self.learning[name]
            self.optimiser.state[parameter] = {
                "step": torch.tensor(float(count)),
                "exp_avg": like(tensors[f"adam.exp_avg.{name}"], parameter),
                "exp_avg_sq": like(tensors[f"adam.exp_avg_sq.{name}"], parameter),
            }
        self.step = int(notes["step"])


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, 63 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def distributed(objective: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[nn.Module, int, bool]:
    """The objective as it is trained, the number of this process, and whether it is the one that writes.

    Several processes (`accelerate launch -m ragsr train ...`) draw batches of their own and share their gradients.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return objective, 0, True
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError:
        raise InputError('several processes need accelerate: pip install "ragsr[train]"') from None
    on_cpu = next(objective.parameters()).device.type == "cpu"
    partly = DistributedDataParallelKwargs(find_unused_parameters=True)  # a batch may be without references
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[partly])
    accelerator.prepare_optimizer(optimiser)
    return accelerator.prepare_model(objective), accelerator.process_index, accelerator.is_main_process
