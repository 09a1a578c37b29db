"""SDEdit: a new picture from a photo, by a diffusion model that starts from the photo made noisy.

    photo ──▶ fitted to the model ──▶ noised to `strength` ──▶ denoised, every x̂₀ recorded ──▶ picture and score

Any image-to-image pipeline of diffusers does that has a VAE and a strength: Stable Diffusion 1 to 3, SDXL, Flux and
their like. `ragsr gallery augment` makes references with it.

Source: iRAG Sec. 3.1, Eq. 1 and 2; C. Meng et al., "SDEdit: guided image synthesis and editing with stochastic
differential equations", ICLR 2022.
"""

import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from ragsr.errors import InputError
from ragsr.image import to_rgb
from ragsr.pipelines.hallucination import WHOLE, Window, hallucination_score, in_window, recorded
from ragsr.pipelines.restore import find_device

PROMPT = "Identical Realistic"  # that of iRAG's released code
NEEDED = ("prompt", "image", "strength", "guidance_scale", "num_inference_steps", "generator")
INSTALL = 'generating images needs diffusers and transformers: pip install "ragsr[diffusion]"'
UNET_STEPS = 8  # a U-Net halves its latent up to three times


@dataclass
class SDEdit:
    """Edits photos with a diffusers image-to-image pipeline.

    pipeline  any with a `vae`, called with `image` and `strength`; used as it is, and left as it was
    model     by what name the gallery remembers it
    prompt    what the picture is told to be
    steps     of a whole denoising; a picture takes about steps · strength of them
    size      the model works on an area of size² pixels; None: what it was trained on
    window    which steps the score looks at, as shares of those done: all by default, as in iRAG's released code
    """

    pipeline: Any
    model: str
    prompt: str = PROMPT
    steps: int = 50
    size: int | None = None
    window: Window = WHOLE

    def __post_init__(self) -> None:
        if getattr(self.pipeline, "vae", None) is None:
            raise without_vae(self.model)
        lacking = [name for name in NEEDED if name not in self._parameters()]
        if lacking:
            kind = type(self.pipeline).__name__
            raise InputError(f"{self.model}: {kind} takes no {', '.join(lacking)}; it cannot edit a photo by SDEdit")
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise InputError(f"the window is {self.window}; it is two shares of the steps, such as 0 and 1, rising")

    @classmethod
    def load(cls, model: str, device: str | torch.device | None = None, **settings: Any) -> Self:
        """The diffusers model in a folder or of that name on the Hub; half precision on GPUs. `settings`: see above.

        Errors: `InputError` where diffusers is not installed, and for what is no diffusers model or has no VAE.
        """
        diffusers = _diffusers()
        place = find_device(device)
        parts = read_parts(model)
        half = torch.float16 if "unet" in parts else torch.bfloat16  # float16 overflows in transformers
        dtype = half if place.type == "cuda" else torch.float32
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of the name torch_dtype, the only one up to 0.35
                pipeline = diffusers.AutoPipelineForImage2Image.from_pretrained(model, torch_dtype=dtype)
        except ImportError as error:  # diffusers is there and transformers is not
            raise InputError(INSTALL) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{model}: cannot be loaded as an image-to-image model ({_first_line(error)})") from error
        pipeline.set_progress_bar_config(disable=True)  # there is one over all photos
        return cls(pipeline.to(place), model, **settings)

    @property
    def settings(self) -> dict[str, Any]:
        """What a picture depends on besides its photo, strength, guidance and seed."""
        scheduler = type(self.pipeline.scheduler).__name__
        return {
            "model": self.model,
            "scheduler": scheduler,
            "prompt": self.prompt,
            "steps": self.steps,
            "size": self.native_size,
            "window": list(self.window),
        }

    @property
    def native_size(self) -> int:
        """The side of the squares that the model works on, in pixels."""
        if self.size is not None:
            return self.size
        parts: Any = self.pipeline
        network = parts.unet if hasattr(parts, "unet") else parts.transformer
        latent = getattr(parts, "default_sample_size", None) or network.config.sample_size
        return int(np.max(latent)) * self._vae_scale

    def __call__(self, photo: Image.Image, strength: float, guidance: float, seed: int) -> tuple[Image.Image, float]:
        """A picture like `photo`, of its proportions, and its hallucination score; the same for the same seed.

        The score is infinite where the model drew nothing: latents that are not finite, or a picture that the
        model's own safety checker blackened.
        """
        fitted, box = fit(photo, self.native_size, UNET_STEPS * self._vae_scale)
        options = {"prompt": self.prompt, "image": fitted, "strength": strength, "guidance_scale": guidance}
        options |= {"num_inference_steps": self.steps, "generator": torch.Generator().manual_seed(seed)}
        if "height" in self._parameters():  # else such a model falls back to a square
            options |= {"height": fitted.height, "width": fitted.width}
        with recorded(self.pipeline.scheduler) as estimates:
            output = self.pipeline(**options)
        if len(in_window(estimates, self.window)) < 2:
            raise InputError(
                f"{len(estimates)} steps of {self.steps} were done at strength {strength:.2f}, and fewer than two are "
                f"in the window {self.window}: take more steps"
            )
        score = float("inf") if _is_blackened(output) else hallucination_score(estimates, self.window)
        return output.images[0].crop(box), score

    @property
    def _vae_scale(self) -> int:
        return int(self.pipeline.vae_scale_factor)

    def _parameters(self) -> Mapping[str, Any]:
        return inspect.signature(self.pipeline.__call__).parameters


def fit(photo: Image.Image, size: int, multiple: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The photo scaled to about size² pixels, its right and bottom mirrored on to sides that the model can take, and
    the box that it takes up there."""
    photo = to_rgb(photo)
    factor = size / (photo.width * photo.height) ** 0.5
    width, height = (max(1, round(side * factor)) for side in photo.size)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS))
    filled = np.pad(pixels, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode="symmetric")
    return Image.fromarray(filled), (0, 0, width, height)


def read_parts(model: str) -> Mapping[str, Any]:
    """The table of a diffusers model, `model_index.json`, read before anything large is. Errors as `SDEdit.load`."""
    diffusers = _diffusers()
    is_name = model.count("/") == 1 and not model.startswith((".", "/"))  # owner/model
    if not (Path(model) / "model_index.json").is_file() and (Path(model).exists() or not is_name):
        raise InputError(
            f"{model}: there is no model_index.json; name a diffusers model by its folder or as owner/model"
        )
    try:
        parts: Mapping[str, Any] = diffusers.DiffusionPipeline.load_config(model)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise InputError(
            f"{model}: neither the folder of a diffusers model nor a model of the Hub that can be reached "
            f"({_first_line(error)})"
        ) from error
    if parts.get("vae", (None, None))[0] is None:
        raise without_vae(model)
    return parts


def without_vae(model: str) -> InputError:
    return InputError(f"{model}: has no VAE; take a latent diffusion model, such as Stable Diffusion 2.1")


def _is_blackened(output: Any) -> bool:
    flagged = getattr(output, "nsfw_content_detected", None)
    return bool(flagged and any(flagged))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise InputError(INSTALL) from None
    return diffusers
