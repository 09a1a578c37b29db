"""`ragsr restore` from argument list to files, lines, JSON and exit status."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data

from ragsr.cli import main
from ragsr.gallery import Gallery
from ragsr.models import views

GOOD = Image.fromarray(data.astronaut()).crop((180, 60, 276, 140))
LOW = GOOD.resize((24, 20), Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with two low-quality photos and a good one, and in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "low").mkdir()
    LOW.save("low/a.png")
    LOW.rotate(180).save("low/b.jpg")
    GOOD.save("good.png")
    return tmp_path


@pytest.fixture
def gallery(folder):
    Image.fromarray(data.chelsea()).save("cat.png")
    with Gallery.create("gallery") as made:
        made.add(["good.png", "cat.png"], progress=False)


def files(path):
    return sorted(p.name for p in path.iterdir())


def test_one_photo_to_one_file(folder, capsys):
    assert main(["restore", "low/a.png", "--ref", "good.png", "-o", "big.webp"]) == 0
    with Image.open("big.webp") as big:
        assert (big.format, big.size) == ("WEBP", GOOD.size)
    assert "low/a.png -> big.webp" in (told := capsys.readouterr().out)
    assert "from good.png" in told


def test_a_folder_with_a_gallery_and_json(gallery, folder, capsys):
    command = ["restore", "low", "--gallery", "gallery", "-k", "2", "--threshold", "0", "-o", "out", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    assert files(folder / "out") == ["a.png", "b.png"]
    told = json.loads(capsys.readouterr().out)
    first = told["results"][0]
    assert first["input"] == os.path.join("low", "a.png")
    assert [os.path.basename(r["path"]) for r in first["references"]] == ["good.png", "cat.png"]
    assert first["references"][0]["cosine"] > first["references"][1]["cosine"]
    assert 1 >= first["references"][0]["score"] > first["references"][1]["score"] >= 0
    assert 0 < first["reference_share"] <= 1
    assert set(first["milliseconds"]) == {"load", "search", "prepare", "restore", "save"}
    assert (first["size"], first["skipped"]) == (list(GOOD.size), False)
    assert {
        "pipeline": "refsr",
        "model": "auto",
        "scale": 4,
        "seed": 0,
        "tile": 256,
        "k": 2,
    }.items() <= told.items()
    assert told["versions"]["torch"] == torch.__version__


def test_a_photo_without_a_useful_reference_is_restored_by_itself(gallery, capsys):
    alone, strict = ["restore", "low/a.png", "--no-reference"], ["restore", "low/a.png", "--gallery", "gallery"]
    assert main([*alone, "-o", "alone.png"]) == main([*strict, "--threshold", "1.1", "-o", "out.png", "--json"]) == 0
    assert Path("alone.png").read_bytes() == Path("out.png").read_bytes()
    told = json.loads(capsys.readouterr().out.partition("\n")[2])["results"][0]
    assert (told["references"], os.path.basename(told["rejected"][0]["path"])) == ([], "good.png")
    assert main([*strict, "--threshold", "1.1", "-o", "again.png"]) == 0
    assert "without reference, none is of use; the nearest is " in capsys.readouterr().out


def test_the_line_tells_the_reference_and_how_near_it_was(gallery, capsys):
    assert main(["restore", "low/a.png", "--gallery", "gallery", "-o", "out"]) == 0
    line = capsys.readouterr().out
    assert "good.png (distance " in line
    assert " of 64, score " in line


def test_what_is_done_is_skipped_and_overwritten_when_asked(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "a.png").write_bytes(b"mine")
    command = ["restore", "low", "--no-reference", "-o", "out"]
    assert main(command) == 0
    assert "a.png: is there already, skipped" in capsys.readouterr().out
    assert (folder / "out" / "a.png").read_bytes() == b"mine"
    assert main([*command, "--overwrite"]) == 0
    assert Image.open("out/a.png").size == GOOD.size


def test_same_names_stay_apart(folder, capsys):
    (folder / "more").mkdir()
    LOW.save("more/A.png")
    LOW.save("more/c.png")
    command = ["restore", "low", "more", "--no-reference", "-o", "out"]
    assert main(command) == 0
    names = files(folder / "out")
    assert len(names) == 4
    assert {"b.png", "c.png"} < set(names)
    assert main(command) == 0
    assert capsys.readouterr().out.count("skipped") == 4
    assert files(folder / "out") == names


def test_one_bad_file_among_many(folder, capsys):
    (folder / "low" / "aa.png").write_bytes(b"not a picture")
    assert main(["restore", "low", "--no-reference", "-o", "out", "--json"]) == 2
    told = capsys.readouterr()
    assert [("error" in r) for r in json.loads(told.out)["results"]] == [False, True, False]
    assert "aa.png: not an image" in told.err
    assert files(folder / "out") == ["a.png", "b.png"]


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch, capsys):
    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(["restore", "low/a.png", "--no-reference", "-o", "out/a.png"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert files(folder / "out") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "--no-reference"], "missing.png: there is no such file"),
        (["empty", "--no-reference"], "no images in empty"),
        (["text.png", "--no-reference"], "text.png: not an image"),
        (["low", "--ref", "missing.png"], "missing.png: there is no such file"),
        (["low", "--ref", "text.png"], "text.png: not an image"),
        (["low", "--gallery", "empty"], "empty: no gallery there"),
        (["low", "--no-reference", "--model", "magic"], "'magic'"),
        (["low", "--no-reference", "--scale", "3"], "use scale 4"),
        (["low", "--no-reference", "--tile", "7"], "tile is '7'"),
        (["low", "--no-reference", "--pipeline", "refir"], "refir restores with a diffusion model"),
        (["low", "--no-reference", "--model", "transfer", "--quality", "rich"], "has no rich mode"),
    ],
)
def test_bad_input(folder, capsys, arguments, message):
    (folder / "empty").mkdir()
    (folder / "text.png").write_text("hello")
    assert main(["restore", *arguments, "-o", "out"]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("error") == 1
    assert not (folder / "out").exists()


def test_more_references_than_there_are(gallery, capsys):
    assert main(["restore", "low", "--gallery", "gallery", "-k", "3", "-o", "out"]) == 2
    assert "gallery: 3 references were asked for and there are 2" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(capsys):
    assert main(["restore", "low", "--no-reference", "-o", "out", "--device", "cuda"]) == 2
    assert "cuda was asked for" in capsys.readouterr().err


def test_a_reduced_reference_is_noted_once_and_in_the_json(monkeypatch, capsys):
    monkeypatch.setattr(views, "MAX_PIXELS", 1000)
    GOOD.crop((0, 0, 40, 20)).save("small.png")
    command = ["restore", "low", "--ref", "good.png", "small.png", "--model", "transfer", "-o", "out", "--json"]
    assert main(command) == 0
    told = capsys.readouterr()
    note = "reduced from 96x80 to 34x28; models use 0 megapixels of a reference"
    assert [line for line in told.err.splitlines() if "reduced" in line] == [f"ragsr: note: good.png: {note}"]
    for record in json.loads(told.out)["results"]:
        assert [r["note"] for r in record["references"]] == [note, None]


def test_a_tiny_reference_is_named_before_the_first_photo(folder, capsys):
    GOOD.crop((0, 0, 4, 4)).save("tiny.png")
    assert main(["restore", "low", "--ref", "good.png", "tiny.png", "--model", "transfer", "-o", "out"]) == 2
    told = capsys.readouterr().err
    assert "tiny.png: 4x4 pixels are too few for a reference" in told
    assert told.count("error") == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["low", "-o", "one.png"], "names one file, and there are 2 photos"),
        (["low", "-o", "good.txt"], "a file is there"),
        (["low/a.png", "-o", "low"], "is an input and would be replaced"),
        (["low/a.png", "-o", "low/a.png", "--overwrite"], "is an input and would be replaced"),
    ],
)
def test_outputs_that_cannot_be(folder, capsys, arguments, message):
    (folder / "good.txt").write_text("mine")
    before = {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
    assert main(["restore", "--no-reference", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()} == before


@pytest.mark.parametrize("selectors", [[], ["--no-reference", "--ref", "good.png"]])
def test_exactly_one_source_of_references(capsys, selectors):
    with pytest.raises(SystemExit) as stop:
        main(["restore", "low", "-o", "out", *selectors])
    assert stop.value.code == 2
    assert "--no-reference" in capsys.readouterr().err
