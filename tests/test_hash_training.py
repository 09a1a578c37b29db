"""The training of hash encoders: the recorded original, views and degradation, a run that can be stopped, errors."""

import json

import numpy as np
import pytest
import torch
from golden import golden_cases
from PIL import Image
from skimage import data
from torch import nn

from ragsr.cli import main
from ragsr.codes import load_encoder
from ragsr.codes.hashing import BACKBONE, digest, relevance
from ragsr.errors import InputError
from ragsr.ops import hamming_distance, pack_bits
from ragsr.training import hash as training
from ragsr.training import hash_check
from ragsr.training.checkpoint import read_checkpoint
from ragsr.training.degrade import PLAIN, Recipe, degrade_image, degrade_tensor, gaussian_kernel, sinc_kernel
from ragsr.training.hash import Material, Settings, check_sizes, train
from ragsr.training.hash_check import fit_logistic, split
from ragsr.training.hash_loss import (
    balance,
    bernoulli_kl,
    hash_loss,
    nt_xent,
    relations,
    straight_sign,
    symmetric_kl,
    use_of_bits,
)
from ragsr.training.hash_start import initial_backbone
from ragsr.training.hash_views import Camera, Views, homography
from ragsr.training.photos import Photo, find_photos

(CASE,) = golden_cases("cibhash")
OUT = {name.removeprefix("output."): x for name, x in CASE.tensors.items() if name.startswith("output.")}


def near(name, x):
    torch.testing.assert_close(x, OUT[name].reshape(x.shape), atol=CASE.config["atol_per_output"][name], rtol=0)


def leaf(x):
    return x.clone().requires_grad_()


# ------------------------------------------------------------------ the recorded original


def golden_head():
    weights = CASE.weights()
    hidden, size = weights["encoder.0.weight"].shape
    head = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, len(weights["encoder.2.bias"])))
    head.load_state_dict({name.removeprefix("encoder."): x for name, x in weights.items()})
    return head


def test_loss_and_gradients_are_the_originals():
    head = golden_head()
    one, other = leaf(CASE.tensors["input.feature_i"]), leaf(CASE.tensors["input.feature_j"])
    p, q = torch.sigmoid(head(one)), torch.sigmoid(head(other))
    near("prob_i", p), near("prob_j", q)
    near("code_i", straight_sign(p)), near("code_j", straight_sign(q))
    tau, weight = CASE.config["config"]["tau"], CASE.config["config"]["w"]
    loss = hash_loss(p, q, tau, weight)
    loss.backward()
    near("loss", loss), near("kl", symmetric_kl(p, q))
    near("grad_feature_i", one.grad), near("grad_feature_j", other.grad)
    for name, parameter in head.named_parameters():
        near(f"grad_encoder.{name}", parameter.grad)


def test_parts_of_the_loss_are_the_originals():
    p, q = leaf(OUT["prob_i"]), leaf(OUT["prob_j"])
    (straight_sign(p) * CASE.tensors["input.ste_upstream"]).sum().backward()
    near("ste_grad_prob", p.grad)
    near("kl_i_to_j", bernoulli_kl(p, q))
    p.grad = None
    symmetric_kl(p, q).backward()
    near("kl_sym", symmetric_kl(p, q)), near("kl_grad_prob_i", p.grad), near("kl_grad_prob_j", q.grad)
    for kind, inputs in (
        ("codes", ("output.code_i", "output.code_j")),
        ("real", ("input.feature_i", "input.feature_j")),
    ):
        a, b = (leaf(CASE.tensors[name]) for name in inputs)
        found = nt_xent(a, b, CASE.config["config"]["tau"])
        found.backward()
        near(f"nt_xent_{kind}", found), near(f"nt_xent_{kind}_grad_i", a.grad), near(f"nt_xent_{kind}_grad_j", b.grad)


def test_packed_codes_have_the_recorded_distances():
    head = golden_head()
    queries, base = (pack_bits(head(CASE.tensors[f"input.{n}_feature"]).detach()) for n in ("query", "db"))
    assert torch.equal(hamming_distance(queries, base).float(), OUT["hamming"])


def test_exactly_a_half_is_a_one():
    assert straight_sign(torch.tensor([0.5, 0.4999])).tolist() == [1, -1]


def test_relations_are_nothing_where_both_agree():
    features = nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    turned = features @ torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    assert relations(turned, features).abs() < 1e-5
    assert relations(features.roll(1, 0), features) > 0.01


def test_balance_tells_dead_and_equal_bits():
    good = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).float()
    assert balance(good) == {"bits_off": 0, "bits_tied": 0}
    assert balance(good[:, [0, 0]])["bits_tied"] == pytest.approx(1)
    assert balance(torch.ones(4, 2)) == {"bits_off": 0.5, "bits_tied": 1}
    assert use_of_bits(good) == 0
    assert use_of_bits(good[:, [0, 0]]) == pytest.approx(0.5)
    assert use_of_bits(torch.ones(4, 2)) == 1


# ------------------------------------------------------------------ views and degradation


def test_degradation_repeats_and_reaches_its_size():
    photo = Image.fromarray(data.coffee())
    one, same, other = (degrade_image(photo, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.tobytes() == same.tobytes() != other.tobytes()
    for seed in range(6):
        bad = degrade_image(photo, np.random.default_rng(seed), Recipe(scale=(4, 4)))
        assert bad.size == (photo.width // 4, photo.height // 4)
    kind = degrade_image(photo, np.random.default_rng(0), PLAIN)
    rough = degrade_image(photo, np.random.default_rng(0), Recipe(noise=(30, 30), jpeg=(10, 12)))
    assert loss_of(photo, kind) < loss_of(photo, rough)
    x = degrade_tensor(torch.rand(1, 3, 40, 60), np.random.default_rng(0), Recipe(scale=(2, 2)))
    assert (x.shape, x.dtype) == ((1, 3, 20, 30), torch.float32)


def loss_of(photo, bad):
    small = photo.resize(bad.size, Image.Resampling.BOX)
    return float(np.square(np.asarray(bad, float) - np.asarray(small, float)).mean())


def test_kernels_are_what_their_names_say():
    for kernel in (gaussian_kernel(2, 0.7, 0.3), sinc_kernel(1.5)):
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-6)
    wave = np.cos(2.5 * np.arange(11))  # beyond the cutoff
    assert abs((sinc_kernel(1.0).sum(0) * wave).sum()) < 0.1
    wide = gaussian_kernel(2, 0.5, 0)
    y, x = np.mgrid[-6:7, -6:7]
    assert (wide * x**2).sum() == pytest.approx(4, rel=0.05)
    assert (wide * y**2).sum() == pytest.approx(0.25, rel=0.2)  # the grid is coarse for it


def test_homography_takes_corners_to_corners():
    corners = np.array([(3.0, 5), (1, 90), (80, 99), (70, 2)])
    a, b, c, d, e, f, g, h = homography((40, 30), corners)
    for (x, y), wanted in zip([(0, 0), (0, 30), (40, 30), (40, 0)], corners, strict=True):
        w = g * x + h * y + 1
        np.testing.assert_allclose(((a * x + b * y + c) / w, (d * x + e * y + f) / w), wanted)


def test_views_depend_on_their_numbers_alone(folder):
    photos = find_photos(folder)
    one, other = Views(photos, 32, 3, seed=1), Views(photos, 32, 3, seed=1)
    other.view(2, 0)
    assert np.array_equal(one.view(1, 2).bad, other.view(1, 2).bad)
    assert one.draw(4, (7, 0)) == other.draw(4, (7, 0)) != one.draw(4, (7, 1))
    for (photo, number), (same, second) in one.draw(4, (0,)):
        assert photo == same
        assert number != second


def test_two_photos_of_a_scene_are_a_pair(folder):
    photos = [Photo(photo.path, f"scene {i // 2}") for i, photo in enumerate(find_photos(folder))]
    for one, other in Views(photos, 32, 2, seed=0).draw(3, (0,)):
        assert one[0] != other[0]
        assert one[0] // 2 == other[0] // 2
    seen, held = split(photos, seed=0)
    assert not {photo.scene for photo in seen} & {photo.scene for photo in held}


# ------------------------------------------------------------------ scores


def test_logistic_fit_finds_its_own_numbers():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(20000, 2))
    y = generator.random(20000) < 1 / (1 + np.exp(-(0.5 + 2 * x[:, 0])))
    w = fit_logistic(x, y.astype(float))
    np.testing.assert_allclose(w, (0.5, 2, 0), atol=0.08)
    assert fit_logistic(-x[:, :1], y.astype(float))[1] == 0  # a score must not fall as likeness rises


def test_relevance_is_monotone():
    fit = {"distance": [2.0, 9.0], "both": [-3.0, 1.0, 8.0]}
    by_distance = [relevance(fit, share, None) for share in (0, 0.1, 0.5)]
    assert by_distance == sorted(by_distance, reverse=True)
    assert relevance(fit, 0.1, 0.9) > relevance(fit, 0.1, 0.5) > relevance(fit, 0.3, 0.5)
    assert 0 <= relevance(fit, 1e9, -1) < relevance(fit, -1e9, 1) <= 1


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve photos."""
    made = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        image = Image.fromarray(getattr(data, name)()).resize((300, 200))
        for i in range(3):
            image.crop((60 * i, 30 * i, 60 * i + 140, 30 * i + 120)).save(made / f"{name}-{i}.png")
    return made


@pytest.fixture
def quick(monkeypatch):
    """Small pictures and few checks."""
    monkeypatch.setattr(training, "SIDE", 32)
    monkeypatch.setattr(training, "CHECKS", 2)
    monkeypatch.setattr(hash_check, "NARROW", Camera((0.4, 1), sides=(64, 96)))
    monkeypatch.setattr(hash_check, "WIDE", Camera((0.4, 1), sides=(64, 96)))


SMALL = Settings(bits=16, steps=4, batch=4, views=2, warm_up=1)


@pytest.mark.usefixtures("quick")
def test_a_stopped_run_ends_as_one_that_ran_through(folder, tmp_path):
    material = Material(find_photos(folder), views=2, seed=0, batch=4)
    reached = train(SMALL, material, tmp_path / "whole")

    def stop(*given):
        report(*given)
        raise KeyboardInterrupt

    report = training.report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "report", stop)
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, material, tmp_path / "halves")
    assert train(SMALL, Material(find_photos(folder), 2, 0, 4), tmp_path / "halves") == reached
    (whole, notes), (halves, same) = (
        read_checkpoint(tmp_path / name / "state.safetensors", SMALL) for name in ("whole", "halves")
    )
    assert notes == same
    assert whole.keys() == halves.keys()
    assert all(torch.equal(x, halves[name]) for name, x in whole.items())
    assert any(x.abs().max() > 0 for name, x in whole.items() if "adam.exp_avg.backbone.net.layers.0" in name)
    for name in ("model/head.safetensors", "model/backbone.safetensors", "log.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes(), name
    assert (tmp_path / "whole" / "curve.png").stat().st_size > 1000
    with pytest.raises(InputError, match=r"of another run .*bits 16 there and 32 here"):
        train(Settings(bits=32, steps=4, batch=4, views=2, warm_up=1), material, tmp_path / "whole")


@pytest.mark.usefixtures("quick")
def test_heads_share_a_backbone_and_load(folder, tmp_path, capsys):
    call = ["train", "hash", "--data", str(folder), "--out", str(tmp_path), "--bits", "16", "32", "--steps", "2"]
    call += ["--head-steps", "2", "--batch", "4", "--views", "2", "--device", "cpu", "--json"]
    assert main(call) == 0
    short, long = (tmp_path / f"hash-{bits}" / "model" for bits in (16, 32))
    assert [one["model"] for one in json.loads(capsys.readouterr().out)] == [str(short), str(long)]
    assert digest([short / BACKBONE]) == digest([long / BACKBONE])
    encoder = load_encoder(long)
    assert (encoder.bits, encoder.features, encoder.source) == (32, 256, str(long))
    assert encoder.id != load_encoder(short).id
    codes, features = encoder.describe([Image.open(path) for path in sorted(folder.iterdir())[:3]])
    assert (codes.shape, features.shape) == ((3, 4), (3, 256))
    assert "12 photos" in (long / "README.md").read_text()
    assert main([*call[:-1], "--backbone", "frozen", "--init", str(long), "--out", str(tmp_path / "more")]) == 0
    assert (tmp_path / "more" / "hash-16" / "model" / BACKBONE).read_bytes() == (long / BACKBONE).read_bytes()


@pytest.mark.usefixtures("quick")
def test_a_trained_backbone_is_averaged_with_what_it_began_with(folder, tmp_path):
    call = ["train", "hash", "--data", str(folder), "--out", str(tmp_path), "--bits", "16", "--steps", "2", "--init"]
    call += ["hash-64", "--head-steps", "2", "--batch", "4", "--views", "2", "--device", "cpu", "--json"]
    assert main(call) == 0
    ends = "hash-64", tmp_path / "backbone" / "model", tmp_path / "hash-16" / "model"
    begun, trained, mixed = (initial_backbone(str(end)) for end in ends)
    name = "net.layers.3.weight"
    assert not torch.equal(begun[name], trained[name])
    torch.testing.assert_close(mixed[name], (begun[name] + trained[name]) / 2, rtol=1e-3, atol=1e-4)  # float16 in files


@pytest.mark.parametrize(
    ("photos", "batch", "message"),
    [(12, 20, "the batch of 20 is larger than the 9 scenes"), (5, 2, "5 photos are too few: at least 8 scenes")],
)
def test_too_little_to_learn_from(folder, photos, batch, message):
    with pytest.raises(InputError, match=message):
        check_sizes(batch, *split(find_photos(folder)[:photos], seed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bits 20", "--bits is 20; codes have 16, 32, 64, 128, 256 bits"),
        ("--backbone frozen", "needs --init"),
        ("--init nothing", "begin with hash-16"),
        ("--init {data}", "holds no config.json"),
        ("--views 1", "--views is 1"),
    ],
)
def test_bad_options(folder, tmp_path, capsys, options, message):
    call = ["train", "hash", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert main([*call, *options.format(data=folder).split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_empty_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["train", "hash", "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "no images in" in capsys.readouterr().err
