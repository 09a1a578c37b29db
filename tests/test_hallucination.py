"""The hallucination score: recorded numbers of the original, and x̂₀ under the schedulers of diffusers."""

import math

import pytest
import torch
from golden import golden_cases
from torch.testing import assert_close

from ragsr.errors import InputError
from ragsr.pipelines.hallucination import (
    clean_estimate,
    hallucination_map,
    hallucination_score,
    in_window,
    recorded,
)

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("case", golden_cases("hallucination"), ids=str)
def test_golden_scores(case):
    x0, divisor, atol = case.tensors["x0"], case.config["divisor"], case.config["atol_per_output"]
    assert_close(hallucination_map(x0, divisor), case.tensors["hal_map"], rtol=0, atol=atol["hal_map"])
    score = hallucination_score(list(x0), divisor=divisor)
    assert score == pytest.approx(float(case.tensors["score"]), abs=atol["score"])
    running = [hallucination_score(list(x0[:n]), divisor=divisor) for n in range(1, len(x0) + 1)]
    assert running == pytest.approx(case.tensors["running"].tolist(), abs=atol["running"])


def test_the_score_is_the_variance_of_the_steps_in_the_window():
    x0 = torch.randn(10, 1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    assert hallucination_score(list(x0)) == pytest.approx(float(x0.var(0, correction=0).mean()), rel=1e-5)
    late = x0[5:].var(0, correction=0).mean()
    assert hallucination_score(list(x0), (0.5, 1.0)) == pytest.approx(float(late), rel=1e-5)
    assert [len(in_window(range(n), (0.2, 0.7))) for n in (0, 1, 2, 3, 10)] == [0, 1, 1, 1, 5]
    parts = [*in_window(range(7), (0.0, 0.3)), *in_window(range(7), (0.3, 1.0))]
    assert parts == list(range(7))  # every step is in one of two windows that meet


def test_a_score_that_is_not_finite_is_infinite():
    assert hallucination_score([torch.zeros(2), torch.tensor([0.0, math.nan])]) == math.inf


@pytest.mark.parametrize(("signal", "noise"), [(0.8, 0.6), (1.0, 3.7), (0.3, 0.7)], ids=["vp", "ve", "flow"])
def test_clean_estimate_undoes_the_forward_process(signal, noise):
    x0, eps = torch.randn(2, 1, 4, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = signal * x0 + noise * eps
    length = math.hypot(signal, noise)
    answers = {"epsilon": eps, "sample": x0, "flow_prediction": eps - x0}
    answers["v_prediction"] = (signal * eps - noise * x0) / length  # v of x / length, which has unit variance
    for kind, answer in answers.items():
        assert_close(clean_estimate(x, answer, signal, noise, kind), x0.float(), rtol=0, atol=1e-5)


SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "EDMEulerScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "UniPCMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of diffusers
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name, kind):
    """x̂₀ is recorded once per step and is what the scheduler makes of the same answer."""
    options = SCHEDULERS[name]
    scheduler = getattr(diffusers, name)(**options if "FlowMatch" in name else {"prediction_type": kind} | options)
    scheduler.set_timesteps(8)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(2 * scheduler.order)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, 6, 6, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1))
    theirs = []
    with recorded(scheduler) as ours:
        for t in scheduler.timesteps[2 * scheduler.order :]:
            first_half = getattr(scheduler, "state_in_first_order", True)
            answer = torch.randn(x.shape, generator=generator)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)  # some count their steps here
            output = scheduler.step(answer, t, x)
            theirs += [told(scheduler, output, answer, t, x)] if first_half else []
            x = output.prev_sample
    assert "step" not in vars(scheduler)
    assert len(ours) == 6 + (name == "PNDMScheduler")  # which takes its first step twice
    for mine, its in zip(ours, theirs, strict=True):
        assert_close(mine, its.float(), rtol=1e-4, atol=1e-4)


def told(scheduler, output, answer, t, x):
    """x̂₀ by the scheduler's own words, or by what its noise is called in its papers."""
    if "pred_original_sample" in output:
        return output.pred_original_sample
    if hasattr(scheduler, "convert_model_output"):
        scheduler._step_index -= 1  # it has gone on
        clean = scheduler.convert_model_output(answer, sample=x)
        scheduler._step_index += 1
        return clean
    if hasattr(scheduler, "scale_noise"):
        return x - t / 1000 * answer
    alpha, sigma = scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5
    return alpha * x - sigma * answer if scheduler.config.prediction_type[0] == "v" else (x - sigma * answer) / alpha


def test_the_scheduler_is_left_as_it_was_after_an_error():
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(RuntimeError, match="enough"), recorded(scheduler):
        raise RuntimeError("enough")
    assert "step" not in vars(scheduler)


def test_a_scheduler_that_tells_nothing():
    scheduler = diffusers.DDIMScheduler()
    scheduler.register_to_config(prediction_type="riddle")
    scheduler.step = lambda model_output, timestep, sample: (sample,)
    scheduler.set_timesteps(4)
    with pytest.raises(InputError, match="DDIMScheduler does not say"), recorded(scheduler):
        scheduler.step(torch.zeros(1), 3, torch.zeros(1))
