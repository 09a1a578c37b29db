"""ReFIR's explanations against what attention really did, and its fallbacks, on tiny random models."""

from typing import Any

import pytest
import torch
from PIL import Image
from tiny_hosts import host, picture, prompts
from torch import Tensor

from ragsr.chains import ChainPlan, state
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.image import tensor_to_image
from ragsr.metrics import niqe
from ragsr.pipelines import Fallback, ReFIRPipeline
from ragsr.pipelines.refir_explain import attention_mass
from ragsr.pipelines.refir_fallback import text_to_image

PLAN = ChainPlan(steps=(0.5, 1.0), scale=0.8)  # injects in 2 of 3 steps
SHORT: dict[str, Any] = {"num_inference_steps": 3, "strength": 1.0, "plan": PLAN}


def restore(kind: str = "sd15", scale: int = 1, output_type: str = "latent", **changes: Any) -> Any:
    made = ReFIRPipeline(host(kind))
    made.set_progress_bar_config(disable=True)
    return made(picture(1), scale=scale, output_type=output_type, **prompts(kind) | SHORT | changes)


def good(seed: int = 2, height: int = 48, width: int = 36) -> Image.Image:
    return tensor_to_image(picture(seed, height, width))


# ------------------------------------------------------------------ explain


def test_mass_goes_where_queries_look(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 8, generator=generator) for n in (37, 21))
    gate = torch.rand(37, generator=generator)
    written = torch.einsum("hnm,n->m", torch.softmax(q @ k.mT / 8**0.5, dim=-1), gate) / 2
    for at_once in (1, 100, 1 << 24):
        monkeypatch.setattr("ragsr.pipelines.refir_explain.AT_ONCE", at_once)
        torch.testing.assert_close(attention_mass(q, k, gate), written)
    far = attention_mass(50 * k[:, 4:5].expand(-1, 37, -1), k / k.norm(dim=-1, keepdim=True), gate)
    assert int(far.argmax()) == 4


class Asked:
    """What each call of the op was given: conditional queries, reference keys and gates."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        op = state.separate_attention

        def noting(q, k, v, k_ref, v_ref, gate, lengths):
            self.calls.append((q[-1], k_ref[-1], gate[-1]))
            return op(q, k, v, k_ref, v_ref, gate, lengths)

        monkeypatch.setattr(state, "separate_attention", noting)


@pytest.mark.parametrize(("kind", "mode"), [("sd15", "denoise"), ("x4", "fast"), ("sdxl", "batched")])
def test_an_explanation_is_what_happened(kind, mode, monkeypatch):
    references = [good(2, 32, 32), good(3, 32, 32)] if mode == "batched" else [good(), good(3, 40, 32)]
    asked = Asked(monkeypatch)
    found = restore(kind, references=references, mode=mode, explain=True)
    told = found.explanation
    layers = [layer.name for layer in host(kind).self_attentions("block") if layer.part == "decoder"]
    assert told.layer == layers[-1]
    assert len(asked.calls) == 2 * len(layers)
    last = asked.calls[len(layers) - 1 :: len(layers)]
    lengths = [drawn.numel() for drawn in told.drawn]
    for r in range(2):
        parts = [(q, k.split(lengths, 1)[r], gate[r]) for q, k, gate in last]
        wanted = sum(torch.einsum("hnm,n->m", (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), g) for q, k, g in parts)
        torch.testing.assert_close(told.drawn[r].flatten(), wanted / wanted.sum(), rtol=1e-4, atol=1e-6)
        taken = torch.stack([gate[r].mean() for *_, gate in asked.calls]).mean()
        torch.testing.assert_close(told.share[r].mean(), taken, rtol=0.15, atol=0.02)  # through two resizings
    assert told.share.shape == (2, 32, 32)
    assert 0 <= told.share.min() < told.share.max() <= sum(found.weights) / 2 + 1e-6
    assert set(told.gates) == set(found.gates)
    sheet = told.sheet(good(5, 32, 32))
    assert len(sheet.getcolors(1 << 24)) > 100
    assert told.share_picture().size == (32, 32)


def test_explaining_changes_nothing_and_not_explaining_costs_nothing(monkeypatch):
    given: dict[str, Any] = {"references": [good()], "output_type": "pt"}
    calls = []
    monkeypatch.setattr("ragsr.pipelines.refir_explain.attention_mass", lambda *args: calls.append(args))
    monkeypatch.setattr("ragsr.pipelines.refir_tiles.GateMaps.note", lambda *args: calls.append(args))
    silent = restore(**given)
    assert not calls
    assert (silent.gates, silent.share, silent.explanation) == (None, None, None)
    monkeypatch.undo()
    told = restore(**given, explain=True)
    assert torch.equal(told.images, silent.images)
    assert restore(explain=True).explanation is None  # there is nothing to explain


def test_tiles_tell_as_the_whole_does():
    whole = restore(references=[good()], explain=True, scale=2).explanation
    tiles = restore(references=[good()], explain=True, scale=2, tile=48).explanation
    assert tiles.share.shape == whole.share.shape == (1, 64, 64)
    assert tiles.drawn[0].shape == (12, 9)
    torch.testing.assert_close(tiles.drawn[0].sum(), torch.tensor(1.0))
    assert (tiles.drawn[0] - whole.drawn[0]).abs().sum() < 0.2


# ------------------------------------------------------------------ fallbacks


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("near")
    good(1, 64, 64).save(folder / "near.png")
    with Gallery.create(folder / "gallery") as made:
        made.add([folder / "near.png"], progress=False)
        yield made


NOTHING: dict[str, Any] = {"threshold": 1.1, "output_type": "pt"}
CAPTION = prompts("sd15")["prompt"]


@pytest.mark.parametrize("kind", ["sd15", "control", "sdxl"])
def test_a_reference_from_a_caption(kind, gallery):
    caption, seen = prompts(kind)["prompt"], []

    def captioner(photo):
        seen.append(photo.size)
        return caption

    with pytest.warns(UserWarning, match="one is generated"):
        found = restore(kind, gallery=gallery, fallback=Fallback("gen_ref", captioner), **NOTHING)
    assert seen == [(32, 32)]
    (used,) = found.references
    assert (used.path, used.note, found.weights) == (None, "generated from a caption", [0.8])
    made = text_to_image(host(kind), caption, prompts(kind)["negative_prompt"], 3, host(kind).defaults.guidance, 0)
    assert torch.equal(restore(kind, references=[made], output_type="pt").images, found.images)
    assert not torch.equal(restore(kind, output_type="pt").images, found.images)


def test_the_better_of_two(gallery):
    """Whichever reference is generated, the result kept is the one with the lower NIQE."""
    given: dict[str, Any] = {"output_type": "pt", "scale": 3}
    found = restore(gallery=gallery, **given)
    kept = []
    for seed in (2, 7, 11):
        made = good(seed)
        fallback = Fallback("ada_gen_ref", "a house", lambda caption, seed, made=made: made)
        with pytest.warns(UserWarning, match="the better of two"):
            best = restore(gallery=gallery, fallback=fallback, **given | {"threshold": 1.1})
        generated = restore(references=[made], **given)
        better = generated if niqe(generated.images) <= niqe(found.images) else found
        assert torch.equal(best.images, better.images)
        assert best.weights == better.weights
        kept.append(better is found)
    relevant = restore(gallery=gallery, fallback=fallback, **given)
    assert torch.equal(relevant.images, found.images)  # what is relevant needs no fallback


@pytest.mark.parametrize(
    ("kind", "fallback", "message"),
    [
        ("sd15", ("invent",), "fallback is 'invent'; it is one of origin_lrm"),
        ("sd15", ("gen_ref",), "generates a reference from a caption; give one"),
        ("sd15", ("gen_ref", ""), "generates a reference from a caption; give one"),
        ("sd15", ("ada_gen_ref", CAPTION), "needs 96 pixels a side; the result has 32x32: use gen_ref"),
        ("x4", ("gen_ref", CAPTION), "x4 upscaler cannot make a picture from text alone"),
    ],
)
def test_fallbacks_that_cannot_be(kind, fallback, message, gallery):
    with pytest.raises(InputError, match=message):
        restore(kind, gallery=gallery, fallback=Fallback(*fallback))
