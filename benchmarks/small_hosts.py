"""A Stable Diffusion 2 an eighth as wide, with random weights: what its steps cost has the proportions of the real one.

Convolutions and projections take N · C² operations and attention N² · C, for N places of the latent and C channels. The
share of attention therefore depends on N / C: a latent of 32 × 64 is to 40 channels what one of 128 × 128, a picture of
1024², is to 320. The prompt has 10 tokens for 77. Normalisation and gates, N · C, weigh eight times more than in the
real network. Heads have 40 or 80 channels, where there they have 64, so that the soft-max has its share too.
"""

from typing import Any

import torch
from torch import Tensor

from ragsr.hosts import host_of

SIZE = (256, 512)  # pixels; the latent has an eighth of them
NARROWER = 8
TOKENS, WIDTH = 10, 1024 // NARROWER  # of the prompt


def small_pipe(attention_scale: float = 4) -> Any:
    """`attention_scale`: self-attention has so many times its first weights, with which a reference hardly shows."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=96,
        block_out_channels=tuple(c // NARROWER for c in (320, 640, 1280, 1280)),
        attention_head_dim=(1, 1, 2, 2),  # the number of heads, as it is called for Stable Diffusion 2
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        norm_num_groups=8,
    ).eval()
    for name, weight in unet.named_parameters():
        if ".attn1." in name or "proj_out" in name:
            weight.data *= attention_scale
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
    ).eval()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear")
    return diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts
    )


def small_host(attention_scale: float = 4) -> Any:
    return host_of(small_pipe(attention_scale))


def prompts() -> dict[str, Tensor]:
    """Embeddings, since there is no text encoder."""
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(1, TOKENS, WIDTH, generator=generator) for n in ("prompt", "negative_prompt")}


def picture(seed: int, height: int, width: int) -> Tensor:
    """[1, 3, H, W] in [0, 1], smooth with some grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
