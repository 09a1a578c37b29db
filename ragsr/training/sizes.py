"""The diffusion stages that can be trained from nothing, by size.

    small   12.5 million weights, 25 MB in fp16; ten steps at 512² take seconds on a CPU
    tiny    for tests: it learns little

Both halve the image's sides three times. `small` keeps eight times the channels of Stable Diffusion, since little
detail may be lost, and the result adds detail to the intermediate image (`DiffusionStage.adds_detail`), so that what
the autoencoder loses is not missing in it. Self-attention is where it is cheap, on the two middle levels of the U-Net,
and so also in its decoder.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from ragsr.errors import InputError
from ragsr.models.sft_unet import SFTUNet
from ragsr.models.structure import StructureEncoder
from ragsr.models.tiny_autoencoder import TinyAutoencoder, load_published
from ragsr.pipelines.diffusion import DiffusionStage

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "timestep_spacing": "trailing",  # few steps begin where the noise is strongest
}
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "vae": 64,
        "latent": 32,
        "unet": (64, 96, 96, 96),
        "layers": 1,
        "condition": 32,
        "structure": (1, 2, 2, 2),
        "head": 32,
    },
    "tiny": {
        "vae": 16,
        "latent": 4,
        "unet": (32, 32, 64, 64),
        "layers": 1,
        "condition": 32,
        "structure": (1, 1, 2, 2),
        "head": 16,
    },
}
TEXT = 8  # width of the text embedding that the U-Net is given, of zeros: it learns without text


def make_stage(size: str, predicts: str = "x0", seed: int = 0, autoencoder: Path | None = None) -> DiffusionStage:
    """A stage of that size with random weights; `predicts` is "x0" or "noise".

    `autoencoder`: the folder of a published one, see `load_published`; its latents must have the channels of the size.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stage = DiffusionStage(
            vae=make_vae(SIZES[size], autoencoder),
            unet=make_unet(SIZES[size]),
            structure=make_structure(SIZES[size]),
            scheduler=make_scheduler(predicts),
            adds_detail=True,
        )
    for parameter in stage.unet.conv_out.parameters():  # where x0 is predicted, it begins with the intermediate result
        torch.nn.init.zeros_(parameter)
    return stage


def make_scheduler(predicts: str) -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, prediction_type={"x0": "sample", "noise": "epsilon"}[predicts])


def make_vae(size: dict[str, Any], published: Path | None) -> TinyAutoencoder:
    if published is None:
        return TinyAutoencoder(size["latent"], size["vae"])
    vae = load_published(published)
    if vae.config.latent_channels != size["latent"]:
        raise InputError(
            f"{published}: its latents have {vae.config.latent_channels} channels, and those of this size "
            f"{size['latent']}; choose another --size, or another autoencoder"
        )
    return vae


def make_unet(size: dict[str, Any]) -> SFTUNet:
    return SFTUNet(
        2 * size["condition"],  # of the photo and of the intermediate result
        in_channels=size["latent"],
        out_channels=size["latent"],
        block_out_channels=size["unet"],
        layers_per_block=size["layers"],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(width // size["head"] for width in size["unet"]),  # diffusers' name for their number
        cross_attention_dim=TEXT,
    )


def make_structure(size: dict[str, Any]) -> StructureEncoder:
    return StructureEncoder(
        in_channels=size["latent"],
        channels=size["condition"],
        out_channels=size["condition"],
        channel_mult=size["structure"],
        layers_per_block=1,
        attention_levels=0,
    )
