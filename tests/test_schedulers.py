"""Any scheduler of diffusers that follows the noise of the training, and a clear word for the others."""

from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from tiny_stage import pictures, run, tiny_stage  # noqa: E402

from ragsr.errors import InputError  # noqa: E402  # what follows needs diffusers
from ragsr.models.irag_ddim import IRAGCompatScheduler  # noqa: E402
from ragsr.models.sft_unet import SFTUNet  # noqa: E402
from ragsr.pipelines.diffusion import DiffusionStage  # noqa: E402

FITTING = {  # the options are those by which the last step ends without noise
    "DDIM": {},
    "DDPM": {},
    "DPMSolverMultistep": {"algorithm_type": "dpmsolver++"},
    "DPMSolverSinglestep": {},
    "UniPCMultistep": {},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "HeunDiscrete": {},
    "PNDM": {"set_alpha_to_one": True},
    "LCM": {},
}


@pytest.fixture
def stage(tiny):
    """With its own scheduler again after every test."""
    own = tiny.scheduler
    yield tiny
    tiny.scheduler = own


@pytest.fixture(scope="module")
def tiny():
    return tiny_stage()


def made(name, stage, **more):
    return getattr(diffusers, f"{name}Scheduler").from_config(stage.scheduler.config, **more)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("start", ["low", "noise"])
@pytest.mark.parametrize("name", FITTING)
def test_a_perfect_network_leads_to_the_truth(stage, monkeypatch, name, start, steps):
    """Told the timestep and the latent as the network expects it, it finds its noise: one list serves both."""
    if name == "PNDM" and steps == 1:
        pytest.skip("a linear multistep method needs several steps")
    stage.scheduler = made(name, stage, **FITTING[name])
    torch.manual_seed(1)
    truth, alphas = torch.randn(1, 4, 16, 16), tiny_stage_alphas()
    monkeypatch.setattr(DiffusionStage, "encode", lambda *_: truth)
    monkeypatch.setattr(DiffusionStage, "decode", lambda *_: torch.zeros(1, 3, 128, 128))

    def noise_in(self, x, timestep, *_):
        alpha = alphas[int(timestep)]
        return SimpleNamespace(sample=(x - alpha.sqrt() * truth) / (1 - alpha).sqrt())

    monkeypatch.setattr(SFTUNet, "forward", noise_in)
    latents = []
    run(stage, steps=steps, start=start, callback_on_step_end=lambda *a: latents.append(a[3]["latents"]))
    assert (latents[-1] - truth).abs().mean() < 0.01
    assert steps == 1 or (latents[0] - truth).abs().mean() > 0.03  # there was noise


def tiny_stage_alphas():
    return IRAGCompatScheduler().alphas_cumprod


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "EulerAncestralDiscrete", "LCM", None])
def test_the_seed_is_all_that_counts(stage, name):
    stage.scheduler = made(name, stage) if name else IRAGCompatScheduler()
    torch.manual_seed(3)
    first = run(stage)
    torch.manual_seed(4)
    assert torch.equal(first, run(stage))
    assert 0 <= first.min() < first.max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d, own: d.FlowMatchEulerDiscreteScheduler(), "FlowMatchEuler.*does not fit: .* flow matching"),
        (lambda d, own: d.FlowMatchEulerDiscreteScheduler.from_config(own), "does not fit: .* flow matching"),
        (lambda d, own: d.EDMEulerScheduler.from_config(own), "networks of another kind"),
        (lambda d, own: d.RePaintScheduler(**BETAS), "every step of it needs original_image too"),
        (lambda d, own: d.EulerDiscreteScheduler(), r"scaled_linear from 0\.00085 to 0\.012 in 1000 timesteps; take"),
        (lambda d, own: d.DDIMScheduler.from_config(own, num_train_timesteps=500), "its noise is another"),
        (
            lambda d, own: d.DDIMScheduler.from_config(own, prediction_type="sample"),
            "expects the clean latent from the network, which predicts noise",
        ),
    ],
)
def test_a_scheduler_that_does_not_fit(stage, monkeypatch, make, message):
    monkeypatch.setattr(DiffusionStage, "encode", None)  # it is refused before any work
    stage.scheduler = make(diffusers, stage.scheduler.config)
    with pytest.raises(InputError, match=message):
        run(stage)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_steps_that_a_scheduler_cannot_make(stage):
    with pytest.raises(InputError, match="DDIMScheduler cannot make 2000 steps: "):
        run(stage, steps=2000)
    stage.scheduler = made("LCM", stage)
    with pytest.raises(InputError, match="LCMScheduler cannot make 60 steps: "):
        run(stage, steps=60)


def test_what_was_learned_is_saved_with_the_network(tmp_path):
    tiny_stage(predicts="sample").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expects noise from the network, which predicts the clean latent"):
        DiffusionStage.from_pretrained(tmp_path, scheduler=diffusers.DDIMScheduler(**BETAS))
    again = DiffusionStage.from_pretrained(tmp_path)
    again.scheduler = diffusers.EulerDiscreteScheduler.from_config(again.scheduler.config)
    again.set_progress_bar_config(disable=True)
    assert run(again).isfinite().all()
    again.scheduler = diffusers.DDIMScheduler(**BETAS)
    with pytest.raises(InputError, match="does not fit"):
        again(*pictures(64, 128))
    again.remember_schedule()  # as training does that begins with another objective
    assert run(again, pictures(64, 128), steps=1).isfinite().all()
