"""Seconds and peak memory of a gallery of a million images: opening, searching, adding, removing, the command line.

    python benchmarks/gallery_scale.py --folder out/scale --json benchmarks/results/gallery_scale_cpu.json

Codes and paths are random and are entered by the gallery's own storage code, as if images had been read. Only the
images that the searches find are on disk, and those that are added. Each step runs in a process of its own, so that
its peak memory is its own; files are in the page cache. The answers are compared with a search by NumPy.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

K = 4
REPEATS = 20  # of what is quick; the median counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    parser.add_argument("--images", type=int, default=1_000_000, help="images in the gallery (%(default)s)")
    parser.add_argument("--one", choices=[step.__name__ for step in STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep the gallery here; one that is here already is used again")
    args = parser.parse_args()
    if args.one:
        step = next(step for step in STEPS if step.__name__ == args.one)
        print(json.dumps(measure(step, args.folder, args.images)))
        return 0
    folder = args.folder or Path(tempfile.mkdtemp(prefix="gallery-scale-"))
    filled = (folder / "codes.npy").exists()
    try:
        rows = [run_step(step.__name__, folder, args.images) for step in STEPS[filled:]] + [run_command(folder)]
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    if args.json:
        from ragsr.env import provenance

        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"images": args.images, "k": K, "provenance": provenance(), "rows": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def run_step(name: str, folder: Path, images: int) -> dict[str, Any]:
    one = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--images", str(images)]
    done = subprocess.run(one, stdout=subprocess.PIPE, text=True, check=True)
    return show(json.loads(done.stdout))


def run_command(folder: Path) -> dict[str, Any]:
    """The command line from start to end: what a user waits for, most of it imports."""
    command = [sys.executable, "-m", "ragsr", "gallery", "search", str(folder / "query.png")]
    command += ["--gallery", str(folder / "gallery"), "-k", str(K), "--json"]
    times: dict[str, float] = {}
    for name, one in (
        ("ragsr gallery search", command),
        ("of it, importing torch", [sys.executable, "-c", "import torch"]),
    ):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            with subprocess.Popen(one, stdout=subprocess.PIPE, text=True) as running:
                assert running.stdout is not None
                out = running.stdout.read()
                _, status, used = os.wait4(running.pid, 0)  # its own peak memory
                running.returncode = os.waitstatus_to_exitcode(status)
            seconds.append(time.perf_counter() - start)
            assert running.returncode == 0
        if one is command:
            assert len(json.loads(out)["hits"]) == K
            peak = used.ru_maxrss >> 10
        times[name] = 1e3 * float(np.median(seconds))
    return show({"step": "command_line", "ms": times, "mib": peak})


def show(row: dict[str, Any]) -> dict[str, Any]:
    times = ", ".join(f"{name} {value:.2f} ms" for name, value in row["ms"].items())
    print(f"{row['step']:<14} {times}; peak {row['mib']} MiB", flush=True)
    return row


def measure(step: Callable[..., dict[str, float]], folder: Path, images: int) -> dict[str, Any]:
    import ragsr.gallery  # noqa: F401 - importing is not what is measured; `before` says what it takes

    before = peak_mib()
    times = step(folder, images)
    return {"step": step.__name__, "ms": {name: 1e3 * seconds for name, seconds in times.items()}} | {
        "mib": peak_mib(),
        "mib_before": before,
    }


# ------------------------------------------------------------------ the steps, in their order


def fill(folder: Path, images: int) -> dict[str, float]:
    """The gallery, through the code that `Gallery.add` stores by; and the few image files that will be found."""
    from ragsr.gallery import Gallery
    from ragsr.gallery.add import Adder, Reading
    from ragsr.gallery.paths import absolute_path

    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (images, 8), np.uint8)
    contents = random.bytes(32 * images)
    for number in range(11):
        pixels = random.integers(0, 256, (32, 48, 3), np.uint8)
        save(pixels, folder / ("query.png" if number == 0 else f"new/{number}.png"))
    with Gallery.create(folder / "gallery") as gallery, timed() as times:
        with gallery._writing() as step_done:
            adder = Adder(gallery._connection, gallery.folder, gallery.encoder)
            for number in range(images):
                content = contents[32 * number : 32 * number + 32]
                reading = Reading(1_000_000, number, content, 4000, 3000, codes[number].tobytes())
                adder.enter_new(stored(number), reading)
                step_done()
        times.lap("fill")
        for number in nearest(codes, query_code(folder), 64):
            path = absolute_path(gallery.folder, stored(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    np.save(folder / "codes.npy", codes)
    return times


def make_index(folder: Path, images: int) -> dict[str, float]:
    """The first search of a gallery whose index file was deleted."""
    from ragsr.gallery import Gallery

    (folder / "gallery" / "gallery.index").unlink()
    with Gallery.open(folder / "gallery") as gallery, timed() as times:
        gallery.search(folder / "query.png", K)
        times.lap("search, index made anew")
    return times


def search(folder: Path, images: int) -> dict[str, float]:
    from ragsr.gallery import Gallery
    from ragsr.image import load_image

    query = load_image(folder / "query.png")
    laps = []
    for _ in range(REPEATS):
        with timed() as times:
            gallery = Gallery.open(folder / "gallery")
            times.lap("open")
            hits = gallery.search(query, K)
            times.lap("first search")
            gallery.search(query, K)
            times.lap("second search")
            gallery.search_many([query] * 64, K)
            times.lap("64 queries at once")
            count = len(gallery)
            times.lap("len")
            gallery.close()
        laps.append(times)
    numbers = nearest(np.load(folder / "codes.npy"), query_code(folder), K)
    assert [int(hit.path.stem) for hit in hits] == numbers
    assert count == images
    times = Laps({name: float(np.median([lap[name] for lap in laps])) for name in times})
    times["first search, coldest"] = laps[0]["first search"]
    times["of a search, encoding"] = median_of(lambda: gallery.encoder.encode([query]))
    return times


def add_and_remove(folder: Path, images: int) -> dict[str, float]:
    from ragsr.gallery import Gallery

    laps = []
    for _ in range(5):
        with Gallery.open(folder / "gallery") as gallery, timed() as times:
            assert gallery.add([folder / "new"]).added == 10
            times.lap("add 10")
            (hit,) = gallery.search(folder / "new/3.png")
            times.lap("search")
            assert (hit.path.name, hit.distance) == ("3.png", 0)
            times.lap("")
            assert gallery.remove([folder / "new"]) == 10
            times.lap("remove 10")
            assert len(gallery) == images
        laps.append(times)
    return {name: float(np.median([lap[name] for lap in laps])) for name in times if name}


def info(folder: Path, images: int) -> dict[str, float]:
    """What must look at every image, or at every byte."""
    from ragsr.gallery import Gallery

    with Gallery.open(folder / "gallery") as gallery, timed() as times:
        missing = len(gallery.info().missing)
        times.lap("info")
        gallery.check()
        times.lap("check")
    assert missing > images - 1000
    return times


STEPS = (fill, make_index, search, add_and_remove, info)


# ------------------------------------------------------------------ details


def median_of(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


class Laps(dict[str, float]):
    """Seconds between calls of `lap`, by name."""

    def __enter__(self) -> "Laps":
        self.last = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self[name], self.last = now - self.last, now


timed = Laps


def stored(number: int) -> str:
    return f"../photos/{number // 1000:04}/{number:07}.jpg"


def save(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def query_code(folder: Path) -> np.ndarray:
    from ragsr.codes import load_encoder
    from ragsr.image import load_image

    return load_encoder().encode([load_image(folder / "query.png")]).numpy()[0]


def nearest(codes: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    distances = np.bitwise_count(codes.view(np.uint64)[:, 0] ^ query.view(np.uint64)[0])
    return np.argsort(distances, kind="stable")[:k].tolist()


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    sys.exit(main())
