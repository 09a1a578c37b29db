"""One attempt of ReFIR to restore a photo, with these references, and the choice among several attempts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ragsr.chains import ChainPlan, Mode, Sampler
from ragsr.pipelines import refir_inputs as inputs
from ragsr.pipelines.refir_denoise import Denoiser, Run
from ragsr.pipelines.refir_explain import DrawnFrom, Explanation, ReFIROutput, shares
from ragsr.pipelines.refir_fallback import most_natural
from ragsr.pipelines.refir_memory import Size, fitting_tile
from ragsr.pipelines.refir_prompts import prompt_for
from ragsr.pipelines.refir_references import USEFUL, Chosen
from ragsr.pipelines.refir_tiles import Box, GateMaps, tile_boxes

if TYPE_CHECKING:
    from ragsr.pipelines.refir import ReFIRPipeline


@dataclass(frozen=True)
class Request:
    """What is the same in every attempt to restore a photo."""

    photo: Tensor  # [1, 3, H, W] in [0, 1], at the size of the result
    plan: ChainPlan
    mode: Mode
    compat: bool
    sampler: Sampler
    guidance: float
    seed: int
    prompts: tuple[Any, Any, Any]  # of the photo, negative, of the references
    tile: int | str | None
    colour: str
    callback: Callable[..., Any] | None
    wants_gates: bool
    explains: bool


def with_regions(pipe: "ReFIRPipeline", asked: Request, references_per: str, k: int) -> tuple[Request, list[Box]]:
    """The parts of the result for which references are sought, and the request, in which their tile is settled."""
    height, width = asked.photo.shape[-2:]
    if references_per == "image":
        return asked, [(0, 0, width, height)]
    canvas = inputs.fit(asked.photo, pipe.host)
    size, side = (canvas.shape[-2], canvas.shape[-1]), round(max(height * width, USEFUL) ** 0.5)
    tile = tile_of(pipe, asked, size, [(side, side)] * k)  # as large as any reference is used
    boxes = tile_boxes(*size, tile, pipe.host.latent_stride)
    return replace(asked, tile=tile), [(x, y, min(right, width), min(low, height)) for x, y, right, low in boxes]


class Attempt(NamedTuple):
    """A photo restored, as latents."""

    output: ReFIROutput  # its images are the restored latent
    clean: Tensor  # the photo's own


def attempt(pipe: "ReFIRPipeline", asked: Request, chosen: Chosen) -> Attempt:
    """The photo restored with the chosen references, of which there may be none."""
    used, pictures = pipe.load_references(chosen, asked.photo)
    mode, canvas = asked.mode, inputs.fit(asked.photo, pipe.host)
    if asked.compat and pictures:
        mode, canvas, pictures = "batched", *inputs.one_canvas(canvas, pictures)
    size = (canvas.shape[-2], canvas.shape[-1])
    run = Run(
        asked.plan,
        mode,
        asked.sampler,
        asked.guidance if asked.guidance > 1 else None,
        asked.seed,
        tile_of(pipe, asked, size, [(t.shape[-2], t.shape[-1]) for t in pictures]),
        asked.callback,
    )
    *_, width, height = tile_boxes(*size, run.tile, pipe.host.latent_stride)[0]
    inputs.check_sizes(mode, (height, width), pictures)
    prompt, negative, told = asked.prompts
    target = pipe.encode(canvas, prompt, negative, asked.seed)
    sources = [
        pipe.encode(picture, prompt_for(told, picture, one.path), negative, asked.seed, once=True)
        for picture, one in zip(pictures, used, strict=True)
    ]
    latent_size = target.clean.shape[-2], target.clean.shape[-1]
    denoiser = Denoiser(
        pipe.host,
        pipe.cache,
        run,
        target,
        sources,
        regions=chosen.regions,
        gates=GateMaps(len(sources), latent_size) if asked.wants_gates and sources else None,
        drawn=DrawnFrom(pipe.host, asked.plan) if asked.explains and sources else None,
        progress=pipe.progress,
    )
    output = ReFIROutput(denoiser.latent(), used, chosen.weights, chosen.regions, chosen.rejected)
    return Attempt(with_gates(output, asked, pipe, denoiser, pictures), target.clean)


def tile_of(pipe: "ReFIRPipeline", asked: Request, size: Size, references: Sequence[Size]) -> int | None:
    """Pixels of a tile's side for pictures of these sizes; None is the whole picture."""
    if asked.tile is None:
        return None
    if asked.tile != "auto":
        return inputs.checked_tile(asked.tile, pipe.host)
    if asked.mode == "batched" or asked.compat:  # the references have the size of something that was asked for
        return None
    return fitting_tile(pipe.host, asked.plan, size, references, 1 + (asked.guidance > 1), pipe.host.device)


def with_gates(
    output: ReFIROutput, asked: Request, pipe: "ReFIRPipeline", run: Denoiser, pictures: list[Tensor]
) -> ReFIROutput:
    """The output with what was listened to."""
    if run.gates is None:
        return output
    gates, size = run.gates.means(), (asked.photo.shape[-2], asked.photo.shape[-1])
    share = shares(pipe.host, asked.plan, run.gates.means_taken(), size)
    explanation = None
    if run.drawn is not None:
        drawn = run.drawn.maps([source.clean for source in run.sources])
        explanation = Explanation(gates, share, drawn, run.drawn.layer.name, pictures)
    return replace(output, gates=gates, share=share, explanation=explanation)


def best_of(pipe: "ReFIRPipeline", asked: Request, attempts: list[Attempt], output_type: str) -> ReFIROutput:
    """The attempt whose picture is the most natural, in the output type that was asked for."""

    def decoded(one: Attempt, output_type: str) -> Any:
        return pipe.decode(one.output.images, one.clean, asked.photo, asked.colour, output_type)

    if len(attempts) > 1:
        attempts = [attempts[most_natural([decoded(one, "pt") for one in attempts])]]
    (best,) = attempts
    return best.output if output_type == "latent" else replace(best.output, images=decoded(best, output_type))
