"""What every training run shares: the file it goes on from, the course of its rate, and its part among several.

A checkpoint holds `net.*`, `adam.exp_avg.*` and `adam.exp_avg_sq.*`, and as notes the step and the settings.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ragsr.errors import InputError
from ragsr.files import replacing

MOMENTS = ("exp_avg", "exp_avg_sq")
Named = Mapping[str, nn.Parameter]


def share_at(step: int, steps: int, warm_up: int) -> float:
    """Of the highest rate: up along a line, down along half a cosine."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], settings: Any, **notes: Any) -> None:
    """Write it whole or not at all; `notes` are told by `repr`, settings are a dataclass."""
    told = {name: repr(value) for name, value in notes.items()} | {"settings": json.dumps(asdict(settings))}
    with replacing(path) as temporary:
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, temporary, metadata=told)


def read_checkpoint(path: Path, settings: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and notes of a run with these settings; `InputError` says which differ."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InputError(f"{path}: is damaged ({error}); remove it to begin anew") from error
    if not {"step", "settings"} <= set(notes):
        raise InputError(f"{path}: is not the state of a training run; choose another --out")
    before, now = json.loads(notes["settings"]), asdict(settings)
    changed = [name for name in (*now, *(n for n in before if n not in now)) if before.get(name) != now.get(name)]
    if changed:
        told = ", ".join(f"{name} {before.get(name)} there and {now.get(name)} here" for name in changed)
        raise InputError(f"{path}: is of another run ({told}); give its options, or another --out")
    return tensors, notes


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """The values of `x` as `parameter` has its own: dtype, device and layout."""
    return torch.empty_like(parameter).copy_(x)


def moments_of(optimiser: torch.optim.Optimizer, named: Named, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The moments of Adam of what has moved so far, in `dtype`, or as they are."""
    return {
        f"adam.{moment}.{name}": optimiser.state[x][moment].to(dtype or x.dtype)
        for name, x in named.items()
        for moment in MOMENTS
        if x in optimiser.state
    }


def give_moments(optimiser: torch.optim.Optimizer, named: Named, tensors: Mapping[str, Tensor], steps: Any) -> None:
    """Take them from a checkpoint; `steps`: how often all of them moved, or of each name."""
    for name, x in named.items():
        if f"adam.exp_avg.{name}" in tensors:  # what stands still has none
            moved = steps[name] if isinstance(steps, dict) else steps
            kept = {moment: like(tensors[f"adam.{moment}.{name}"], x) for moment in MOMENTS}
            optimiser.state[x] = {"step": torch.tensor(float(moved)), **kept}


def distributed(model: nn.Module, optimiser: torch.optim.Optimizer, **options: Any) -> tuple[nn.Module, int, bool]:
    """The model as it is trained, the number of this process, and whether it is the one that writes.

    Several processes (`accelerate launch -m ragsr train ...`) draw batches of their own and share their gradients;
    `options` are those of PyTorch's DistributedDataParallel.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return model, 0, True
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError:
        raise InputError('several processes need accelerate: pip install "ragsr[train]"') from None
    on_cpu = next(model.parameters()).device.type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[DistributedDataParallelKwargs(**options)])
    accelerator.prepare_optimizer(optimiser)
    return accelerator.prepare_model(model), accelerator.process_index, accelerator.is_main_process
