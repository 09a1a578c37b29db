"""The gallery: what goes in, what is found, and what happens when things go wrong."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pictures import picture, write_photos
from PIL import Image

import ragsr.codes
import ragsr.gallery.add
from ragsr.codes import Baseline64
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.search import COMPILED, FlatIndex


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def gallery(tmp_path: Path, photos: Path) -> Iterator[Gallery]:
    with Gallery.create(tmp_path / "gallery", "baseline-64") as gallery:
        gallery.add([photos])
        yield gallery


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded since."""
    names: list[str] = []
    decode = ragsr.gallery.add.decode_image

    def spy(file: object, path: Path) -> Image.Image:
        names.append(path.name)
        return decode(file, path)  # type: ignore[arg-type]

    monkeypatch.setattr(ragsr.gallery.add, "decode_image", spy)
    return names


def stored_paths(gallery: Gallery) -> list[str]:
    with sqlite3.connect(gallery.folder / "gallery.db") as connection:
        return [path for (path,) in connection.execute("SELECT path FROM images ORDER BY path")]


# ------------------------------------------------------------------ search


def test_every_photo_finds_itself(gallery: Gallery, photos: Path) -> None:
    assert len(gallery) == 6
    for path in photos.rglob("*.png"):
        (hit,) = gallery.search(Image.open(path))
        assert hit[:3] == (path, 0, 1.0)
        assert gallery.search(path, k=1) == [hit]


def test_hits_are_sorted_and_counted(gallery: Gallery) -> None:
    hits = gallery.search(picture(99), k=6)
    assert [hit.cosine for hit in hits] == sorted((hit.cosine for hit in hits), reverse=True)
    assert len({hit.path for hit in hits}) == 6
    assert all(hit.path.is_absolute() and hit.score == Baseline64().score(hit.distance, hit.cosine) for hit in hits)


def test_score() -> None:
    assert [round(Baseline64().score(d), 3) for d in (0, 16, 32, 64)] == [1.0, 0.707, 0.0, 0.0]


@pytest.mark.parametrize("k", [0, -1, 7])
def test_k_must_fit(gallery: Gallery, k: int) -> None:
    with pytest.raises(InputError, match=rf": {k} references were asked for and there are 6; ask for 1 to 6"):
        gallery.search(picture(0), k)


def test_empty_gallery(tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "g", "baseline-64") as gallery:
        with pytest.raises(InputError, match="an empty gallery; add images: ragsr gallery add"):
            gallery.search(picture(0))
        assert gallery.info().images == 0


def test_files_that_are_gone_are_passed_over_and_reported(gallery: Gallery, photos: Path) -> None:
    (photos / "2.png").unlink()
    assert (photos / "2.png") not in [hit.path for hit in gallery.search(picture(2), k=5)]
    assert len(gallery.search(picture(2), k=1)) == 1
    assert len(gallery.search(picture(2), k=6)) == 5
    assert gallery.info().missing == [photos / "2.png"]


def test_folder_and_photos_move_together(gallery: Gallery, tmp_path: Path) -> None:
    gallery.close()
    assert stored_paths(gallery)[0] == "../photos/0.png"
    (tmp_path / "elsewhere").mkdir()
    for name in ("gallery", "photos"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    with Gallery.open(tmp_path / "elsewhere" / "gallery") as moved:
        assert moved.search(picture(4))[0].path == tmp_path / "elsewhere" / "photos" / "deep" / "4.png"
        assert not moved.info().missing


def test_changes_by_others_are_seen(gallery: Gallery, photos: Path) -> None:
    assert gallery.search(picture(2))[0].path.name == "2.png"
    with Gallery.open(gallery.folder) as other:
        other.remove([photos / "2.png"])
    assert len(gallery) == 5
    assert gallery.search(picture(2))[0].path.name != "2.png"


# ------------------------------------------------------------------ add and remove


def test_what_is_known_is_not_read_again(gallery: Gallery, photos: Path, decoded: list[str]) -> None:
    report = gallery.add([photos])
    assert (report.unchanged, report.added, str(report)) == (6, 0, "6 unchanged")
    os.utime(photos / "1.png", ns=(1, 1))
    assert gallery.add([photos]).unchanged == 6
    assert decoded == []
    picture(7).save(photos / "7.png")
    assert str(gallery.add([photos])) == "1 added, 6 unchanged"
    assert decoded == ["7.png"]


def test_a_changed_file_is_encoded_anew(gallery: Gallery, photos: Path) -> None:
    picture(50).save(photos / "1.png")
    report = gallery.add([photos])
    assert (report.updated, report.added, report.unchanged, len(gallery)) == (1, 0, 5, 6)
    assert gallery.search(picture(50))[0][:3] == (photos / "1.png", 0, 1.0)
    assert gallery.search(picture(1))[0].distance > 0


def test_a_moved_file_is_found_where_it_is(gallery: Gallery, photos: Path, decoded: list[str]) -> None:
    (photos / "1.png").rename(photos / "deep" / "one.png")
    report = gallery.add([photos])
    assert (report.moved, report.unchanged, len(gallery)) == (1, 5, 6)
    assert gallery.search(picture(1))[0].path == photos / "deep" / "one.png"
    assert decoded == []


def test_two_files_that_change_places(gallery: Gallery, photos: Path) -> None:
    for a, b in (("1.png", "x"), ("2.png", "1.png"), ("x", "2.png")):
        (photos / a).rename(photos / b)
    os.utime(photos / "1.png", ns=(5, 5))
    os.utime(photos / "2.png", ns=(6, 6))
    gallery.add([photos])
    gallery.add([photos])
    assert gallery.search(picture(1))[0][:3] == (photos / "2.png", 0, 1.0)
    assert gallery.search(picture(2))[0][:3] == (photos / "1.png", 0, 1.0)
    assert str(gallery.add([photos])) == "6 unchanged"


def test_copies_are_skipped_and_named(gallery: Gallery, photos: Path) -> None:
    shutil.copy(photos / "1.png", photos / "copy.png")
    report = gallery.add([photos])
    assert report.duplicates == [(photos / "copy.png", photos / "1.png")]
    assert len(gallery) == 6


def test_copies_within_one_call(tmp_path: Path) -> None:
    for name in "abc":
        picture(1).save(tmp_path / f"{name}.png")
    with Gallery.create(tmp_path / "g", "baseline-64") as gallery:
        report = gallery.add([tmp_path])
        assert (report.added, len(report.duplicates), len(gallery)) == (1, 2, 1)


def test_unreadable_files_are_skipped_and_listed(gallery: Gallery, photos: Path) -> None:
    (photos / "bad.jpg").write_text("not a picture")
    data = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(data[: len(data) // 2])  # known, and now damaged
    picture(8).save(photos / "zz.png")
    report = gallery.add([photos])
    assert [(path.name, reason.split(",")[0].split(" (")[0]) for path, reason in report.unreadable] == [
        ("1.png", "damaged or cut off"),
        ("bad.jpg", "not an image"),
    ]
    assert (report.added, len(gallery)) == (1, 6)
    assert photos / "1.png" not in [hit.path for hit in gallery.search(picture(1), k=6)]


def test_nothing_to_add(gallery: Gallery, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    with pytest.raises(InputError, match="no images in"):
        gallery.add([tmp_path / "bad"])
    (tmp_path / "bad" / "x.png").write_text("no")
    with pytest.raises(InputError, match=r"no images: none of 1 files can be read; .*x\.png: not an image"):
        gallery.add([tmp_path / "bad"])
    with pytest.raises(InputError, match="there is no such file or folder"):
        gallery.add([tmp_path / "gone"])
    assert len(gallery) == 6


def test_a_name_that_is_not_utf8(gallery: Gallery, photos: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(photos) + b"/\xff.png"))
    picture(9).save(photos / "9.png")
    try:
        (photos / "9.png").rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    report = gallery.add([photos])
    assert report.unreadable == [(odd, "the file name is not UTF-8; rename it")]
    assert report.unchanged == 6


def test_remove(gallery: Gallery, photos: Path) -> None:
    (photos / "0.png").unlink()
    assert gallery.remove([photos / "0.png", photos / "deep"]) == 3
    assert sorted(hit.path.name for hit in gallery.search(picture(0), k=3)) == ["1.png", "2.png", "3.png"]
    assert (photos / "deep" / "4.png").exists()
    with pytest.raises(InputError, match="not in the gallery"):
        gallery.remove([photos / "0.png"])
    assert len(gallery) == 3


def test_remove_folders_of_all_kinds(tmp_path: Path) -> None:
    """Names that begin alike stay; the gallery's own folder, and those above it, are folders like others."""
    inside, outside = tmp_path / "a/g", tmp_path / "a"
    names = [inside / "deep/1.png", inside / "2.png", inside / "..3.png"]  # the last is hidden
    names += [outside / name for name in ("deep/4.png", "deep-5.png", "deep0.png", "deep.png", "g0/6.png", "7.png")]
    names += [tmp_path / "8.png"]
    for seed, name in enumerate(names):
        name.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(name)
    for target in (*names, inside, inside / "deep", outside / "deep", outside / "g0", outside, tmp_path, Path("/")):
        with Gallery.create(inside, "baseline-64") as gallery:
            gallery.add([tmp_path, inside / "..3.png"], progress=False)
            assert gallery.remove([target]) == sum(target in (name, *name.parents) for name in names)
            left = [hit.path for hit in gallery.search(picture(0), len(gallery))] if len(gallery) else []
            assert set(left) == {name for name in names if target not in (name, *name.parents)}
        for file in inside.glob("gallery.*"):
            file.unlink()


# ------------------------------------------------------------------ opening


def test_info(gallery: Gallery) -> None:
    info = gallery.info()
    assert (info.encoder, info.bits, info.images, info.missing) == ("baseline-64@1", 64, 6, [])
    assert info.file_bytes == (gallery.folder / "gallery.db").stat().st_size
    assert repr(gallery).endswith("encoder='baseline-64@1', images=6)")


def test_no_gallery_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError, match=r"no gallery there; build one with: ragsr gallery build"):
            Gallery.open(folder)
        assert not Gallery.is_at(folder)
    assert not any(tmp_path.iterdir())


def test_create_does_not_overwrite(gallery: Gallery) -> None:
    with pytest.raises(InputError, match="there is a gallery already"):
        Gallery.create(gallery.folder, "baseline-64")
    assert len(gallery) == 6
    assert set(os.listdir(gallery.folder)) <= {"gallery.db", "gallery.index"}


def test_create_with_an_unknown_encoder_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no encoder 'x'"):
        Gallery.create(tmp_path / "g", encoder="x")
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.99])
def test_cut_off_in_the_middle(gallery: Gallery, share: float) -> None:
    gallery.close()
    file = gallery.folder / "gallery.db"
    cut = file.read_bytes()[: int(file.stat().st_size * share)]
    file.write_bytes(cut)
    with pytest.raises(InputError, match="damaged"):
        Gallery.open(gallery.folder)
    assert file.read_bytes() == cut


def test_damage_inside_is_told_when_it_is_met(gallery: Gallery, photos: Path) -> None:
    gallery.close()
    file = gallery.folder / "gallery.db"
    data = file.read_bytes()
    file.write_bytes(data[:8192] + bytes(len(data) - 8192))  # all but the schema and `meta`
    with Gallery.open(gallery.folder) as opened:
        for use in (lambda: opened.search(picture(0)), opened.info, opened.check, lambda: opened.remove([photos])):
            with pytest.raises(InputError, match=r"gallery\.db: damaged.*; restore a copy or build it anew"):
                use()


def test_check_reads_everything(gallery: Gallery) -> None:
    gallery.check()
    gallery.close()
    file = gallery.folder / "gallery.db"
    data = file.read_bytes()
    at = data.rindex(b"../photos/3.png")  # the table comes before its index
    file.write_bytes(data[:at] + b"../photos/x.png" + data[at + 15 :])
    with Gallery.open(gallery.folder) as opened:
        assert len(opened.search(picture(0), 6)) == 6
        with pytest.raises(InputError, match=r"gallery\.db: damaged \(row 4 missing from index"):
            opened.check()


@pytest.mark.skipif(not COMPILED, reason="there are no index files without ragsr._index")
def test_check_compares_the_index(gallery: Gallery) -> None:
    with sqlite3.connect(gallery.folder / "gallery.db") as connection:
        ((state,),) = connection.execute("SELECT value FROM meta WHERE key = 'state'")
    wrong = FlatIndex(8)
    wrong.add(np.zeros((6, 8), np.uint8))
    wrong.save(gallery.folder / "gallery.index", tag=bytes.fromhex(state))
    with (
        Gallery.open(gallery.folder) as opened,
        pytest.raises(InputError, match=r"gallery\.index: does not agree with gallery\.db; delete it"),
    ):
        opened.check()


def change(gallery: Gallery, statement: str) -> None:
    gallery.close()
    with sqlite3.connect(gallery.folder / "gallery.db") as connection:
        connection.execute(statement)


def test_a_code_of_the_wrong_length(gallery: Gallery) -> None:
    change(gallery, "UPDATE images SET code = x'00' WHERE id = 3")
    with Gallery.open(gallery.folder) as opened, pytest.raises(InputError, match="a code is not of 8 bytes"):
        opened.search(picture(0))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("PRAGMA application_id = 7", "a database of another program"),
        ("PRAGMA user_version = 2", "gallery format 2; this ragsr reads format 1: update ragsr"),
        ("DROP TABLE meta", "no such table: meta"),
        ("UPDATE meta SET value = 'vgg@3' WHERE key = 'encoder'", "built by the encoder vgg@3, and this ragsr has"),
        (
            "UPDATE meta SET value = 'baseline-64@2' WHERE key = 'encoder'",
            "built by the encoder baseline-64@2, and this ragsr has baseline-64@1; .*build another gallery",
        ),
    ],
)
def test_files_that_are_not_for_us(gallery: Gallery, statement: str, message: str) -> None:
    change(gallery, statement)
    before = (gallery.folder / "gallery.db").read_bytes()
    with pytest.raises(InputError, match=message):
        Gallery.open(gallery.folder)
    assert (gallery.folder / "gallery.db").read_bytes() == before


def test_text_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "gallery.db").write_text("hello " * 1000)
    with pytest.raises(InputError, match="not a gallery file, or damaged"):
        Gallery.open(tmp_path)


def test_codes_of_two_encoders_never_mix(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Baseline64):
        name = "other"

    monkeypatch.setitem(ragsr.codes.ENCODERS, "other", Other)
    with pytest.raises(InputError, match="built by the encoder baseline-64@1, and other@1 was asked for"):
        Gallery.open(gallery.folder, encoder="other")
    with Gallery.open(gallery.folder, encoder="baseline-64") as same:
        assert len(same) == 6


# ------------------------------------------------------------------ other processes


def test_two_writers(gallery: Gallery, photos: Path) -> None:
    picture(10).save(photos / "10.png")
    other = sqlite3.connect(gallery.folder / "gallery.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for write in (lambda: gallery.add([photos]), lambda: gallery.remove([photos])):
        with pytest.raises(InputError, match="another process is writing this gallery; try again"):
            write()
    assert len(gallery.search(picture(0), k=6)) == 6  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    assert gallery.add([photos]).added == 1


def test_an_error_in_the_middle_keeps_what_was_committed(
    gallery: Gallery, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug or an interrupt: back to the last commit, and the gallery can be used on."""
    describe: Callable[..., object] = gallery.encoder.describe

    def failing(images: list[Image.Image]) -> object:
        if images[0].width == 13:
            raise RuntimeError("bug")
        return describe(images)

    monkeypatch.setattr(gallery.encoder, "describe", failing)
    picture(11).save(photos / "a.png")
    picture(12, width=13).save(photos / "b.png")
    with pytest.raises(RuntimeError, match="bug"):
        gallery.add([photos])
    assert len(gallery) == 6
    (photos / "b.png").unlink()
    assert gallery.add([photos]).added == 1


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX permissions")
@pytest.mark.parametrize("indexed", [True, False])
def test_searching_in_a_folder_that_cannot_be_written(indexed: bool) -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    user = os.geteuid()
    try:
        for seed in range(3):
            picture(seed).save(folder / f"{seed}.png")
        with Gallery.create(folder / "g", "baseline-64") as gallery:
            gallery.add([folder])
        if not indexed:
            (folder / "g" / "gallery.index").unlink(missing_ok=True)
        picture(3).save(folder / "3.png")
        (folder / "g" / "gallery.db").chmod(0o444)
        (folder / "g").chmod(0o555)
        folder.chmod(0o755)
        if user == 0:
            os.seteuid(65534)  # permissions mean nothing to root
        with Gallery.open(folder / "g") as gallery:
            assert gallery.search(picture(1))[0].path.name == "1.png"
            with pytest.raises(InputError, match="cannot be written"):
                gallery.add([folder])
            assert len(gallery) == 3
    finally:
        os.seteuid(user)
        (folder / "g").chmod(0o755)
        shutil.rmtree(folder)


SLOW_BUILD = """
import sys, time
import ragsr.gallery.file
from ragsr.codes import Baseline64
from ragsr.gallery import Gallery

ragsr.gallery.file.COMMIT_SECONDS = 0.05
encode = Baseline64.describe

def slow_encode(self, images):
    time.sleep(0.02)
    return encode(self, images)

Baseline64.describe = slow_encode
print("ready", flush=True)
gallery = Gallery.open(sys.argv[1]) if Gallery.is_at(sys.argv[1]) else Gallery.create(sys.argv[1], "baseline-64")
gallery.add([sys.argv[2]], progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_killed_at_any_moment_it_reopens(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(120):
        picture(seed).save(photos / f"{seed:03}.png")
    kept = 0
    for wait in (0.13, 0.31):
        build = subprocess.Popen(
            [sys.executable, "-c", SLOW_BUILD, str(tmp_path / "g"), str(photos)], stdout=subprocess.PIPE, text=True
        )
        assert build.stdout is not None
        assert build.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 20
        while committed(tmp_path / "g") <= kept and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        build.send_signal(signal.SIGKILL)
        assert build.wait() == -signal.SIGKILL
        build.stdout.close()
        with Gallery.open(tmp_path / "g") as gallery:
            assert kept < len(gallery) < 120
            kept = len(gallery)
            assert gallery.search(photos / "000.png")[0][:3] == (photos / "000.png", 0, 1.0)
    with Gallery.open(tmp_path / "g") as gallery:
        report = gallery.add([photos], progress=False)
        assert (report.unchanged, report.added, len(gallery)) == (kept, 120 - kept, 120)


def committed(folder: Path) -> int:
    """How many images another connection sees."""
    if not Gallery.is_at(folder):
        return 0
    with Gallery.open(folder) as gallery:
        return len(gallery)


# ------------------------------------------------------------------ the format


def test_the_documented_format(gallery: Gallery, photos: Path) -> None:
    """Reads the file as docs/gallery_format.md tells a stranger to, without ragsr."""
    file = gallery.folder / "gallery.db"
    header = file.read_bytes()[:100]
    assert header[:16] == b"SQLite format 3\0"
    assert header[68:72] == b"RAGS"
    assert int.from_bytes(header[60:64], "big") == 1
    with sqlite3.connect(file) as connection:
        meta = dict(connection.execute("SELECT key, value FROM meta"))
        rows = list(connection.execute("SELECT path, size, width, height, code FROM images ORDER BY id"))
        features = connection.execute("SELECT feature FROM features ORDER BY image").fetchall()
    assert (meta["encoder"], meta["bits"]) == ("baseline-64@1", "64")
    ((code,), (feature,)) = (part.numpy() for part in gallery.encoder.describe([picture(77)]))
    query = int.from_bytes(code.tobytes(), "little")
    distances = [(query ^ int.from_bytes(code, "little")).bit_count() for *_, code in rows]
    cosines = [round(float(np.frombuffer(stored, "<f2").astype(np.float32) @ feature), 4) for (stored,) in features]
    order = sorted(range(len(rows)), key=lambda number: (-cosines[number], distances[number], number))
    hits = gallery.search(picture(77), k=6)
    assert [hit.distance for hit in hits] == [distances[number] for number in order]
    assert [hit.cosine for hit in hits] == [cosines[number] for number in order]
    for hit, number in zip(hits, order, strict=True):
        path, size, width, height, _ = rows[number]
        assert (gallery.folder / path).resolve() == hit.path
        assert (size, (width, height)) == (hit.path.stat().st_size, (48, 32))
