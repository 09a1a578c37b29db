"""`ragsr gallery` from the command line: what it prints, where, and with which exit status."""

import argparse
import json
from pathlib import Path

import pytest
from pictures import picture, write_photos
from PIL import Image

from ragsr.cli import gallery as command
from ragsr.cli import main
from ragsr.gallery import Gallery
from ragsr.sheet import contact_sheet


def run(*arguments: str | Path) -> int:
    return main(["gallery", *map(str, arguments)])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def folder(tmp_path: Path, photos: Path) -> Path:
    assert run("build", photos, "-o", tmp_path / "g", "--encoder", "baseline-64") == 0
    return tmp_path / "g"


def test_build_says_what_it_did(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "bad.png").write_text("no")
    (photos / "copy.png").write_bytes((photos / "0.png").read_bytes())
    assert run("build", photos, "-o", tmp_path / "g", "--encoder", "baseline-64") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"skipped {photos / 'bad.png'}: not an image" in err
    assert f"skipped {photos / 'copy.png'}: the same file as {photos / '0.png'}" in err
    assert "6 added, 1 duplicates skipped, 1 unreadable skipped; 6 images" in err


def test_build_goes_on_where_it_stopped(folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(6).save(photos / "6.png")
    assert run("build", photos, "-o", folder, "--encoder", "baseline-64") == 0
    assert "1 added, 6 unchanged; 7 images" in capsys.readouterr().err


def test_add_remove_info(folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(6).save(photos / "6.png")
    assert run("add", folder, photos / "6.png") == 0
    assert "1 added; 7 images" in capsys.readouterr().err
    assert run("remove", folder, photos / "deep") == 0
    assert "2 removed, 5 images left" in capsys.readouterr().err
    (photos / "0.png").unlink()
    assert run("info", folder) == 0
    out = capsys.readouterr().out
    assert "images        5\n" in out
    assert f"missing       1\n  {photos / '0.png'}\n" in out
    assert run("info", folder, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["images"], info["missing"], info["bits"]) == (5, [str(photos / "0.png")], 64)
    assert info["checked"] is False


def test_info_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", folder, "--check") == 0
    assert "checked       all files are whole\n" in capsys.readouterr().out
    data = (folder / "gallery.db").read_bytes()
    (folder / "gallery.db").write_bytes(data[:8192] + bytes(len(data) - 8192))
    assert run("info", folder, "--check") == 2
    assert "gallery.db: damaged" in capsys.readouterr().err


def test_json_of_what_was_done(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def done(*arguments: str | Path) -> dict[str, object]:
        assert run(*arguments, "--json") == 0
        return dict(json.loads(capsys.readouterr().out))

    folder = tmp_path / "g"
    (photos / "copy.png").write_bytes((photos / "0.png").read_bytes())
    built = done("build", photos, "-o", folder, "--encoder", "baseline-64")
    assert (built["gallery"], built["added"], built["images"]) == (str(folder), 6, 6)
    assert built["duplicates"] == [[str(photos / "copy.png"), str(photos / "0.png")]]
    picture(9).save(photos / "9.png")
    assert done("add", folder, photos / "9.png")["added"] == 1
    assert done("remove", folder, photos / "deep") == {"gallery": str(folder), "removed": 2, "images": 5}


def test_search_prints_paths_best_first(folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("search", photos / "3.png", "--gallery", folder, "-k", "2") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{photos / '3.png'}  distance 0 of 64, cosine 1.00, score 1.00"
    assert "distance" in second


def test_search_json(folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("search", photos / "3.png", "--gallery", folder, "-k", "6", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["query"], found["gallery"]) == (str(photos / "3.png"), str(folder))
    assert found["encoder"] == "baseline-64@1"
    first = {"path": str(photos / "3.png"), "distance": 0, "score": 1.0, "generated": False, "cosine": 1.0}
    assert found["hits"][0] == {**first, "region": None, "query_region": None}
    cosines = [hit["cosine"] for hit in found["hits"]]
    assert (len(cosines), cosines) == (6, sorted(cosines, reverse=True))
    assert found["threshold"] == 0.7


def test_search_says_when_photos_are_gone(folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "0.png").unlink()
    assert run("search", photos / "1.png", "--gallery", folder, "-k", "6") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert "only 5 of the 6" in err


def test_search_plot(folder: Path, photos: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "new" / "hits.png"
    assert run("search", photos / "3.png", "--gallery", folder, "-k", "2", "--plot", sheet) == 0
    image = Image.open(sheet)
    assert image.width > 3 * image.height
    assert image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("build EMPTY -o NEW", "no images in"),
        ("build gone -o NEW", "gone: there is no such file or folder"),
        ("build PHOTOS -o NEW --encoder x", "no encoder 'x'; there are: baseline-64"),
        ("add EMPTY PHOTOS", "no gallery there; build one with: ragsr gallery build"),
        ("remove GALLERY gone", "not in the gallery"),
        ("info EMPTY", "no gallery there"),
        ("search gone.png --gallery GALLERY", "gone.png: there is no such file"),
        ("search PHOTOS/0.png --gallery GALLERY -k 7", "7 references were asked for and there are 6"),
        ("search PHOTOS/0.png --gallery EMPTY", "no gallery there"),
        ("search PHOTOS/0.png --gallery GALLERY --plot EMPTY/x.txt", "use .png, .jpg or .webp"),
    ],
)
def test_bad_input(
    arguments: str, message: str, folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": tmp_path / "empty", "NEW": tmp_path / "new", "PHOTOS": photos, "GALLERY": folder}
    for name, path in names.items():
        arguments = arguments.replace(name, str(path))
    before = (folder / "gallery.db").read_bytes()
    capsys.readouterr()
    assert run(*arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("ragsr: error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()
    assert not any((tmp_path / "empty").iterdir())
    assert (folder / "gallery.db").read_bytes() == before


def test_build_with_another_encoder_leaves_the_gallery(
    folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ragsr.codes

    class Other(ragsr.codes.Baseline64):
        name = "other"

    monkeypatch.setitem(ragsr.codes.ENCODERS, "other", Other)
    assert run("build", photos, "-o", folder, "--encoder", "other") == 2
    assert "codes of two encoders do not compare" in capsys.readouterr().err
    with Gallery.open(folder) as gallery:
        assert len(gallery) == 6


@pytest.mark.parametrize("name", ["build", "add", "remove", "info", "search"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="ragsr")
    command.add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["gallery", name, "--help"])
    assert f"example: ragsr gallery {name}" in capsys.readouterr().out.replace("\n", " ")


# ------------------------------------------------------------------ sheets


def test_contact_sheet_sizes() -> None:
    wide, tall = Image.new("RGB", (200, 100), "red"), Image.new("L", (50, 100), 0)
    row = [(wide, "one"), (tall, "two words that need several lines")]
    sheet = contact_sheet([row, row], height=100, margin=10)
    assert sheet.mode == "RGB"
    assert sheet.width == 10 + 200 + 10 + 50 + 10
    assert sheet.getpixel((10, 10)) == (255, 0, 0)
    assert sheet.getpixel((209, 109)) == (255, 0, 0)
    assert sheet.getpixel((210, 10)) == (255, 255, 255)
    assert sheet.height > 2 * (100 + 10 + 3 * 10)  # the second caption takes three lines or more


def test_a_long_word_is_broken() -> None:
    sheet = contact_sheet([[(Image.new("RGB", (100, 100)), "x" * 300)]], height=100, margin=10)
    assert sheet.width == 120
