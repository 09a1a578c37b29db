"""Where a restored photo comes from: arrays, and a sheet that shows them.

    gates   how alike each place of the photo is to a reference, per stage: the mean of M_r over the injected steps;
            0 in tiles that do not look at it
    share   how much each pixel took from a reference: the mean of g_r = s · w · a_r · M_r over layers and those steps
    drawn   which places j of a reference were looked at, in the plan's last layer, over those steps:

                drawn_j = Σ_i g_i · A_ij / Σ_i g_i,     A = softmax(Q K_refᵀ / √D), the mean over heads

All are of the conditional half of the guidance. A share is that of the attention's output: the rest of the network,
which knows many photos, works on both. A share of 0 says that a detail is not from a reference; one of 1 does not prove
that it is. The weights A are computed again for `drawn`, some queries at a time, since fused attention keeps none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ragsr.chains import ChainPlan, Host, Layer, chosen_layers
from ragsr.image import tensor_to_image
from ragsr.pipelines.refir_references import Region
from ragsr.pipelines.refir_tiles import Place
from ragsr.pipelines.refsr import Reference
from ragsr.sheet import Cell, contact_sheet

AT_ONCE = 1 << 24  # attention weights in memory
DIM = 0.2  # of its brightness is left of a place that was not looked at


@dataclass(frozen=True)
class Explanation:
    """Arrays on the CPU, float32; R references in the order of the output."""

    gates: dict[str, Tensor]  # per stage [R, h, w] in [0, 1], on the latent's grid
    share: Tensor  # [R, H, W] in [0, 1], pixels of the result
    drawn: list[Tensor]  # R times [h, w], each with the sum 1, on the layer's grid over the reference
    layer: str  # where `drawn` was found
    references: list[Tensor]  # R times [1, 3, h, w] in [0, 1], as the network saw them

    def sheet(self, result: Image.Image) -> Image.Image:
        """The result and its share; then for each reference the places looked at and its gates."""
        share = self.share.sum(0)
        told = f"from references: {share.mean():.0%}, at most {share.max():.0%} (black 0%, white 100%)"
        rows: list[list[Cell]] = [[(result, "result"), (heat(share), told)]]
        for r, (picture, drawn) in enumerate(zip(self.references, self.drawn, strict=True)):
            row = [(tensor_to_image(picture), f"reference {r + 1}"), (lit(picture, drawn), "bright: drawn from")]
            rows.append(row + [(heat(gate[r]), f"gate {stage}") for stage, gate in self.gates.items()])
        return contact_sheet(rows)

    def share_picture(self) -> Image.Image:
        """The share of all references together, in the result's size: white is 100 %."""
        return tensor_to_image(self.share.sum(0).clamp(0, 1).expand(1, 3, -1, -1))


@dataclass(frozen=True)
class ReFIROutput:
    """What a run gives."""

    images: Any  # of the output type asked for; one image
    references: list[Reference]  # those that were used, in the order of the gates
    weights: list[float]  # strength times share of each: the mean over the regions
    regions: list[Region] = field(default_factory=list)  # what each reference counts for where
    rejected: list[Reference] = field(default_factory=list)  # found in the gallery, and too little alike
    gates: dict[str, Tensor] | None = None  # per tap float32 [R, h, w] on the latent's grid, the mean over steps
    share: Tensor | None = None  # with the gates: float32 [R, H, W], how much each pixel took from each reference
    explanation: Explanation | None = None  # on request


def heat(values: Tensor) -> Image.Image:  # [h, w] in [0, 1]
    """Black, red, yellow, white."""
    return tensor_to_image(torch.stack([3 * values - i for i in range(3)])[None].clamp(0, 1))


def lit(picture: Tensor, drawn: Tensor) -> Image.Image:  # [1, 3, H, W], [h, w]
    """The picture, as bright as each place was looked at beside the most looked-at one."""
    seen = drawn / drawn.max().clamp(min=torch.finfo(drawn.dtype).tiny)
    seen = F.interpolate(seen[None, None], picture.shape[-2:], mode="bilinear")
    return tensor_to_image(picture * (DIM + (1 - DIM) * seen))


# ------------------------------------------------------------------ during the run


class DrawnFrom:
    """Listens to one layer: which tokens of the references its queries look at."""

    def __init__(self, host: Host, plan: ChainPlan) -> None:
        self.layer: Layer = plan.weigh(chosen_layers(host, plan))[-1][0]
        self.sums: dict[int, Tensor] = {}  # per reference [M]
        self.used: Sequence[int] = ()

    def clear(self) -> "DrawnFrom":
        """Forget all, for a run that begins again."""
        self.sums.clear()
        return self

    def look_at(self, place: Place, used: Sequence[int], weights: Tensor) -> None:
        """Which references are looked at next."""
        self.used = used

    def note(self, layer: str, q: Tensor, k_ref: Tensor, gate: Tensor, lengths: list[int]) -> None:
        if layer != self.layer.name:
            return
        keys = k_ref[-1].split(lengths, dim=1)
        for r, k, g in zip(self.used, keys, gate[-1], strict=True):
            mass = attention_mass(q[-1], k, g)
            self.sums[r] = self.sums[r] + mass if r in self.sums else mass

    def maps(self, latents: Sequence[Tensor]) -> list[Tensor]:  # of the references, [1, C, h, w]
        """Per reference [h, w] on the layer's grid, with the sum 1."""
        return [self._map(self.sums.get(r), latent) for r, latent in enumerate(latents)]

    def _map(self, total: Tensor | None, latent: Tensor) -> Tensor:
        height, width = (-(-side // self.layer.stride) for side in latent.shape[-2:])
        if total is None:  # no tile looked at it
            return torch.zeros(height, width)
        return (total / total.sum().clamp(min=torch.finfo(total.dtype).tiny)).view(height, width).cpu()


def attention_mass(
    q: Tensor,  # [heads, N, D]
    k: Tensor,  # [heads, M, D]
    gate: Tensor,  # [N]
) -> Tensor:  # float32 [M]
    """Σ_i gate_i · softmax(q kᵀ / √D)_ij, the mean over heads, in memory that does not grow with N."""
    heads, tokens, depth = k.shape
    rows = max(1, AT_ONCE // (heads * tokens))
    total = torch.zeros(tokens, device=q.device)
    for queries, weights in zip(q.float().split(rows, dim=1), gate.float().split(rows), strict=True):
        attention = torch.softmax(queries @ k.float().mT * depth**-0.5, dim=-1)
        total += torch.einsum("hnm,n->m", attention, weights) / heads
    return total


# ------------------------------------------------------------------ after it


def shares(
    host: Host,
    plan: ChainPlan,
    taken: dict[str, Tensor],  # per tap [R, h, w]: strength times share times gate
    size: tuple[int, int],  # of the result in pixels
) -> Tensor:  # float32 [R, H, W]
    """How much each pixel took from each reference: the mean over the plan's layers, enlarged."""
    layers = plan.weigh(chosen_layers(host, plan))
    mean = sum((weight * taken[layer.tap_name] for layer, weight in layers), torch.zeros(())) / len(layers)
    large = F.interpolate(mean[None], scale_factor=host.latent_stride, mode="bilinear")[0]
    return large[:, : size[0], : size[1]]
