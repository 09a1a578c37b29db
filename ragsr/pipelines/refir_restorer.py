"""ReFIR behind the front door: settings once, then photo by photo, with the answer that every pipeline gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from ragsr.chains import Mode
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.models import SHIPPED
from ragsr.pipelines import refir_inputs as inputs
from ragsr.pipelines.refir import ReFIRPipeline
from ragsr.pipelines.refir_explain import ReFIROutput
from ragsr.pipelines.refir_fallback import Fallback, TextToImage
from ragsr.pipelines.refir_memory import MemoryEstimate, fitting_tile
from ragsr.pipelines.refir_prompts import Captioner, TagFile
from ragsr.pipelines.refir_references import USEFUL
from ragsr.pipelines.refsr import Restored, read_reference, timed


@dataclass(frozen=True)
class ReFIROptions:
    """What only this pipeline can be told. None is left to the model; see `ReFIRPipeline.__call__`.

    preset              when and where references are injected: paper, released-seesr, released-supir
    strength            the share of the noise levels that is run: how far the result may leave the photo
    references_per      image, or tile: a gallery is searched for every tile by itself
    reference_strength  in [0, 1], how much is taken from the references; 0 is the plain model
    tags                a file of tags per picture, see `ragsr.pipelines.refir_prompts`: they come before the prompt
    caption             for a fallback that generates a reference; the prompt by default
    steering            options of `ragsr.hosts.supir.Steering` by name
    base, config        files that SeeSR and SUPIR need besides, see `ragsr.hosts.load_host`
    """

    preset: str | None = None
    mode: Mode = "denoise"
    steps: int | None = None
    references_per: str = "image"
    strength: float | None = None
    reference_strength: float | None = None
    guidance: float | None = None
    prompt: Any = None
    negative_prompt: Any = None
    tags: str | Path | None = None
    fallback: str = "origin_lrm"
    caption: Any = None
    text_to_image: TextToImage | None = None
    explain: bool = False
    steering: Mapping[str, float] = field(default_factory=dict)
    base: str | Path | None = None
    config: str | Path | None = None
    controlnet: Any = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """Raises `InputError` for a name that is not there."""
        known = [one.name for one in fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"refir has no option {name!r}; it has: {', '.join(known)}")
        return cls(**options)


class ReFIRRestorer:
    """Restores photos one by one with the same settings; what the references leave is kept for the next photo."""

    def __init__(
        self,
        pipeline: ReFIRPipeline,
        options: ReFIROptions,
        scale: int = 4,
        tile: int | str = "auto",
        seed: int = 0,
    ) -> None:
        self.pipeline, self.options, self.scale, self.seed = pipeline, options, scale, seed
        self.tile = inputs.tile_of_result(tile, scale)
        self.tags = None if options.tags is None else TagFile(options.tags)
        if self.tags is not None and not isinstance(options.prompt, str | None):
            raise InputError("tags are words that come before a prompt in words; give that, or leave tags out")
        self.fallback = Fallback(
            options.fallback, options.prompt if options.caption is None else options.caption, options.text_to_image
        )
        pipeline.set_progress_bar_config(desc="denoising", leave=False, disable=None)  # no bar where nobody looks

    @property
    def steps(self) -> int | None:
        """Of the denoising; None leaves it to the model."""
        return self.options.steps

    @property
    def device(self) -> torch.device:
        return self.pipeline.host.device

    def __call__(
        self,
        photo: str | Path | Image.Image | Tensor,  # a tensor is [1, 3, h, w] in [0, 1]
        references: Sequence[str | Path | Image.Image] = (),
        gallery: Gallery | None = None,
        k: int = 1,
        threshold: float | None = None,
    ) -> Restored:
        """Restore one photo with `references`, or with the k nearest of `gallery`, or with neither.

        What is found with a score below `threshold` (None: that of the gallery's encoder) is not used.
        """
        if threshold is None:
            threshold = 0.0 if gallery is None else gallery.encoder.threshold
        told, milliseconds = self.options, dict[str, float]()
        prompt, of_references = self.prompts(Path(photo) if isinstance(photo, str | Path) else None)
        with timed(milliseconds, "restore"):
            output = self.pipeline(
                photo,
                references,
                gallery,
                k=k,
                references_per=told.references_per,
                prompt=prompt,
                reference_prompt=of_references,
                negative_prompt=told.negative_prompt,
                plan=told.preset,
                reference_strength=told.reference_strength,
                threshold=threshold,
                fallback=self.fallback,
                mode=told.mode,
                scale=self.scale,
                strength=told.strength,
                num_inference_steps=told.steps,
                guidance_scale=told.guidance,
                generator=self.seed,
                tile=self.tile,
                return_gates=True,
                explain=told.explain,
            )
        assert isinstance(output, ReFIROutput)
        (picture,) = output.images
        share = torch.zeros(1, picture.height, picture.width) if output.share is None else output.share
        weight = share.sum(0)[None, None]
        return Restored(picture, output.references, weight, milliseconds, output.rejected, output.explanation)

    def prompts(self, photo: Path | None) -> tuple[Any, Captioner | None]:
        """Of the photo and, where there are tags, of its references: their own, or those of the photo."""
        tags = self.tags
        if tags is None:
            return self.options.prompt, None
        prompt = tags.prompt(photo, self.options.prompt)
        return prompt, lambda picture, path: tags.find(path) or prompt

    def prepare(self, references: Sequence[str | Path | Image.Image]) -> None:
        """Complain about references that cannot be used, before the first photo."""
        for number, reference in enumerate(references, 1):
            read_reference(reference, number)

    def estimate_memory(self, low: tuple[int, int], references: int) -> MemoryEstimate:
        """For a photo of this (height, width), with references as large as any is used."""
        size = low[0] * self.scale, low[1] * self.scale
        host, side = self.pipeline.host, int(max(size[0] * size[1], USEFUL) ** 0.5)
        guidance = host.defaults.guidance if self.options.guidance is None else self.options.guidance
        others, plan = [(side, side)] * references, inputs.plan_of(self.options.preset, None, host)
        fits = fitting_tile(host, plan, size, others, 1 + (guidance > 1), host.device)
        tile = self.tile if isinstance(self.tile, int) else fits
        return self.pipeline.estimate_memory(size, others, self.options.preset, guidance > 1, tile)


def load_refir(
    model: str | Path, options: ReFIROptions, scale: int, tile: int | str, seed: int, device: torch.device
) -> ReFIRRestorer:
    """With the model on the device: in float16 on a GPU, in float32 elsewhere."""
    if str(model) in SHIPPED:
        raise InputError(
            "refir restores with a diffusion model: name its folder, its file or its hub name, such as a Stable "
            "Diffusion, SDXL, its x4 upscaler, SeeSR or SUPIR"
        )
    files = {name: getattr(options, name) for name in ("base", "config", "controlnet")}
    given = {name: value for name, value in files.items() if value is not None} | dict(options.steering)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = ReFIRPipeline.from_pretrained(model, dtype=dtype, **given).to(device)
    return ReFIRRestorer(pipeline, options, scale, tile, seed)
