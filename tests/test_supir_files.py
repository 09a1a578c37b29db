"""SUPIR from its published single files, made tiny: all arrives where it belongs, or one sentence says why not."""

import json
import math
import re

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ragsr.colour import low_frequencies
from ragsr.errors import InputError
from ragsr.hosts import load_host
from ragsr.hosts.supir import QUALITY, Steering, SUPIRHost, size_vector
from ragsr.hosts.supir_files import ENCODER, load_pipeline
from ragsr.hosts.supir_layers import Sizes
from ragsr.hosts.supir_net import GLVControl, LightGLVUNet
from ragsr.image import tensor_to_image
from ragsr.pipelines import refir
from ragsr.pipelines import refir_inputs as inputs
from ragsr.pipelines.refir import ReFIRPipeline

TEXT = (8, 12)  # widths of the two text encoders, the second's also that of the pooled text
TINY = Sizes(channels=32, multipliers=(1, 2), depths=(0, 1), context=sum(TEXT), vector=TEXT[1] + 1536, head=32)


# ------------------------------------------------------------------ the published files


DECODER = (
    (r"^decoder\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"decoder.up.{1 - int(m[1])}.block.{m[2]}."),
    (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"decoder.up.{1 - int(m[1])}.upsample."),
    (r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"conv_norm_out", "norm_out"),
)  # names in diffusers -> names in the published file, of an auto-encoder with two levels
OPEN_CLIP = (
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
    (r"self_attn", "attn"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding.weight", "positional_embedding"),
    (r"^text_projection.weight", "text_projection"),
)


def renamed(weights, rules, prefix):
    found = {}
    for name, x in weights.items():
        for old, new in rules:
            name = re.sub(old, new, name)
        found[prefix + name] = x[..., None, None] if "attn_1" in name and x.ndim == 2 else x
    return found


def open_clip(model):
    """The weights of a text encoder as OpenCLIP has them: q, k and v in one, the projection turned."""
    weights = {n: x.T if n == "text_projection.weight" else x for n, x in model.state_dict().items()}
    joined = {}
    for name in [n for n in weights if ".q_proj." in n]:
        parts = [weights.pop(name.replace(".q_", f".{letter}_")) for letter in "qkv"]
        joined[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return renamed(weights | joined, OPEN_CLIP, "conditioner.embedders.1.model.")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(SUPIR's file, SDXL's file, folder of configurations), tiny, and the models that are in them."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    unet, control = LightGLVUNet(TINY), GLVControl(TINY)
    for x in (*unet.project_modules.parameters(), *control.input_hint_block.parameters()):
        nn.init.normal_(x, std=0.1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.13025,
    )
    sizes = {"vocab_size": 9, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    texts = [
        kind(CLIPTextConfig(hidden_size=width, projection_dim=width, **sizes, **ends))
        for kind, width in zip((CLIPTextModel, CLIPTextModelWithProjection), TEXT, strict=True)
    ]
    config = root / "config"
    save_configurations(config, vae, texts)
    clip = {f"text_model.{n.removeprefix('text_model.')}": x for n, x in texts[0].state_dict().items()}
    in_unet = {f"model.diffusion_model.{n}": x for n, x in unet.state_dict().items()}
    base = {n: x for n, x in in_unet.items() if "project_modules" not in n}
    base |= renamed(vae.state_dict(), DECODER, "first_stage_model.")
    base |= {f"conditioner.embedders.0.transformer.{n}": x for n, x in clip.items()} | open_clip(texts[1])
    own = {n: x for n, x in in_unet.items() if "project_modules" in n}
    own |= {f"model.control_model.{n}": x for n, x in control.state_dict().items()}
    own |= renamed(vae.encoder.state_dict(), DECODER, ENCODER)  # the base's own encoder in the place of the robust one
    for name, weights in (("supir", own), ("base", base)):
        save_file({n: x.contiguous().clone() for n, x in weights.items()}, root / f"{name}.safetensors")
    return (root / "supir.safetensors", root / "base.safetensors", config), (unet, control, vae, texts)


def save_configurations(folder, vae, texts):
    for name, model in (("vae", vae), ("text_encoder", texts[0]), ("text_encoder_2", texts[1])):
        (folder / name).mkdir(parents=True)
        model.save_config(folder / name) if name == "vae" else model.config.save_pretrained(folder / name)
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcde"), "a", "b"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(folder / name)
    diffusers.EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    of_transformers = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer", "CLIPTokenizer")
    parts = dict(zip(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), of_transformers, strict=True))
    index = {name: ["transformers", kind] for name, kind in parts.items()}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", "EulerDiscreteScheduler"], "_class_name": "StableDiffusionXLPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": True}))


@pytest.fixture(scope="module")
def host(published):
    return SUPIRHost(load_pipeline(*published[0], torch.float32, TINY))


@torch.no_grad()
def test_loads_the_published_files(host, published):
    unet, control, vae, texts = published[1]
    for found, kept in (
        (host.pipe.unet, unet),
        (host.pipe.control, control),
        (host.pipe.vae, vae),
        (host.pipe.text_encoder, texts[0]),
        (host.pipe.text_encoder_2, texts[1]),
    ):
        torch.testing.assert_close(dict(found.state_dict()), dict(kept.state_dict()))
    picture = torch.rand(1, 3, 64, 64)
    wanted = vae.encode(2 * picture - 1).latent_dist.mode() * 0.13025
    torch.testing.assert_close(host.encode(picture, torch.Generator()), wanted)  # through the published names
    host.pipe.vae.enable_tiling()
    host.encode(picture, torch.Generator())
    assert host.pipe.robust_vae.use_tiling
    host.pipe.vae.disable_tiling()
    torch.testing.assert_close(host.encode(picture, torch.Generator()), wanted)
    assert set(host.parts()) == {"unet", "control", "vae", "robust_vae", "text_encoder", "text_encoder_2"}


def test_told(host, monkeypatch):
    asked = []
    both = SUPIRHost._both
    monkeypatch.setattr(SUPIRHost, "_both", lambda self, prompt: asked.append(prompt) or both(self, prompt))
    latent = torch.rand(1, 4, 32, 32)
    with torch.no_grad():
        told = host.condition(torch.rand(1, 3, 64, 64), latent, "a b", None)
    assert asked[0] == f"a b, {QUALITY}"
    assert "blurry" in asked[1]
    assert told.positive["context"].shape == (1, 77, TINY.context)
    assert told.positive["vector"].shape == (1, TINY.vector)
    assert torch.equal(told.spatial["low"], latent)
    sizes = size_vector(torch.device("cpu")).view(6, 256)
    assert torch.equal(sizes[2], torch.cat((torch.ones(128), torch.zeros(128))))  # 0: cosines first
    frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    torch.testing.assert_close(sizes[0, :128], torch.cos(1024 * frequency), rtol=0, atol=1e-4)


@torch.no_grad()
def test_predict_is_guided_as_sigma_says(host):
    torch.manual_seed(0)
    low, x = torch.rand(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    given = [torch.randn(1, 5, TINY.context), torch.randn(1, TEXT[1])]
    prompts = [dict(zip(("prompt_embeds", "text_embeds"), (s * y for y in given), strict=True)) for s in (1, -1)]
    told = host.condition(torch.rand(1, 3, 16, 16), low, *prompts)
    level = torch.tensor([8.0, 8.0 / 1.1])
    flipped = type(told)(told.negative, told.positive, told.spatial)
    (conditional,), (without,) = (host.predict([x], level, [c], None) for c in (told, flipped))
    scale = 7.5 - 3.5 * 8.0 / 14.6146
    (guided,) = host.predict([x], level, [told], 7.5)
    torch.testing.assert_close(guided, without + scale * (conditional - without), rtol=1e-4, atol=1e-4)
    both = host.predict([x, x], torch.stack((level, level / 4)), [told, told], None)  # a level for each
    torch.testing.assert_close(both[0], conditional, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1], host.predict([x], level / 4, [told], None)[0], rtol=1e-4, atol=1e-4)
    (weak,) = host.predict([x], level, [told], 2.0)  # less than 4 is never exceeded
    torch.testing.assert_close(weak, without + 2 * (conditional - without), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restores(published, dtype):
    """From text to a picture, with a reference; in bfloat16 the latent stays in float32 on its way."""
    pipe, latents = ReFIRPipeline(SUPIRHost(load_pipeline(*published[0], dtype, TINY))), []
    pipe.set_progress_bar_config(disable=True)
    photo, reference = torch.rand(1, 3, 40, 64), tensor_to_image(torch.rand(1, 3, 64, 64))
    restored = pipe(
        photo,
        reference,
        prompt="a b",
        num_inference_steps=2,
        scale=1,
        output_type="pt",
        callback_on_step_end=lambda pipe, step, level, state: latents.append(state["latents"]),
    ).images
    assert restored.shape == photo.shape
    assert restored.isfinite().all()
    assert [x.dtype for x in latents] == [torch.float32] * 2


def test_colours_are_those_of_the_first_stage(host, monkeypatch):
    """By wavelets from what the VAE makes of the clean latent, not from the photo, which may have noise."""
    pipe, styles = ReFIRPipeline(host), []
    pipe.set_progress_bar_config(disable=True)
    match = refir.match_colour
    monkeypatch.setattr(refir, "match_colour", lambda *given: styles.append(given) or match(*given))
    photo = torch.rand(1, 3, 40, 64)
    restored = pipe(photo, prompt="a", num_inference_steps=1, scale=1, output_type="pt").images
    ((content, style, method),) = styles
    assert method == "wavelet"
    with torch.no_grad():
        clean = host.encode(inputs.fit(photo, host), torch.Generator())
        first_stage = host.decode(clean)[..., :40, :64]
    assert torch.equal(style, first_stage)
    assert not torch.allclose(style, photo, atol=0.1)
    assert torch.equal(restored, (content + low_frequencies(first_stage - content)).clamp(0, 1))


@torch.no_grad()
def test_steering(published, host):
    (paths, _), names = published, "control_scale, control_start, guidance_start, restore, churn, churn_noise"
    told = {"control_scale": 0.8, "control_start": 0.1, "guidance_start": 3.0}
    steered = SUPIRHost(load_pipeline(*paths, torch.float32, TINY), Steering.of(told))
    scales = []
    steered.network.register_forward_pre_hook(lambda module, given: scales.append(given[-1]))
    condition = host.condition(torch.rand(1, 3, 16, 16), torch.rand(1, 4, 8, 8), "a", None)
    sampler, x = steered.sampler(10, 1.0), torch.randn(1, 4, 8, 8)
    for step in (0, 5, 9):
        steered.predict([x], sampler.level(step), [condition], 7.5)
        sigma = sampler.schedule.sigmas[step]
        assert scales.pop() == pytest.approx((sigma / 14.6146) * (0.1 - 0.8) + 0.8)  # as recorded in supir_edm
    assert Steering().control_at(3.0) == 1.0
    assert host.mixes_levels
    assert not steered.mixes_levels  # so `fast` gives each step a pass of its own
    assert steered.identity() != host.identity()
    run = SUPIRHost(host.pipe, Steering(restore=4.0, churn=2.0, churn_noise=1.0)).sampler(10, 1.0).schedule
    assert (run.restore, run.churn, run.churn_noise) == (4.0, 2.0, 1.0)
    with pytest.raises(InputError, match=f"SUPIR has no option 'pull'; it has: {names}"):
        load_host(paths[0], base=paths[1], config=paths[2], pull=3)
    with pytest.raises(InputError, match="churn is -1"):
        Steering(churn=-1)
    with pytest.raises(InputError, match="restore is an option of SUPIR, which this is not"):
        load_host(paths[1], restore=4)


# ------------------------------------------------------------------ what cannot be loaded


def test_missing_files_are_named(published, tmp_path):
    supir, base, config = published[0]
    for paths, name in (
        ((tmp_path / "SUPIR-v0Q.ckpt", base, config), "SUPIR-v0Q.ckpt is missing; .*Fanghua-Yu/SUPIR"),
        ((supir, tmp_path / "xl.safetensors", config), "xl.safetensors is missing; .*stable-diffusion-xl-base-1.0"),
        ((supir, base, tmp_path), "model_index.json is missing; .*without the weights"),
    ):
        with pytest.raises(InputError, match=name):
            SUPIRHost.load(*paths)
    with pytest.raises(InputError, match="SUPIR needs SDXL besides: its file as base="):
        load_host(supir, base=base)
    with pytest.raises(InputError, match="this is SUPIR's file; name SDXL's file as base="):
        load_host(supir)


def test_wrong_files_are_refused(published, tmp_path):
    supir, base, config = published[0]
    with pytest.raises(InputError, match=r"base.safetensors: it has no weights model.control_model.\*"):
        load_pipeline(base, base, config, torch.float32, TINY)
    with pytest.raises(InputError, match=r"model.diffusion_model.\*: time_embed.0.weight is missing \(\d+ of \d+"):
        load_pipeline(supir, supir, config, torch.float32, TINY)
    with pytest.raises(InputError, match=r"has shape .*, and the model needs"):
        load_host(supir, base=base, config=config)  # of the published sizes
    unet_only = tmp_path / "unet.safetensors"
    save_file({n: x for n, x in load_file(base).items() if n.startswith("model.")}, unet_only)
    with pytest.raises(InputError, match=r"unet.safetensors: diffusers cannot read its VAE and text encoders"):
        load_pipeline(supir, unet_only, config, torch.float32, TINY)
    code = tmp_path / "SUPIR-v0F.ckpt"
    torch.save({"state_dict": {}, "callback": print}, code)
    with pytest.raises(InputError, match=r"SUPIR-v0F.ckpt: .*ragsr never does"):
        load_pipeline(code, base, config, torch.float32, TINY)
