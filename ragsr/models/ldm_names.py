"""Names of published checkpoints in the LDM layout, as diffusers names the same layers.

    U-Net    input_blocks.4.0.in_layers.2.weight   ->  down_blocks.1.resnets.0.conv1.weight
    VAE      encoder.down.1.block.0.nin_shortcut   ->  encoder.down_blocks.1.resnets.0.conv_shortcut

Layers that diffusers does not have keep their names below the layer they belong to (`spade.*`, `fusion_layer_*`).
"""

import re
from collections.abc import Mapping

from torch import Tensor

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
VAE = {
    "nin_shortcut": "conv_shortcut",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "norm_out": "conv_norm_out",
    "downsample.conv": "downsamplers.0.conv",
    "upsample.conv": "upsamplers.0.conv",
}


def unet_from_ldm(weights: Mapping[str, Tensor], layers_per_block: int = 2) -> dict[str, Tensor]:
    """The weights of a U-Net under diffusers' names."""
    return {unet_name(name, layers_per_block): tensor for name, tensor in weights.items()}


def unet_name(name: str, layers_per_block: int = 2) -> str:
    """One name. Blocks are counted through in LDM: per level so many layers, then a change of size."""
    name = replace_start(name, ENDS)
    match = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", name)
    if match:
        side, number, part, rest = match[1], int(match[2]), int(match[3]), match[4]
        name = f"{_place(side, number, part, rest, layers_per_block)}.{rest}"
    if ".resnets." not in name:
        return name.replace(".downsamplers.0.op.", ".downsamplers.0.conv.")
    head, number_and_rest = name.split(".resnets.")
    number_, rest = number_and_rest.split(".", 1)
    return f"{head}.resnets.{number_}.{replace_start(rest, RESIDUAL)}"


def _place(side: str, number: int, part: int, rest: str, layers: int) -> str:
    """Where a block of LDM stands in diffusers."""
    if side == "input":
        level, layer = divmod(number - 1, layers + 1)
        kind = f"resnets.{layer}" if part == 0 else f"attentions.{layer}"
        return f"down_blocks.{level}.{'downsamplers.0' if layer == layers else kind}"
    level, layer = divmod(number, layers + 1)
    resizes = rest.startswith("conv.")  # the only thing in LDM's decoder blocks that is called so
    kind = "upsamplers.0" if resizes else f"resnets.{layer}" if part == 0 else f"attentions.{layer}"
    return f"up_blocks.{level}.{kind}"


def vae_from_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an autoencoder under diffusers' names; attention by 1×1 convolutions becomes linear layers."""
    levels = 1 + max(int(m[1]) for name in weights if (m := re.match(r"decoder\.up\.(\d+)\.", name)))
    out = {}
    for name, tensor in weights.items():
        new = vae_name(name, levels)
        out[new] = tensor[..., 0, 0] if ".attentions." in new and tensor.ndim == 4 else tensor
    return out


def vae_name(name: str, levels: int) -> str:
    """One name. LDM counts the decoder's levels from the finest, diffusers in the order they run."""
    if ".fusion_layer_" in name:
        return name
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"(_blocks\.\d+)\.block\.", r"\1.resnets.", name)
    for old, new in VAE.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def replace_start(name: str, table: Mapping[str, str]) -> str:
    """`name` with the entry of `table` that it begins with replaced."""
    for old, new in table.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name
