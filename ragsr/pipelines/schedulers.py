"""Which schedulers of diffusers a network can be sampled with: any that follows the noise it was trained with.

DDIM, DDPM, DPM-Solver++, UniPC, Euler, Heun, LCM and others share the table ᾱ of a thousand timesteps, and differ in
how they go down it. Schedulers for flow matching, or for noise levels of their own, do not.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ragsr.errors import InputError

PREDICTED = {"epsilon": "noise", "sample": "the clean latent", "v_prediction": "velocity"}
NOISE = {  # what makes ᾱ; the second is assumed where a scheduler has no choice: that of `IRAGCompatScheduler`
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
ADVICE = (
    "take one that follows the noise the network was trained with, as "
    "DPMSolverMultistepScheduler.from_config(stage.scheduler.config) of the scheduler it came with"
)


def schedule_of(scheduler: Any) -> dict[str, Any]:
    """What a network that is trained with this scheduler learns: the noise of each timestep, and what to predict."""
    config = scheduler.config
    chosen = {name: config.get(name, assumed) for name, assumed in NOISE.items()}
    return chosen | {"prediction_type": config.get("prediction_type", "epsilon")}


def check_scheduler(scheduler: Any, schedule: Mapping[str, Any]) -> None:
    """Raise `InputError` where a network with this schedule cannot be sampled with the scheduler."""
    if reason := why_not(scheduler, schedule):
        raise InputError(f"{type(scheduler).__name__} does not fit: {reason}; {ADVICE}")


def why_not(scheduler: Any, schedule: Mapping[str, Any]) -> str | None:
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or not hasattr(scheduler, "add_noise"):
        return "it is made for networks of another kind, such as those of flow matching"
    if more := needed_besides(scheduler):
        return f"every step of it needs {more[0]} too"
    own, predicts = schedule_of(scheduler)["prediction_type"], schedule["prediction_type"]
    if own != predicts:
        return f"it expects {PREDICTED.get(own, own)} from the network, which predicts {PREDICTED[predicts]}"
    trained = DDPMScheduler(**{name: schedule[name] for name in NOISE}).alphas_cumprod
    if alphas.shape != trained.shape or not torch.allclose(alphas.cpu().float(), trained, rtol=0, atol=1e-4):
        return f"its noise is another than that of the training, {schedule['beta_schedule']} " + (
            f"from {schedule['beta_start']} to {schedule['beta_end']} in {schedule['num_train_timesteps']} timesteps"
        )
    return None


def needed_besides(scheduler: Any) -> list[str]:
    """The arguments of `step` without a default, after the network's answer, the timestep and the latent."""
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    return [one.name for one in parameters[3:] if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]


def timesteps_of(scheduler: Any, steps: int, device: torch.device) -> Tensor:
    """The timesteps, falling, of so many steps; raises `InputError` where the scheduler cannot make them."""
    try:
        scheduler.set_timesteps(steps, device=device)
    except ValueError as error:
        raise InputError(f"{type(scheduler).__name__} cannot make {steps} steps: {error}") from None
    timesteps: Tensor = scheduler.timesteps
    return timesteps


def takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
