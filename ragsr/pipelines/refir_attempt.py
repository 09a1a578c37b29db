"""One attempt of ReFIR to restore a photo, with these references, and the choice among several attempts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ragsr.chains import ChainPlan, Mode, Sampler
from ragsr.pipelines import refir_inputs as inputs
from ragsr.pipelines.refir_denoise import Denoiser, Run
from ragsr.pipelines.refir_explain import DrawnFrom, Explanation, ReFIROutput, shares
from ragsr.pipelines.refir_fallback import most_natural
from ragsr.pipelines.refir_memory import fitting_tile
from ragsr.pipelines.refir_tiles import GateMaps

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


def attempt(pipe: "ReFIRPipeline", asked: Request, found: list[inputs.Chosen]) -> ReFIROutput:
    """The photo restored with the references of `found`, which may be none; its images are the latent."""
    used, pictures = pipe.load_references(found, asked.photo)
    mode, canvas = asked.mode, inputs.fit(asked.photo, pipe.host)
    if asked.compat and pictures:
        mode, canvas, pictures = "batched", *inputs.one_canvas(canvas, pictures)
    inputs.check_sizes(mode, canvas, pictures)
    prompt, negative, told = asked.prompts
    target = pipe.encode(canvas, prompt, negative, asked.seed)
    sources = [pipe.encode(picture, told, negative, asked.seed) for picture in pictures]
    denoiser = Denoiser(
        pipe.host,
        pipe.cache,
        run_of(pipe, asked, mode, [canvas, *pictures]),
        target,
        sources,
        weights=[one.weight for one in found],
        gates=GateMaps() if asked.wants_gates and sources else None,
        drawn=DrawnFrom(pipe.host, asked.plan) if asked.explains and sources else None,
        progress=pipe.progress,
    )
    output = ReFIROutput(denoiser.latent(), used, list(denoiser.weights))
    return with_gates(output, asked, pipe, denoiser, pictures)


def run_of(pipe: "ReFIRPipeline", asked: Request, mode: Mode, pictures: list[Tensor]) -> Run:
    """The settings of the run, with its tile: the first of `pictures` is the canvas."""
    size, *others = [(t.shape[-2], t.shape[-1]) for t in pictures]
    host, guidance, tile = pipe.host, asked.guidance if asked.guidance > 1 else None, asked.tile
    if mode == "batched":  # can do nothing but the whole picture
        tile = None
    elif tile == "auto":
        tile = fitting_tile(host, asked.plan, size, others, 1 + (guidance is not None), host.device)
    elif tile is not None:
        tile = inputs.checked_tile(tile, host)
    return Run(asked.plan, mode, asked.sampler, guidance, asked.seed, tile, asked.callback)


def with_gates(
    output: ReFIROutput, asked: Request, pipe: "ReFIRPipeline", run: Denoiser, pictures: list[Tensor]
) -> ReFIROutput:
    """The output with what was listened to."""
    if run.gates is None:
        return output
    gates, size = run.gates.means(), (asked.photo.shape[-2], asked.photo.shape[-1])
    share = shares(pipe.host, asked.plan, gates, output.weights, size)
    explanation = None
    if run.drawn is not None:
        drawn = run.drawn.maps([source.clean for source in run.sources])
        explanation = Explanation(gates, share, drawn, run.drawn.layer.name, pictures)
    return replace(output, gates=gates, share=share, explanation=explanation)


def best_of(pipe: "ReFIRPipeline", asked: Request, attempts: list[ReFIROutput], output_type: str) -> ReFIROutput:
    """The attempt whose picture is the most natural, in the output type that was asked for."""
    if len(attempts) > 1:
        pictures = [pipe.decode(one.images, asked.photo, asked.colour, "pt") for one in attempts]
        attempts = [attempts[most_natural(pictures)]]
    (best,) = attempts
    if output_type == "latent":
        return best
    return replace(best, images=pipe.decode(best.images, asked.photo, asked.colour, output_type))
