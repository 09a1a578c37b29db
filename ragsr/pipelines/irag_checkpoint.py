"""Published checkpoints of iRAG and StableSR as a `DiffusionStage`.

One file in the LDM layout holds the U-Net, the time-aware encoder and the autoencoder, each under a prefix. The text
encoder in it has names of another library and is the unchanged one of Stable Diffusion 2.1: it is taken from a folder
of that model. Sizes are read from the shapes of the weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn

from ragsr.errors import InputError
from ragsr.models.ldm_names import unet_from_ldm, vae_from_ldm
from ragsr.models.loading import load_into, load_weights
from ragsr.models.sft_unet import SFTUNet
from ragsr.models.structure import StructureEncoder
from ragsr.models.wrapping import WrappingAutoencoder
from ragsr.pipelines.diffusion import DiffusionStage

UNET, STRUCTURE, VAE = "model.diffusion_model.", "structcond_stage_model.", "first_stage_model."
HEAD = 64  # channels of one head in the published U-Nets
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def load_published(
    checkpoint: str | Path,
    base: str | Path | None = None,
    wrapping: str | Path | None = None,
    channels_per_head: int = HEAD,
) -> DiffusionStage:
    """A `DiffusionStage` with published weights, sampled by DDIM until its `scheduler` is replaced.

    checkpoint   iRAG's or StableSR's file, `.safetensors` or a pickle of plain tensors
    base         a folder of Stable Diffusion 2.1 in diffusers' layout, for its text encoder; without one the prompt is
                 taken as zeros, which the published weights were not trained for
    wrapping     the file of the feature-wrapping autoencoder (CFW); without one the plain one of `checkpoint` decodes

    Raises `InputError` that names the file and the first tensor that is missing, unknown or of another shape.
    """
    weights = load_weights(checkpoint)
    unet_weights, structure_weights = (part_of(weights, prefix, str(checkpoint)) for prefix in (UNET, STRUCTURE))
    source = wrapping or checkpoint
    vae_weights = load_weights(wrapping) if wrapping else part_of(weights, VAE, str(checkpoint))
    text_encoder, tokenizer = load_text(base)
    return DiffusionStage(
        vae=filled(make_vae(vae_weights), vae_from_ldm(without_training_parts(vae_weights)), str(source)),
        unet=filled(make_unet(unet_weights, channels_per_head), unet_from_ldm(unet_weights), str(checkpoint)),
        structure=filled(make_structure(structure_weights), structure_weights, str(checkpoint)),
        scheduler=DDIMScheduler(**SCHEDULE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def part_of(weights: Mapping[str, Tensor], prefix: str, source: str) -> dict[str, Tensor]:
    """The weights of one network, without its prefix."""
    part = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not part:
        raise InputError(f"{source}: holds no weights {prefix}*; use a checkpoint of iRAG or StableSR")
    return part


def without_training_parts(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder without the discriminator and the perceptual network that it was trained with."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith("loss.")}


def filled(module: Any, weights: dict[str, Tensor], source: str) -> Any:
    load_into(module, weights, source)
    return module.eval()


# ------------------------------------------------------------------ sizes, read from shapes


def make_unet(weights: Mapping[str, Tensor], channels_per_head: int) -> SFTUNet:
    widths = level_widths(weights, "input_blocks.{}.0.out_layers.3.weight", (1, 4, 7, 10))
    return SFTUNet(
        size(weights, "middle_block.0.spade.mlp_shared.0.weight", 1),
        block_out_channels=widths,
        cross_attention_dim=size(weights, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        attention_head_dim=tuple(width // channels_per_head for width in widths),
    )


def make_structure(weights: Mapping[str, Tensor]) -> StructureEncoder:
    channels = size(weights, "time_embed.0.weight", 1)
    widths = level_widths(weights, "fea_tran.{}.in_layers.0.weight", range(4))
    return StructureEncoder(
        in_channels=size(weights, "input_blocks.0.0.weight", 1),
        channels=channels,
        out_channels=size(weights, "fea_tran.0.out_layers.3.weight", 0),
        channel_mult=tuple(width // channels for width in widths),
    )


def make_vae(weights: Mapping[str, Tensor]) -> AutoencoderKL:
    widths = level_widths(weights, "encoder.down.{}.block.0.conv2.weight", range(4))
    layers = sum(name.startswith("encoder.down.0.block.") and name.endswith("conv1.weight") for name in weights)
    fusions = {name.split(".")[3] for name in weights if name.startswith("decoder.fusion_layer_1.encode_enc_2.")}
    settings = {"block_out_channels": widths, "layers_per_block": layers, "scaling_factor": 0.18215}
    if fusions:
        return WrappingAutoencoder(len(fusions), **settings)
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**settings, **ends)


def level_widths(weights: Mapping[str, Tensor], pattern: str, numbers: Any) -> tuple[int, ...]:
    return tuple(size(weights, pattern.format(number), 0) for number in numbers)


def size(weights: Mapping[str, Tensor], name: str, dim: int) -> int:
    if name not in weights:
        raise InputError(f"the checkpoint lacks {name}; use a checkpoint of iRAG or StableSR")
    return weights[name].shape[dim]


def load_text(base: str | Path | None) -> tuple[nn.Module | None, Any]:
    """Text encoder and tokenizer of a folder of Stable Diffusion."""
    if base is None:
        return None, None
    from transformers import CLIPTextModel, CLIPTokenizer

    for name in ("text_encoder", "tokenizer"):
        if not (Path(base) / name).is_dir():
            raise InputError(f"{base}: holds no folder {name}; name a folder of Stable Diffusion 2.1")
    return (
        CLIPTextModel.from_pretrained(base, subfolder="text_encoder"),
        CLIPTokenizer.from_pretrained(base, subfolder="tokenizer"),
    )
