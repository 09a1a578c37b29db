"""ReFIR on tiny random models of every kind: what is injected, what never changes, what is computed how often."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_hosts import KINDS, Passes, good, host, picture, pipe, prompts, records, unet, with_words
from torch import Tensor

from ragsr.chains import ChainPlan, ReferenceCache, SourceChain, Sources, chosen_layers, installed
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.hosts import host_of, load_host
from ragsr.hosts.common import dtype_option
from ragsr.hosts.loading import FIRST, POOLED, TEXT, single_file_class
from ragsr.pipelines.refir import ReFIRPipeline
from ragsr.pipelines.refir_memory import estimate_memory, fitting_tile, record_bytes

STEPS = 3
PLAN = ChainPlan(steps=(0.5, 1.0), scale=1.0)  # injects in 2 of 3 steps
SCHEDULERS = (  # all that diffusers says are compatible, but for one that needs another package
    "DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete",
    "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "UniPCMultistep",
)  # fmt: skip


def refir(kind: str, cache: ReferenceCache | None = None) -> ReFIRPipeline:
    made = ReFIRPipeline(host(kind), cache)
    made.set_progress_bar_config(disable=True)
    return made


def restore(pipeline: ReFIRPipeline, kind: str = "sd15", photo: int = 1, **changes: Any) -> Any:
    settings = {"scale": 1, "num_inference_steps": STEPS, "strength": 1.0, "output_type": "latent", "plan": PLAN}
    return pipeline(picture(photo), **prompts(kind) | settings | changes)


# ------------------------------------------------------------------ the equations


class Written:
    """ReFIR's equations, written out, as a diffusers processor: source pass first, then the target's."""

    def __init__(self) -> None:
        self.source: tuple[Tensor, Tensor] | None = None
        self.features: list[Tensor] = []  # of the source's block, then of the target's

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: None = None, attention_mask: None = None) -> Tensor:
        q, k, v = (f(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        own = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v  # Eq. 1
        if self.source is None:
            self.source, out = (k, v), own
        else:
            k_ref, v_ref = self.source
            other = torch.softmax(q @ k_ref.mT * q.shape[-1] ** -0.5, dim=-1) @ v_ref
            gate = self.gate()[:, None, :, None]
            fused = (1 - gate) * own + gate * other  # Eq. 2
            mean, variance = fused.mean(2, keepdim=True), fused.var(2, keepdim=True)
            aim, spread = own.mean(2, keepdim=True), own.var(2, keepdim=True)
            out = (fused - mean) / (variance + 1e-5).sqrt() * (spread + 1e-5).sqrt() + aim  # Eq. 3
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    def gate(self) -> Tensor:
        source, target = (f.flatten(2).mT for f in self.features)
        similar = torch.cosine_similarity(target[:, :, None], source[:, None], dim=-1).mean(2)  # [B, N]
        low, high = similar.aminmax(dim=1, keepdim=True)
        return PLAN.scale * (similar - low) / (high - low)


@pytest.mark.parametrize("gate_source", ["block", "resnet"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_pass_follows_the_paper(kind, gate_source):
    """One pass over a source of another size and one over the target."""
    model, plan = host(kind), ChainPlan(scale=PLAN.scale, gate_source=gate_source)
    generator = torch.Generator().manual_seed(0)
    pictures = [picture(2, 48, 36), picture(1)]
    latents = [model.encode(p, generator) for p in pictures]
    conditions = [model.condition(p, x, *prompts(kind).values()) for p, x in zip(pictures, latents, strict=True)]
    level = model.sampler(STEPS, 1.0).level(1)
    with installed(model, plan) as state:
        with state.recording() as record:
            model.predict(latents[:1], level, conditions[:1], 3.0)
        with state.injecting(Sources.join([record], torch.tensor([plan.scale]))):
            (found,) = model.predict(latents[1:], level, conditions[1:], 3.0)
    (plain,) = model.predict(latents[1:], level, conditions[1:], 3.0)

    layers, hooks = chosen_layers(model, plan), []
    before = [layer.attention.processor for layer in layers]
    for layer in layers:
        written = Written()
        layer.attention.set_processor(written)
        hooks.append(
            layer.tap.register_forward_pre_hook(
                lambda _, args, kwargs, w=written: w.features.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
    for x, condition in zip(latents, conditions, strict=True):
        (wanted,) = model.predict([x], level, [condition], 3.0)
    for layer, processor, hook in zip(layers, before, hooks, strict=True):
        layer.attention.set_processor(processor)
        hook.remove()
    scale = (plain - wanted).abs().max()
    assert scale > 1e-2  # the reference changes the picture
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


# ------------------------------------------------------------------ what never changes


@pytest.mark.parametrize("kind", KINDS)
def test_invariants(kind):
    cache = ReferenceCache()
    pipeline = refir(kind, cache)
    with Passes(kind) as plain_passes:
        plain = restore(pipeline, kind).images
    assert len(plain_passes) == STEPS
    with Passes(kind) as passes:
        assert torch.equal(restore(pipeline, kind, references=good(), reference_strength=0.0).images, plain)
    assert passes == plain_passes  # no source chain

    with Passes(kind) as passes:
        first = restore(pipeline, kind, references=good()).images
    assert len(passes) == 2 * STEPS
    assert not torch.equal(first, plain)
    with Passes(kind) as passes:
        other = restore(pipeline, kind, photo=3, references=good()).images  # another photo, the same reference
    assert len(passes) == STEPS
    assert cache.hits == 2
    assert torch.equal(restore(pipeline, kind, references=good()).images, first)  # a hit, after another photo
    assert torch.equal(restore(pipeline, kind).images, plain)

    fresh = ReferenceCache()
    assert torch.equal(restore(refir(kind, fresh), kind, photo=3, references=good()).images, other)  # a miss
    (key,) = {key for key, _ in records(cache)}
    assert records(cache).keys() == records(fresh).keys()
    for step in (1, 2):  # the source knows nothing of the photo
        one, two = (records(c)[key, step].flat() for c in (cache, fresh))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(
        type(layer.attention.processor).__name__ == "AttnProcessor2_0" for layer in host(kind).self_attentions("block")
    )


def test_one_reference_equals_two_of_the_same():
    one, two = (restore(refir("sd15"), references=[good()] * n) for n in (1, 2))
    assert two.weights == [0.5, 0.5]
    torch.testing.assert_close(two.images, one.images, rtol=1e-3, atol=1e-2)
    assert not torch.equal(restore(refir("sd15"), references=[good(), good(4)]).images, one.images)


def test_the_order_of_references_does_not_matter():
    """Chains share neither random numbers nor the state of a sampler: SDXL's here counts its steps."""
    there, back = (restore(refir("sdxl"), "sdxl", references=r) for r in ([good(), good(4)], [good(4), good()]))
    torch.testing.assert_close(there.images, back.images, rtol=1e-3, atol=1e-2)


def test_every_place_of_the_cache_gives_the_same_bits(tmp_path):
    wanted = restore(refir("sd15"), references=good()).images
    nowhere = refir("sd15", ReferenceCache(host_bytes=0))
    with Passes() as passes:
        for _ in range(2):
            assert torch.equal(restore(nowhere, references=good()).images, wanted)
    assert len(passes) == 2 * STEPS + STEPS + 2  # the second time only the injected steps, from what was seen
    for _ in range(2):  # the second is another process, as far as the cache can tell
        disk = ReferenceCache(host_bytes=0, folder=tmp_path)
        assert torch.equal(restore(refir("sd15", disk), references=good()).images, wanted)
    assert (disk.hits, disk.misses) == (2, 0)
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(restore(refir("sd15", disk), references=good()).images, wanted)
    assert disk.misses == 2


def test_what_changes_the_source_changes_the_key():
    cache = ReferenceCache()
    pipeline = refir("sd15", cache)
    restore(pipeline, references=good())
    for changes in (
        {"generator": 1},
        {"guidance_scale": 2.0},
        {"reference_prompt": torch.ones(1, 7, 12)},
        {"plan": replace(PLAN, gate_source="resnet")},
        {"plan": replace(PLAN, layer_weight="cosine")},
    ):
        before = cache.misses
        restore(pipeline, references=good(), **changes)
        assert cache.misses == before + 2
    weight = host("sd15").network.conv_out.bias
    kept = weight.data.clone()
    weight.data += 1
    restore(pipeline, references=good())
    weight.data = kept
    assert cache.hits == 0
    restore(pipeline, references=good(), reference_strength=0.3)  # the strength is the target's affair
    assert cache.hits == 2


@pytest.mark.parametrize(
    "scheduler", ["DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "HeunDiscrete"]
)
def test_without_references_it_is_what_diffusers_does(scheduler):
    """Its img2img from the same latent and seed; every kind of scheduler also carries a source chain."""
    import diffusers

    made = pipe("sd15")
    made.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(made.scheduler.config)
    pipeline = ReFIRPipeline(host_of(made))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 6, "strength": 0.5, "guidance_scale": 3.0}
    plain = restore(pipeline, generator=3, **settings).images
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**made.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    told = {f"{name}_embeds": x for name, x in prompts("sd15").items()}
    clean = pipeline.host.encode(picture(1), torch.Generator())
    seed = torch.Generator().manual_seed(3)
    wanted = theirs(image=clean, generator=seed, output_type="latent", **told, **settings).images
    assert torch.equal(plain, wanted)
    injected = restore(pipeline, generator=3, references=good(), **settings).images
    assert injected.isfinite().all()
    assert not torch.equal(injected, plain)
    sampler = pipeline.host.sampler(6, 0.5)
    noised, started = (
        call(clean, *step, torch.Generator()) for call, step in ((sampler.noised, (0,)), (sampler.start, ()))
    )
    assert torch.equal(noised, sampler.model_input(started, 0, seed))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_image_1_equals_image_2(scheduler):
    """Nothing of a run is left in the scheduler, of which multistep ones keep the last predictions."""
    import diffusers

    made = pipe("sd15")
    made.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(made.scheduler.config)
    before = repr(vars(made.scheduler))
    pipeline = ReFIRPipeline(host_of(made))
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"references": good(), "num_inference_steps": 4}
    first, other, again = (restore(pipeline, photo=photo, **given).images for photo in (1, 3, 1))
    assert torch.equal(again, first)
    assert first.isfinite().all()
    fresh = ReFIRPipeline(host_of(made))
    fresh.set_progress_bar_config(disable=True)
    assert torch.equal(restore(fresh, photo=3, **given).images, other)  # and without a cache
    assert repr(vars(made.scheduler)) == before  # the user's own is not touched


def test_a_scheduler_that_cannot_noise():
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = pipe("sd15")
    made.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler cannot noise a picture"):
        restore(ReFIRPipeline(host_of(made)))


# ------------------------------------------------------------------ modes


def test_cost_of_the_modes():
    """Rows of every pass, and how many passes reach the end of the network: the source's stop where they may."""
    found, ends = {}, []
    hook = host("sd15").network.conv_out.register_forward_hook(lambda *_: ends.append(True))
    for mode, rows, whole in (
        ("denoise", [2] * 2 * STEPS, STEPS + STEPS - 1),
        ("noised", [2] * (STEPS + 2), STEPS),
        ("fast", [2] * (STEPS + 1), STEPS),  # without guidance, and both injected steps in one pass
        ("batched", [4] * STEPS, STEPS),
    ):
        ends.clear()
        with Passes() as passes:
            found[mode] = restore(refir("sd15"), references=good(2, 32, 32), mode=mode).images
        assert (passes, len(ends)) == (rows, whole)
    hook.remove()
    assert not torch.equal(found["noised"], found["fast"])
    with Passes() as passes:
        restore(refir("sd15"), references=good(), mode="fast", guidance_scale=1.0)
    assert passes == [1] * (STEPS + 2)  # a pass of two steps would be a larger batch than the target's


def test_no_chain_goes_on_after_the_last_injection():
    early = ChainPlan(steps=(0.0, 0.5), scale=1.0)  # 2 of 3 steps
    for mode, rows in (("denoise", [2] * (STEPS + 2)), ("batched", [4, 4, 2])):
        with Passes() as passes:
            restore(refir("sd15"), references=good(2, 32, 32), mode=mode, plan=early)
        assert passes == rows


def test_a_reference_is_encoded_once(monkeypatch):
    model, pictures = host("sd15"), []
    encode = type(model).encode
    monkeypatch.setattr(type(model), "encode", lambda self, x, seed: pictures.append(x) or encode(self, x, seed))
    pipeline = refir("sd15")
    first = restore(pipeline, references=[good(), good(4)]).images
    assert len(pictures) == 3
    assert torch.equal(restore(pipeline, references=[good(), good(4)]).images, first)
    assert len(pictures) == 4  # the photo
    restore(pipeline, references=good(), generator=1)  # an encoder may draw from the seed
    assert len(pictures) == 6
    pipeline.enable_vae_tiling()
    restore(pipeline, references=good())
    model.pipe.vae.disable_tiling()
    assert len(pictures) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_share_a_pass(kind):
    """In float64 they leave what each leaves alone, also where the number of steps is odd; twice the same bits."""
    made = pipe(kind)
    for part in (made.unet, made.vae, getattr(made, "controlnet", None)):
        part is None or part.double()
    model, plan, steps = host_of(made), ChainPlan(steps=(0.0, 1.0)), 3
    clean = model.encode(picture(2), torch.Generator())
    condition = model.condition(picture(2), clean, *prompts(kind).values())

    def chain(mode: str, guidance: float | None) -> SourceChain:
        given = model, state, plan, model.sampler(steps, 1.0), clean, condition, guidance, 0, mode
        return SourceChain(*given, ReferenceCache(host_bytes=0))

    with torch.no_grad(), installed(model, plan) as state:
        together, again, alone = chain("fast", 3.0), chain("fast", 3.0), chain("noised", None)
        for step in (0, 1, 2):
            shared, single = together.record(step).flat(), alone.record(step).flat()
            assert shared.keys() == single.keys()
            for name, x in shared.items():
                torch.testing.assert_close(x, single[name], rtol=1e-6, atol=1e-9)
        assert together.key != alone.key
        second = again.record(1).flat()  # asked for first
        assert all(torch.equal(x, again.record(1).flat()[name]) for name, x in second.items())
        assert all(torch.equal(x, second[name]) for name, x in chain("fast", 3.0).record(1).flat().items())


def test_batched_equals_denoise():
    """In float64, where the networks do not blow rounding up."""
    made = pipe("sd2")
    for part in (made.unet, made.vae):
        part.double()
    pipeline = ReFIRPipeline(host_of(made))
    pipeline.set_progress_bar_config(disable=True)
    references = [good(2, 32, 32), good(4, 32, 32)]
    beside, together = (restore(pipeline, "sd2", references=references, mode=m) for m in ("denoise", "batched"))
    torch.testing.assert_close(together.images, beside.images, rtol=1e-6, atol=1e-6)


def test_shared_noise():
    """A plan that shares noise gives a reference that is the photo the very chain of the photo.

    Up to what the last step sees: there the source chain ends.
    """
    model, plan = host("sd2"), ChainPlan(steps=(0.0, 1.0), noise="shared")
    photo = picture(1)
    clean = model.encode(photo, torch.Generator())
    condition = model.condition(photo, clean, *prompts("sd2").values())
    sampler = model.sampler(STEPS, 1.0)
    latents = []
    restore(refir("sd2"), "sd2", guidance_scale=3.0, callback_on_step_end=lambda *a: latents.append(a[3]["latents"]))
    with torch.no_grad(), installed(model, plan) as state:
        chain = SourceChain(model, state, plan, sampler, clean, condition, 3.0, 0, "denoise", ReferenceCache())
        chain.record(STEPS - 1)
    assert torch.equal(chain.latent, latents[-2])


def test_compat_takes_the_canvas_of_the_original():
    with Passes() as passes:
        restored = restore(refir("sd15"), references=good(2, 64, 40), compat=True, output_type="pil", colour="none")
    assert passes == [4] * STEPS
    assert restored.images[0].size == (32, 32)
    with pytest.raises(InputError, match="compat takes one reference"):
        restore(refir("sd15"), references=[good(), good()], compat=True)


# ------------------------------------------------------------------ sizes, tiles, outputs


def test_any_size():
    restored = restore(refir("sd15"), references=good(2, 57, 43), output_type="pil").images[0]
    assert restored.size == (32, 32)
    odd = refir("sd15")(picture(1, 23, 19), scale=2, references=good(), output_type="pt", **prompts("sd15"), **SHORT)
    assert odd.images.shape == (1, 3, 46, 38)
    assert odd.images.isfinite().all()


SHORT: dict[str, Any] = {"num_inference_steps": 1, "strength": 1.0}


@pytest.mark.parametrize("kind", ["control", "x4"])
def test_tiles(kind):
    whole = restore(refir(kind), kind, references=good(), return_gates=True)
    cache = ReferenceCache()
    with Passes(kind) as passes:
        tiled = restore(refir(kind, cache), kind, references=good(), return_gates=True, tile=32)
    assert torch.equal(tiled.images, whole.images)
    assert len(passes) == 2 * STEPS
    with Passes(kind) as passes:
        tiled = refir(kind, cache)(
            picture(1, 48, 56), scale=1, tile=32, references=good(), output_type="latent", return_gates=True,
            num_inference_steps=STEPS, strength=1.0, plan=PLAN, **prompts(kind),
        )  # fmt: skip
    assert len(passes) == 4 * STEPS
    assert cache.hits == 2
    assert tiled.images.shape[-2:] == (12, 14)
    assert tiled.images.isfinite().all()
    for gate in tiled.gates.values():
        assert gate.shape == (1, 12, 14)
        assert 0 <= gate.min() < gate.max() <= 1


def test_outputs():
    pipeline, given = refir("sd15"), {"references": good()}
    pt = restore(pipeline, **given, output_type="pt").images
    assert pt.shape == (1, 3, 32, 32)
    assert 0 <= pt.min() < pt.max() <= 1
    array = restore(pipeline, **given, output_type="np").images
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), pt)
    (images,) = restore(pipeline, **given, output_type="pil", return_dict=False)
    assert images[0].size == (32, 32)
    assert restore(pipeline).gates is None
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    generators[1].manual_seed(7)
    torch.randn(5, generator=generators[1])  # how often it was used does not matter
    first, second = (restore(pipeline, **given, generator=g).images for g in generators)
    assert torch.equal(first, second)
    assert torch.equal(first, restore(pipeline, **given, generator=7).images)


def test_callbacks_see_and_change_latents():
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else None

    assert not restore(refir("sd15"), callback_on_step_end=callback).images.any()
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert seen[0][1] > seen[1][1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    made = pipe("sd15")
    made.unet.to(dtype)
    made.vae.to(dtype)
    if dtype == torch.float16:  # a decoder whose numbers overflow
        made.vae.post_quant_conv.weight.data *= 6e4
    pipeline = ReFIRPipeline(host_of(made))
    pipeline.set_progress_bar_config(disable=True)
    restored = restore(pipeline, references=good(), output_type="pt").images
    assert restored.isfinite().all()
    assert restored.std() > 1e-3
    assert made.vae.dtype == dtype


# ------------------------------------------------------------------ several references, relevance


def test_gallery(tmp_path):
    files = []
    for seed in (1, 4):
        files.append(tmp_path / f"{seed}.png")
        good(seed).save(files[-1])
    with Gallery.create(tmp_path / "gallery", "baseline-64") as gallery:
        gallery.add(files)
        found = restore(refir("sd15"), gallery=gallery, k=2, threshold=0.5)
        (one,) = found.references  # the other looks like nothing here
        assert one.path == files[0]
        assert found.weights == [one.score]
        assert one.score > 0.8
        plain = restore(refir("sd15")).images
        with Passes() as passes, pytest.warns(UserWarning, match=r"no reference is relevant enough \(the best scores"):
            assert torch.equal(restore(refir("sd15"), gallery=gallery, threshold=1.1).images, plain)
        assert len(passes) == STEPS
        with pytest.raises(InputError, match="both given"):
            restore(refir("sd15"), gallery=gallery, references=good())


# ------------------------------------------------------------------ what cannot be used


def test_an_exception_leaves_the_model_as_it_was():
    model = host("sd15")
    before = [layer.attention.processor for layer in model.self_attentions("block")]

    def fail(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(refir("sd15"), references=good(), callback_on_step_end=fail)
    assert [layer.attention.processor for layer in model.self_attentions("block")] == before
    assert not any(block._forward_pre_hooks for block in model.network.up_blocks)
    with installed(model, PLAN), pytest.raises(InputError, match="under the control of another run"):
        installed(model, PLAN).__enter__()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": "best"}, "there is no plan 'best'"),
        ({"mode": "slow"}, "mode is 'slow'; it is one of denoise, noised"),
        ({"reference_strength": 2.0}, "scale is 2.0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"tile": 5}, "tile is 5"),
        ({"output_type": "gif"}, "output_type is 'gif'"),
        ({"mode": "batched", "references": good()}, "restored at once, 32x32, not 36x48"),
        ({"references": good(2, 40, 20)}, "20x40 pixels, used as 20x40; Stable Diffusion needs 32"),
        ({"references": good(2, 8, 2000)}, "2000x8 pixels"),
        ({"prompt": "a house"}, "without a text encoder"),
        ({"colour": "sepia"}, "colour is 'sepia'; it is one of adain"),
        ({"plan": ChainPlan(layers=(1,), layer_weight="cosine"), "references": good()}, "has weight 0"),
        ({"plan": ChainPlan(layers=(9,)), "references": good()}, "numbers of the decoder's self-attentions, 0 to 3"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(InputError, match=message):
        restore(refir("sd15"), **{"output_type": "pt"} | changes)


def test_one_step():
    assert not torch.equal(
        restore(refir("sd15"), references=good(), num_inference_steps=1).images,
        restore(refir("sd15"), num_inference_steps=1).images,
    )


def test_a_decoder_without_self_attention():
    made = pipe("sd15")
    made.register_modules(unet=unet(only_cross_attention=True))
    with pytest.raises(InputError, match="Stable Diffusion has no self-attention in its decoder"):
        restore(ReFIRPipeline(host_of(made)), references=good())


# ------------------------------------------------------------------ loading


def test_from_pretrained(tmp_path):
    made = pipe("control")
    made.save_pretrained(tmp_path / "whole")
    pipe("sd15").save_pretrained(tmp_path / "plain")
    wanted = restore(refir("control"), references=good()).images
    without = {"text_encoder": None, "tokenizer": None}
    for loaded in (
        ReFIRPipeline.from_pretrained(tmp_path / "whole", **without),
        ReFIRPipeline.from_pretrained(tmp_path / "plain", controlnet=tmp_path / "whole" / "controlnet", **without),
    ):
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(restore(loaded, references=good()).images, wanted)


def test_dtype_by_both_of_its_names(tmp_path):
    with_words(pipe("control"), tmp_path).save_pretrained(tmp_path / "whole")
    given = {"controlnet": tmp_path / "whole" / "controlnet"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for name in ("dtype", "torch_dtype"):
            loaded = load_host(tmp_path / "whole", **given | {name: torch.bfloat16})
            assert {part.dtype for part in loaded.parts().values()} == {torch.bfloat16}
        assert load_host(tmp_path / "whole").dtype == torch.float32
    with pytest.raises(InputError, match="two names of one option"):
        load_host(tmp_path, dtype=torch.float16, torch_dtype=torch.float16)


def test_dtype_for_an_older_diffusers(monkeypatch):
    import diffusers

    for version, name in (("0.39.0", "torch_dtype"), ("0.40.0.dev0", "dtype"), ("1.0", "dtype")):
        monkeypatch.setattr(diffusers, "__version__", version)
        assert dtype_option(torch.float16) == {name: torch.float16}


def test_prompts_in_words(tmp_path):
    made = with_words(pipe("sd15"), tmp_path)
    words_told, none_told = (host_of(made).embed(prompt, None) for prompt in ("a b", None))
    assert words_told[0]["prompt_embeds"].shape == (1, 7, 12)
    assert not torch.equal(words_told[0]["prompt_embeds"], none_told[0]["prompt_embeds"])
    assert torch.equal(words_told[1]["prompt_embeds"], none_told[0]["prompt_embeds"])  # no prompt is an empty one
    pipeline = ReFIRPipeline(host_of(made))
    pipeline.set_progress_bar_config(disable=True)
    given = {"references": good(), "prompt": "a", "negative_prompt": None}
    assert restore(pipeline, **given).images.isfinite().all()


def test_a_prompt_that_is_asked_of_each_picture(tmp_path):
    good().save(tmp_path / "good.png")
    first, second = prompts("sd15").values()
    asked = []

    def captioner(shown, path):
        asked.append((shown.size, path))
        return first if path is None else second

    found = restore(refir("sd15"), references=tmp_path / "good.png", prompt=captioner).images
    assert asked == [((32, 32), None), ((36, 48), tmp_path / "good.png")]
    assert torch.equal(found, restore(refir("sd15"), references=good(), reference_prompt=second).images)
    assert not torch.equal(found, restore(refir("sd15"), references=good()).images)


@pytest.mark.parametrize(
    ("channels", "width", "pooled", "wanted"),
    [(4, 768, False, ""), (4, 1024, False, "config="), (4, 2048, True, "XL"), (7, 1024, False, "Upscale")],
)
def test_single_files_are_told_apart_by_their_shapes(tmp_path, channels, width, pooled, wanted):
    import diffusers
    from safetensors.torch import save_file

    shapes = {FIRST: (2, channels, 3, 3), TEXT: (2, width)} | ({POOLED: (2, 3)} if pooled else {})
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "one.safetensors")
    if wanted == "config=":
        with pytest.raises(InputError, match=wanted):
            single_file_class(diffusers, tmp_path / "one.safetensors", {})
    else:
        found = single_file_class(diffusers, tmp_path / "one.safetensors", {})
        assert found.__name__ == f"StableDiffusion{wanted}Pipeline"


def test_seesr_is_not_loaded_as_if_it_were_stock(tmp_path):
    network = unet()
    network.save_pretrained(tmp_path / "unet")
    config = tmp_path / "unet" / "config.json"
    config.write_text(config.read_text().replace("{", '{"use_image_cross_attention": true,', 1))
    with pytest.raises(InputError, match="would leave out its image attention"):
        load_host(tmp_path / "unet")
    with pytest.raises(InputError, match="SeeSR needs Stable Diffusion 2 besides"):
        load_host(tmp_path)
    made = pipe("sd15")
    made.register_modules(unet=type(network).from_pretrained(tmp_path / "unet"))
    with pytest.raises(InputError, match="would leave out its image attention"):
        host_of(made)


def test_what_is_no_host(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with pytest.raises(InputError, match="UNet2DModel; references are"):
        host_of(DDPMPipeline(UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                         up_block_types=("UpBlock2D",)), DDPMScheduler()))  # fmt: skip
    with pytest.raises(InputError, match="diffusers cannot load it"):
        load_host(tmp_path / "nothing")
    (tmp_path / "x.ckpt").write_bytes(b"pickle")
    with pytest.raises(InputError, match="must be safetensors"):
        load_host(tmp_path / "x.ckpt")
    from safetensors.torch import save_file

    save_file({"vae": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match="holds no U-Net"):
        load_host(tmp_path / "vae.safetensors")


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "x4"])
def test_records_take_what_was_estimated(kind):
    cache = ReferenceCache()
    restore(refir(kind, cache), kind, references=good())
    for record in records(cache).values():
        told = sum(x.nbytes for x in (*record.keys.values(), *record.values.values()))
        assert told == record_bytes(host(kind), PLAN, (48, 36), 2)
    estimate = estimate_memory(host(kind), PLAN, (32, 32), [(48, 36)], 2, None)
    assert estimate.total > estimate.weights > 0
    assert "GB" in str(estimate)


def test_a_tile_that_fits(monkeypatch):
    model, sizes = host("sd15"), ((4096, 3072), [(1024, 1024)], 2, torch.device("cpu"))
    assert fitting_tile(model, PLAN, *sizes) is None  # only a GPU says what is free
    tiles = []
    for free in (1 << 40, 1 << 30, 1 << 28, 1):
        monkeypatch.setattr("ragsr.pipelines.refir_memory.free_bytes", lambda device, free=free: free)
        tiles.append(fitting_tile(model, PLAN, *sizes))
        if tiles[-1] is not None and free > 1:
            estimate = estimate_memory(model, PLAN, *sizes[:3], tiles[-1])
            assert estimate.network + estimate.records <= free
    assert tiles == [None, *sorted(tiles[1:], reverse=True)]
    assert tiles[-1] == 512


def test_the_auto_encoder_goes_on_in_tiles(monkeypatch):
    wanted = restore(refir("sd15"), output_type="pt").images
    autoencoder = host("sd15").pipe.vae
    decode = type(autoencoder)._decode

    def decode_tiles_alone(self, *given, **options):
        if not self.use_tiling:
            raise torch.OutOfMemoryError("no memory")
        return decode(self, *given, **options)

    monkeypatch.setattr(type(autoencoder), "_decode", decode_tiles_alone)
    with pytest.warns(UserWarning, match="the auto-encoder goes on in tiles"):
        found = restore(refir("sd15"), output_type="pt").images
    assert torch.equal(found, wanted)  # so small a picture is one tile
    assert not autoencoder.use_tiling


def test_out_of_memory_goes_on_in_tiles(monkeypatch):
    monkeypatch.setattr("ragsr.pipelines.refir_memory.SIDES", (48, 32))
    wanted = restore(refir("sd15"), references=good(), tile=32).images
    model, predict = host("sd15"), type(host("sd15")).predict
    failed = []

    def predict_once(self, inputs, *rest):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no memory")
        return predict(self, inputs, *rest)

    monkeypatch.setattr(type(model), "predict", predict_once)
    with pytest.warns(UserWarning, match="going on in tiles of 32 pixels"):
        found = restore(refir("sd15"), references=good(), tile=48).images
    assert torch.equal(found, wanted)
