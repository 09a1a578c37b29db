"""iRAG's Table 5 on a small CUFED5: which images each encoder learns from, and what is measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from pictures import picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ragsr.cli import main
from ragsr.codes import Baseline64
from ragsr.errors import InputError
from ragsr.evaluation import evaluate_table5, load_pack, training_sets
from ragsr.evaluation.table5 import PAPER, table5_lines
from ragsr.gallery import Gallery, augment_gallery
from ragsr.gallery.augment import parent_of


def photos(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    for number in range(count):
        picture(number, 16, 16).save(folder / f"{number:03}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture
def real(tmp_path):
    return photos(tmp_path / "real", 20)


def from_parents(real, folder, each):
    """As `ragsr gallery augment` leaves them."""
    folder.mkdir()
    with Gallery.create(folder) as gallery:
        gallery.add(real, progress=False)
        edit = type("Editor", (), {"settings": {}, "__call__": lambda self, photo, *_: (photo, 0.0)})()
        augment_gallery(gallery, edit, count=each, progress=False)
    return sorted((folder / "generated").glob("*.png"))


def test_the_limited_set_keeps_to_its_photos(real, tmp_path):
    generated = from_parents(real, tmp_path / "g", 2)
    sets = training_sets(real, generated)
    assert list(sets) == list(PAPER)
    assert {name: len(images) for name, images in sets.items()} == {
        "real": 20,
        "generated": 40,
        "real + generated": 60,
        "limited": 2,
        "limited + generated": 6,
    }
    names = {path.stem for path in sets["limited"]}
    assert {path.stem.split("-")[0] for path in sets["limited + generated"]} == names
    assert {path.name for path in training_sets(real, generated, seed=1)["limited"]} != names
    assert training_sets(real[::-1], generated[::-1]) == sets


def test_nine_generated_images_for_each_photo(real, tmp_path):
    anybody = photos(tmp_path / "anybody", 50)  # they do not say from which photo they are
    sets = training_sets(real, anybody)
    assert (len(sets["limited"]), len(sets["limited + generated"])) == (2, 2 + 18)
    assert set(sets["limited + generated"]) - set(anybody) == set(sets["limited"])


def test_parents_as_files_tell_them(real, tmp_path):
    assert parent_of(real[0]) is None
    for text in ("no", "[1]", '{"parent": "x"}', '{"parent": 3}'):
        about = PngInfo()
        about.add_text("ragsr", text)
        picture(0).save(tmp_path / "odd.png", pnginfo=about)
        assert parent_of(tmp_path / "odd.png") is None
    (tmp_path / "odd.png").write_text("not a picture")
    assert parent_of(tmp_path / "odd.png") is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda real, other: (real[:9], other), "9 photos are too few"),
        (lambda real, other: (real, [*other, real[3]]), "003.png: is among the photos and among the generated images"),
        (lambda real, other: (real, []), "no generated image is from one of the 2 photos"),
    ],
)
def test_folders_that_cannot_be(real, tmp_path, spoil, message):
    with pytest.raises(InputError, match=message):
        training_sets(*spoil(real, photos(tmp_path / "other", 3)))


class Known(Baseline64):
    """Codes that know the scene of some pictures by their name, and nothing of the others."""

    def __init__(self, share):
        super().__init__()
        self.share, self.features = share, 0

    def describe(self, images):
        import torch

        means = [np.asarray(image.convert("RGB"), float).mean((0, 1)).round() for image in images]
        numbers = [int(red + 256 * green) if red % 10 < 10 * self.share else 0 for red, green, _ in means]
        codes = [list(number.to_bytes(8, "little")) for number in numbers]
        return torch.tensor(codes, dtype=torch.uint8), torch.empty(len(images), 0)


@pytest.fixture(scope="module")
def cufed5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("CUFED5")
    for number in range(126):
        for place in range(6):
            Image.new("RGB", (8, 8), (number, number, place)).save(folder / f"{number:03}_{place}.png")
    return folder


def test_hit_rates_are_of_what_was_trained(tmp_path, real, cufed5):
    seen = []

    def train(name, images):
        seen.append((name, images))
        return Known(1.0 if "generated" in name else 0.5)

    sets = training_sets(real, photos(tmp_path / "other", 5))
    sets = {name: sets[name] for name in ("real", "generated")}
    rows = evaluate_table5(load_pack(cufed5), sets, train)
    assert seen == list(sets.items())
    for row in rows:
        assert row.images == len(sets[row.name])
        assert row.reranked is None
        if "generated" in row.name:
            assert row.codes == [1.0] * 5
        else:
            assert 0.5 < row.codes[0] < row.codes[4] < 0.6  # half of them, and what chance finds
    lines = table5_lines(rows).splitlines()
    assert lines[2].split() == ["generated", "5", *["100"] * 5, *["-"] * 5, *map(str, PAPER["generated"])]


def test_from_the_command_line(tmp_path, real, cufed5, monkeypatch, capsys):
    """The five trainings, with the options asked for; the training itself has tests of its own."""
    trained = {}

    def run(args):
        print("trained")
        trained[args.out.name] = args, [path.resolve() for path in sorted(args.data.iterdir())]
        return 0

    monkeypatch.setattr("ragsr.cli.train_hash.run", run)
    found_by = {"real": 1.0}
    monkeypatch.setattr("ragsr.codes.load_encoder", lambda folder: Known(found_by.get(folder.parent.parent.name, 0.0)))
    other, numbers = tmp_path / "other", tmp_path / "numbers.json"
    photos(other, 5)
    command = ["eval", "table5", "--data", str(cufed5), "--real", str(tmp_path / "real"), "--generated", str(other)]
    command += ["--out", str(tmp_path / "runs"), "--bits", "32", "--seed", "3", "--json", str(numbers)]
    for _ in range(2):  # links are made anew
        assert main([*command, "--", "--views", "7", "--batch", "6"]) == 0
    sets = {name.replace(" + ", "-"): images for name, images in training_sets(real, [*other.iterdir()], 3).items()}
    assert {name: images for name, (_, images) in trained.items()} == sets
    options = {name: args for name, (args, _) in trained.items()}
    assert [(args.bits, args.seed, args.views) for args in options.values()] == [([32], 3, 7)] * 5
    assert {name: args.batch for name, args in options.items()} == {
        "real": 6,
        "generated": 4,  # of five, one is held out
        "real-generated": 6,
        "limited": 2,
        "limited-generated": 6,
    }
    assert [row["codes"][0] > 0.9 for row in json.loads(numbers.read_text())["rows"]] == [True, *[False] * 4]
    told = capsys.readouterr().out
    assert "limited + generated" in told
    assert "trained" not in told
    assert main([*command[:2], "--data", str(other), *command[4:]]) == 2
    assert "is not CUFED5" in capsys.readouterr().err
