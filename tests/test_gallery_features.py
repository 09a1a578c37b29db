"""Float features beside the codes: what is kept, what is completed, and how hits are ranked again."""

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, write_photos
from PIL import Image

import ragsr.codes
from ragsr.codes import Baseline64
from ragsr.errors import InputError
from ragsr.gallery import Gallery, hits
from ragsr.gallery.hits import with_ties


class Short(Baseline64):
    """Codes of 8 bits that are all equal: every image ties with every other."""

    name = "short"
    bits = 8

    def describe(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(images), 1, dtype=torch.uint8), super().describe(images)[1]


class Blind(Short):
    """No features."""

    name = "blind"
    features = 0

    def __init__(self) -> None:
        pass

    def describe(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(images), 1, dtype=torch.uint8), torch.empty(len(images), 0)


@pytest.fixture(autouse=True)
def encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ragsr.codes.ENCODERS, "short", Short)
    monkeypatch.setitem(ragsr.codes.ENCODERS, "blind", Blind)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def plain(tmp_path: Path, photos: Path) -> Iterator[Gallery]:
    """A gallery of codes alone."""
    with Gallery.create(tmp_path / "g", "baseline-64", features=False) as gallery:
        gallery.add([photos], progress=False)
        yield gallery


def counts(gallery: Gallery) -> dict[str, int]:
    with sqlite3.connect(gallery.folder / "gallery.db") as file:
        tables = [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {t: file.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in tables if t in TABLES}


TABLES = ("images", "features", "patches", "patch_features")


# ------------------------------------------------------------------ ranking


def test_ties_of_short_codes_are_ranked_by_cosine(tmp_path: Path, photos: Path) -> None:
    with Gallery.create(tmp_path / "g", "short") as gallery:
        gallery.add([photos], progress=False)
        for seed in range(6):
            (hit,) = gallery.search(picture(seed, 24, 16))
            assert (hit.path.stem, hit.distance) == (str(seed), 0)
            assert hit.cosine is not None
            assert 0.9 < hit.cosine <= 1
            assert hit.score == Short().score(0, hit.cosine)


def test_candidates_are_the_nearest_with_all_ties() -> None:
    distances, ids = [0, 1, 1, 1, 2, 2], [7, 2, 5, 9, 1, 3]
    assert [len(with_ties(distances, ids, n)) for n in (1, 2, 3, 4, 5, 6)] == [1, 4, 4, 4, 6, 6]


def test_only_candidates_are_ranked_again(plain: Gallery, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one candidate the order is that of the codes; with all of them that of the features."""
    by_code = plain.search(picture(99), 6)
    plain.keep(features=True)
    plain.add([photos], progress=False)
    monkeypatch.setattr(hits, "LEAST", 1)
    monkeypatch.setattr(hits, "WIDE", 1)
    assert plain.search(picture(99), 1)[0].path == by_code[0].path
    assert [hit.path for hit in plain.search(picture(99), 6)] != [hit.path for hit in by_code]


def test_files_that_are_gone_do_not_cost_hits(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hits, "LEAST", 1)
    monkeypatch.setattr(hits, "WIDE", 1)
    with Gallery.create(tmp_path / "g", "baseline-64") as gallery:
        gallery.add([photos], progress=False)
        for hit in gallery.search(picture(3), 5):
            hit.path.unlink()
        assert len(gallery.search(picture(3), 1)) == 1


# ------------------------------------------------------------------ keeping


def test_a_gallery_of_codes_is_completed(plain: Gallery, photos: Path) -> None:
    assert counts(plain) == {"images": 6}
    assert plain.search(picture(1))[0].cosine is None
    plain.keep(features=True, patches=True)
    assert plain.search(picture(1))[0].path.name == "1.png"  # what lacks features is found by its code
    report = plain.add([photos / "0.png", photos / "1.png"], progress=False)
    assert str(report) == "2 completed"
    hit = plain.search(picture(2), 6)[0]
    assert hit.cosine is not None  # those without come behind all that have one
    assert str(plain.add([photos], progress=False)) == "4 completed, 2 unchanged"
    assert str(plain.add([photos], progress=False)) == "6 unchanged"
    assert counts(plain) == dict.fromkeys(TABLES, 6)
    assert plain.search(picture(2))[0].path.name == "2.png"
    info = plain.info(progress=False)
    assert (info.features, info.patches, info.preprocessing) == (6, 6, "rgb, bilinear 64x64")


def test_features_go_with_their_image_whoever_takes_it_out(tmp_path: Path, photos: Path) -> None:
    with Gallery.create(tmp_path / "g", "baseline-64", patches=True) as gallery:
        gallery.add([photos], progress=False)
        gallery.remove([photos / "deep"])
        assert counts(gallery) == dict.fromkeys(TABLES, 4)
        with sqlite3.connect(gallery.folder / "gallery.db") as other:  # a program that knows only `images`
            other.execute("DELETE FROM images WHERE path LIKE '%0.png'")
        assert counts(gallery) == dict.fromkeys(TABLES, 3)
        picture(60).save(photos / "1.png")
        assert gallery.add([photos / "1.png"], progress=False).updated == 1
        assert counts(gallery) == dict.fromkeys(TABLES, 3)
        assert gallery.search(picture(60))[0][:3] == (photos / "1.png", 0, 1.0)


def test_what_is_refused(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(InputError, match="the encoder blind@1 gives codes alone, no features"):
        Gallery.create(tmp_path / "g", "blind", features=True)
    assert not (tmp_path / "g").exists()
    with Gallery.create(tmp_path / "g", "blind", patches=True) as gallery:
        gallery.add([photos], progress=False)
        (hit,) = gallery.search(picture(0))
        assert (hit.cosine, hit.region is None) == (None, False)
    with sqlite3.connect(tmp_path / "g" / "gallery.db") as file:
        file.execute("UPDATE meta SET value = 'gray 8x8' WHERE key = 'preprocessing'")
    with pytest.raises(InputError, match="its photos were prepared as 'gray 8x8', and blind@1 now takes"):
        Gallery.open(tmp_path / "g")


# ------------------------------------------------------------------ a kill


BUILD = """
import sys, time
import ragsr.gallery.file
from ragsr.codes import Baseline64
from ragsr.gallery import Gallery

ragsr.gallery.file.COMMIT_SECONDS = 0.05
describe = Baseline64.describe
Baseline64.describe = lambda self, images: (time.sleep(0.005), describe(self, images))[1]
gallery = Gallery.create(sys.argv[1], "baseline-64", patches=True)
print("ready", flush=True)
gallery.add([sys.argv[2]], progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_after_a_kill_every_image_is_whole(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(60):
        picture(seed).save(photos / f"{seed:02}.png")
    command = [sys.executable, "-c", BUILD, str(tmp_path / "g"), str(photos)]
    build = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert build.stdout is not None
    assert build.stdout.readline() == "ready\n"
    with Gallery.open(tmp_path / "g") as gallery:
        deadline = time.monotonic() + 20
        while not len(gallery) and time.monotonic() < deadline:
            time.sleep(0.01)
        build.send_signal(signal.SIGKILL)
        assert build.wait() == -signal.SIGKILL
        build.stdout.close()
        kept = len(gallery)
        assert 0 < kept < 60
        assert counts(gallery) == dict.fromkeys(TABLES, kept)
        report = gallery.add([photos], progress=False)
        assert (report.unchanged, report.added, report.completed) == (kept, 60 - kept, 0)
        assert counts(gallery) == dict.fromkeys(TABLES, 60)
        gallery.check()


def test_readers_keep_torch_to_one_thread(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(3)
    describe = Baseline64.describe

    def spy(self: Baseline64, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(torch.get_num_threads())
        return describe(self, images)

    monkeypatch.setattr(Baseline64, "describe", spy)
    try:
        with Gallery.create(tmp_path / "g", "baseline-64") as gallery:
            gallery.add([photos], progress=False)
        assert (set(seen), torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


def test_the_documented_blobs(tmp_path: Path, photos: Path) -> None:
    """Reads the tables as docs/gallery_format.md tells a stranger to."""
    with Gallery.create(tmp_path / "g", "baseline-64", patches=True) as gallery:
        gallery.add([photos / "0.png"], progress=False)
        encoder = gallery.encoder
    with sqlite3.connect(tmp_path / "g" / "gallery.db") as file:
        meta = dict(file.execute("SELECT key, value FROM meta"))
        ((feature, boxes, codes, features),) = file.execute(
            "SELECT feature, boxes, codes, patch_features.features FROM features "
            "JOIN patches USING (image) JOIN patch_features USING (image)"
        )
    size = int(meta["features"])
    expected = encoder.describe([picture(0)])[1].numpy()[0]
    np.testing.assert_allclose(np.frombuffer(feature, "<f2"), expected, atol=1e-3)
    boxes = np.frombuffer(boxes, "<i4").reshape(-1, 4)
    code, vector = (part.numpy()[0] for part in encoder.describe([picture(0).crop(tuple(boxes[3].tolist()))]))
    assert np.array_equal(np.frombuffer(codes, np.uint8).reshape(len(boxes), -1)[3], code)
    np.testing.assert_allclose(np.frombuffer(features, "<f2").reshape(-1, size)[3], vector, atol=1e-3)
