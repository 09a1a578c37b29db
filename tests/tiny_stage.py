"""A diffusion stage with tiny random networks, and pictures for it."""

import diffusers
import torch

from ragsr.models.sft_unet import SFTUNet
from ragsr.models.structure import StructureEncoder
from ragsr.models.wrapping import WrappingAutoencoder
from ragsr.pipelines.diffusion import DiffusionStage

WIDTHS = (32, 32, 32, 32)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def tiny_stage(condition_channels=64, predicts="epsilon", **more):
    torch.manual_seed(0)
    unet = SFTUNet(condition_channels, block_out_channels=WIDTHS, cross_attention_dim=8, attention_head_dim=2)
    stage = DiffusionStage(
        vae=WrappingAutoencoder(1, block_out_channels=WIDTHS, layers_per_block=1),
        unet=unet,
        structure=StructureEncoder(channels=32, out_channels=32, channel_mult=(1, 1, 1, 1), layers_per_block=1),
        scheduler=diffusers.DDIMScheduler(**SCHEDULE, prediction_type=predicts),
        **more,
    )
    stage.set_progress_bar_config(disable=True)
    return stage


def pictures(height=128, width=128):
    rows = torch.linspace(0, 1, height)[:, None] * torch.linspace(0.2, 1, width)
    return rows.expand(1, 3, -1, -1).clone(), rows.flip(0).expand(1, 3, -1, -1).clone()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(stage, given=None, steps=2, **options):
    """The restored image, with the noise of seed 0 unless another generator is given."""
    return stage(*(given or pictures()), num_inference_steps=steps, **({"generator": generator()} | options))
