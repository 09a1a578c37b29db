"""The index file: killed at any byte, flipped at any bit, cut, full, locked, older, newer; nothing is lost silently."""

import errno
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from index.counting import Counted, assert_answers, random_codes
from index.make_fixtures import FIXTURES, WIDTHS, commits, expected, write

from ragsr.search import FlatIndex

if FlatIndex is None:
    pytest.skip("ragsr._index was not built", allow_module_level=True)

DOCUMENT = Path(__file__).parents[2] / "docs/index_format.md"
MEGABYTE = 8192  # codes of 128 bytes: smaller records are copied into memory, these are mapped


def crc32c(data: bytes) -> int:
    """From the sentence in the document, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def resealed(header: bytes) -> bytes:
    return header[:60] + crc32c(header[:60]).to_bytes(4, "little")


def check(index, model: Counted) -> None:
    queries = random_codes(3, model.codes.shape[1], seed=9)
    assert_answers(index, model, queries, min(10, int(model.live.sum())), 4 * model.codes.shape[1])


def answer(path: Path, mmap: bool = True) -> None:
    """Load and read every code."""
    index = FlatIndex.load(path, mmap=mmap)
    index.range_search(np.zeros((1, index.width), np.uint8), 8 * index.width)


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.index"
    write(path, 8)
    return path


@pytest.fixture
def large(tmp_path) -> tuple[Path, Counted]:
    """Two mapped records, of 1 MiB and 2 MiB and some bytes, with a short one in between."""
    path, model = tmp_path / "large.index", Counted(128)
    FlatIndex(128).save(path)
    index = FlatIndex.open(path)
    for n in (MEGABYTE, 3, 2 * MEGABYTE + 1):
        codes = random_codes(n, 128)
        model.add(codes)
        index.add(codes)
        index.commit()
    model.remove([5, MEGABYTE + 1])
    index.remove([5, MEGABYTE + 1])
    index.commit()
    check(index, model)  # the committed codes are mapped by now
    index.close()
    return path, model


# ---------------------------------------------------------------- whole files


@pytest.mark.parametrize("mmap", [True, False])
def test_large_files_come_back(large, mmap):
    path, model = large
    check(FlatIndex.load(path, mmap=mmap), model)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("n", [0, 1, 700])
def test_save_and_load(tmp_path, n, mmap):
    index, model = FlatIndex(12), Counted(12)
    index.add(random_codes(n, 12))
    model.add(random_codes(n, 12))
    index.remove(np.arange(0, n, 7))
    model.remove(np.arange(0, n, 7))
    path = tmp_path / "Überraschung.index"
    index.save(path)
    index.save(str(path))  # over itself
    assert os.listdir(tmp_path) == [path.name]
    loaded = FlatIndex.load(path, mmap=mmap)
    check(loaded, model)
    assert loaded.add(random_codes(2, 12)) == n  # a loaded index grows in memory
    check(FlatIndex.load(path, mmap=mmap), model)


def test_save_keeps_the_permissions_of_the_file_it_replaces(small):
    small.chmod(0o640)
    FlatIndex.load(small).save(small)
    assert small.stat().st_mode & 0o7777 == 0o640


def test_a_mapped_index_takes_no_memory(tmp_path):
    """64 MiB of codes are loaded and searched where the process may have no more than 32 MiB of its own."""
    index = FlatIndex(128)
    for seed in range(8):
        index.add(random_codes(8 * MEGABYTE, 128, seed=seed % 2))
    index.save(tmp_path / "codes.index")
    script = """
import sys, resource, numpy as np
from ragsr._index import FlatIndex
FlatIndex(1)
resource.setrlimit(resource.RLIMIT_DATA, (int(open("/proc/self/statm").read().split()[5]) * 4096 + (32 << 20),) * 2)
try:
    FlatIndex.load(sys.argv[1], mmap=False)
except MemoryError:
    index = FlatIndex.load(sys.argv[1])
    print(len(index), index.search(np.zeros((1, 128), np.uint8), 1)[0].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "codes.index"], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [str(64 * MEGABYTE), "(1,", "1)"], done.stderr


@pytest.mark.parametrize("width", WIDTHS)
def test_files_of_version_1_stay_readable(width, tmp_path):
    kept = FIXTURES / f"version-1-width-{width}.index"
    for mmap in (True, False):
        check(FlatIndex.load(kept, mmap=mmap), expected(width))
    write(tmp_path / "new.index", width)
    assert (tmp_path / "new.index").read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_document_reads_the_fixtures(width):
    source = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert source
    names: dict = {}
    exec(source[1], names)
    model = expected(width)
    wanted = [code.tobytes() if live else None for code, live in zip(model.codes, model.live, strict=True)]
    assert names["read_index"](FIXTURES / f"version-1-width-{width}.index") == wanted


def test_checksums_are_those_of_the_document(small):
    assert crc32c(b"123456789") == 0xE3069283
    data = small.read_bytes()
    assert resealed(data[:64]) == data[:64]
    assert resealed(data[64:128]) == data[64:128]


# ---------------------------------------------------------------- adding


def test_commits_are_kept_and_the_rest_is_not(tmp_path):
    path, model = tmp_path / "a.index", Counted(8)
    FlatIndex(8).save(path)
    index = FlatIndex.open(path)
    index.commit()  # nothing to do
    before = path.stat().st_size
    for codes, ids in commits(8):
        index.add(codes)
        model.add(codes)
        index.remove(ids)
        model.remove(ids)
        check(index, model)
        assert "uncommitted=" in repr(index)
        index.commit()
        assert "uncommitted=" not in repr(index)
        check(FlatIndex.load(path), model)
    assert path.stat().st_size > before
    index.add(random_codes(3, 8))
    index.remove([1])
    index.close()
    with pytest.raises(ValueError, match=r"FlatIndex\.open"):
        index.commit()
    check(FlatIndex.open(path), model)


def test_a_tag_belongs_to_its_commit(tmp_path):
    path, tags = tmp_path / "a.index", [bytes([n] * 16) for n in (1, 2, 3)]
    FlatIndex(8).save(path, tag=tags[0])
    assert FlatIndex.load(path).tag == tags[0]
    index = FlatIndex.open(path)
    assert (index.tag, index.total) == (tags[0], 0)
    index.add(random_codes(5, 8))
    index.remove([4])
    index.commit(tag=tags[1])
    assert (index.tag, index.total, FlatIndex.load(path).tag) == (tags[1], 5, tags[1])
    index.commit(tag=tags[1])  # nothing to do
    size = path.stat().st_size
    index.commit(tag=tags[2])  # a tag alone is a commit
    assert (path.stat().st_size, FlatIndex.load(path).tag) == (size + 64, tags[2])
    index.commit()
    assert (index.tag, FlatIndex.load(path).tag) == (b"", b"")
    with pytest.raises(ValueError, match="the tag has 3 bytes; a tag has 16, or none"):
        index.commit(tag=b"abc")


def test_many_small_commits_then_a_mapped_one(tmp_path):
    path, model = tmp_path / "a.index", Counted(128)
    FlatIndex(128).save(path)
    index = FlatIndex.open(path)
    for n in (10, 20, MEGABYTE, 5, 2 * MEGABYTE, 1):
        codes = random_codes(n, 128)
        assert index.add(codes) == model.add(codes)
        index.commit()
        check(index, model)
    index.close()
    check(FlatIndex.load(path), model)


def test_readers_load_while_a_writer_commits(tmp_path, recwarn):
    path = tmp_path / "a.index"
    FlatIndex(8).save(path)
    index = FlatIndex.open(path)
    stop = threading.Event()
    problems: list[str] = []

    def read() -> None:
        last = 0
        while not stop.is_set():
            try:
                size = len(FlatIndex.load(path))
            except Exception as problem:
                problems.append(str(problem))
                return
            if size < last or size % 10:
                problems.append(f"{size} after {last}")
            last = size

    reader = threading.Thread(target=read)
    reader.start()
    for commit in range(60):
        index.add(random_codes(10, 8, seed=commit))
        index.commit()
    stop.set()
    reader.join()
    assert problems == []
    assert not recwarn.list


# ---------------------------------------------------------------- killed, cut, flipped


def test_cut_at_every_byte_of_the_last_commit(small, tmp_path):
    """What a writer killed at that byte leaves: the commit before. It goes on from there."""
    whole = small.read_bytes()
    ends = [at + 64 for at in range(64, len(whole), 64) if whole[at : at + 4] == b"DONE"]
    assert ends[-1] == len(whole)
    model = Counted(8)
    for codes, ids in commits(8)[:-1]:
        model.add(codes)
        model.remove(ids)
    path = tmp_path / "cut.index"
    for size in range(ends[-2], len(whole)):
        path.write_bytes(whole[:size])
        left = size - ends[-2]
        if left:
            with pytest.warns(RuntimeWarning, match=f"cut.index: {left} bytes behind the last commit are left out"):
                index = FlatIndex.load(path, mmap=size % 2 == 0)
        else:
            index = FlatIndex.load(path)
        assert len(index) == model.live.sum()
        if size % 7:  # the disk is slow to sync
            continue
        check(index, model)
        writer = FlatIndex.open(path)
        check(writer, model)
        codes, ids = commits(8)[-1]
        writer.add(codes)
        writer.remove(ids)
        writer.commit()
        writer.close()
        assert path.read_bytes() == whole


def test_cut_before_the_first_commit(tmp_path):
    index = FlatIndex(8)
    index.add(random_codes(9, 8))
    index.save(tmp_path / "a.index")
    whole = (tmp_path / "a.index").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "a.index").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.index (is no index, or was cut off|holds no whole commit)"):
            FlatIndex.load(tmp_path / "a.index")
        with pytest.raises(ValueError, match="cut off"):
            FlatIndex.open(tmp_path / "a.index")


@pytest.mark.filterwarnings("error")  # to leave a part out with a warning is not to find the damage
def test_every_flipped_bit_is_found_and_named(small):
    whole = small.read_bytes()
    with open(small, "r+b", buffering=0) as file:
        for bit in range(8 * len(whole)):
            at = bit // 8
            os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << bit % 8]), at)
            with pytest.raises(ValueError, match=r"small\.index (is damaged|is no index of ragsr)") as problem:
                answer(small, mmap=bit % 2 == 0)
            os.pwrite(file.fileno(), whole[at : at + 1], at)
            if at >= 8:
                first, last = map(int, re.search(r"bytes (\d+) to (\d+)", str(problem.value)).groups())
                assert first <= at <= last
    answer(small)


@pytest.mark.parametrize("mmap", [True, False])
def test_flipped_bits_of_mapped_codes_are_named_by_block(large, mmap, tmp_path):
    path, _ = large
    whole = path.read_bytes()
    third = whole.index(b"CODE", whole.index(b"CODE", 10_000) + 1)
    for offset, name in [
        (128 + 64, "block 0 of record 1 (bytes 192 to 1048767)"),  # record 0 is the empty first commit
        (third + 64 + (1 << 20), f"block 1 of record 5 (bytes {third + 64 + (1 << 20)}"),
        (third + 64 + (2 << 20) + 127, "block 2 of record 5"),
        (third + 64 + (2 << 20) + 128 + 3, "the table of checksums of record 5"),
    ]:
        data = bytearray(whole)
        data[offset] ^= 16
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(name)):
            answer(path, mmap)
        if "block" in name and "table" not in name and mmap:
            index = FlatIndex.load(path)
            for _ in range(2):  # the second search refuses as well
                with pytest.raises(ValueError, match=re.escape(name)):
                    index.search(random_codes(1, 128), 1)
            with pytest.raises(ValueError, match=re.escape(name)):
                index.save(tmp_path / "copy.index")
            assert not (tmp_path / "copy.index").exists()


def test_a_hole_in_the_middle_is_damage(small):
    whole = small.read_bytes()
    ends = [at + 64 for at in range(64, len(whole), 64) if whole[at : at + 4] == b"DONE"]
    for end in ends[:-1]:
        small.write_bytes(whole[:end] + bytes(64) + whole[end + 64 :])
        with pytest.raises(ValueError, match=f"record . at byte {end} is missing, and a commit follows it"):
            FlatIndex.load(small)
    small.write_bytes(whole + bytes(4096))  # an interrupted commit whose pages never reached the disk
    with pytest.warns(RuntimeWarning, match="4096 bytes behind the last commit"):
        check(FlatIndex.load(small), expected(8))


def test_records_that_contradict_each_other(small):
    whole = small.read_bytes()
    for place, value, problem in [
        (24, 39, "does not go on"),  # the number of codes
        (16, 1, "does not go on"),  # the first id
        (4, 3, "is out of place"),  # the number of the record
        (8, 0, "is out of place"),  # its offset
    ]:
        at = whole.index(b"CODE")
        header = bytearray(whole[at : at + 64])
        header[place] = value
        small.write_bytes(whole[:at] + resealed(bytes(header)) + whole[at + 64 :])
        with pytest.raises(ValueError, match=problem):
            FlatIndex.load(small)
    at = whole.rindex(b"DONE")
    header = bytearray(whole[at : at + 64])
    header[24] += 1
    small.write_bytes(whole[:at] + resealed(bytes(header)))
    with pytest.raises(ValueError, match="counts other codes than there are"):
        FlatIndex.load(small)


def test_a_newer_version_is_refused(small):
    data = small.read_bytes()
    small.write_bytes(resealed(data[:8] + b"\2" + data[9:64]) + data[64:])
    with pytest.raises(
        ValueError, match="has version 2 of the index format, and this ragsr reads version 1: install a new"
    ):
        FlatIndex.load(small)
    with pytest.raises(ValueError, match="version 2"):
        FlatIndex.open(small)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("no index " * 100)
    with pytest.raises(ValueError, match="text is no index of ragsr: it does not begin with RAGSRIDX"):
        FlatIndex.load(tmp_path / "text")
    for call in (FlatIndex.load, FlatIndex.open):
        with pytest.raises(FileNotFoundError, match="missing"):
            call(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"making .*a\.index failed"):
        FlatIndex(1).save(tmp_path / "nowhere" / "a.index")
    with pytest.raises(IsADirectoryError):
        FlatIndex(1).save(tmp_path)
    assert os.listdir(tmp_path) == ["text"]


# ---------------------------------------------------------------- two writers, full disks, no permission


def test_one_writer_at_a_time(small):
    writer = FlatIndex.open(small)
    before = small.read_bytes()
    for call in (FlatIndex.open, FlatIndex(8).save):
        with pytest.raises(BlockingIOError, match=r"small\.index is open for adding elsewhere.*close that one first"):
            call(small)
    script = "import sys; from ragsr._index import FlatIndex; FlatIndex.open(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, small], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in done.stderr
    assert small.read_bytes() == before
    check(FlatIndex.load(small), expected(8))  # readers are welcome
    writer.close()
    FlatIndex.open(small).close()
    FlatIndex(8).save(small)


@pytest.fixture
def small_disk():
    """No file may grow beyond 40 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_saving(small, small_disk):
    before = small.read_bytes()
    index = FlatIndex(8)
    index.add(random_codes(10_000, 8))
    with pytest.raises(OSError, match=r"writing .*small\.index failed: File too large") as problem:
        index.save(small)
    assert problem.value.errno == errno.EFBIG
    assert small.read_bytes() == before
    assert os.listdir(small.parent) == [small.name]
    small_disk()
    index.save(small)
    assert len(FlatIndex.load(small)) == 10_000


def test_a_full_disk_while_committing(small, small_disk):
    before, model = small.read_bytes(), expected(8)
    index = FlatIndex.open(small)
    index.add(random_codes(10_000, 8))
    index.remove([20])
    model.add(random_codes(10_000, 8))
    model.remove([20])
    for _ in range(2):
        with pytest.raises(
            OSError, match=r"File too large\. The file is as it was before; what was added waits in memory"
        ):
            index.commit()
        assert small.read_bytes() == before
        check(index, model)
    small_disk()
    index.commit()
    index.close()
    check(FlatIndex.load(small), model)


def without_rights(call) -> str:
    """What `call` raises in a process that is nobody's (root may do anything)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            call()
            text = "nothing"
        except BaseException as problem:
            text = f"{type(problem).__name__}: {problem}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def test_a_read_only_directory():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to nobody
        folder = Path(name)
        path = folder / "a.index"
        write(path, 8)
        path.chmod(0o444)
        folder.chmod(0o555)
        refusal = without_rights(lambda: FlatIndex(8).save(folder / "new.index"))
        assert re.match(r"PermissionError: .*making .*new\.index failed", refusal)
        assert re.match(r"PermissionError: .*making ", without_rights(lambda: FlatIndex(8).save(path)))
        refusal = without_rights(lambda: FlatIndex.open(path))
        assert re.match(r"PermissionError: .*a\.index failed \(to search it without adding: FlatIndex\.load\)", refusal)
        assert without_rights(lambda: check(FlatIndex.load(path), expected(8))) == "nothing"
        folder.chmod(0o755)
        assert os.listdir(folder) == ["a.index"]


@pytest.mark.parametrize("pause", [0.05, 0.1, 0.2])
def test_a_killed_writer_loses_nothing_it_committed(tmp_path, pause):
    path = tmp_path / "a.index"
    FlatIndex(8).save(path)
    script = """
import sys, numpy as np
from ragsr._index import FlatIndex
index = FlatIndex.open(sys.argv[1])
while True:
    index.add(np.random.default_rng(len(index)).integers(0, 256, (1000, 8), dtype=np.uint8))
    index.commit()
    print(len(index), flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True) as writer:
        committed = int(writer.stdout.readline())
        threading.Event().wait(pause)
        writer.kill()
        committed = int((writer.stdout.read().split() or [committed])[-1])
    index = FlatIndex.open(path)
    assert len(index) in (committed, committed + 1000)
    codes = [np.random.default_rng(i).integers(0, 256, (1000, 8), dtype=np.uint8) for i in range(0, len(index), 1000)]
    model = Counted(8)
    model.add(np.concatenate(codes))
    check(index, model)
