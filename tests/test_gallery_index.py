"""The index file beside a gallery: used only where it is that of the database, and never missed.

Every test compares with `truth`: a search that reads the database as docs/gallery_format.md tells a stranger to.
"""

import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import picture, write_photos

import ragsr.gallery.file
import ragsr.gallery.index
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.gallery.add import Adder, Reading
from ragsr.gallery.index import Codes, IndexFollower
from ragsr.gallery.patches import Patches
from ragsr.gallery.query import Query
from ragsr.search import COMPILED, FlatIndex

if not COMPILED:
    pytest.skip("there are no index files without ragsr._index", allow_module_level=True)

OLD = Path(__file__).parent / "data/gallery_without_state.db"  # written by ragsr 0.1.0 before there were index files


@pytest.fixture
def gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gallery]:
    """20 images of 16 codes, searched by codes that the test chooses."""
    monkeypatch.setattr(ragsr.gallery.gallery, "load_image", lambda image: image)
    monkeypatch.setattr(ragsr.gallery.gallery, "describe_query", code_by_hand)
    with Gallery.create(tmp_path / "gallery", "baseline-64", features=False) as gallery:
        put(gallery, range(20))
        yield gallery


def code_by_hand(encoder: object, code: np.ndarray, *_: object) -> Query:
    return Query(Patches(np.zeros((1, 4), np.int32), code[None], np.empty((1, 0), np.float32)))


def code_of(number: int) -> bytes:
    """Few different ones, so that many distances are equal."""
    return random.Random(number % 16).randbytes(8)


def put(gallery: Gallery, numbers: Any) -> None:
    """Images by number, through the storage code; empty files stand for them on disk."""
    with gallery._writing() as step_done:
        adder = Adder(gallery._connection, gallery.folder, gallery.encoder)
        for number in numbers:
            path = gallery.folder.parent / f"{number}.png"
            path.touch()
            adder.enter_new(f"../{path.name}", Reading(0, 0, number.to_bytes(32), 1, 1, code_of(number)))
            step_done()


def take(gallery: Gallery, numbers: Any) -> None:
    gallery.remove([gallery.folder.parent / f"{number}.png" for number in numbers])


def truth(folder: Path, query: bytes, k: int) -> list[tuple[str, int]]:
    """Name and distance of the k nearest."""
    with sqlite3.connect(folder / "gallery.db") as connection:
        rows = connection.execute("SELECT path, code FROM images ORDER BY id").fetchall()
    value = int.from_bytes(query, "little")
    near = [(Path(path).name, (int.from_bytes(code, "little") ^ value).bit_count()) for path, code in rows]
    return sorted(near, key=lambda pair: pair[1])[:k]


def assert_answers(gallery: Gallery) -> None:
    count = len(gallery)
    for seed in (3, 1000):
        query = code_of(seed)
        for k in {1, min(7, count), count}:
            hits = gallery.search_many([np.frombuffer(query, np.uint8)], k)[0]
            assert [(hit.path.name, hit.distance) for hit in hits] == truth(gallery.folder, query, k)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever all rows are read."""
    calls: list[int] = []
    read_rows = Codes.read_rows
    monkeypatch.setattr(Codes, "read_rows", lambda self: calls.append(1) or read_rows(self))
    return calls


def index_file(gallery: Gallery) -> Path:
    return gallery.folder / "gallery.index"


def assert_in_step(folder: Path) -> None:
    """The index file is the database's: by its tag, and code by code."""
    with sqlite3.connect(folder / "gallery.db") as connection:
        ((state,),) = connection.execute("SELECT value FROM meta WHERE key = 'state'")
        rows = connection.execute("SELECT id, code FROM images ORDER BY id").fetchall()
    index = FlatIndex.load(folder / "gallery.index")
    assert index.tag.hex().upper() == state
    assert (index.ids() + 1).tolist() == [number for number, _ in rows]
    assert index.codes(index.ids()).tobytes() == b"".join(code for _, code in rows)


# ------------------------------------------------------------------ in step


def test_writers_keep_it_in_step_and_nobody_reads_all_rows(gallery: Gallery, whole: list[int]) -> None:
    generator = random.Random(0)
    held, file = set(range(20)), index_file(gallery).stat().st_ino
    for step in range(12):
        new = range(100 * step + 20, 100 * step + 23)
        put(gallery, new)
        gone = [*generator.sample(sorted(held), 2), new[-1]]  # the last one too: its id must not come back
        take(gallery, gone)
        held = (held | set(new)) - set(gone)
        assert_in_step(gallery.folder)
        assert_answers(gallery)
        with Gallery.open(gallery.folder) as another:
            assert_answers(another)
            assert len(another) == len(held)
    assert index_file(gallery).stat().st_ino == file
    assert whole == []


def test_many_commits_become_one(gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragsr.gallery.file, "COMMIT_SECONDS", 0)
    put(gallery, range(100, 120))
    assert_in_step(gallery.folder)
    assert_answers(gallery)
    index = FlatIndex.load(index_file(gallery))
    index.save(tmp_path / "one", tag=index.tag)
    assert index_file(gallery).read_bytes() == (tmp_path / "one").read_bytes()


def test_it_is_deleted_and_comes_back(gallery: Gallery, whole: list[int]) -> None:
    index_file(gallery).unlink()
    assert_answers(gallery)  # from what is loaded
    assert whole == []
    for change in (lambda: put(gallery, [50]), lambda: take(gallery, [3]), lambda: None):
        index_file(gallery).unlink(missing_ok=True)
        change()
        with Gallery.open(gallery.folder) as fresh:
            assert_answers(fresh)
        assert_in_step(gallery.folder)
        assert len(whole) == 1
        whole.clear()


def test_others_that_write_with_sql(gallery: Gallery) -> None:
    other = "'../other.png', x'01', 0, 0, 0, 0, x'0101010101010101')"
    (gallery.folder.parent / "other.png").touch()
    statements = (
        "DELETE FROM images WHERE id IN (2, 20)",
        "UPDATE images SET code = x'0000000000000000' WHERE id = 5",
        "UPDATE images SET id = 40 WHERE id = 6",
        "REPLACE INTO images SELECT id, path, content, 0, 0, 0, 0, x'ffffffffffffffff' FROM images WHERE id = 7",
        f"INSERT INTO images VALUES (-3, {other}",  # no index has such an id
        "DELETE FROM images WHERE id = -3",
        f"INSERT INTO images VALUES (1 << 40, {other}",  # nor this
        "DELETE FROM images WHERE id = 1 << 40",
        "DROP TRIGGER state_after_delete",
        "DELETE FROM images WHERE id = 8",
        "UPDATE meta SET value = 'rubbish' WHERE key = 'state'",
        "VACUUM",
    )
    for statement in statements:
        connection = sqlite3.connect(gallery.folder / "gallery.db", isolation_level=None)
        connection.execute(statement)
        connection.close()
        assert_answers(gallery)
        with Gallery.open(gallery.folder) as fresh:
            assert_answers(fresh)
    assert_in_step(gallery.folder)


def test_another_writes_between_two_commits(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer lets go of the database for an instant whenever it commits, but not of the index."""
    committed = IndexFollower.committed

    def intruded(self: IndexFollower) -> None:
        committed(self)
        monkeypatch.setattr(IndexFollower, "committed", committed)
        with Gallery.open(gallery.folder) as other:
            put(other, [30])
            take(other, [0])

    monkeypatch.setattr(IndexFollower, "committed", intruded)
    monkeypatch.setattr(ragsr.gallery.file, "COMMIT_SECONDS", 0)
    put(gallery, [40, 41, 42])
    assert len(gallery) == 23
    assert_answers(gallery)
    assert_in_step(gallery.folder)


# ------------------------------------------------------------------ out of step


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_half_an_index(follower: IndexFollower) -> None:
    with follower.path.open("ab") as file:
        file.write(b"CODE" + bytes(100))
    die()


def follow_and_die(follower: IndexFollower) -> None:
    IndexFollower.follow_really(follower)
    die()


@pytest.mark.parametrize(
    ("step", "end", "committed"),
    [
        ("begun", die, False),
        ("committing", die, False),
        ("committed", die, True),
        ("_follow", die_with_half_an_index, True),
        ("_follow", follow_and_die, True),
        ("_make_anew", die, True),
    ],
)
def test_killed_between_the_two_commits(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch, step: str, end: Callable[..., None], committed: bool
) -> None:
    counts = (22, 20) if committed else (20, 20)
    for write, count in zip((lambda g: put(g, [70, 71]), lambda g: take(g, [1, 2])), counts, strict=True):
        if step == "_make_anew":
            index_file(gallery).unlink()
        child = os.fork()
        if child == 0:
            with monkeypatch.context() as patch:
                patch.setattr(IndexFollower, "follow_really", IndexFollower._follow, raising=False)
                patch.setattr(IndexFollower, step, end)
                write(Gallery.open(gallery.folder))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with Gallery.open(gallery.folder) as fresh:
            assert len(fresh) == count
            assert_answers(fresh)
        assert_in_step(gallery.folder)
    put(gallery, [80])
    assert_answers(gallery)
    assert_in_step(gallery.folder)


def test_files_of_two_times(gallery: Gallery, tmp_path: Path) -> None:
    """A copy of either file that is put back, and the index of a copy that went its own way."""
    copy = tmp_path / "copy"
    shutil.copytree(gallery.folder, copy)
    with Gallery.open(copy) as twin:
        put(twin, [90])
    put(gallery, [91])
    for name, source in (("gallery.index", copy), ("gallery.db", copy), ("gallery.index", gallery.folder)):
        mixed = tmp_path / f"mixed-{name}-{source.name}"
        shutil.copytree(gallery.folder, mixed)
        shutil.copy(source / name, mixed / name)
        with Gallery.open(mixed) as opened:
            assert_answers(opened)
        assert_in_step(mixed)


def test_files_of_others(gallery: Gallery, tmp_path: Path) -> None:
    foreign = FlatIndex(8)
    foreign.add(np.zeros((20, 8), np.uint8))
    foreign.save(tmp_path / "foreign")
    contents = (tmp_path / "foreign").read_bytes(), b"", b"hello" * 100, os.urandom(5000)
    for content in contents:
        index_file(gallery).write_bytes(content)
        with Gallery.open(gallery.folder) as opened:
            assert_answers(opened)
        assert_in_step(gallery.folder)
        index_file(gallery).write_bytes(content)
        put(gallery, [1000 + len(content)])
        assert_in_step(gallery.folder)
    plain = FlatIndex.open(index_file(gallery))  # a program that knows the index and not the gallery
    plain.remove([4])
    plain.commit()
    plain.close()
    with Gallery.open(gallery.folder) as opened:
        assert_answers(opened)
    assert_in_step(gallery.folder)


def test_damage_is_mended_from_the_database(gallery: Gallery) -> None:
    """Bytes that flip and ends that are missing, at all kinds of places: never a wrong answer, never an error."""
    take(gallery, [5])
    good = index_file(gallery).read_bytes()
    for at in range(3, len(good), 41):
        for bad in (good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :], good[:at]):
            index_file(gallery).write_bytes(bad)
            with Gallery.open(gallery.folder) as opened:
                query = np.frombuffer(code_of(3), np.uint8)
                hits = opened.search_many([query], 19)[0]
                assert [(hit.path.name, hit.distance) for hit in hits] == truth(gallery.folder, code_of(3), 19)
            assert_in_step(gallery.folder)


MANY_IMAGES = """
INSERT INTO images (path, content, size, mtime_ns, width, height, code)
WITH RECURSIVE n(i) AS (SELECT 1000 UNION ALL SELECT i + 1 FROM n WHERE i < 140000)
SELECT printf('../%d.png', i), randomblob(32), 0, 0, 1, 1, randomblob(8) FROM n
"""


def test_damage_in_codes_that_are_mapped(gallery: Gallery) -> None:
    """More than a megabyte of codes stays in the file, and is looked at before it is searched."""
    connection = sqlite3.connect(gallery.folder / "gallery.db", isolation_level=None)
    connection.execute(MANY_IMAGES)
    connection.close()
    assert len(gallery) == 139_021
    (hit,) = gallery.search_many([np.frombuffer(code_of(7), np.uint8)])[0]
    assert (hit.path.name, hit.distance) == ("7.png", 0)
    assert_in_step(gallery.folder)
    good = index_file(gallery).read_bytes()
    index_file(gallery).write_bytes(good[:200_000] + bytes([good[200_000] ^ 1]) + good[200_001:])
    with Gallery.open(gallery.folder) as opened:
        assert opened.search_many([np.frombuffer(code_of(7), np.uint8)]) == [[hit]]
    assert index_file(gallery).read_bytes() == good


# ------------------------------------------------------------------ where it cannot be


class FullDisk(FlatIndex or object):
    def save(self, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


class NoRoom:
    """An index open for adding whose disk is full."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)

    def __len__(self) -> int:
        return len(self.index)

    def commit(self, tag: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_loses_nothing(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    open_for_adding = ragsr.gallery.index.open_for_adding
    before = index_file(gallery).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ragsr.gallery.index, "FlatIndex", FullDisk)
        patch.setattr(
            ragsr.gallery.index,
            "open_for_adding",
            lambda *a: (found := open_for_adding(*a)) and NoRoom(found),
        )
        put(gallery, [50, 51])
        take(gallery, [1])
        assert len(gallery) == 21
        assert_answers(gallery)
        assert index_file(gallery).read_bytes() == before
    with Gallery.open(gallery.folder) as fresh:
        assert_answers(fresh)
    assert_in_step(gallery.folder)


def test_a_name_that_is_taken(gallery: Gallery) -> None:
    index_file(gallery).unlink()
    index_file(gallery).mkdir()
    put(gallery, [50])
    take(gallery, [3])
    with Gallery.open(gallery.folder) as fresh:
        assert_answers(fresh)
    assert sorted(os.listdir(gallery.folder)) == ["gallery.db", "gallery.index"]


PLAIN = """
import sys
from pathlib import Path
from ragsr.gallery import Gallery

with Gallery.open(sys.argv[1]) as gallery:
    print(type(gallery._codes.load().index._flat).__name__)
    for command in sys.argv[2:]:
        gallery.add([command], progress=False)
    print(*[(hit.path.name, hit.distance) for hit in gallery.search(sys.argv[2], len(gallery))])
"""


def test_plain_installs_share_it(tmp_path: Path) -> None:
    """One without compiled code answers the same and, after it has written, the others do."""
    photos = write_photos(tmp_path / "photos")
    with Gallery.create(tmp_path / "gallery", "baseline-64") as gallery:
        gallery.add([photos])
        new = tmp_path / "new.png"
        picture(20).save(new)
        plain = [sys.executable, "-c", PLAIN, str(gallery.folder), str(new)]
        done = subprocess.run(
            plain, env=os.environ | {"RAGSR_PLAIN": "1"}, stdout=subprocess.PIPE, text=True, check=True
        )
        kind, answers = done.stdout.splitlines()
        assert kind == "_Codes"
        hits = gallery.search(new, 7)
        assert hits[0][:2] == (new, 0)
        assert answers == " ".join(str((hit.path.name, hit.distance)) for hit in hits)
    assert_in_step(tmp_path / "gallery")


# ------------------------------------------------------------------ many at once


def test_readers_while_a_writer_adds(gallery: Gallery, whole: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader is told was true at one moment: hits are there, in order, and none is missing."""
    monkeypatch.setattr(ragsr.gallery.file, "COMMIT_SECONDS", 0)
    problems: list[BaseException] = []
    searches = [0, 0]
    done = threading.Event()

    def read(number: int) -> None:
        try:
            with Gallery.open(gallery.folder) as reader:
                while not done.is_set():
                    query = np.frombuffer(code_of(7), np.uint8)
                    hits = reader.search_many([query], 5)[0]
                    for hit in hits:
                        expected = int.from_bytes(code_of(int(hit.path.stem))) ^ int.from_bytes(code_of(7))
                        assert hit.distance == expected.bit_count()
                    assert (hits[0].path.name, hits[0].distance) == ("7.png", 0)
                    assert [hit.distance for hit in hits] == sorted(hit.distance for hit in hits)
                    searches[number] += 1
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for start in range(200, 240, 8):
        put(gallery, range(start, start + 8))
        take(gallery, range(start, start + 4))
    done.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert min(searches) > 0
    assert whole == []
    assert_answers(gallery)
    assert_in_step(gallery.folder)


def test_several_queries_at_once(gallery: Gallery) -> None:
    queries = [np.frombuffer(code_of(seed), np.uint8) for seed in range(3)]
    (gallery.folder.parent / "1.png").unlink()
    assert gallery.search_many(queries, 4) == [gallery.search_many([query], 4)[0] for query in queries]
    with pytest.raises(InputError, match="21 references were asked for and there are 20"):
        gallery.search_many(queries, 21)


# ------------------------------------------------------------------ galleries of an older ragsr


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Its photos 0.png to 5.png less 2.png, whose id 3 is free."""
    write_photos(tmp_path / "photos")
    (tmp_path / "gallery").mkdir()
    shutil.copy(OLD, tmp_path / "gallery/gallery.db")
    return tmp_path / "gallery"


def test_an_old_gallery_gets_an_index_when_it_is_searched(old: Path) -> None:
    with Gallery.open(old) as gallery:
        assert len(gallery) == 5
        assert os.listdir(old) == ["gallery.db"]
        assert gallery.search(picture(3))[0][:3] == (old.parent / "photos/3.png", 0, 1.0)
        assert_in_step(old)
        assert len(gallery.search(picture(3), 5)) == 5
        assert gallery.info().missing == []
        gallery.check()
    with sqlite3.connect(old / "gallery.db") as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)  # older ragsr read it still


def test_an_old_gallery_gives_an_id_out_again(old: Path) -> None:
    photos = old.parent / "photos"
    with Gallery.open(old) as gallery:
        gallery.remove([photos / "deep"])  # ids 5 and 6, the last
        assert_in_step(old)
        gallery.add([photos], progress=False)  # 2.png and those two: ids from 5 on
        assert_in_step(old)
        for number in range(6):
            assert gallery.search(picture(number))[0].path.stem == str(number)


def test_an_old_gallery_that_is_being_written(old: Path) -> None:
    writer = sqlite3.connect(old / "gallery.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with Gallery.open(old) as gallery:
        assert gallery.search(picture(3))[0].path.stem == "3"  # in memory
        assert "gallery.index" not in os.listdir(old)
        writer.execute("DELETE FROM images WHERE path = '../photos/3.png'")
        writer.execute("COMMIT")
        assert gallery.search(picture(3))[0].path.stem != "3"
    writer.close()
