"""Training: which photos, what samples, and a run that can be stopped at any time."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from pictures import SAMPLES, write_samples
from PIL import Image

from ragsr.cli import main
from ragsr.errors import InputError
from ragsr.models.alignment import enlarge_low
from ragsr.models.fusion import FusionNet
from ragsr.models.resample import back_project
from ragsr.training import refsr
from ragsr.training.pairs import SIDE, PairMaker, load_pair, make_pairs, retake, warped_reference
from ragsr.training.photos import Crops, Photo, degrade, find_photos, may_train, sources_of, turned
from ragsr.training.samples import Samples, grouped, hold_out

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def pairs(folder, tmp_path_factory):
    """Six pairs on disk, of which at least one is of the same thing."""
    return make_pairs(PairMaker(find_photos(folder), seed=3), 6, tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def quick(monkeypatch):
    """A run that holds two photos out and validates on one pair every other step."""
    for name, value in {"HELD_OUT": 2, "CHECKS": 1, "CHECK_EVERY": 2}.items():
        monkeypatch.setattr(refsr, name, value)


def settings(**changes):
    return dataclasses.replace(refsr.Settings("base", steps=4, batch=2, side=32, warm_up=1), **changes)


def tiny():
    return FusionNet(channels=8, before=1, after=1, guide_blocks=1)


# ------------------------------------------------------------------ photos


@pytest.mark.parametrize(
    ("licence", "licence_class", "allowed"),
    [
        ("CC0", "clean", True),
        ("CC BY 4.0 (repo LICENSE)", "clean", True),
        ("Unsplash licence", "free", True),
        ("CC BY-SA 4.0 (Attribution)", "clean", False),
        ("GPL-2.0-or-later / CC BY 4.0", "clean", False),
        ("GPL-2.0 (LICENSE)", "repo", False),
        ("BSD-2-Clause (repo LICENSE)", "repo", True),
        ("CC0", "unstated", False),
        ("", "repo", False),
    ],
)
def test_licences(licence, licence_class, allowed):
    assert may_train(licence, licence_class) is allowed


def test_a_manifest_decides(folder, tmp_path):
    head = ("file", "licence", "licence_class", "scene_id", "source_repo")
    rows = [
        ("a.png", "CC0", "clean", "yard", "us/photos"),
        ("b.png", "CC BY-SA 4.0", "clean", "yard", "us/photos"),
        ("c.png", "", "unstated", "", ""),
    ]
    with open(tmp_path / "MANIFEST.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    assert find_photos(tmp_path) == [Photo(tmp_path / "a.png", "yard", "CC0", "us/photos")]
    assert sources_of(find_photos(tmp_path)) == [("us/photos", "CC0", 1)]
    assert [photo.path.stem for photo in find_photos(folder)] == sorted(SAMPLES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,licence,licence_class\na.png,GPL,clean\n", "none of its photos may be trained on"),
        ("path,licence\na.png,CC0\n", "lacks the columns file, licence_class"),
    ],
)
def test_manifests_that_cannot_be(tmp_path, text, message):
    (tmp_path / "MANIFEST.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        find_photos(tmp_path)


def test_crops_are_drawn_again_alike(folder):
    crops = Crops(find_photos(folder), 64)
    first, again, other = (crops.draw(3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 3, 64, 64)
    assert 0 <= first.min() < first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_photo_is_large_enough(tmp_path):
    Image.new("RGB", (200, 300)).save(tmp_path / "small.png")
    with pytest.raises(InputError, match="no photo has sides of 256"):
        Crops(find_photos(tmp_path), 64)
    with pytest.raises(InputError, match="two photos and more with sides of at least 416"):
        PairMaker(find_photos(tmp_path))


def test_held_out_scenes_are_never_trained_on(folder):
    seen, held = hold_out(find_photos(folder), 2, seed=0)
    assert len(seen) == len(held) == 2
    assert not {p.scene for p in seen} & {p.scene for p in held}
    with pytest.raises(InputError, match="4 large photos are too few"):
        hold_out(find_photos(folder), 4, seed=0)


# ------------------------------------------------------------------ pairs and samples


def test_pairs_are_made_once_and_alike(folder, pairs):
    found = load_pair(pairs[0])
    again = PairMaker(find_photos(folder), seed=3).make(0)
    assert found.truth.shape == (SIDE, SIDE, 3)
    assert found.clues.shape == (len(found.kinds), 6, SIDE, SIDE)
    assert found.kinds == again.kinds
    assert np.array_equal(found.truth, again.truth)
    assert np.array_equal(found.clues, again.clues)
    before = pairs[0].stat().st_mtime_ns
    make_pairs(PairMaker(find_photos(folder), seed=3), 1, pairs[0].parent)
    assert pairs[0].stat().st_mtime_ns == before


def test_the_detail_of_a_true_reference_is_true(pairs):
    """Adding what the clues bring, weighted with their trust, lowers the error where the reference shows the same."""
    gains = []
    for pair in map(load_pair, pairs):
        if pair.kinds == ("same",):
            truth = torch.from_numpy(pair.truth).permute(2, 0, 1)[None] / 255
            low, clues = degrade(truth, 4), torch.from_numpy(pair.clues).float()
            alone = enlarge_low(low)
            helped = back_project(alone + clues[:, 5:] * clues[:, :3], low, 3)
            gains.append(float((alone - truth).square().mean() / (helped - truth).square().mean()))
    assert gains
    assert np.mean(gains) > 1.05


def test_the_reference_shows_the_crop(folder):
    """Its middle, moved by at most 0.4 of its span, lies around the centre it was given."""
    image = Image.new("RGB", (900, 900))
    image.paste((255, 255, 255), (300, 300, 600, 600))
    reference, zoom = warped_reference(image, np.array([450.0, 450.0]), 1.0, np.random.default_rng(0))
    assert reference.shape == (1, 3, 640, 640)
    assert 0.8 <= zoom <= 1.9
    assert reference.max() > 0.99
    assert 0.05 < reference.mean() < 0.95


def test_a_retake_changes_light_but_not_the_scene(folder):
    photo = torch.from_numpy(np.array(Image.open(folder / "coffee.png"))).permute(2, 0, 1)[None] / 255
    stranger = Image.open(folder / "rocket.png")
    other = retake(photo, stranger, np.random.default_rng(5))
    assert other.shape == photo.shape
    assert 0.005 < (other - photo).abs().mean() < 0.3
    both = torch.stack((photo.flatten(), other.flatten()))
    assert torch.corrcoef(both)[0, 1] > 0.7


def test_the_eight_ways_to_lie():
    square = torch.arange(9.0).view(1, 1, 3, 3)
    assert len({tuple(turned(square, way).flatten().tolist()) for way in range(8)}) == 8


def test_samples_keep_truth_and_clues_together(folder, pairs):
    """Every pair's luma difference fits its truth after cropping and turning: both were turned alike."""
    samples = Samples(160, 4, 0, find_photos(folder), pairs)
    (plain, nothing), *with_references = samples.draw(7)
    assert nothing == ()
    assert len(plain) + sum(len(truth) for truth, _ in with_references) == 4
    for truth, clues in with_references:
        assert all(one.shape == (len(truth), 6, 160, 160) for one in clues)
    batches, again = samples.draw(8), samples.draw(8)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    truth, clues = next((t, c) for t, c in samples.draw(9)[1:] if len(c))
    missing = truth - enlarge_low(degrade(truth, 4))
    agreement = (missing * clues[0][:, :3] * clues[0][:, 5:]).sum((1, 2, 3))
    assert (agreement > 0).any() or clues[0][:, 5].max() < 0.05


def test_batches_are_grouped_by_the_number_of_references():
    drawn = [(torch.full((1, 3, 8, 8), float(n)), torch.full((n, 6, 8, 8), float(n))) for n in (2, 1, 2)]
    (one, (_,)), (two, (first, second)) = grouped(drawn)
    assert (len(one), len(two), len(first), len(second)) == (1, 2, 2, 2)
    assert one.unique().tolist() == [1.0]
    assert torch.equal(first, second)


def test_the_low_quality_photo_is_that_of_pillow(folder):
    image = Image.open(folder / "astronaut.png")
    truth = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    pillow = np.asarray(image.resize((120, 110), Image.Resampling.BICUBIC)) / 255
    ours = degrade(truth, 4)[0].permute(1, 2, 0).numpy()
    difference = np.abs(ours - pillow) * 255
    assert difference.mean() < 0.2
    assert (difference > 1.01).mean() < 5e-3  # Pillow rounds, and clips overshoots, between rows and columns


# ------------------------------------------------------------------ a run


def test_the_rate_rises_and_falls():
    rates = [settings(steps=100, warm_up=10, rate=1.0).rate_at(step) for step in range(101)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == rates[10] == pytest.approx(1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_a_step_learns():
    torch.manual_seed(0)
    run = refsr.Run(settings(steps=60, rate=3e-3), tiny(), CPU)
    batch = [(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), ())]
    losses = [run.train_step(batch) for _ in range(60)]
    assert losses[-1] < 0.9 * losses[0]
    assert run.step == 60
    guide = [name for name in run.average if name.startswith("guide.")]
    assert all(torch.equal(run.average[name], run.net.state_dict()[name]) for name in guide)  # no reference, no change


@pytest.mark.parametrize("with_pairs", [False, True])
def test_a_run_that_was_stopped_goes_on(folder, pairs, tmp_path, with_pairs):
    samples = Samples(32, 2, 0, find_photos(folder), pairs if with_pairs else ())

    def steps(run, count):
        for _ in range(count):
            run.train_step(samples.draw(run.step))
        return run

    def begin():
        torch.manual_seed(0)
        return refsr.Run(settings(steps=8), tiny(), CPU)

    whole = steps(begin(), 8)
    steps(begin(), 4).save(tmp_path / "state.safetensors")
    torch.manual_seed(99)
    resumed = refsr.Run(settings(steps=8), tiny(), CPU)
    resumed.resume(tmp_path / "state.safetensors")
    assert resumed.step == 4
    steps(resumed, 4)
    for kept in (lambda run: run.net.state_dict(), lambda run: run.average):
        moved, missed = (apart(kept(whole), kept(other)) for other in (begin(), resumed))
        assert missed < 0.05 * moved  # Adam's moments were rounded to bfloat16 on the way


def apart(a, b):
    """The mean difference of two sets of weights."""
    return float(torch.cat([(a[name] - b[name]).abs().flatten() for name in a]).mean())


def test_a_state_of_another_run_is_refused(tmp_path):
    refsr.Run(settings(), tiny(), CPU).save(tmp_path / "state.safetensors")
    with pytest.raises(InputError, match=r"is of another run \(steps 4 there and 9 here"):
        refsr.Run(settings(steps=9), tiny(), CPU).resume(tmp_path / "state.safetensors")
    with pytest.raises(InputError, match=r"head\.weight has shape"):
        refsr.Run(settings(), FusionNet(channels=16, before=1, after=1, guide_blocks=1), CPU).resume(
            tmp_path / "state.safetensors"
        )
    whole = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(whole[:1000])
    with pytest.raises(InputError, match="is damaged"):
        refsr.Run(settings(), tiny(), CPU).resume(tmp_path / "state.safetensors")


@pytest.mark.parametrize("stopped", [False, True])
def test_what_a_run_began_with_can_be_kept_in_part(folder, tmp_path, stopped):
    samples, began = Samples(32, 2, 0, find_photos(folder)), tiny().state_dict()

    def run_of(kept):
        run = refsr.Run(settings(kept=kept), tiny(), CPU)
        run.begin_with(began)
        return run

    def after_two_steps(run):
        while run.step < 2:
            run.train_step(samples.draw(run.step))
        return run

    new, run = after_two_steps(run_of(0.0)).averaged().state_dict(), after_two_steps(run_of(0.75))
    if stopped:
        run.save(tmp_path / "state.safetensors")
        run = run_of(0.75)
        run.resume(tmp_path / "state.safetensors")
    mean = run.averaged().state_dict()
    assert apart(new, began) > 0
    for name, value in mean.items():
        torch.testing.assert_close(value, 0.75 * began[name] + 0.25 * new[name])


def test_a_log_keeps_one_row_per_step(tmp_path):
    for step in (2, 4, 6, 4):
        refsr.append_row(tmp_path / "log.csv", {"step": step, "loss": step / 10})
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "2,0.2", "4,0.4"]


def test_the_command_from_photos_to_a_restored_photo(folder, tmp_path, quick, capsys):
    def train(stage, *more):
        command = ["train", "refsr", "--stage", stage, "--data", str(folder), "--out", str(tmp_path / stage)]
        assert main([*command, "--batch", "2", "--side", "32", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    told = train("base", "--steps", "2")
    assert (told["step"], told["photos"]) == (2, 4)
    told = train("reference", "--steps", "2", "--pairs", "2", "--init", str(tmp_path / "base" / "model"))
    assert told["step"] == 2
    assert {path.name for path in (tmp_path / "reference").iterdir()} == {
        "state.safetensors",
        "model",
        "log.csv",
        "curve.png",
        "validation.png",
        "pairs",
    }
    card = (tmp_path / "reference" / "model" / "README.md").read_text()
    assert "| not stated | not stated | 4 |" in card
    assert "ragsr" in card or "pytest" in card  # the command
    facts = json.loads((tmp_path / "reference" / "model" / "training.json").read_text())
    assert facts["begun_with"] == str(tmp_path / "base" / "model")
    assert facts["reached"]["step"] == 2
    Image.open(folder / "coffee.png").resize((30, 20)).save(tmp_path / "low.png")
    model = str(tmp_path / "reference" / "model")
    command = ["restore", str(tmp_path / "low.png"), "--ref", str(folder / "coffee.png"), "--model", model]
    assert main([*command, "-o", str(tmp_path / "big.png")]) == 0
    assert Image.open(tmp_path / "big.png").size == (120, 80)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--steps", "0"), "--steps is 0; it must be at least 1"),
        (("--side", "34"), "--side is 34; it must be a multiple of 4, at most 320"),
        (("--rate", "2"), "--rate is 2.0; it must lie between 0 and 1"),
        (("--init", "nowhere"), "nowhere: holds no config.json"),
        (("--kept", "0.5"), "--kept is 0.5; it is a share of the weights of --init, from 0 to less than 1"),
        (("--kept", "1", "--init", "refnet"), "--kept is 1.0; it is a share of the weights of --init"),
    ],
)
def test_wrong_options(folder, tmp_path, capsys, option, message):
    command = ["train", "refsr", "--stage", "base", "--data", str(folder), "--out", str(tmp_path / "run")]
    assert main([*command, *option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
