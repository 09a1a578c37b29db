"""The attention processor that carries injection, and the context in which a network has it.

Processors are installed once per run and obey a state object: setting them anew in each step would walk the network
every time. While the state is off, each calls the processor that it replaced.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from ragsr.chains.host import Host, Layer
from ragsr.chains.plan import ChainPlan
from ragsr.chains.state import ChainState
from ragsr.errors import InputError


@contextmanager
def installed(host: Host, plan: ChainPlan) -> Iterator[ChainState]:
    """The network of `host` with the plan's layers under the control of the state that is yielded.

    On leaving, also by an exception, every processor is the one it was. Raises `InputError` if the network has no
    layer of the plan, or one that injection cannot serve.
    """
    layers = plan.weigh(chosen_layers(host, plan))
    if not layers:
        raise InputError(f"every layer of {plan} has weight 0; a cosine needs two layers or more")
    state = ChainState(last_layer=layers[-1][0].name)
    with ExitStack() as undo:
        taps = {}
        for layer, weight in layers:
            if reason := why_not(layer.attention):
                raise InputError(f"{host.name}: {layer.name} {reason}; leave it out of the plan's layers")
            undo.callback(layer.attention.set_processor, layer.attention.processor)
            layer.attention.set_processor(ReferenceAttention(layer, weight, state))
            taps[layer.tap_name] = layer.tap
        for name, module in taps.items():
            undo.callback(module.register_forward_pre_hook(tap_hook(state, name), with_kwargs=True).remove)
        yield state


def chosen_layers(host: Host, plan: ChainPlan) -> list[Layer]:
    """The plan's self-attentions in the order of execution."""
    layers = host.self_attentions(plan.gate_source)
    part = plan.layers if isinstance(plan.layers, str) else "decoder"
    found = [layer for layer in layers if part in ("all", layer.part)]
    if not found:
        raise InputError(f"{host.name} has no self-attention in its {part}, so no reference can be injected there")
    return found if isinstance(plan.layers, str) else numbered(found, plan.layers)


def numbered(layers: Sequence[Layer], numbers: Sequence[int]) -> list[Layer]:
    if not numbers or any(not 0 <= n < len(layers) for n in numbers):
        raise InputError(
            f"layers is {tuple(numbers)}; give numbers of the decoder's self-attentions, 0 to {len(layers) - 1}"
        )
    return [layers[n] for n in sorted(set(numbers))]


def why_not(attention: Any) -> str | None:
    """Why a layer cannot be served, or None: only what U-Nets of latent diffusion have is written here."""
    if isinstance(attention.processor, ReferenceAttention):
        return "is under the control of another run"
    for name in ("spatial_norm", "group_norm", "add_k_proj"):
        if getattr(attention, name, None) is not None:
            return f"has {name}, which injection does not know"
    return "has its own residual connection" if attention.residual_connection else None


class ReferenceAttention:
    """A diffusers attention processor: projections of the layer's own, attention as the state says."""

    def __init__(self, layer: Layer, weight: float, state: ChainState) -> None:
        self.layer, self.weight, self.state = layer, weight, state
        self.plain = layer.attention.processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [B, N, C]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:  # [B, N, C]
        if self.state.mode == "off":
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(f"{self.layer.name}: a reference is injected into self-attention without a mask only")
        q, k, v = (split_heads(project(hidden_states), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        out = self.state.attend(self.layer.name, self.layer.tap_name, self.weight, q, k, v)
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads · D] -> [B, heads, N, D]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def tap_hook(state: ChainState, name: str) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.tap(name, args[0] if args else kwargs["hidden_states"])

    return hook
