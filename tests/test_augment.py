"""Galleries that grow by generated images: what is kept, what is marked, and what a kill or a full disk leaves."""

import errno
import json
import os
import signal
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from pictures import picture
from PIL import Image, ImageChops
from tiny_diffusion import save_tiny_diffusion

from ragsr.cli import main
from ragsr.errors import InputError
from ragsr.gallery import Gallery, RejectionRule, augment_gallery
from ragsr.pipelines import SDEdit
from ragsr.pipelines.sdedit import fit


class Editor:
    """Scores as listed, then 0.01; pictures that depend on what it is given alone."""

    def __init__(self, *scores, model="m"):
        self.scores, self.calls = list(scores), []
        self.settings = {"model": model}

    def __call__(self, photo, strength, guidance, seed):
        self.calls.append((strength, guidance, seed))
        score = self.scores.pop(0) if self.scores else 0.01
        return ImageChops.blend(photo, picture(seed % 1000, *photo.size), strength), score


@pytest.fixture
def gallery(tmp_path):
    for seed in range(3):
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture(seed).save(tmp_path / "photos" / f"{seed}.png")
    with Gallery.create(tmp_path / "g", "baseline-64") as gallery:  # a network does not run in a forked process
        gallery.add([tmp_path / "photos"], progress=False)
        yield gallery


def augment(gallery, edit, **options):
    return augment_gallery(gallery, edit, progress=False, **options)


def files(gallery):
    """The pictures that were made, by name, and nothing else in their folder."""
    return {path.name: path.read_bytes() for path in (gallery.folder / "generated").glob("*")}


# ------------------------------------------------------------------ what is kept


def test_the_first_try_that_is_good_enough_is_kept(gallery):
    edit = Editor(0.5, 0.03, 0.02, 0.9)
    done = augment(gallery, edit, limit=2)
    assert [one.row.tries for one in done.made] == [3, 2]
    assert [one.row.score for one in done.made] == [0.02, 0.01]
    assert [(one.row.strength, one.row.guidance, one.row.seed) for one in done.made] == [edit.calls[2], edit.calls[4]]
    assert [one.parent.name for one in done.made] == ["0.png", "1.png"]
    assert (len(gallery), gallery.info(progress=False).generated) == (5, 2)


def test_rejected_images_are_not_stored_and_their_lowest_score_is_noted(gallery):
    done = augment(gallery, Editor(0.5, 0.2, 0.4), rule=RejectionRule(tries=3), limit=1)
    assert (done.made, len(gallery), files(gallery)) == ([], 3, {})
    assert [(one.path, one.row.score, one.row.tries) for one in done.rejected] == [(None, 0.2, 3)]


def test_what_draws_nothing_is_never_kept(gallery):
    done = augment(gallery, Editor(*[float("inf")] * 2), rule=RejectionRule(float("inf"), tries=2), limit=1)
    assert len(done.made) + len(done.rejected) == 1
    assert files(gallery) == {}
    assert json.loads(json.dumps(done.rejected[0].row.score)) > 1e100


def test_strength_and_guidance_are_drawn_from_their_ranges(gallery):
    edit = Editor(*[1.0] * 60)
    augment(gallery, edit, rule=RejectionRule(tries=20))
    strengths, guidances, seeds = zip(*edit.calls, strict=True)
    assert 0.55 <= min(strengths) < 0.56 < 0.64 < max(strengths) <= 0.65
    assert 7 <= min(guidances) < 7.5 < 9.5 < max(guidances) <= 10
    assert len(set(seeds)) == 60


def test_what_is_made_does_not_depend_on_order(gallery, tmp_path):
    at_once = files_of(gallery, count=2)
    with Gallery.create(tmp_path / "other") as other:
        for seed in (2, 0, 1):
            other.add([tmp_path / "photos" / f"{seed}.png"], progress=False)
            augment(other, Editor(), limit=1)
        augment(other, Editor(), count=2)
        assert files(other) == at_once
    assert files_of(gallery, seed=1, count=3).keys() > at_once.keys()


def files_of(gallery, **options):
    augment(gallery, Editor(), **options)
    return files(gallery)


def test_a_second_run_does_what_is_left(gallery):
    assert len(augment(gallery, Editor(1.0), rule=RejectionRule(tries=1)).made) == 2
    idle = augment(gallery, Editor(), rule=RejectionRule(tries=1))
    assert (idle.made, idle.rejected, idle.before, str(idle)) == ([], [], 3, "0 made, 3 done before")
    assert len(augment(gallery, Editor(model="another"), rule=RejectionRule(tries=1)).made) == 1  # was rejected
    assert len(augment(gallery, Editor(), count=2).made) == 3


def test_generated_images_are_marked_and_are_no_parents(gallery, tmp_path):
    made = augment(gallery, Editor()).made
    assert all(hit.generated == (hit.path.parent.name == "generated") for hit in gallery.search(picture(0), 6))
    assert augment(gallery, Editor()).before == 3
    moved = tmp_path / "elsewhere.png"
    gallery.remove([made[0].path])
    made[0].path.rename(moved)
    assert gallery.info(progress=False).generated == 2
    gallery.add([moved], progress=False)
    (hit,) = gallery.search(moved)
    assert (hit.path, hit.generated) == (moved, True)
    said = Image.open(moved).text["ragsr"]
    assert json.loads(said) == {"generated": True, "parent": made[0].row.parent.hex(), "score": 0.01}


def test_the_table_as_documented(gallery):
    made = augment(gallery, Editor()).made[0]
    query = (
        "SELECT images.path, photos.path, score FROM generated JOIN images USING (content) "
        "JOIN images AS photos ON photos.content = parent ORDER BY photos.path"
    )
    with sqlite3.connect(gallery.folder / "gallery.db") as database:
        found = database.execute(query).fetchall()
    assert len(found) == 3
    assert found[0] == (f"generated/{made.path.name}", "../photos/0.png", 0.01)


# ------------------------------------------------------------------ kills, full disks, bad input


def test_photos_that_are_of_no_use_are_skipped(gallery, tmp_path):
    (tmp_path / "photos" / "0.png").unlink()
    picture(9).save(tmp_path / "photos" / "1.png")
    done = augment(gallery, Editor())
    assert [one.parent.name for one in done.made] == ["2.png"]
    assert [reason for _, reason in done.skipped] == [
        "No such file or directory",
        "has changed since it was added; add it again",
    ]


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(image, path, **_):
    Path(path).write_bytes(b"\x89PNG half")
    die()


@pytest.mark.parametrize("moment", ["drawing", "writing", "renamed", "committing"])
def test_killed_at_any_moment(gallery, tmp_path, monkeypatch, moment):
    child = os.fork()
    if not child:  # a process of its own, which dies during the second picture
        with Gallery.open(gallery.folder) as own:
            augment(own, Editor(), limit=1)
            if moment == "drawing":
                monkeypatch.setattr(Editor, "__call__", die)
            elif moment == "writing":
                monkeypatch.setattr(Image.Image, "save", half_a_file)
            elif moment == "renamed":
                monkeypatch.setattr(Gallery, "note_generated", die)
            else:
                monkeypatch.setattr("ragsr.gallery.index.IndexFollower.committing", die)
            augment(own, Editor())
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with Gallery.open(gallery.folder) as again:
        again.check()
        assert (len(again), again.info(progress=False).generated) == (4, 1)
        assert len(augment(again, Editor()).made) == 2
        visible = {name for name in files(again) if not name.startswith(".")}
        assert {hit.path.name for hit in again.search(picture(0), 6) if hit.generated} == visible
    with Gallery.create(tmp_path / "whole", "baseline-64") as whole:
        whole.add([tmp_path / "photos"], progress=False)
        assert {name: files(gallery)[name] for name in visible} == files_of(whole)


def no_space(image, path, **_):
    Path(path).write_bytes(b"\x89PNG half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_full_of_pictures(gallery, monkeypatch):
    augment(gallery, Editor(), limit=1)
    before = files(gallery)
    with monkeypatch.context() as full:
        full.setattr(Image.Image, "save", no_space)
        with pytest.raises(InputError, match=r"generated/1.*No space left on device.*goes on from there"):
            augment(gallery, Editor())
    assert files(gallery) == before
    assert len(augment(gallery, Editor()).made) == 2


def test_a_disk_full_of_the_database(gallery):
    augment(gallery, Editor(), limit=1)
    before = files(gallery)
    ((pages,),) = gallery._connection.execute("PRAGMA page_count")
    gallery._connection.execute(f"PRAGMA max_page_count = {pages}")
    long = Editor(model="m" * 20_000)
    with pytest.raises(InputError, match="full"):
        augment(gallery, long)
    assert (len(gallery), files(gallery)) == (4, before)
    gallery._connection.execute(f"PRAGMA max_page_count = {pages + 100}")
    assert len(augment(gallery, long).made) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "0 pictures of None photos"),
        ({"limit": 0}, "1 pictures of 0 photos"),
    ],
)
def test_numbers_that_cannot_be(gallery, options, message):
    with pytest.raises(InputError, match=message):
        augment(gallery, Editor(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": (0.7, 0.6)}, "strength is 0.7 to 0.6"),
        ({"strength": (0.0, 0.6)}, "strength is 0.0 to 0.6"),
        ({"guidance": (9.0, 7.0)}, "guidance is 9.0 to 7.0"),
        ({"tries": 0}, "0 tries"),
        ({"threshold": float("nan")}, "below nan"),
    ],
)
def test_rules_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        RejectionRule(**options)


def test_an_empty_gallery(tmp_path):
    with Gallery.create(tmp_path / "g") as gallery, pytest.raises(InputError, match="holds no photos"):
        augment(gallery, Editor())


# ------------------------------------------------------------------ with diffusers


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    pytest.importorskip("diffusers")
    return save_tiny_diffusion(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def edit(tiny):
    return SDEdit.load(str(tiny), "cpu", steps=6)


def test_a_picture_is_like_its_photo_and_repeats(edit):
    photo = picture(1, 50, 30)
    made, score = edit(photo, 0.6, 8.0, 1)
    again = edit(photo, 0.6, 8.0, 1)
    assert (made.tobytes(), score) == (again[0].tobytes(), again[1])
    assert score > 0
    assert edit(photo, 0.6, 8.0, 2)[1] != score
    assert made.width / made.height == pytest.approx(50 / 30, rel=0.05)
    assert made.width * made.height == pytest.approx(32 * 32, rel=0.05)
    assert "step" not in vars(edit.pipeline.scheduler)


def test_the_score_is_that_of_the_steps_that_were_done(edit):
    """Of a model that is said to predict x₀ itself, every answer is an x̂₀."""
    seen = []
    scheduler = edit.pipeline.scheduler
    scheduler.register_to_config(prediction_type="sample")
    step = scheduler.step
    scheduler.step = lambda *a, **k: seen.append(a[0].double()) or step(*a, **k)
    scheduler.step.__wrapped__ = step
    _, score = edit(picture(1), 0.6, 8.0, 1)
    assert len(seen) == 3
    mean = sum(seen) / 3
    assert score == pytest.approx(float(sum((x - mean) ** 2 for x in seen).mean() / 3), rel=1e-4)


def test_fit_fills_up_with_mirrored_pixels():
    photo = picture(2, 60, 20)
    filled, box = fit(photo, 32, 16)
    assert (filled.size, box) == ((64, 32), (0, 0, 55, 18))
    assert filled.getpixel((0, 18)) == filled.getpixel((0, 17))
    assert filled.getpixel((55, 0)) == filled.getpixel((54, 0))
    assert fit(picture(2, 1, 40), 32, 16)[0].size == (16, 208)


def test_from_the_command_line_to_a_restored_photo(gallery, tiny, tmp_path, capfd):
    folder = str(gallery.folder)
    command = ["gallery", "augment", folder, "--model", str(tiny), "--steps", "6", "--threshold", "1", "--json"]
    assert main([*command, "--limit", "2"]) == 0
    told, said = capfd.readouterr()
    found = json.loads(told)
    assert [Path(one["parent"]).name for one in found["made"]] == ["0.png", "1.png"]
    assert found["images"] == 5
    assert f"{folder}: 2 made; 5 images" in said
    assert main(command) == 0
    assert json.loads(capfd.readouterr().out)["done_before"] == 2
    made = found["made"][0]["path"]
    assert main(["gallery", "search", made, "--gallery", folder, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["hits"][0] == {
        "path": made, "distance": 0, "score": pytest.approx(1, abs=0.01), "generated": True, "cosine": 1.0,
        "region": None, "query_region": None,
    }  # fmt: skip
    assert main(["gallery", "search", made, "--gallery", folder]) == 0
    assert capfd.readouterr().out == f"{made}  distance 0 of 64, cosine 1.00, score 1.00, generated\n"
    assert main(["gallery", "info", folder]) == 0
    assert "generated     3\n" in capfd.readouterr().out
    restore = ["restore", made, "--gallery", folder, "--model", "transfer", "--device", "cpu"]
    assert main([*restore, "-o", str(tmp_path / "a.png")]) == 0
    assert "score 1.00, generated)" in capfd.readouterr().out
    assert main([*restore, "-o", str(tmp_path / "b.png"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["results"][0]["references"][0]["generated"] is True


class Blackened:
    """A pipeline whose safety checker flags everything."""

    vae, vae_scale_factor, unet = object(), 2, SimpleNamespace(config=SimpleNamespace(sample_size=16))

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __call__(self, prompt, image, strength, guidance_scale, num_inference_steps, generator):
        import torch

        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            self.scheduler.step(torch.zeros(1, 4, 16, 16), t, torch.zeros(1, 4, 16, 16))
        return SimpleNamespace(images=[Image.new("RGB", image.size)], nsfw_content_detected=[True])


def test_what_the_safety_checker_blackens_scores_infinity(edit):
    assert SDEdit(Blackened(edit.pipeline.scheduler), "m", steps=4)(picture(0), 0.6, 8.0, 0)[1] == float("inf")


def test_models_that_cannot_edit(edit):
    with pytest.raises(InputError, match="takes no prompt, image, strength"):
        SDEdit(SimpleNamespace(vae=1, __call__=lambda: 0), "odd")
    with pytest.raises(InputError, match=r"odd: has no VAE; take a latent diffusion model"):
        SDEdit(SimpleNamespace(vae=None), "odd")
    with pytest.raises(InputError, match=r"the window is \(0.5, 0.2\)"):
        SDEdit(edit.pipeline, "m", window=(0.5, 0.2))
    edit.steps = 2
    with pytest.raises(InputError, match=r"1 steps of 2 were done at strength 0.60, .* take more steps"):
        edit(picture(0), 0.6, 8.0, 0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("WITHOUT", "has no VAE"),
        ("PHOTOS", "there is no model_index.json; name a diffusers model"),
        ("nowhere", "there is no model_index.json; name a diffusers model"),
        ("BROKEN", "cannot be loaded as an image-to-image model"),
    ],
)
def test_bad_models(gallery, tiny, tmp_path, capsys, model, message):
    table = json.loads((tiny / "model_index.json").read_text())
    for name, change in (("WITHOUT", {"vae": [None, None]}), ("BROKEN", {"_class_name": "StableRiddle"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps(table | change))
    named = {"PHOTOS": tmp_path / "photos", "nowhere": "nowhere"}.get(model, tmp_path / model)
    assert main(["gallery", "augment", str(gallery.folder), "--model", str(named)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("ragsr: error: ")
    assert message in said
    assert len(gallery) == 3


def test_without_diffusers(gallery, tiny, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert main(["gallery", "augment", str(gallery.folder), "--model", str(tiny)]) == 2
    assert 'pip install "ragsr[diffusion]"' in capsys.readouterr().err
