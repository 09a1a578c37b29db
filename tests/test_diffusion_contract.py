"""What `DiffusionStage` promises besides its result: cost of a step, seams, precision, offloading, callbacks."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_stage import generator, pictures, run, tiny_stage

from ragsr.errors import InputError  # what follows needs diffusers
from ragsr.models import sft
from ragsr.models.sft_unet import SFTResnetBlock, SFTUNet
from ragsr.models.structure import StructureEncoder
from ragsr.pipelines import diffusion
from ragsr.tiling import Span, plan_tiles


class Text(torch.nn.Module):
    """Of every token a vector of its number."""

    device = torch.device("cpu")

    def forward(self, tokens):
        return (tokens[..., None] / 10 + torch.zeros(8),)


def spelled(prompts, **_):
    """The first three letters of each prompt."""
    return SimpleNamespace(input_ids=torch.tensor([list(map(ord, f"{one:3}"[:3])) for one in prompts]))


@pytest.fixture(scope="module")
def stage():
    return tiny_stage()


# ------------------------------------------------------------------ what a step costs


def test_the_condition_is_made_once_a_step_for_both_halves_of_guidance(monkeypatch):
    stage, calls = tiny_stage(text_encoder=Text(), tokenizer=spelled), {"structure": [], "maps": [], "unet": []}
    encode, make, denoise = StructureEncoder._encode, sft.make_modulation, SFTUNet.forward
    monkeypatch.setattr(
        StructureEncoder, "_encode", lambda self, x, t: calls["structure"].append(len(x)) or encode(self, x, t)
    )
    monkeypatch.setattr(sft, "make_modulation", lambda c, *a: calls["maps"].append(len(c)) or make(c, *a))
    monkeypatch.setattr(SFTUNet, "forward", lambda self, x, *a: calls["unet"].append(len(x)) or denoise(self, x, *a))
    guided = run(stage, prompt="cat", guidance_scale=3.0, steps=3)
    blocks = sum(isinstance(one, SFTResnetBlock) for one in stage.unet.modules())
    assert calls == {"structure": [2] * 3, "maps": [1] * 3 * blocks, "unet": [2] * 3}  # 2: photo and intermediate
    assert not torch.equal(guided, run(stage, prompt="cat", steps=3))
    assert not torch.equal(guided, run(stage, prompt="cat", negative_prompt="dog", guidance_scale=3.0, steps=3))


# ------------------------------------------------------------------ tiles


@pytest.mark.parametrize("length", [9, 15, 16, 22, 33, 64])
def test_the_weights_of_tiles_add_up_to_one(length):
    tiles = plan_tiles(1, length, diffusion.TILE, diffusion.SHARED)
    ones = diffusion.blended(tiles, 8, lambda part: torch.ones(1, 1, 8, 8 * length)[..., *part(8)])
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-5)


def test_no_seam_is_visible(stage, monkeypatch):
    """Tiles see other statistics than the whole. The difference is small and goes from tile to tile without an edge:
    its steps from column to column are nowhere in the overlap larger than elsewhere; where tiles were cut hard, they
    are.
    """
    given = pictures(64, 448)
    whole = run(stage, given, colour="none")
    monkeypatch.setattr(diffusion, "TILE", 4)
    monkeypatch.setattr(diffusion, "SHARED", 1)
    overlap, weights = slice(192, 256), Span.weights
    faded = run(stage, given, colour="none") - whole
    monkeypatch.setattr(Span, "weights", lambda self, scale: (weights(self, scale) > 0.5).float())
    cut = run(stage, given, colour="none") - whole

    def edge(difference):
        steps = difference.diff(dim=-1).abs().mean(dim=(0, 1, 2))
        return steps[overlap].max() / torch.cat((steps[: overlap.start - 1], steps[overlap.stop :])).max()

    assert 0 < faded[..., overlap].abs().mean() < 0.05
    assert edge(faded) < 1 < edge(cut)


def test_any_size(stage):
    assert run(stage, pictures(70, 33)).shape == (1, 3, 70, 33)
    assert run(stage, pictures(65, 1), steps=1).shape == (1, 3, 65, 1)


# ------------------------------------------------------------------ precision and memory

HALVES = [  # an autoencoder that overflows in fp16 may stay in fp32; on the CPU its convolutions are slow there, too
    (torch.float16, torch.float32, 0.005),
    (torch.bfloat16, torch.bfloat16, 0.02),
]


@pytest.mark.parametrize(("dtype", "of_vae", "tolerance"), HALVES)
def test_half_precision_gives_nearly_the_same(stage, dtype, of_vae, tolerance):
    half = tiny_stage().to(dtype)
    half.vae.to(of_vae)
    wanted, other = (run(stage, colour="none", generator=generator(seed)) for seed in (0, 1))
    found = run(half, colour="none")
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().mean() < tolerance
    assert (other - wanted).abs().mean() > 5 * tolerance  # so the noise was the same


def test_offloading_changes_nothing():
    """On the CPU nothing moves, but every hook is called: what is not called through one stays on the device."""
    stage = tiny_stage()
    wanted = run(stage)
    stage.enable_model_cpu_offload(device="cpu")
    assert hasattr(stage.unet, "_hf_hook")
    assert not hasattr(stage.vae, "_hf_hook")  # its encoder and decoder are called by themselves
    assert not hasattr(stage.structure, "_hf_hook")  # it would come and go in every step
    for _ in range(2):
        assert torch.equal(run(stage), wanted)
    with pytest.raises(InputError, match="use enable_model_cpu_offload"):
        stage.enable_sequential_cpu_offload()


# ------------------------------------------------------------------ callbacks and progress


def test_a_callback_sees_every_step_and_the_progress_is_shown(stage, capsys):
    seen = []
    stage.set_progress_bar_config(disable=False)
    try:
        run(stage, steps=3, callback_on_step_end=lambda pipe, i, t, got: seen.append((pipe is stage, i, int(t), *got)))
    finally:
        stage.set_progress_bar_config(disable=True)
    assert [(own, i, name) for own, i, _, name in seen] == [(True, i, "latents") for i in range(3)]
    assert [t for _, _, t, _ in seen] == stage.scheduler.timesteps.tolist()
    assert "3/3" in capsys.readouterr().err
