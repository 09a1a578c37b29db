"""benchmarks/ablations.py: what each variant of the tables switches, on its tiny network."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from ablations import SCALE, Variant, measure, scores, switched, tiny, variants

from ragsr.chains import ChainPlan, state

PLAN = ChainPlan(steps=(0.0, 1.0), scale=0.6)  # at 1 without a gate "SA" would be "replace"
SHORT = {"strength": 1.0, "num_inference_steps": 1, "mode": "fast"}


@pytest.fixture(scope="module")
def small():
    pipe, scenes, settings = tiny()
    pipe.set_progress_bar_config(disable=True)
    return pipe, scenes, settings | SHORT


def test_what_the_variants_switch(small):
    """Variants with one meaning have one latent, and any two with different meanings differ."""
    pipe, (scene,), settings = small
    latents = {}
    for variant in variants():
        if variant.table in ("components", "designs", "references") or variant.name == "s = 0":
            plan = replace(PLAN, **variant.plan)
            with switched(variant):
                chosen = scene.chosen(variant.references)
                made = pipe(scene.low, chosen, scale=SCALE, plan=plan, output_type="latent", **settings)
            latents[variant.name] = made.images
    for one, other in (
        ("none", "s = 0"),
        ("none", "NoRef"),
        ("SA + SG + DA", "separate"),
        ("separate", "best of the pack"),
    ):
        assert torch.equal(latents[one], latents[other])
    different = [latents[v.name] for v in variants() if v.table == "components"]
    different += [latents[name] for name in ("concat", "replace", "HQRef", "SelfRef", "Random")]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(different) for b in different[:i])


def test_means_over_the_scenes_that_have_references(small):
    pipe, (scene,), settings = small
    variant = Variant("count", "two", references="2")
    alone = replace(scene, references=scene.references[:1])
    both, one = (measure(pipe, PLAN, [*more, scene], variant, settings) for more in ([alone], []))
    assert both == one
    assert (one["photos"], one["table"], one["variant"]) == (1, "count", "two")
    assert one["niqe"] > 0
    assert measure(pipe, PLAN, [alone], variant, settings) == {"table": "count", "variant": "two", "photos": 0}


def test_switches_are_undone():
    before = state.separate_attention, state.cosine_gate
    with switched(Variant("", "", gated=False, op={"align": False})):
        assert (state.separate_attention, state.cosine_gate) != before
        assert torch.equal(state.cosine_gate(torch.zeros(2, 5, 3), torch.zeros(2, 2, 3), [1, 1]), torch.ones(2, 2, 5))
    assert (state.separate_attention, state.cosine_gate) == before


def test_scores_know_the_truth(small):
    scene = small[1][0]
    best, worse = scores(scene.truth, scene.truth), scores(scene.chosen("SelfRef")[0], scene.truth)
    assert best["haarpsi"] > worse["haarpsi"]
    assert best["psnr refir"] > worse["psnr refir"]
