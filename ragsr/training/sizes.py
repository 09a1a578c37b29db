"""The diffusion stages that can be trained from nothing, by size.

    small   about 13 million weights, 26 MB in fp16; ten steps at 512² are to take seconds on a CPU
    tiny    for tests: it learns little

Both halve the image's sides three times. `small` keeps more channels than Stable Diffusion, since little detail may be
lost, and the result adds detail to the intermediate image (`DiffusionStage.adds_detail`), so that what the autoencoder
loses is not missing in it. Self-attention is where it is cheap, on the two middle levels of the U-Net, and so also in
its decoder.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler

from ragsr.models.sft_unet import SFTUNet
from ragsr.models.structure import StructureEncoder
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
        "vae": (48, 64, 80, 96),
        "latent": 16,
        "unet": (64, 96, 96, 128),
        "layers": 1,
        "condition": 32,
        "structure": (1, 2, 2, 3),
        "head": 32,
    },
    "tiny": {
        "vae": (32, 32, 32, 32),
        "latent": 4,
        "unet": (32, 32, 64, 64),
        "layers": 1,
        "condition": 32,
        "structure": (1, 1, 2, 2),
        "head": 16,
    },
}
TEXT = 8  # width of the text embedding that the U-Net is given, of zeros: it learns without text


def make_stage(size: str, predicts: str = "x0", seed: int = 0) -> DiffusionStage:
    """A stage of that size with random weights; `predicts` is "x0" or "noise"."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stage = DiffusionStage(
            vae=make_vae(SIZES[size]),
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


def make_vae(size: dict[str, Any]) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=size["vae"],
        layers_per_block=size["layers"],
        latent_channels=size["latent"],
        norm_num_groups=16,
        scaling_factor=1.0,  # measured when it has been trained
    )


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
