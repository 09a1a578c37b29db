"""The second stage of iRAG on a tiny network with random weights: what must hold whatever the weights are."""

import pytest
import torch
from golden import golden_item

diffusers = pytest.importorskip("diffusers")

from tiny_stage import pictures, run, tiny_stage  # noqa: E402

from ragsr.errors import InputError  # noqa: E402  # what follows needs diffusers
from ragsr.models.irag_ddim import IRAGCompatScheduler  # noqa: E402
from ragsr.pipelines import diffusion  # noqa: E402
from ragsr.pipelines.diffusion import DiffusionStage  # noqa: E402


@pytest.fixture(scope="module")
def stage():
    return tiny_stage()


# ------------------------------------------------------------------ recorded original


@pytest.mark.parametrize("name", ["run20", "run20_cfg7", "run50", "run50_cfg7"])
def test_golden_sampler(name):
    case = golden_item("irag_ddim")
    given, settings = case.tensors, case.config["runs"][name]
    scheduler = IRAGCompatScheduler()
    scheduler.set_timesteps(settings["n"])

    def toy(x, t, condition):
        at = float(t) / 1000
        low, reference = given["input.z_lr"], given["input.z_ref"]
        return 0.6 * x + 0.3 * low.tanh() * at - 0.2 * reference.sin() * (1 - at) + condition

    x = scheduler.add_noise(given["input.z_lr"], given["input.noise"], torch.tensor([999, 999]))
    for t in scheduler.timesteps:
        noise = toy(x, t, given["input.cond"])
        if settings["cfg_scale"]:
            pair = torch.cat((toy(x, t, given["input.uncond"]), noise))
            noise = diffusion.guided(pair, settings["cfg_scale"])
        x = scheduler.step(noise, t, x).prev_sample
    torch.testing.assert_close(x, given[f"{name}.final"], rtol=0, atol=case.config["atol"])


@pytest.mark.parametrize("steps", [20, 50, 200, 300])
def test_golden_schedule(steps):
    tables = golden_item("irag_ddim").tensors
    scheduler = IRAGCompatScheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.flip(0).tolist() == tables[f"network_timesteps.{steps}"].tolist()


# ------------------------------------------------------------------ behaviour


def test_callback_may_change_the_latent(stage):
    plain = run(stage, colour="none")
    stopped = run(stage, colour="none", callback_on_step_end=lambda *a: {"latents": torch.zeros_like(a[3]["latents"])})
    assert not torch.equal(plain, stopped)


def test_both_images_count(stage):
    low, guide = pictures()
    plain = run(stage, (low, guide), colour="none", fidelity=0)
    assert not torch.equal(plain, run(stage, (low, 1 - guide), colour="none", fidelity=0))
    assert not torch.equal(plain, run(stage, (1 - low, guide), colour="none", fidelity=0))


def test_fidelity_brings_in_the_photo(stage):
    plain = run(stage, colour="none", fidelity=0)
    assert not torch.equal(plain, run(stage, colour="none", fidelity=1))


def test_photo_alone_conditions_like_stablesr():
    stage = tiny_stage(condition_channels=32)
    low, guide = pictures()
    assert not stage.sees_both
    assert torch.equal(run(stage, (low, guide)), run(stage, (low, 1 - guide)))


def test_blending_keeps_what_all_tiles_agree_on():
    tiles = diffusion.plan_tiles(5, 7, 3, 1)
    x = torch.randn(1, 2, 20, 28)
    assert len(tiles) > 4
    torch.testing.assert_close(diffusion.blended(tiles, 4, lambda part: x[..., *part(4)]), x)


def test_saved_and_loaded(stage, tmp_path):
    stage.save_pretrained(tmp_path)
    again = DiffusionStage.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(again), run(stage), rtol=0, atol=1e-2)


def test_wrong_input_is_refused(stage):
    low, guide = pictures()
    with pytest.raises(InputError, match=r"\[1, 3, 128, 128\] and the intermediate result \[1, 3, 128, 60\]"):
        run(stage, (low, guide[..., :60]))
    with pytest.raises(InputError, match="it is low or noise"):
        run(stage, start="middle")
    with pytest.raises(InputError, match="fidelity is 2"):
        run(stage, fidelity=2)
    with pytest.raises(InputError, match="trained without text"):
        run(stage, prompt="a cat")
    with pytest.raises(InputError, match="48 condition channels and the encoder makes 32"):
        tiny_stage(condition_channels=48)
    with pytest.raises(ValueError, match="takes 2 to 1000"):
        IRAGCompatScheduler().set_timesteps(1)
