"""What the attention layers of a network do in the present pass, and what they remember for the next one.

    off      what they always did
    record   plain attention; keys, values and mean directions are noted: the source chain's pass
    inject   keys, values and mean directions of the references are used: the target chain's pass
    paired   both in one batch, [target_u, source_u, ..., target_c, source_c, ...]

The mean direction ȳ = mean_j ĥ_ref,j is all that the gate needs to know of a reference: ⟨ĥ_i, ȳ⟩ is stretched to
[0, 1], so the length of ȳ does not matter and `ops.cosine_gate` takes it for a reference of one token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ragsr.ops import cosine_gate, separate_attention
from ragsr.ops.cosine import unit
from ragsr.ops.gate import mean_directions

GateListener = Callable[[str, Tensor], None]  # name of the tap, float32 [B, R, H, W]
# name of the layer, queries [B, heads, N, D], reference keys [B, heads, ΣM, D], gate [B, R, N], [M_1, ..., M_R]
AttentionListener = Callable[[str, Tensor, Tensor, Tensor, list[int]], None]


@dataclass
class Record:
    """What one pass of a source chain leaves: all that a target takes from this reference at this step."""

    keys: dict[str, Tensor] = field(default_factory=dict)  # per layer [B, heads, M, D]
    values: dict[str, Tensor] = field(default_factory=dict)  # the same
    directions: dict[str, Tensor] = field(default_factory=dict)  # per tap float32 [B, 1, C]

    def flat(self) -> dict[str, Tensor]:
        return {f"{kind}/{n}": x for kind in ("keys", "values", "directions") for n, x in getattr(self, kind).items()}

    @classmethod
    def from_flat(cls, tensors: dict[str, Tensor]) -> "Record":
        record = cls()
        for name, x in tensors.items():
            kind, name = name.split("/", 1)
            getattr(record, kind)[name] = x
        return record

    def to(self, device: torch.device | str) -> "Record":
        """A copy there; on CUDA it is made in the background, in pinned memory on the CPU's side."""
        return self.from_flat({name: x.to(device, non_blocking=True) for name, x in self.flat().items()})

    def row(self, i: int) -> "Record":
        """What row i of the pass left, without a copy."""
        return self.from_flat({name: x[i : i + 1] for name, x in self.flat().items()})

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.flat().values())


@dataclass(frozen=True)
class Sources:
    """The records of R references at one step, side by side."""

    keys: dict[str, Tensor]  # per layer [B, heads, ΣM, D]
    values: dict[str, Tensor]
    lengths: dict[str, list[int]]  # per layer [M_1, ..., M_R]
    directions: dict[str, Tensor]  # per tap [B, R, C]
    weights: Tensor  # float32 [R]: strength times share

    @classmethod
    def join(cls, records: Sequence[Record], weights: Tensor) -> "Sources":
        first = records[0]
        lengths = {name: [r.keys[name].shape[2] for r in records] for name in first.keys}
        keys, values = ({n: joined([getattr(r, kind)[n] for r in records], 2) for n in first.keys} for kind in KINDS)
        directions = {n: joined([r.directions[n] for r in records], 1) for n in first.directions}
        return cls(keys, values, lengths, directions, weights)


KINDS = ("keys", "values")


def joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class PassEnds(Exception):
    """Raised from within a network: its prediction is not needed."""


class ChainState:
    """Shared by the layers and taps of one network. Outside its context managers everything is as it always was."""

    def __init__(self, last_layer: str = "") -> None:
        self.last_layer = last_layer  # of those under control, in the order of execution
        self.mode = "off"
        self.on_gate: GateListener | None = None  # told every gate of a target
        self.on_attention: AttentionListener | None = None  # told what a target asks its references
        self._clear()

    def _clear(self) -> None:
        self.mode = "off"
        self.whole = True
        self.record = Record()
        self.records: list[Record] = []  # of the sources of a batch, where they are kept
        self.sources: Sources | None = None
        self.weights: Tensor | None = None
        self.gates: dict[str, Tensor] = {}  # per tap float32 [B, R, H, W]

    @contextmanager
    def recording(self, whole: bool = True) -> Iterator[Record]:
        """Within, a pass is that of a source chain, and what it leaves is in the record.

        A pass that need not be `whole` ends where the last keys and values are known, and so does the block within.
        """
        with self._in("record"), suppress(PassEnds):
            self.whole = whole
            yield self.record

    @contextmanager
    def injecting(self, sources: Sources) -> Iterator[None]:
        """Within, passes are those of a target chain that looks at `sources`."""
        with self._in("inject"):
            self.sources, self.weights = sources, sources.weights
            yield

    @contextmanager
    def paired(self, weights: Tensor, keep: bool = False) -> Iterator[list[Record]]:
        """Within, batches hold a target before each R sources; `weights` float32 [R] are strength times share.

        With `keep`, what each of them leaves is in the records [R], of which there are none otherwise.
        """
        with self._in("paired"):
            self.weights = weights
            self.records = [Record() for _ in range(weights.shape[0])] if keep else []
            yield self.records

    @contextmanager
    def _in(self, mode: str) -> Iterator[None]:
        if self.mode != "off":
            raise RuntimeError(f"the chains are in a pass ({self.mode}) and cannot begin another ({mode})")
        self.mode = mode
        try:
            yield
        finally:
            self._clear()

    # -------------------------------------------------------------- what taps and layers call

    def tap(self, name: str, features: Tensor) -> None:  # [B, C, H, W]
        """Note the mean direction of a source, or compute the gate of a target."""
        if self.mode == "off":
            return
        tokens = features.flatten(2).transpose(1, 2)  # [B, N, C]
        if self.mode == "record":
            self.record.directions[name] = mean_directions(unit(tokens), [tokens.shape[1]])
            return
        gate = self._paired_gate(name, tokens) if self.mode == "paired" else self._injected_gate(name, tokens)
        self.gates[name] = gate.unflatten(2, features.shape[2:])
        if self.on_gate is not None:
            self.on_gate(name, self.gates[name])

    def _injected_gate(self, name: str, tokens: Tensor) -> Tensor:
        assert self.sources is not None
        directions = self.sources.directions[name].to(tokens.dtype)
        directions = directions.expand(tokens.shape[0], -1, -1)
        return cosine_gate(tokens, directions, [1] * directions.shape[1])

    def _paired_gate(self, name: str, tokens: Tensor) -> Tensor:
        groups = self._grouped(tokens)  # [halves, 1 + R, N, C]
        sources = groups[:, 1:]
        for r, record in enumerate(self.records):
            record.directions[name] = mean_directions(unit(sources[:, r]), [sources.shape[2]])
        return cosine_gate(groups[:, 0], sources.flatten(1, 2), [sources.shape[2]] * sources.shape[1])

    def _grouped(self, x: Tensor) -> Tensor:
        """[halves · (1 + R), ...] -> [halves, 1 + R, ...]: the target and its sources."""
        assert self.weights is not None
        return x.unflatten(0, (-1, 1 + self.weights.shape[0]))

    def attend(self, layer: str, tap: str, weight: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention [B, heads, N, D] in the present mode."""
        match self.mode:
            case "inject":
                return self._attend_injected(layer, self._gate(tap, q.shape[2], weight), q, k, v)
            case "paired":
                return self._attend_paired(layer, self._gate(tap, q.shape[2], weight), q, k, v)
            case _:
                self.record.keys[layer], self.record.values[layer] = k, v
                if layer == self.last_layer and not self.whole:
                    raise PassEnds
                return F.scaled_dot_product_attention(q, k, v)

    def _attend_injected(self, layer: str, gate: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.sources is not None
        k_ref, v_ref = (kept[layer].expand(q.shape[0], -1, -1, -1) for kept in (self.sources.keys, self.sources.values))
        lengths = self.sources.lengths[layer]
        if self.on_attention is not None:
            self.on_attention(layer, q, k_ref, gate, lengths)
        return separate_attention(q, k, v, k_ref, v_ref, gate, lengths)

    def _attend_paired(self, layer: str, gate: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q_own, q_ref), (k_own, k_ref), (v_own, v_ref) = (
            (groups[:, 0], groups[:, 1:]) for groups in map(self._grouped, (q, k, v))
        )
        for r, record in enumerate(self.records):
            record.keys[layer], record.values[layer] = k_ref[:, r], v_ref[:, r]
        k_all, v_all = (x.transpose(1, 2).flatten(2, 3) for x in (k_ref, v_ref))  # [halves, heads, R·M, D]
        lengths = [k_ref.shape[3]] * k_ref.shape[1]
        if self.on_attention is not None:
            self.on_attention(layer, q_own, k_all, gate, lengths)
        own = separate_attention(q_own, k_own, v_own, k_all, v_all, gate, lengths)
        q_flat, k_flat, v_flat = (x.flatten(0, 1) for x in (q_ref, k_ref, v_ref))  # five dimensions would not be fused
        ref = F.scaled_dot_product_attention(q_flat, k_flat, v_flat).unflatten(0, q_ref.shape[:2])  # each sees itself
        return torch.cat((own[:, None], ref), dim=1).flatten(0, 1)

    def _gate(self, tap: str, tokens: int, weight: float) -> Tensor:
        """s · w · a_r · M_r on the layer's grid: float32 [B, R, tokens]."""
        assert self.weights is not None
        return weight * self.weights[:, None] * on_grid(self.gates[tap], tokens).flatten(2)


def on_grid(
    gate: Tensor,  # [B, R, H, W]
    tokens: int,
) -> Tensor:  # [B, R, h, w], h · w = tokens
    """The gate on a grid of another resolution and the same shape, bilinearly. Raises `ValueError` if there is none."""
    height, width = gate.shape[2:]
    if tokens == height * width:
        return gate
    h = max(1, round(height * (tokens / (height * width)) ** 0.5))
    if tokens % h or abs(tokens // h * height - h * width) > max(height, width):
        raise ValueError(f"a gate of {height}x{width} does not fit a layer of {tokens} tokens; their shapes must agree")
    return F.interpolate(gate, (h, tokens // h), mode="bilinear", align_corners=False)
