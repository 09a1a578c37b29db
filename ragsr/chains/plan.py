"""When, where and how strongly a reference is injected.

    g = s · a_r · w_layer · M_r        strength, share of reference r, weight by depth, similarity (`ops.cosine_gate`)

    preset            steps        layers               w_layer                 s     noise         gate features
    paper             last 40 %    decoder              1                       0.5   independent   block input
    released-seesr    all          decoder              ½(1 − cos(π·i / L))     0.6   independent   block input
    released-supir    all          decoder              1                       1.0   shared        residual input

The paper's settings and those of the two programs that its authors published differ; the numbers they printed come from
the programs. In SeeSR's program i counts the L = 18 self-attentions of the decoder from 0, so the first takes nothing.

Source: ReFIR Sec. 3.3 and App. B.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ragsr.errors import InputError

LAYERS = ("decoder", "middle", "encoder", "all")
WEIGHTS = ("constant", "cosine")
NOISE = ("independent", "shared")
GATE_SOURCES = ("block", "resnet")
ROUNDING = 1e-9  # 0.6 · 5 is 3.0000000000000004 or 2.9999…: fractions of steps are meant exactly

T = TypeVar("T")


@dataclass(frozen=True)
class ChainPlan:
    """One way to inject. Raises `InputError` for values that make no sense.

    steps         the first and last fraction of the denoising steps in which the reference is injected
    layers        which self-attentions: "decoder", "middle", "encoder", "all", or numbers among those of the decoder
    layer_weight  "constant", or "cosine": from 0 at the first layer towards 1 at the last
    scale         the strength s in [0, 1]; 0 is the plain model
    noise         "shared": the source chain draws the numbers that the target chain draws; "independent": its own
    gate_source   features for the gate: "block", what enters the layer's block before it is joined with the skip
                  connection, or "resnet", what enters the residual block before the layer
    """

    steps: tuple[float, float] = (0.6, 1.0)
    layers: str | tuple[int, ...] = "decoder"
    layer_weight: Literal["constant", "cosine"] = "constant"
    scale: float = 0.5
    noise: Literal["independent", "shared"] = "independent"
    gate_source: Literal["block", "resnet"] = "block"

    def __post_init__(self) -> None:
        check_plan(self)

    def injects(self, step: int, steps: int) -> bool:
        """Is the reference injected in this step, counted from 0? At least one step always is."""
        return step in self.injected(steps)

    def injected(self, steps: int) -> range:
        """The steps in which the reference is injected."""
        first = min(math.floor(self.steps[0] * steps + ROUNDING), steps - 1)
        return range(first, max(math.ceil(self.steps[1] * steps - ROUNDING), first + 1))

    def weigh(self, layers: Sequence[T]) -> list[tuple[T, float]]:
        """Layers in the order of the network with their weights; those of weight 0 are left out."""
        weights = (self.weight(i, len(layers)) for i in range(len(layers)))
        return [(layer, weight) for layer, weight in zip(layers, weights, strict=True) if weight > 0]

    def weight(self, i: int, count: int) -> float:
        return 1.0 if self.layer_weight == "constant" else 0.5 * (1 - math.cos(math.pi * i / count))


def check_plan(plan: ChainPlan) -> None:
    start, stop = plan.steps
    if not 0 <= start < stop <= 1:
        raise InputError(f"steps is {plan.steps}; it must be two fractions of the run, 0 <= first < last <= 1")
    if not 0 <= plan.scale <= 1:
        raise InputError(f"scale is {plan.scale}; the strength of a reference lies in [0, 1]")
    if isinstance(plan.layers, str) and plan.layers not in LAYERS:
        raise InputError(f"layers is {plan.layers!r}; it is one of {', '.join(LAYERS)}, or numbers of decoder layers")
    for name, value, allowed in (
        ("layer_weight", plan.layer_weight, WEIGHTS),
        ("noise", plan.noise, NOISE),
        ("gate_source", plan.gate_source, GATE_SOURCES),
    ):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; it is {' or '.join(allowed)}")


PRESETS = {
    "paper": ChainPlan(),
    "released-seesr": ChainPlan(steps=(0.0, 1.0), layer_weight="cosine", scale=0.6),
    "released-supir": ChainPlan(steps=(0.0, 1.0), scale=1.0, noise="shared", gate_source="resnet"),
}


def chain_plan(plan: str | ChainPlan) -> ChainPlan:
    """A plan by the name of its preset; a plan is given back as it is. Raises `InputError` for an unknown name."""
    if isinstance(plan, ChainPlan):
        return plan
    if plan not in PRESETS:
        raise InputError(
            f"there is no plan {plan!r}; there are: {', '.join(PRESETS)}, or build a ragsr.chains.ChainPlan"
        )
    return PRESETS[plan]
