"""The second stage of iRAG: latent diffusion, conditioned by the photo and by the intermediate reference result.

    photo, enlarged ──▶ encode ──▶ z_low ───┐          ┌─────────── features ───────────┐
                                            ├─▶ structure ─▶ SFT maps                   ▼
    intermediate ─────▶ encode ──▶ z_inter ─┘          ▼                             decode ──▶ colours
    z_low + noise, or noise ───────────────────────▶ denoise ─────▶ latent ─────────────┘

A small autoencoder loses detail. A stage that adds detail therefore never replaces the intermediate result, but adds to
it what the new latent shows more than its own: intermediate + decode(latent) - decode(z_inter). What is noised and
denoised is the difference latent - z_inter, scaled to the deviation of noise, since it is small beside the latents. A
network that answers with a difference of 0 gives the intermediate result back as it is.

One list of timesteps serves the network and the update, whichever scheduler of diffusers is used. Images of any size:
sides are continued to multiples of 64 pixels. What is larger than a tile is denoised in tiles that overlap, and whose
predictions are blended in every step, so that no seam appears.

Source: iRAG, Sec. 3.3, Eq. 4 to 7; the start from the noised photo and the tiles: Wang et al., StableSR, IJCV 2024,
Sec. 3.3.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ragsr.colour import check_match_colour, match_colour
from ragsr.errors import InputError
from ragsr.models.sft_unet import SFTUNet
from ragsr.models.structure import StructureEncoder
from ragsr.models.tiny_autoencoder import TinyAutoencoder
from ragsr.models.wrapping import WrappingAutoencoder
from ragsr.pipelines.schedulers import check_scheduler, schedule_of, takes_generator, timesteps_of
from ragsr.tiling import Tile, plan_tiles, reflect_to

UNIT = 64  # pixels: the U-Net halves a latent, an eighth of the image, three times
TILE, SHARED = 8, 2  # units: 512 pixels, of which neighbours share 128


class DiffusionStage(DiffusionPipeline):
    """Restores an image from two: the low-quality one, enlarged, and the intermediate result of the first stage.

    `text_encoder` and `tokenizer` are those of the base model; a network that was trained without text has none.
    `adds_detail`: whether the result is the intermediate one and what the latent adds to it, see above.
    `schedule`: the noise the U-Net was trained with and what it predicts; None is that of `scheduler`, which may later
    be replaced by any other that fits it.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012  # diffusers adds a list to it
    _exclude_from_cpu_offload = ["vae", "structure"]  # noqa: RUF012  # needed in every tile and step

    def __init__(
        self,
        vae: AutoencoderKL | TinyAutoencoder,
        unet: SFTUNet,
        structure: StructureEncoder,
        scheduler: SchedulerMixin,
        text_encoder: ModelMixin | None = None,
        tokenizer: Any = None,
        adds_detail: bool = False,
        detail_scale: float = 1.0,  # of the difference of latents
        schedule: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        schedule = schedule or schedule_of(scheduler)
        check_scheduler(scheduler, schedule)
        self.register_to_config(adds_detail=adds_detail, detail_scale=detail_scale, schedule=schedule)
        self.register_modules(
            vae=vae, unet=unet, structure=structure, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        own, made = unet.config.condition_channels, structure.config.out_channels
        if own not in (made, 2 * made):
            raise InputError(
                f"the U-Net takes {own} condition channels and the encoder makes {made} of a latent; it must be {made} "
                f"(the photo alone, as StableSR) or {2 * made} (photo and intermediate result, as iRAG)"
            )

    @torch.no_grad()
    def __call__(
        self,
        low: Tensor,  # [1, 3, H, W] in [0, 1]: the low-quality photo at the size of the result
        intermediate: Tensor,  # the same: the result of the reference stage
        *,
        num_inference_steps: int = 50,
        start: str = "low",
        prompt: str = "",
        negative_prompt: str = "",
        guidance_scale: float = 1.0,
        fidelity: float = 0.5,
        colour: str | None = None,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Tensor:  # [1, 3, H, W] in [0, 1]
        """Restore one image.

        start       "low": from the photo's latent with noise of the first step; "noise": from noise alone
        guidance_scale  above 1, the network runs with both prompts; the condition is shared between them
        fidelity    in [0, 1], how much of the photo's own features the decoder takes in, if it can (CFW, Eq. 3 of
                    StableSR)
        colour      "adain" or "wavelet": the photo's colours on the result; "none". None is adain, or none for a stage
                    that adds detail: the intermediate result has its colours
        callback_on_step_end  diffusers': called as (pipeline, step, timestep, {"latents": …}); may return the same dict

        Raises `InputError` for images that do not fit each other, for unknown choices, and for a `scheduler` that the
        network was not trained for.
        """
        colour = colour or ("none" if self.config.adds_detail else "adain")
        check(low, intermediate, start, fidelity, colour)
        check_scheduler(self.scheduler, self.config.schedule)
        height, width = low.shape[-2:]
        sides = [-(-side // UNIT) * UNIT for side in (height, width)]
        photo, guide = (
            (2 * reflect_to(x, *sides) - 1).to(self._execution_device, self.vae.dtype) for x in (low, intermediate)
        )
        tiles = plan_tiles(sides[0] // UNIT, sides[1] // UNIT, TILE, SHARED)

        text = self.embed(prompt, negative_prompt, guidance_scale)
        z_low, z_inter = (self.encode(x, tiles) for x in (photo, guide))
        timesteps_of(self.scheduler, num_inference_steps, photo.device)
        scale = self.config.detail_scale
        latent = self.begin((z_low - z_inter) * scale if self.config.adds_detail else z_low, start, generator)
        conditions = [z_low, z_inter] if self.sees_both else [z_low]
        latent = self.denoise(latent, conditions, text, guidance_scale, tiles, generator, callback_on_step_end)
        latent = z_inter + latent / scale if self.config.adds_detail else latent
        image = self.decode(latent, photo, tiles, fidelity)
        if self.config.adds_detail:
            image = guide + image - self.decode(z_inter, photo, tiles, fidelity)

        image = ((image.float() + 1) / 2)[..., :height, :width].to(low.device)
        self.maybe_free_model_hooks()
        return match_colour(image, low, colour).clamp(0, 1)

    @property
    def sees_both(self) -> bool:
        """Whether the condition is made of the intermediate result too."""
        return bool(self.unet.config.condition_channels == 2 * self.structure.config.out_channels)

    def remember_schedule(self) -> None:
        """Take what the scheduler does as what the U-Net learns with."""
        self.register_to_config(schedule=schedule_of(self.scheduler))

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Refused: it loads weights only for calls of their own layer, and SFT layers use those of several at once."""
        raise InputError("the diffusion stage cannot be offloaded layer by layer; use enable_model_cpu_offload()")

    # -------------------------------------------------------------- the steps

    def embed(self, prompt: str, negative_prompt: str, guidance_scale: float) -> Tensor:
        """The prompts for the U-Net: [1 or 2, tokens, width], the negative one first; zeros for a network without."""
        prompts = [negative_prompt, prompt] if guidance_scale > 1 else [prompt]
        if self.text_encoder is None:
            if any(prompts) or guidance_scale > 1:
                raise InputError("this model was trained without text: leave out prompts and guidance_scale")
            return torch.zeros(
                1, 1, self.unet.config.cross_attention_dim, device=self._execution_device, dtype=self.unet.dtype
            )
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        embedded: Tensor = self.text_encoder(tokens.input_ids.to(self._execution_device))[0]
        return embedded.to(self.unet.dtype)

    def encode(self, image: Tensor, tiles: list[Tile]) -> Tensor:
        """[1, 3, H, W] in [-1, 1] -> scaled latent [1, c, H/8, W/8], the middle of the encoder's distribution."""
        latent = blended(tiles, UNIT // 8, lambda part: self.vae.encode(image[..., *part(UNIT)]).latent_dist.mode())
        return latent.to(self.unet.dtype) * self.vae.config.scaling_factor

    def begin(self, z_low: Tensor, start: str, generator: torch.Generator | None) -> Tensor:
        """The latent before the first step; the noise is the same in every dtype."""
        noise = randn_tensor(z_low.shape, generator=generator, device=z_low.device).to(z_low.dtype)
        if start == "noise":
            return noise * self.scheduler.init_noise_sigma
        started: Tensor = self.scheduler.add_noise(z_low, noise, self.scheduler.timesteps[:1])
        return started

    def denoise(
        self,
        latent: Tensor,
        conditions: list[Tensor],
        text: Tensor,
        guidance_scale: float,
        tiles: list[Tile],
        generator: torch.Generator | None,
        callback: Callable[..., Any] | None,
    ) -> Tensor:
        """The latent after the last step."""
        extra = {"generator": generator} if takes_generator(self.scheduler) else {}
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            scaled = self.scheduler.scale_model_input(latent, timestep)

            def predict(part: "Part", scaled: Tensor = scaled, timestep: Tensor = timestep) -> Tensor:
                maps = self.structure([z[..., *part(UNIT // 8)] for z in conditions], timestep)
                x = scaled[..., *part(UNIT // 8)].expand(len(text), -1, -1, -1)
                prediction: Tensor = self.unet(x, timestep, text, maps).sample
                return prediction if len(text) == 1 else guided(prediction, guidance_scale)

            prediction = blended(tiles, UNIT // 8, predict)
            latent = self.scheduler.step(prediction, timestep, latent, **extra).prev_sample
            if callback is not None:
                latent = (callback(self, step, timestep, {"latents": latent}) or {}).get("latents", latent)
        return latent

    def decode(self, latent: Tensor, photo: Tensor, tiles: list[Tile], fidelity: float) -> Tensor:
        """Scaled latent -> image [1, 3, H, W] in [-1, 1]; a wrapping decoder sees the photo's features."""
        latent = latent.to(self.vae.dtype) / self.vae.config.scaling_factor

        def image_of(part: "Part") -> Tensor:
            z = latent[..., *part(UNIT // 8)]
            if not isinstance(self.vae, WrappingAutoencoder):
                image: Tensor = self.vae.decode(z).sample
                return image
            _, features = self.vae.encode_with_features(photo[..., *part(UNIT)])
            return self.vae.decode_with_features(z, features, fidelity)

        return blended(tiles, UNIT, image_of)


# ------------------------------------------------------------------ details

Part = Callable[[int], tuple[slice, slice]]  # the rows and columns of a tile where a unit has so many


def blended(tiles: list[Tile], scale: int, call: Callable[[Part], Tensor]) -> Tensor:
    """What `call` makes of every tile, in one map with `scale` pixels to a unit; neighbours fade into each other."""
    if len(tiles) == 1:
        return call(lambda unit: place_of(tiles[0], unit))
    total: Tensor | None = None
    for tile in tiles:
        piece = call(lambda unit, tile=tile: place_of(tile, unit))  # type: ignore[misc]
        if total is None:
            total = piece.new_zeros(*piece.shape[:2], tiles[-1].rows.stop * scale, tiles[-1].columns.stop * scale)
        weights = tile.rows.weights(scale)[:, None] * tile.columns.weights(scale)
        total[..., *place_of(tile, scale)] += piece * weights.to(piece)
    assert total is not None
    return total


def place_of(tile: Tile, unit: int) -> tuple[slice, slice]:
    return (
        slice(tile.rows.start * unit, tile.rows.stop * unit),
        slice(tile.columns.start * unit, tile.columns.stop * unit),
    )


def guided(prediction: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: from the negative prompt's prediction through the prompt's, and beyond."""
    negative, positive = prediction.chunk(2)
    return negative + scale * (positive - negative)


def check(low: Tensor, intermediate: Tensor, start: str, fidelity: float, colour: str) -> None:
    if low.ndim != 4 or low.shape[:2] != (1, 3) or low.shape != intermediate.shape:
        raise InputError(
            f"the photo is {list(low.shape)} and the intermediate result {list(intermediate.shape)}; both must be "
            "[1, 3, height, width], of one size"
        )
    if start not in ("low", "noise"):
        raise InputError(f"start is {start!r}; it is low or noise")
    check_match_colour(low, low, colour)
    if not 0 <= fidelity <= 1:
        raise InputError(f"fidelity is {fidelity}; it must lie in [0, 1]")
