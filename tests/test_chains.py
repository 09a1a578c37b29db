"""Injection: the processors and their state against what the originals recorded and against the paper's equations."""

import pytest
import torch
from golden import golden_cases
from torch import nn
from torch.nn import functional as F

from ragsr.chains import (
    PRESETS,
    ChainPlan,
    ChainState,
    Condition,
    Layer,
    Record,
    ReferenceCache,
    Sources,
    chain_plan,
    installed,
    reference_weights,
    shared_canvas,
)
from ragsr.chains.host import predict_in_halves
from ragsr.chains.state import on_grid
from ragsr.errors import InputError
from ragsr.ops import adain

# ------------------------------------------------------------------ plans


def test_presets():
    assert [i for i in range(50) if PRESETS["paper"].injects(i, 50)] == [*range(30, 50)]
    assert all(PRESETS["released-supir"].injects(i, 50) for i in range(50))
    weights = [PRESETS["released-seesr"].weight(i, 18) for i in range(18)]
    torch.testing.assert_close(
        torch.tensor(weights)[[0, 1, 9, 17]], torch.tensor([0, 0.0076, 0.5, 0.9924]), atol=1e-4, rtol=0
    )
    assert len(PRESETS["released-seesr"].weigh(range(18))) == 17  # the first takes nothing
    assert chain_plan("paper") is PRESETS["paper"]


@pytest.mark.parametrize("steps", range(1, 12))
def test_every_run_injects(steps):
    for plan in (PRESETS["paper"], ChainPlan(steps=(0.95, 1.0)), ChainPlan(steps=(0.2, 0.21))):
        injected = [i for i in range(steps) if plan.injects(i, steps)]
        assert injected
        assert injected == [*plan.injected(steps)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": (0.6, 0.6)}, "two fractions"),
        ({"scale": 1.5}, r"scale is 1.5"),
        ({"layers": "top"}, "decoder, middle"),
        ({"noise": "pink"}, "independent or shared"),
    ],
)
def test_bad_plans(settings, message):
    with pytest.raises(InputError, match=message):
        ChainPlan(**settings)


def test_unknown_preset():
    with pytest.raises(InputError, match="'best'; there are: paper, released-seesr, released-supir"):
        chain_plan("best")


# ------------------------------------------------------------------ what the originals recorded


class OneLayer:
    """A network of one self-attention, whose gate is given."""

    name = "one layer"

    def __init__(self, heads: int, dim: int) -> None:
        from diffusers.models.attention_processor import Attention

        self.attention = Attention(heads * dim, heads=heads, dim_head=dim)
        self.tap = nn.Identity()

    def self_attentions(self, gate_source: str) -> list[Layer]:
        return [Layer("attn1", self.attention, "decoder", 1, "block", self.tap)]


@pytest.mark.parametrize("case", golden_cases("refir_injection") + golden_cases("refir_injection_supir"), ids=str)
def test_golden_injection(case):
    given, limits = case.tensors, case.config["atol_per_output"]
    weights, layer_weight = torch.tensor([case.config["scale_s"]]), case.config.get("layer_weight_w", 1.0)
    if "q" in given:
        state = ChainState()
        with state.paired(weights):
            state.gates["block"] = given["mask"]
            out = state.attend("attn1", "block", layer_weight, given["q"], given["k"], given["v"])
        out = out.transpose(1, 2).flatten(2)
    else:
        host = OneLayer(case.config["heads"], case.config["head_dim"])
        host.attention.load_state_dict(case.weights())
        with torch.no_grad(), installed(host, ChainPlan(scale=1.0)) as state:
            plain = host.attention(given["hidden_states"])
            with state.paired(layer_weight * weights):
                state.gates["block"] = given["mask"]
                out = host.attention(given["hidden_states"])
        torch.testing.assert_close(plain, given["plain_out"], rtol=0, atol=limits["plain_out"])
    torch.testing.assert_close(out, given["out"], rtol=0, atol=limits["out"])


@pytest.mark.parametrize("case", [c for c in golden_cases("refir_gate") if c.name != "degenerate"], ids=str)
def test_golden_gate(case):
    """From the whole reference beside the target, and from its mean direction alone."""
    x, y, mask = (case.tensors[name] for name in ("x", "y", "mask"))
    state, one = ChainState(), torch.ones(1)
    gates = []
    state.on_gate = lambda name, gate: gates.append(gate)
    with state.paired(one):
        state.tap("block", torch.cat((x, y)))
    with state.recording() as record:
        state.tap("block", y)
    with state.injecting(Sources.join([record], one)):
        state.tap("block", x)
    for gate in gates:
        torch.testing.assert_close(gate, mask, rtol=0, atol=case.config["atol_per_output"]["mask"])
    assert len(gates) == 2


def test_gates_change_their_grid():
    gate = torch.rand(2, 1, 6, 5)
    wanted = F.interpolate(gate, (12, 10), mode="bilinear", align_corners=False)
    assert torch.equal(on_grid(gate, 120), wanted)
    assert on_grid(gate, 30) is gate
    assert on_grid(torch.rand(1, 1, 3, 5), 6 * 9).shape == (1, 1, 6, 9)  # a side that was odd before it was halved
    with pytest.raises(ValueError, match="6x5 does not fit a layer of 31"):
        on_grid(gate, 31)


# ------------------------------------------------------------------ several references


def test_reference_weights():
    assert reference_weights([None, None], 0.6) == [0.3, 0.3]  # the user's own
    first, second = reference_weights([0.8, 0.6], 0.5, temperature=0.1)
    share = torch.softmax(torch.tensor([8.0, 6.0]), 0)  # Eq. 4
    torch.testing.assert_close(torch.tensor([first, second]), 0.5 * torch.tensor([0.8, 0.6]) * share)
    assert reference_weights([0.8, 0.59], 0.5, threshold=0.6) == [0.4, 0.0]
    assert reference_weights([0.2, 0.0], 0.5, threshold=0.3) == [0.0, 0.0]
    assert reference_weights([], 0.5) == []
    with pytest.raises(InputError, match="temperature is 0"):
        reference_weights([0.5], 0.5, temperature=0)


def test_references_side_by_side():
    """R references of different sizes: the gate of each weighs its own attention."""
    state, weights, length = ChainState(), torch.tensor([0.5, 0.25]), [6, 9]
    records = []
    for tokens in length:
        with state.recording() as record:
            state.tap("block", torch.randn(2, 8, 3, tokens // 3))
            state.attend("attn1", "block", 1.0, *torch.randn(3, 2, 2, tokens, 4))
        records.append(record)
    q, k, v = torch.randn(3, 2, 2, 12, 4)
    with state.injecting(Sources.join(records, weights)):
        state.tap("block", torch.randn(2, 8, 3, 4))
        out, gates = state.attend("attn1", "block", 0.5, q, k, v), state.gates["block"].flatten(2)
    own = F.scaled_dot_product_attention(q, k, v)
    fused = own.clone()
    for r, record in enumerate(records):
        other = F.scaled_dot_product_attention(q, record.keys["attn1"], record.values["attn1"])
        fused += 0.5 * weights[r] * gates[:, r, None, :, None] * (other - own)
    torch.testing.assert_close(out, adain(fused, own), rtol=1e-4, atol=1e-5)
    assert state.mode == "off"
    assert not state.gates


# ------------------------------------------------------------------ cache


def record_of(value: float, count: int = 100) -> Record:
    return Record({"attn1": torch.full((count,), float(value))}, {"attn1": torch.zeros(0)}, {"block": torch.zeros(0)})


def test_a_cache_keeps_what_it_can_use():
    cache, cpu = ReferenceCache(host_bytes=1200), torch.device("cpu")  # three records of 400 bytes
    for step in range(5):
        cache.put("one", step, record_of(step))
    found = [cache.get("one", step, cpu) for step in range(5)]
    assert [r is not None for r in found] == [True] * 3 + [False] * 2  # not pushed out by its own later steps
    assert found[2] is not None
    assert found[2].keys["attn1"][0] == 2
    cache.put("two", 0, record_of(0))  # another chain takes the place of the one used least recently
    assert cache.get("one", 0, cpu) is None
    assert cache.get("two", 0, cpu) is not None
    cache.put("two", 1, record_of(0, count=1000))
    assert cache.get("two", 1, cpu) is None
    assert cache.get("two", 0, cpu) is not None
    cache.put("two", 1, record_of(0), record_of(0), record_of(0))  # of one pass: three and the one there are too many
    assert cache.get("two", 1, cpu) is None
    cache.put("two", 1, record_of(5), record_of(6))
    assert [cache.get("two", step, cpu).keys["attn1"][0] for step in (0, 1, 2)] == [0, 5, 6]
    cache.put("three", 0, record_of(0))
    assert "1 hits" not in repr(cache)
    assert cache.places[1].used == 400
    cache.clear()
    assert cache.get("two", 0, cpu) is None
    assert cache.places[1].used == 0
    with pytest.raises(InputError, match="negative"):
        ReferenceCache(host_bytes=-1)


def test_a_full_place_gives_way_to_the_next(tmp_path):
    cache, cpu = ReferenceCache(host_bytes=400, folder=tmp_path, disk_bytes=1000), torch.device("cpu")
    for step in range(3):
        cache.put("key", step, record_of(step))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["key-0001.safetensors", "key-0002.safetensors"]
    again = ReferenceCache(host_bytes=0, folder=tmp_path, disk_bytes=10_000)
    record = again.get("key", 2, cpu)
    assert record is not None
    assert record.keys["attn1"][0] == 2
    assert again.get("key", 0, cpu) is None
    again.clear()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the canvas of the original


@pytest.mark.parametrize(
    ("photo", "reference", "wanted"),
    [
        ((64, 64), (64, 64), (64, 64)),
        ((64, 96), (80, 72), (80, 96)),  # each is the larger one on one side
        ((64, 64), (200, 300), (128, 128)),  # cut at its top left corner
        ((128, 128), (40, 80), (128, 136)),  # enlarged until no side is less than half
    ],
)
def test_shared_canvas(photo, reference, wanted):
    own, other = torch.rand(1, 3, *photo), torch.rand(1, 3, *reference)
    canvas, source = shared_canvas(own, other)
    assert canvas.shape == source.shape == (1, 3, *wanted)
    assert torch.equal(canvas[..., : photo[0], : photo[1]], own)
    if wanted[0] > photo[0]:
        assert torch.equal(canvas[..., photo[0], : photo[1]], own[..., -1, :])  # the edge row is repeated


# ------------------------------------------------------------------ what a host is told


def test_conditions_are_cropped_where_they_lie():
    """In pixels of the latent, whatever the stride of each part."""
    grid = torch.arange(12.0).view(1, 1, 3, 4)
    fine = grid.repeat_interleave(8, 2).repeat_interleave(8, 3)
    told = Condition({"text": grid}, spatial={"same": grid, "hint": fine})
    part = told.crop(slice(1, 3), slice(0, 2), (3, 4))
    assert torch.equal(part.spatial["same"], grid[..., 1:3, 0:2])
    assert torch.equal(part.spatial["hint"][..., ::8, ::8], grid[..., 1:3, 0:2])
    assert part.positive is told.positive


def test_halves_of_several_pictures():
    """The batch is [first_u, second_u, first_c, second_c]; without guidance there is no unconditional half."""
    inputs = [torch.full((1, 1, 1, 1), float(i)) for i in (1, 2)]
    told = [Condition({"x": torch.full((1, 1), 10.0 * i)}, {"x": torch.full((1, 1), -10.0 * i)}) for i in (1, 2)]
    batches = []

    def network(latents, embeddings, spatial):
        batches.append((latents.flatten().tolist(), embeddings["x"].flatten().tolist()))
        return latents + embeddings["x"][..., None, None]

    guided = predict_in_halves(network, inputs, told, 3.0)
    assert [x.item() for x in guided] == [-9 + 3 * 20, -18 + 3 * 40]  # u + g · (c − u)
    plain = predict_in_halves(network, inputs, told, None)
    assert [x.item() for x in plain] == [11, 22]
    assert batches == [([1, 2, 1, 2], [-10, -20, 10, 20]), ([1, 2], [10, 20])]
