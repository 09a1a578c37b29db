"""SeeSR's networks: Stable Diffusion 2 with a second attention branch, which looks at tokens of the image.

    x ──▶ resnets[i] ──▶ attentions[i] ──▶ image_attentions[i] ──▶      in every block with attention: down, middle, up
                             ▲                    ▲
                         text tokens         image tokens [B, 145, 512]: one for the whole image, 12 × 12 for its parts

The U-Net and the ControlNet are those of diffusers with such blocks. Both kinds of tokens travel together as what
diffusers calls `encoder_hidden_states`, which it hands to the blocks without looking inside. Names and shapes of the
parameters are the published ones.

Without image tokens the branch is given zeros. It then attends to nothing (keys and values have no bias) but does the
rest of its work, which what follows it was trained on. One zero token does what 145 do.

Source: Wu et al., SeeSR: Towards Semantics-Aware Real-World Image Super-Resolution, CVPR 2024, Sec. 3.3.
"""

import functools
from typing import Any, NamedTuple

from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, cat, nn

IMAGE_CHANNELS = 512


class Tokens(NamedTuple):
    """What the blocks attend to."""

    text: Tensor  # [B, N, C]
    image: Tensor  # [B, M, 512]


def tokens_of(text: Tensor, image: Tensor | None) -> Tokens:
    """Raises `ValueError` for image tokens of another batch or width."""
    if image is None:
        image = text.new_zeros(text.shape[0], 1, IMAGE_CHANNELS)
    if image.ndim != 3 or image.shape[0] != text.shape[0] or image.shape[2] != IMAGE_CHANNELS:
        raise ValueError(
            f"image tokens have shape {tuple(image.shape)}; beside text of shape {tuple(text.shape)} they must be "
            f"[{text.shape[0]}, tokens, {IMAGE_CHANNELS}]"
        )
    return Tokens(text, image)


# ------------------------------------------------------------------ the two networks


class SeeSRUNet(UNet2DConditionModel):
    """The arguments are those of `UNet2DConditionModel`."""

    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]  # diffusers looks there for its settings
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_image_branch(self)
        for i, block in enumerate(self.up_blocks):
            if has_attention(block):
                self.up_blocks[i] = UpBlock(block)

    def forward(
        self,
        sample: Tensor,  # [B, 4, h, w]
        timestep: Tensor | int,
        encoder_hidden_states: Tensor,  # text tokens [B, N, C]
        image_hidden_states: Tensor | None = None,  # image tokens [B, M, 512]
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        return super().forward(
            sample,
            timestep,
            tokens_of(encoder_hidden_states, image_hidden_states),
            cross_attention_kwargs=cross_attention_kwargs,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            return_dict=return_dict,
        )


class SeeSRControlNet(ControlNetModel):
    """The arguments are those of `ControlNetModel`; the hint is the enlarged photo [B, 3, 8h, 8w] in [0, 1]."""

    @functools.wraps(ControlNetModel.__init__)  # type: ignore[misc]  # as above
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_image_branch(self)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        image_hidden_states: Tensor | None = None,
        conditioning_scale: float = 1.0,
        return_dict: bool = True,
    ) -> Any:
        tokens = tokens_of(encoder_hidden_states, image_hidden_states)
        return super().forward(
            sample, timestep, tokens, controlnet_cond, conditioning_scale=conditioning_scale, return_dict=return_dict
        )


def add_image_branch(network: SeeSRUNet | SeeSRControlNet) -> None:
    """To the parts that both networks have; the configuration says so, in the published word."""
    for i, block in enumerate(network.down_blocks):
        if has_attention(block):
            network.down_blocks[i] = DownBlock(block)
    network.mid_block = MidBlock(network.mid_block)
    network.register_to_config(use_image_cross_attention=True)


def has_attention(block: nn.Module) -> bool:
    return getattr(block, "has_cross_attention", False)


# ------------------------------------------------------------------ blocks


class TwoBranches(nn.Module):
    """The layers of a stock block, and beside each of its transformers one for image tokens."""

    has_cross_attention = True  # what diffusers asks before it hands over tokens

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.resnets: nn.ModuleList = stock.resnets
        self.attentions: nn.ModuleList = stock.attentions
        self.image_attentions = nn.ModuleList(beside(attention) for attention in stock.attentions)

    def attend(self, i: int, x: Tensor, tokens: Tokens, kwargs: dict[str, Any] | None) -> Tensor:
        for attention, context in zip((self.attentions[i], self.image_attentions[i]), tokens, strict=True):
            x = attention(x, encoder_hidden_states=context, cross_attention_kwargs=kwargs, return_dict=False)[0]
        return x


def beside(attention: Transformer2DModel) -> Transformer2DModel:
    """A transformer of the same size for image tokens."""
    settings = {name: value for name, value in attention.config.items() if name[0] != "_"}
    return Transformer2DModel(**{**settings, "cross_attention_dim": IMAGE_CHANNELS})


class DownBlock(TwoBranches):
    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        self.downsamplers: nn.ModuleList | None = stock.downsamplers

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        encoder_hidden_states: Tokens,
        cross_attention_kwargs: dict[str, Any] | None = None,
        **masks: None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = hidden_states
        skips: tuple[Tensor, ...] = ()
        for i, resnet in enumerate(self.resnets):
            x = self.attend(i, resnet(x, temb), encoder_hidden_states, cross_attention_kwargs)
            skips += (x,)
        for downsampler in self.downsamplers or ():
            x = downsampler(x)
            skips += (x,)
        return x, skips


class MidBlock(TwoBranches):
    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        encoder_hidden_states: Tokens,
        cross_attention_kwargs: dict[str, Any] | None = None,
        **masks: None,
    ) -> Tensor:
        first, *others = self.resnets
        x = first(hidden_states, temb)
        for i, resnet in enumerate(others):
            x = resnet(self.attend(i, x, encoder_hidden_states, cross_attention_kwargs), temb)
        return x


class UpBlock(TwoBranches):
    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        self.upsamplers: nn.ModuleList | None = stock.upsamplers

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor,
        encoder_hidden_states: Tokens,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: tuple[int, int] | None = None,
        **masks: None,
    ) -> Tensor:
        x = hidden_states
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(res_hidden_states_tuple), strict=True)):
            x = resnet(cat((x, skip), dim=1), temb)
            x = self.attend(i, x, encoder_hidden_states, cross_attention_kwargs)
        for upsampler in self.upsamplers or ():
            x = upsampler(x, upsample_size)
        return x
