"""SUPIR from its published single files: the base first, SUPIR's own weights on top.

    model.diffusion_model.*                base and supir    LightGLVUNet
    model.control_model.*                  supir             GLVControl
    first_stage_model.denoise_encoder.*    supir             the encoder that is robust to degradation
    first_stage_model.*, conditioner.*     base              VAE and text encoders, which diffusers reads

Every weight of the two networks and of the encoder must be there, and no other.
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from ragsr.errors import InputError
from ragsr.hosts.common import dtype_option
from ragsr.hosts.published import filled
from ragsr.hosts.supir_layers import SDXL, Sizes
from ragsr.hosts.supir_net import GLVControl, LightGLVUNet
from ragsr.models.loading import load_weights

UNET, CONTROL, ENCODER = "model.diffusion_model.", "model.control_model.", "first_stage_model.denoise_encoder."
BASE_FROM = "stabilityai/stable-diffusion-xl-base-1.0 on the Hugging Face hub"
SUPIR_FROM = "github.com/Fanghua-Yu/SUPIR, by its authors and under their licence"
CONFIG_FROM = f"{BASE_FROM}: its *.json and *.txt files in their folders, without the weights"

# names in the published encoder -> names in diffusers'
ENCODER_NAMES = (
    (r"^down\.(\d)\.block\.(\d)\.", r"down_blocks.\1.resnets.\2."),
    (r"^down\.(\d)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"^mid\.attn_1\.norm\.", "mid_block.attentions.0.group_norm."),
    (r"^mid\.attn_1\.proj_out\.", "mid_block.attentions.0.to_out.0."),
    (r"^mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"^norm_out\.", "conv_norm_out."),
)


class SUPIRPipeline(DiffusionPipeline):
    """The parts, for what diffusers does with them: moving, offloading, prompts. It has no call of its own."""

    model_cpu_offload_seq: Any = "text_encoder->text_encoder_2->robust_vae->control->unet->vae"
    encode_prompt = StableDiffusionXLPipeline.encode_prompt

    def __init__(
        self,
        unet: LightGLVUNet,
        control: GLVControl,
        vae: AutoencoderKL,
        robust_vae: AutoencoderKL,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        force_zeros_for_empty_prompt: bool = False,  # encode_prompt asks; SUPIR always says what it does not want
    ) -> None:
        super().__init__()
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.register_modules(
            unet=unet,
            control=control,
            vae=vae,
            robust_vae=robust_vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
        )


def load_pipeline(
    supir: Path,
    base: Path,
    config: Path,
    dtype: torch.dtype,
    sizes: Sizes = SDXL,
) -> SUPIRPipeline:
    """Raises `InputError`, which names the file and where it is published, or the first wrong weight."""
    for path, origin in ((supir, SUPIR_FROM), (base, BASE_FROM), (config / "model_index.json", CONFIG_FROM)):
        if not path.is_file():
            raise InputError(f"{path} is missing; it is published at {origin}")
    own, unet_weights = load_own(supir), part_of(load_weights(base), UNET)
    with torch.device("meta"):
        unet, control = LightGLVUNet(sizes), GLVControl(sizes)
    filled(unet, unet_weights | part_of(own, UNET), f"{base} with {supir} on top, {UNET}*", dtype)
    filled(control, part_of(own, CONTROL), f"{supir}, {CONTROL}*", dtype)
    sdxl = rest_of_sdxl(base, config, dtype)
    robust = robust_vae(sdxl.vae, part_of(own, ENCODER), f"{supir}, {ENCODER}*")
    texts = {name: getattr(sdxl, name) for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    return SUPIRPipeline(unet, control, sdxl.vae, robust, **texts)


def rest_of_sdxl(base: Path, config: Path, dtype: torch.dtype) -> Any:
    """A pipeline of the base file's VAE and text encoders."""
    try:
        return StableDiffusionXLPipeline.from_single_file(
            str(base), config=str(config), unet=None, **dtype_option(dtype)
        )
    except Exception as error:  # what lacks a part ends in errors of every kind
        first_line, *_ = str(error).strip().split("\n")
        raise InputError(
            f"{base}: diffusers cannot read its VAE and text encoders by the configurations in {config} "
            f"({first_line}); take both from {BASE_FROM}"
        ) from error


def load_own(supir: Path) -> dict[str, Tensor]:
    weights = load_weights(supir)
    if not any(name.startswith(CONTROL) for name in weights):
        raise InputError(f"{supir}: it has no weights {CONTROL}*, so it is not SUPIR's file; that is from {SUPIR_FROM}")
    return weights


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def robust_vae(vae: AutoencoderKL, encoder: dict[str, Tensor], what: str) -> AutoencoderKL:
    """An auto-encoder that has the second encoder and no decoder; the layer after the encoder is the base's."""
    with torch.device("meta"):
        robust = AutoencoderKL.from_config(vae.config)
    filled(robust.encoder, diffusers_encoder(encoder), what, vae.dtype)
    robust.quant_conv, robust.post_quant_conv, robust.decoder = vae.quant_conv, None, None
    return robust.eval()


def diffusers_encoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published encoder in the names of diffusers, where attention is linear layers and not 1x1 convolutions."""
    renamed = {}
    for name, x in weights.items():
        for old, new in ENCODER_NAMES:
            name = re.sub(old, new, name)
        renamed[name] = x.flatten(1) if ".attentions." in name and x.ndim == 4 else x
    return renamed
