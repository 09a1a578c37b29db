"""How much a diffusion model hallucinated: the variance of what it took the clean picture to be, step after step.

At every step a denoising network says, one way or another, what clean x₀ it sees behind the noisy x_t. Where it
changes its mind from step to step, it invents. With x̂₀⁽ⁱ⁾ of the steps in a window, and their mean x̄,

    Hal(x) = 1/|T₂ − T₁| · Σᵢ (x̂₀⁽ⁱ⁾ − x̄)²          (iRAG Eq. 2)

per element of the latent, and the score of a picture is its mean over all elements. The latents are those that the
network sees, scaled as the model's VAE asks. x̂₀ is computed here from x_t, the network's answer and the noise level,
so the score means the same under every scheduler; see `clean_estimate`.

Source: iRAG Sec. 3.1, Eq. 2; S. Aithal et al., "Understanding hallucinations in diffusion models through mode
interpolation", NeurIPS 2024.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ragsr.errors import InputError

Window = tuple[float, float]  # which steps count: from and to, as shares of all steps that are done
WHOLE: Window = (0.0, 1.0)
KINDS = ("epsilon", "v_prediction", "sample", "original_sample", "flow_prediction")


def hallucination_map(
    estimates: Tensor,  # float [steps, ...]
    divisor: int | None = None,
) -> Tensor:  # float32 [...]
    """Eq. 2 per element. `divisor` stands for |T₂ − T₁|; None is the number of steps, which makes it the variance."""
    x = estimates.float()
    return (x - x.mean(0)).square().sum(0) / (divisor or len(x))


def hallucination_score(
    estimates: Sequence[Tensor],  # of every step, in order: float [...]
    window: Window = WHOLE,
    divisor: int | None = None,
) -> float:
    """The mean of `hallucination_map` over the steps `in_window`. 0 for fewer than two; infinite where x̂₀ was not."""
    steps = in_window(estimates, window)
    if len(steps) < 2:
        return 0.0
    score = float(hallucination_map(torch.stack(list(steps)), divisor).mean())
    return score if math.isfinite(score) else math.inf


def in_window(estimates: Sequence[Tensor], window: Window) -> Sequence[Tensor]:
    """Step i of n, from 0, is in a window when its middle is: window[0] ≤ (i + ½) / n < window[1]."""
    start, stop = (max(0, math.ceil(share * len(estimates) - 0.5)) for share in window)
    return estimates[start:stop]


def clean_estimate(
    x: Tensor,  # [B, ...], x_t
    answer: Tensor,  # of x's shape: the network's, after guidance
    signal: float,
    noise: float,
    kind: str,  # one of KINDS
) -> Tensor:  # float32, of x's shape
    """x̂₀ behind x_t = signal · x₀ + noise · ε.

    Variance-preserving schedules have signal = √ᾱ and noise = √(1 − ᾱ); variance-exploding ones 1 and σ, whose
    networks see x / √(1 + σ²), which v refers to; rectified flows 1 − σ and σ, and v = ε − x₀.
    """
    x, answer = x.float(), answer.float()
    if kind == "epsilon":
        return (x - noise * answer) / signal
    if kind == "v_prediction":
        length = math.hypot(signal, noise)
        return (signal * x / length - noise * answer) / length
    if kind == "flow_prediction":
        return (x - noise * answer) / (signal + noise)
    return answer


@contextmanager
def recorded(scheduler: Any) -> Iterator[list[Tensor]]:
    """The x̂₀ of every step that a diffusers scheduler takes inside, as a list that grows: float32 [B, ...].

    The scheduler's `step` is wrapped, and is its own again afterwards, also after an error. The second half of a
    second-order step (Heun) is no step of its own. Errors: `InputError` at the first step of a scheduler that tells
    neither its noise level nor x̂₀.
    """
    estimates: list[Tensor] = []
    its_own = vars(scheduler).get("step")  # mostly the method of its class; somebody else may have wrapped it too
    step: Callable[..., Any] = scheduler.step
    arguments_of = inspect.signature(step).bind

    @functools.wraps(step)  # pipelines look at the parameters
    def recording(*args: Any, **kwargs: Any) -> Any:
        first_half = getattr(scheduler, "state_in_first_order", True)
        given = arguments_of(*args, **kwargs).arguments
        estimate = _estimate(scheduler, given["sample"], given["model_output"], given["timestep"])
        output = step(*args, **kwargs)
        if first_half:
            estimates.append(_told(scheduler, output) if estimate is None else estimate)
        return output

    scheduler.step = recording
    try:
        yield estimates
    finally:
        vars(scheduler).pop("step", None)
        if its_own is not None:
            scheduler.step = its_own


def _estimate(scheduler: Any, x: Tensor, answer: Tensor, timestep: Any) -> Tensor | None:
    """x̂₀ from what is known before the step; None where the scheduler does not say what its network predicts."""
    levels = noise_level(scheduler, timestep, x.device)
    if levels is None:
        return None
    if hasattr(scheduler, "precondition_outputs"):  # EDM: the network's answer is mixed with x by the noise level
        mixed: Tensor = scheduler.precondition_outputs(x.float(), answer.float(), levels[1])
        return mixed
    kind = prediction_kind(scheduler)
    return None if kind is None else clean_estimate(x, answer, *levels, kind)


def noise_level(scheduler: Any, timestep: Any, device: torch.device) -> tuple[float, float] | None:
    """(signal, noise) of x_t at the step that comes next: how the scheduler itself mixes a 1 with noise of 0, and a 0
    with noise of 1. None where it does not do that."""
    t = torch.as_tensor(timestep, device=device).reshape(1)
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
    if hasattr(scheduler, "add_noise"):
        return float(scheduler.add_noise(one, zero, t)), float(scheduler.add_noise(zero, one, t))
    if hasattr(scheduler, "scale_noise"):  # rectified flows
        return float(scheduler.scale_noise(one, t, zero)), float(scheduler.scale_noise(zero, t, one))
    return None


def prediction_kind(scheduler: Any) -> str | None:
    """What the network predicts, one of `KINDS`; None where the scheduler does not say."""
    kind = scheduler.config.get("prediction_type")
    if kind is None and hasattr(scheduler, "scale_noise"):  # there it goes without saying
        return "flow_prediction"
    return kind if kind in KINDS else None


def _told(scheduler: Any, output: Any) -> Tensor:
    """x̂₀ as the scheduler tells it beside x_{t−1}, for those that nothing else is known of."""
    told = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    told = getattr(output, "pred_original_sample", told)
    if not isinstance(told, Tensor):
        raise InputError(
            f"the scheduler {type(scheduler).__name__} does not say how noisy its steps are or what its network "
            "predicts; give the model another scheduler, such as DDIM"
        )
    return told.float()
