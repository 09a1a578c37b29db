"""The training of autoencoder, diffusion and both stages jointly, on tiny networks."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from pictures import write_samples
from PIL import Image
from safetensors.torch import load_file
from tiny_vgg import vgg

pytest.importorskip("diffusers")

from ragsr.cli import main  # what follows needs diffusers
from ragsr.errors import InputError
from ragsr.models.fusion import FusionNet
from ragsr.models.refnet import save_model
from ragsr.pipelines.restore import load_diffusion
from ragsr.training import stages
from ragsr.training.critic import PatchCritic, adversarial
from ragsr.training.encodings import Encodings, make_encodings
from ragsr.training.examples import Example, ExampleMaker, Examples, Finder, Mix, make_examples
from ragsr.training.objectives import AutoencoderObjective, DiffusionObjective, PictureLoss, signed
from ragsr.training.photos import degrade, find_photos
from ragsr.training.refsr import distance
from ragsr.training.run import BAD_BATCH, Run, Settings
from ragsr.training.sizes import make_stage

CPU = torch.device("cpu")
SETTINGS = Settings("diffusion", steps=4, size="tiny", batch=1, side=64, warm_up=1, rate=1e-3)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def paths(folder, tmp_path_factory):
    return make_examples(find_photos(folder), Mix(), 3, tmp_path_factory.mktemp("examples"))


@pytest.fixture
def quick(monkeypatch):
    """A run that holds two photos out and validates on one of them every other step."""
    for name, value in {"HELD_OUT": 2, "CHECKS": 1, "CHECK_EVERY": 2}.items():
        monkeypatch.setattr(stages, name, value)


def tiny_net():
    torch.manual_seed(0)
    net = FusionNet(channels=8, before=1, after=1, guide_blocks=1)
    for layer in (net.tail, net.guide.value, net.guide.verdict):  # they begin with zeros, which stop gradients
        torch.nn.init.normal_(layer.weight, std=0.05)
    return net


def diffusion_objective(joint=False, alpha=1.0, predicts="x0", picture_loss=None, gan=0.0, own_steps=0):
    stage = make_stage("tiny", predicts)
    torch.manual_seed(0)
    torch.nn.init.normal_(stage.unet.conv_out.weight, std=0.02)  # it begins with zeros too
    loss = picture_loss or PictureLoss(None, 0)
    return DiffusionObjective(stage, tiny_net(), joint, alpha, loss, gan, own_steps=own_steps)


def batch_of(count=2, side=64, references=True):
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(count, 3, side, side, generator=generator)
    batch = {"truth": truth, "low": degrade(truth, 4)}
    return batch | ({"clues": torch.rand(count, 6, side, side, generator=generator)} if references else {})


def drawing(batch):
    return lambda *_: batch


# ------------------------------------------------------------------ examples


def test_examples_are_made_once_and_alike(folder, paths):
    again = ExampleMaker(find_photos(folder), Mix()).make(1)
    with np.load(paths[1]) as file:
        kept = Example(file["truth"], file["low"], file["clues"], str(file["kind"]))
    assert kept.truth.shape == (320, 320, 3)
    assert kept.low.shape == (80, 80, 3)
    assert kept.clues.shape == (6, 320, 320)
    assert kept.kind == again.kind
    assert np.array_equal(kept.low, again.low)
    assert np.array_equal(kept.clues, again.clues)
    with pytest.raises(InputError, match="made with other settings"):
        make_examples(find_photos(folder), Mix(degradation="bicubic"), 1, paths[0].parent)
    samples = Examples(paths, 64, 3, seed=0)
    first, same, other = samples.draw(5), samples.draw(5), samples.draw(6)
    assert first["truth"].shape == (3, 3, 64, 64)
    assert first["low"].shape == (3, 3, 16, 16)
    assert torch.equal(first["truth"], same["truth"])
    assert not torch.equal(first["truth"], other["truth"])
    drawn = [samples.draw(step) for step in range(30)]
    assert {"clues" in batch for batch in drawn} == {True, False}  # some see no reference
    mean = (degrade(first["truth"], 4) - first["low"]).abs().mean()
    assert mean < 0.1  # truth and photo are cut and turned alike


def test_the_finder_finds_the_likest_photo_but_not_the_same(folder):
    photos = find_photos(folder)
    finder = Finder(photos, "baseline-64")
    for photo in photos:
        small = Image.open(photo.path).resize((120, 110))
        found = finder.nearest(small, besides=photo)
        assert photo not in found
        assert len(found) == 3
        other = next(one for one in photos if one != photo)
        assert finder.nearest(small, besides=other)[0] == photo


def test_shares_of_the_mix(folder, monkeypatch):
    """What is drawn follows the stated shares."""
    for share, kinds in ((Mix(retrieved=1, random=0), {"retrieved"}), (Mix(retrieved=0, random=1), {"random"})):
        maker = ExampleMaker(find_photos(folder), share)
        monkeypatch.setattr(
            "ragsr.training.examples.align", lambda *_, **__: [type("A", (), {"clues": torch.zeros(1, 6, 320, 320)})]
        )
        assert {maker.make(number).kind for number in range(3)} == kinds


def test_encodings_are_made_once_and_cut_alike(paths, tmp_path):
    objective = diffusion_objective()
    made = make_encodings(objective, paths, tmp_path, seed=0, half=False)
    before = [path.stat().st_mtime_ns for path in made]
    assert make_encodings(objective, paths, tmp_path, seed=0, half=False) == made
    assert before == [path.stat().st_mtime_ns for path in made]
    batches = Encodings(made, 64, 2, seed=0)
    batch = batches.draw(3)
    assert torch.equal(batch["truth"], batches.draw(3)["truth"])
    assert batch["truth"].shape == batch["intermediate"].shape == (2, 3, 64, 64)
    assert batch["z"].shape == batch["z_low"].shape == batch["z_inter"].shape == (2, 4, 8, 8)
    for picture, latent in (("truth", "z"), ("intermediate", "z_inter")):
        own = objective.encode(batch[picture])[..., 3:5, 3:5]  # away from the edges
        torch.testing.assert_close(own, batch[latent][..., 3:5, 3:5], rtol=0.1, atol=0.05)
    torch.nn.init.normal_(objective.reference.tail.weight)
    with pytest.raises(InputError, match="made by another autoencoder or reference stage"):
        make_encodings(objective, paths, tmp_path, seed=0, half=False)


# ------------------------------------------------------------------ objectives


def gradients(module):
    return sum(float(x.grad.abs().sum()) for x in module.parameters() if x.grad is not None)


def test_the_diffusion_loss_reaches_the_reference_stage_in_joint_alone():
    for joint in (False, True):
        objective = diffusion_objective(joint)
        final = objective.final_losses(objective.encoded(batch_of()), torch.Generator())
        (final["latent"] + final["picture"]).backward()
        assert (gradients(objective.reference) > 0) is joint
        assert gradients(objective.unet) > 0
        assert gradients(objective.structure) > 0
        assert gradients(objective.vae) == 0


def test_alpha_weighs_what_reaches_the_reference_stage():
    found = []
    for alpha in (1.0, 2.0, 4.0):
        objective = diffusion_objective(joint=True, alpha=alpha)
        objective(batch_of(), torch.Generator().manual_seed(0))["loss"].backward()
        found.append(torch.cat([x.grad.flatten() for x in objective.reference.parameters() if x.grad is not None]))
    once, twice, four = found
    final, own = twice - once, 2 * once - twice
    assert final.norm() > 1e-3 * own.norm()
    assert torch.cosine_similarity(own, once, dim=0) < 1 - 1e-7  # another direction, not only another length
    torch.testing.assert_close(four - once, 3 * final, rtol=1e-3, atol=1e-5)


def test_without_alpha_the_reference_stage_learns_alone():
    objective, batch = diffusion_objective(joint=True, alpha=0.0), batch_of()
    losses = objective(batch, torch.Generator())
    losses["loss"].backward()
    assert losses["loss"] == distance((objective.restore(batch) + 1) / 2, batch["truth"])
    assert gradients(objective.reference) > 0
    assert gradients(objective.unet) == 0


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_intermediate_result_is_judged_by_features_and_a_critic_too(alpha):
    seen = PictureLoss(lambda made, truth: (made - truth).square().mean((1, 2, 3)), 3.0)
    objective = diffusion_objective(True, alpha, picture_loss=seen, gan=0.5)
    batch = batch_of()
    losses = objective(batch, torch.Generator().manual_seed(0))
    made, truth = objective.restore(batch), 2 * batch["truth"] - 1
    near = (made - truth).abs().mean() if alpha else distance((made + 1) / 2, batch["truth"])
    restored = near + 3 * (made - truth).square().mean() / 4
    torch.testing.assert_close(losses["restored"], restored)
    for_made, of_critic = adversarial(objective.reference_critic, made, truth)
    torch.testing.assert_close(losses["reference_critic"], of_critic)
    whole = restored + 0.5 * for_made.mean() + of_critic
    if alpha:
        whole = whole + losses["latent"] + losses["picture"] + losses["critic"]
    torch.testing.assert_close(losses["loss"], whole)
    losses["loss"].backward()
    assert gradients(objective.reference_critic) > 0
    assert diffusion_objective(gan=0.5).reference_critic is None  # where the reference stage stands still


@pytest.mark.parametrize("own_steps", [0, 3])
@pytest.mark.parametrize("predicts", ["x0", "noise"])
def test_a_perfect_denoiser_has_no_loss(predicts, own_steps, monkeypatch):
    """The latent part vanishes, and the picture is the intermediate one with the truth's detail added."""
    objective = diffusion_objective(predicts=predicts, own_steps=own_steps)
    encoded = objective.encoded(batch_of())
    clean, intermediate = encoded["z"], encoded["intermediate"]
    objective.detail_scale = 3.0

    def perfect(_, x, t, *__):
        difference, alpha = 3 * (clean - encoded["z_inter"]), objective.alphas[t].view(-1, 1, 1, 1)
        noise = (x - alpha.sqrt() * difference) / (1 - alpha).sqrt()
        return type("Out", (), {"sample": difference if predicts == "x0" else noise})

    monkeypatch.setattr(type(objective.unet), "forward", perfect)
    seen = []
    objective.picture_loss.forward = lambda made, truth: seen.append(made) or (made - truth).abs().mean((1, 2, 3))
    losses = objective.final_losses(encoded, torch.Generator().manual_seed(3))
    assert losses["latent"] < 1e-12
    expected = intermediate + objective.decode(clean) - objective.decode(objective.encode(intermediate))
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("predicts", ["x0", "noise"])
def test_own_steps_learn_from_what_the_sampler_has(predicts):
    """What the pipeline has between its steps is what the loss denoises at these timesteps."""
    objective = diffusion_objective(predicts=predicts, own_steps=3)
    stage = make_stage("tiny", predicts)
    stage.unet, stage.structure, stage.vae = objective.unet, objective.structure, objective.vae
    stage.set_progress_bar_config(disable=True)
    low, intermediate = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).unbind()
    sampled = []

    def keep(_, step, timestep, kept):
        sampled.append((int(timestep), kept["latents"]))

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(7)}
    stage(low, intermediate, **options, callback_on_step_end=keep)
    z_low, z_inter = (objective.encode(signed(x)) for x in (low, intermediate))
    met = {}
    for seed in range(12):
        x, t = objective.on_the_way(z_low, z_inter, noise, torch.Generator().manual_seed(seed))
        met[int(t)] = x
    timesteps = [timestep for timestep, _ in sampled]
    assert set(met) == set(timesteps)
    for before, (_, latents) in zip(timesteps[1:], sampled, strict=False):
        torch.testing.assert_close(met[before], latents, rtol=0, atol=1e-4)


def test_without_the_picture_nothing_is_decoded():
    objective = diffusion_objective()
    encoded = objective.encoded(batch_of())
    whole = objective(encoded, torch.Generator().manual_seed(0))
    objective.picture, objective.decode = 0, None
    latent = objective(encoded, torch.Generator().manual_seed(0))
    assert latent.keys() == {"loss", "latent"}
    assert latent["loss"] == latent["latent"] == whole["latent"]


def test_the_critic_and_the_picture_learn_against_each_other():
    torch.manual_seed(0)
    critic, truth = PatchCritic(), batch_of(2)["truth"]
    made = (truth / 2).requires_grad_()
    for_made, for_critic = adversarial(critic, made, truth)
    for_made.sum().backward()
    assert made.grad.abs().sum() > 0
    assert gradients(critic) == 0
    made.grad = None
    for_critic.backward()
    assert made.grad is None
    assert gradients(critic) > 0
    optimiser = torch.optim.Adam(critic.parameters(), 1e-3)
    for _ in range(30):
        optimiser.zero_grad()
        adversarial(critic, made, truth)[1].backward()
        optimiser.step()
    assert adversarial(critic, made, truth)[1] < 0.7 * for_critic
    assert (adversarial(critic, truth, truth)[0] < adversarial(critic, made, truth)[0]).all()


def test_bfloat16_follows_float32():
    losses = []
    for precision in ("fp32", "bf16"):
        settings = dataclasses.replace(SETTINGS, precision=precision)
        run = Run(settings, diffusion_objective(), CPU, None)
        losses.append(float(run.losses(batch_of())["loss"].detach()))
        run.losses(batch_of())["loss"].backward()
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize("stage", ["autoencoder", "joint"])
def test_the_loss_falls(stage, tmp_path):
    settings = dataclasses.replace(SETTINGS, stage=stage, steps=40, rate=2e-3)
    if stage == "autoencoder":
        objective = AutoencoderObjective(make_stage("tiny"), PictureLoss(None, 0))
    else:
        objective = diffusion_objective(joint=stage == "joint")
    run = Run(settings, objective, CPU, tmp_path)
    batch = batch_of(1, references=stage != "autoencoder")
    batch["truth"] = torch.nn.functional.avg_pool2d(batch["truth"], 9, 1, 4)
    losses = [run.train_step(drawing(batch))["loss"] for _ in range(14)]
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:3])


def test_a_stopped_run_ends_with_the_same_bits(tmp_path, paths):
    settings = dataclasses.replace(SETTINGS, stage="joint", accumulate=2)
    samples = Examples(paths, 64, 1, seed=0)

    def begin():
        return Run(settings, diffusion_objective(joint=True), CPU, tmp_path)

    whole, half = begin(), begin()
    for _ in range(2):
        whole.train_step(samples.draw)
    half.train_step(samples.draw)
    half.save(tmp_path / "state.safetensors")
    torch.manual_seed(99)
    resumed = begin()
    resumed.resume(tmp_path / "state.safetensors")
    resumed.train_step(samples.draw)
    whole.save(tmp_path / "whole.safetensors")
    resumed.save(tmp_path / "resumed.safetensors")
    one, other = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "resumed.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    other = Run(dataclasses.replace(settings, alpha=2.0), diffusion_objective(joint=True), CPU, tmp_path)
    with pytest.raises(InputError, match=r"of another run \(alpha 1.0 there and 2.0 here"):
        other.resume(tmp_path / "state.safetensors")
    other = Run(settings, diffusion_objective(), CPU, tmp_path)
    with pytest.raises(InputError, match="has other weights than this model"):
        other.resume(tmp_path / "state.safetensors")


def test_accumulation_is_the_mean_of_its_parts(tmp_path):
    """Twice the same batch with the same numbers is that batch once."""
    batch, found = batch_of(1), []
    for accumulate in (1, 2):
        settings = dataclasses.replace(SETTINGS, stage="autoencoder", accumulate=accumulate)
        run = Run(settings, AutoencoderObjective(make_stage("tiny"), PictureLoss(None, 0)), CPU, tmp_path)
        run.losses = lambda batch, _, run=run: run.model(batch, torch.Generator().manual_seed(0))
        run.train_step(drawing(batch))
        found.append(torch.cat([x.detach().flatten() for x in run.learning.values()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_nan_stops_and_keeps_the_batch(tmp_path):
    run = Run(SETTINGS, diffusion_objective(), CPU, tmp_path)
    batch = batch_of(1)
    batch["truth"][0, 0, 0, 0] = torch.nan
    before = {name: x.detach().clone() for name, x in run.learning.items()}
    with pytest.raises(InputError, match=r"the loss is nan in step 0; its batch is kept as .*bad_batch"):
        run.train_step(drawing(batch))
    kept = load_file(tmp_path / BAD_BATCH)
    assert kept["truth"].isnan().sum() == 1
    assert all(torch.equal(before[name], x) for name, x in run.learning.items())


@pytest.mark.usefixtures("quick")
def test_the_commands_from_photos_to_a_rich_photo(folder, tmp_path, capsys):
    save_model(tmp_path / "refnet", tiny_net())

    def train(stage, *more):
        command = ["train", "refsr", "--stage", stage, "--data", str(folder), "--out", str(tmp_path / stage)]
        command += ["--size", "tiny", "--batch", "1", "--side", "64", "--steps", "2", "--pairs", "2", "--json"]
        command += ["--sampling-steps", "2", "--retrieved", "0.5", "--random", "0.5"]
        assert main([*command, *more]) == 0
        return json.loads(capsys.readouterr().out)

    told = train("autoencoder", "--reference", str(tmp_path / "refnet"))
    assert told["step"] == 2
    assert train("autoencoder", "--reference", str(tmp_path / "refnet")) == told  # it goes on, and there is no more
    init = tmp_path / "autoencoder" / "model"
    for side, kept in (("320", True), ("64", False)):  # of crops, which are as many pixels as the examples, or fewer
        out = tmp_path / f"diffusion-{side}"
        more = ["--picture-share", "0", "--timesteps", "own", "--out", str(out)]
        train("diffusion", "--init", str(init), "--side", side, *more)
        assert (out / "encodings").is_dir() == kept
    assert json.loads((out / "model" / "training.json").read_text())["settings"]["timesteps"] == "own"
    told = train("joint", "--init", str(init), "--perceptual", str(vgg(tmp_path)), "--gan", "0.1")
    assert 0 < told["rich_haarpsi"] <= 1
    assert told["critic"] > 0
    assert told["restored"] > 0
    model = tmp_path / "joint" / "model"
    own, before = (load_file(one / "reference" / "model.safetensors") for one in (model, init))
    assert any(not torch.equal(own[name], before[name]) for name in own)  # joint moved the reference stage
    assert {path.name for path in model.parent.iterdir()} == {
        "state.safetensors", "model", "log.csv", "curve.png", "validation.png", "examples",
    }  # fmt: skip
    assert load_diffusion(model, CPU).unet.dtype == torch.float32  # though it is kept in half precision
    facts = json.loads((model / "training.json").read_text())
    assert (facts["sampling_steps"], facts["mix"]["retrieved"]) == (2, 0.5)
    assert "diffusion stage" in (model / "README.md").read_text()

    low = tmp_path / "low.png"
    Image.open(folder / "coffee.png").resize((30, 20)).save(low)
    command = ["restore", str(low), "--ref", str(folder / "coffee.png"), "--model", str(model)]
    assert main([*command, "--quality", "rich", "-o", str(tmp_path / "rich.png"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 2
    assert told["results"][0]["milliseconds"]["diffuse"] > 0
    assert Image.open(tmp_path / "rich.png").size == (120, 80)
    (model / "unet" / "config.json").write_text("{")
    assert main([*command, "--quality", "rich", "-o", str(tmp_path / "no.png")]) == 2
    assert "is no diffusion stage that ragsr can load" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stage diffusion", "stage diffusion needs --init"),
        ("--stage diffusion --init {data}", "holds no model_index.json"),
        ("--stage autoencoder --side 100", "must be a multiple of 64, at most 320"),
        ("--stage autoencoder --retrieved 0.9 --random 0.2", "are shares: none below 0, together at most 1"),
        ("--stage autoencoder --steps 0", "--steps is 0; it must be at least 1"),
        ("--stage autoencoder --rate 2", "--rate is 2.0"),
        ("--stage autoencoder", "4 large photos are too few"),
        ("--stage autoencoder --data {empty}", "no images in"),
        ("--stage autoencoder --data {small}", "0 large photos are too few"),
    ],
)
def test_bad_options(folder, tmp_path, capsys, options, message, monkeypatch):
    if "init" in options:
        monkeypatch.setattr(stages, "HELD_OUT", 2)
    for name in ("empty", "small"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (60, 60)).save(tmp_path / "small" / "a.png")
    places = {"data": folder, "empty": tmp_path / "empty", "small": tmp_path / "small"}
    command = ["train", "refsr", "--data", str(folder), "--out", str(tmp_path / "out"), "--size", "tiny"]
    assert main([*command, *options.format(**places).split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
