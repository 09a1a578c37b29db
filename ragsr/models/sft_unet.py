"""The U-Net of StableSR and iRAG: a diffusers `UNet2DConditionModel` whose residual blocks end with an SFT layer.

    out = skip(x) + SPADE(h, F)        in every residual block, down, middle and up

Because it is that diffusers model, its attention processors, schedulers and offloading are at its service. The maps γ
and β depend on the condition F alone: `modulate` makes those of all layers, once a step, and both halves of
classifier-free guidance use them.

Source: iRAG, Sec. 3.3.1, Eq. 5; Wang et al., StableSR, IJCV 2024, Sec. 3.1.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  # a pipeline that loads looks for ModelMixin here
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ragsr.models.sft import SPADE, Modulation

PUBLISHED = {
    "down_block_types": (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",)),
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),  # the number of heads; diffusers calls it so
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
Modulations = Mapping[str, Modulation]  # by the name of the residual block


class SFTUNet(UNet2DConditionModel):
    """A U-Net that is conditioned by feature maps, one per level, besides time and text.

    `settings` are those of `UNet2DConditionModel`, where they differ from the published ones of Stable Diffusion 2.
    iRAG has 512 condition channels, of two latents, StableSR 256.
    """

    def __init__(self, condition_channels: int = 512, **settings: Any) -> None:
        super().__init__(**(PUBLISHED | settings))
        self.register_to_config(condition_channels=condition_channels)
        for _, blocks in self._levels():
            for i, block in enumerate(blocks):
                blocks[i] = SFTResnetBlock(block, condition_channels)

    @staticmethod
    def _get_init_keys(_: type) -> set[str]:
        """Which settings a saved configuration may hold; diffusers looks at `__init__`, which passes most on."""
        return {"condition_channels", *UNet2DConditionModel._get_init_keys(UNet2DConditionModel)}

    def modulate(self, condition: Sequence[Tensor]) -> dict[str, Modulation]:
        """γ and β of every residual block, from the maps of every level, finest first.

        A map of another size than the level's features is not interpolated here: the op refuses it and says the size.
        """
        names = {block: name for name, block in self._blocks().items()}
        if len(condition) != len(self.down_blocks):
            raise ValueError(
                f"the condition has maps of {len(condition)} levels and this U-Net {len(self.down_blocks)} levels"
            )
        return {
            names[block]: block.spade.modulation(condition[level])
            for level, blocks in self._levels()
            for block in blocks
        }

    def forward(
        self,
        sample: Tensor,  # [B, in_channels, h, w]
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,  # [B, tokens, cross_attention_dim]
        condition: Sequence[Tensor] | Modulations,  # maps, finest first, or what `modulate` made of them
        **options: Any,
    ) -> Any:
        """As of `UNet2DConditionModel`; a condition of batch b serves samples of batch k · b."""
        maps = condition if isinstance(condition, Mapping) else self.modulate(condition)
        with self._conditioned(maps):
            return super().forward(sample, timestep, encoder_hidden_states, **options)

    @contextmanager
    def _conditioned(self, maps: Modulations) -> Iterator[None]:
        """Give every block its maps for one call: diffusers passes residual blocks nothing but features and time."""
        blocks = self._blocks()
        try:
            for name, block in blocks.items():
                block.maps = maps[name]
            yield
        finally:
            for block in blocks.values():
                block.maps = None

    def _blocks(self) -> dict[str, "SFTResnetBlock"]:
        return {name: block for name, block in self.named_modules() if isinstance(block, SFTResnetBlock)}

    def _levels(self) -> Iterator[tuple[int, Any]]:
        """The residual blocks of the network with the level of their features, 0 the finest."""
        deepest = len(self.down_blocks) - 1
        yield from ((level, block.resnets) for level, block in enumerate(self.down_blocks))
        yield deepest, self.mid_block.resnets
        yield from ((deepest - i, block.resnets) for i, block in enumerate(self.up_blocks))


class SFTResnetBlock(nn.Module):
    """`ResnetBlock2D`, its layers and their names, with SPADE before the addition."""

    def __init__(self, plain: ResnetBlock2D, condition_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = plain.norm1, plain.conv1
        self.time_emb_proj = plain.time_emb_proj
        self.norm2, self.conv2 = plain.norm2, plain.conv2
        self.conv_shortcut = plain.conv_shortcut
        self.spade = SPADE(plain.out_channels, condition_channels)
        self.maps: Modulation | None = None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x [B, inputs, H, W], temb [B, E] -> [B, outputs, H, W]."""
        if self.maps is None:
            raise RuntimeError("a residual block of SFTUNet was called outside its U-Net: it has no condition")
        silu = nn.functional.silu
        h = self.conv1(silu(self.norm1(x))) + self.time_emb_proj(silu(temb))[..., None, None]
        h = self.conv2(silu(self.norm2(h)))
        return self.spade(h, self.maps, residual=x if self.conv_shortcut is None else self.conv_shortcut(x))
