"""Tiny diffusion models with random weights, built through diffusers in the shapes of the real ones."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ragsr.chains import ReferenceCache, Sources
from ragsr.chains.cache import Memory
from ragsr.image import tensor_to_image

SIDE = 32  # pixels of the pictures in tests; the auto-encoders here have stride 4


def unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    made = UNet2DConditionModel(**settings | changes).eval()
    for name, weight in made.named_parameters():
        if ".attn1." in name or "proj_out" in name:
            weight.data *= 4  # new layers hardly look around: a reference would drown in rounding
    return made


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        **changes,
    ).eval()


DDIM = {"clip_sample": False, "steps_offset": 1}
SD2 = {"attention_head_dim": (2, 4, 4), "use_linear_projection": True}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 6,
}
X4 = {
    "in_channels": 7,
    "only_cross_attention": (True, True, False),
    "num_class_embeds": 1000,
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


def pipe(kind: str) -> Any:
    import diffusers
    from diffusers import ControlNetModel, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

    if kind == "sdxl":
        parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        return diffusers.StableDiffusionXLPipeline(
            vae(), unet=unet(**SDXL), scheduler=EulerDiscreteScheduler(steps_offset=1), add_watermarker=False, **parts
        )
    if kind == "x4":
        return diffusers.StableDiffusionUpscalePipeline(
            vae(scaling_factor=0.08333), None, None, unet(**X4), DDPMScheduler(), DDIMScheduler(**DDIM)
        )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    if kind == "sd2":
        return diffusers.StableDiffusionPipeline(
            vae(),
            unet=unet(**SD2),
            scheduler=DDPMScheduler(clip_sample=False, steps_offset=1),
            requires_safety_checker=False,
            **parts,
        )
    made = unet()
    if kind == "control":
        controlnet = ControlNetModel.from_unet(made, conditioning_embedding_out_channels=(4, 8, 8))
        for x in controlnet.parameters():
            torch.nn.init.normal_(x, std=0.1)
        return diffusers.StableDiffusionControlNetPipeline(
            vae(),
            unet=made,
            controlnet=controlnet,
            scheduler=DDIMScheduler(**DDIM),
            requires_safety_checker=False,
            **parts,
        )
    return diffusers.StableDiffusionPipeline(
        vae(), unet=made, scheduler=DDIMScheduler(**DDIM), requires_safety_checker=False, **parts
    )


def with_words(made: Any, folder: Path) -> Any:
    """The pipeline with a text encoder that knows two words, "a" and "b"; its vocabulary is written to the folder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=7)
    settings = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(2)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=4, max_position_embeddings=7, **settings)).eval()
    made.register_modules(tokenizer=tokenizer, text_encoder=text)
    return made


KINDS = ("sd15", "sd2", "control", "sdxl", "x4")


@cache
def host(kind: str) -> Any:
    from ragsr.hosts import host_of

    return host_of(pipe(kind))


def prompts(kind: str) -> dict[str, Any]:
    """Embeddings of a prompt and a negative prompt, since there is no text encoder."""
    generator = torch.Generator().manual_seed(5)
    positive, negative = (torch.randn(1, 7, 12, generator=generator) for _ in range(2))
    if kind != "sdxl":
        return {"prompt": positive, "negative_prompt": negative}
    pooled = torch.randn(1, 6, generator=generator)
    return {
        "prompt": {"prompt_embeds": positive, "text_embeds": pooled},
        "negative_prompt": {"prompt_embeds": negative, "text_embeds": -pooled},
    }


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    """[1, 3, H, W] in [0, 1], smooth."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def check_recorded_injection(host, state, masks):
    """A host with a recorded `case`: injected in one batch of four, and as two chains, the source's recorded first."""
    gates = {}
    state.on_gate = lambda name, gate: gates.__setitem__(name, gate)
    weights = torch.tensor([host.case.config["config"]["s"]])
    with state.paired(weights):
        host.case.check("refir.out", host.run())
    for i, name in enumerate(masks):
        host.case.check(f"refir.mask.{i}", gates[name])
    with state.recording() as record:
        source = host.run(rows=slice(1, None, 2))
    with state.injecting(Sources.join([record], weights)):
        target = host.run(rows=slice(0, None, 2))
    host.case.check("refir.out", torch.stack((target, source), dim=1).flatten(0, 1))
    host.case.check("plain.out", host.run())  # off again


def good(seed: int = 2, height: int = 48, width: int = 36) -> Image.Image:
    return tensor_to_image(picture(seed, height, width))


class Passes:
    """Rows of each pass of the network while within."""

    def __init__(self, kind: str = "sd15") -> None:
        self.rows: list[int] = []
        self.hook = host(kind).network.register_forward_pre_hook(lambda module, args: self.rows.append(len(args[0])))

    def __enter__(self) -> list[int]:
        return self.rows

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


def records(cache: ReferenceCache) -> dict[tuple[str, int], Any]:
    memory = cache.places[1]
    assert isinstance(memory, Memory)
    return memory.records
