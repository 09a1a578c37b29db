"""ReFIR on SeeSR and SUPIR, tiny and with random weights: the whole pipeline, in every mode."""

from functools import cache

import diffusers
import pytest
import tiny_hosts
import torch
from torch import nn

from ragsr.chains import chain_plan
from ragsr.hosts.seesr import SeeSRHost, SeeSRPrompt
from ragsr.hosts.seesr_net import SeeSRControlNet, SeeSRUNet
from ragsr.hosts.supir import SUPIRHost
from ragsr.hosts.supir_files import SUPIRPipeline
from ragsr.hosts.supir_layers import Sizes
from ragsr.hosts.supir_net import GLVControl, LightGLVUNet
from ragsr.image import tensor_to_image
from ragsr.pipelines.refir import ReFIRPipeline
from ragsr.pipelines.refir_memory import estimate_memory

UNET = {
    "block_out_channels": (8, 8, 16),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
}
UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
SIZES = Sizes(channels=32, multipliers=(1, 2), depths=(0, 1), context=12, vector=6 + 1536, head=32)
SIDES = (64, 128)  # multiples of 64, as SUPIR wants them


def trained(kind, *sizes, **settings):
    """No layer is zero, as some are before training."""
    torch.manual_seed(0)
    network = kind(*sizes, **settings)
    for x in network.parameters():
        if x.count_nonzero() == 0:
            nn.init.normal_(x, std=0.2)
    return network.eval()


@cache
def pipeline(kind):
    if kind == "supir":
        nets = trained(LightGLVUNet, SIZES), trained(GLVControl, SIZES)
        return ReFIRPipeline(SUPIRHost(SUPIRPipeline(*nets, tiny_hosts.vae(), tiny_hosts.vae(), *[None] * 4)))
    hint = {"conditioning_embedding_out_channels": (4, 8, 8)}
    nets = trained(SeeSRUNet, **UNET | UP), trained(SeeSRControlNet, **UNET | hint)
    scheduler = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, steps_offset=1)
    parts = tiny_hosts.vae(), None, None, *nets, scheduler, None, None
    return ReFIRPipeline(SeeSRHost(diffusers.StableDiffusionControlNetPipeline(*parts, requires_safety_checker=False)))


def restore(kind, reference=None, photo=1, **settings):
    text, other = torch.randn(2, 1, 5, 12, generator=torch.Generator().manual_seed(5))
    prompts = {"prompt": SeeSRPrompt(text, torch.ones(1, 145, 512)), "negative_prompt": other}
    if kind == "supir":
        given = {"prompt_embeds": text, "text_embeds": text[:, 0, :6]}
        prompts = {"prompt": given, "negative_prompt": {name: -x for name, x in given.items()}}
    references = [] if reference is None else [tensor_to_image(tiny_hosts.picture(reference, *SIDES))]
    pipe = pipeline(kind)
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 2, "scale": 1, "generator": 7, "output_type": "latent"}
    return pipe(tiny_hosts.picture(photo, *SIDES), references, **prompts | steps | settings)


@pytest.mark.parametrize("kind", ["seesr", "supir"])
def test_a_reference_is_injected_and_leaves_nothing_behind(kind):
    plain = restore(kind).images
    with_reference = restore(kind, 2, return_gates=True)
    first, gates = with_reference.images, with_reference.gates
    assert first.isfinite().all()
    assert (first - plain).abs().max() > 1e-3
    assert {tuple(gate.shape[1:]) for gate in gates.values()} == {tuple(side // 4 for side in SIDES)}
    assert not torch.equal(first, restore(kind, 3).images)
    restore(kind, 3, photo=4)
    assert torch.equal(first, restore(kind, 2).images)  # whatever was restored before
    assert torch.equal(plain, restore(kind, 2, reference_strength=0.0).images)
    picture = restore(kind, 2, output_type="pt").images
    assert picture.shape == (1, 3, *SIDES)
    assert picture.isfinite().all()


@pytest.mark.parametrize("kind", ["seesr", "supir"])
def test_modes_and_tiles(kind):
    denoise = restore(kind, 2).images
    host, plan = pipeline(kind).host, chain_plan(pipeline(kind).host.defaults.plan)
    assert estimate_memory(host, plan, SIDES, [SIDES], 2, None).network > 0
    torch.testing.assert_close(restore(kind, 2, mode="batched").images, denoise, rtol=0, atol=3e-4)
    for settings in ({"mode": "noised"}, {"mode": "fast"}, {"tile": 96}, {"strength": 0.5, "plan": "paper"}):
        other = restore(kind, 2, **settings).images
        assert other.isfinite().all(), settings
        assert (other - denoise).abs().max() > 1e-3, settings
