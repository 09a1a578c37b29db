"""Patches: where they lie, how images compare by them, and searching for regions."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pictures import picture
from PIL import Image

from ragsr.cli import main
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.gallery.patches import Patches, as_box, compare, patch_boxes, similarity, tiles_of
from ragsr.gallery.query import centre_box
from ragsr.models import Transfer
from ragsr.pipelines import RefSRPipeline


def collage(*seeds: int) -> Image.Image:
    """Pictures of 64 x 64 side by side."""
    sheet = Image.new("RGB", (64 * len(seeds), 64))
    for column, seed in enumerate(seeds):
        sheet.paste(picture(seed, 64, 64), (64 * column, 0))
    return sheet


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    """Four images of three pictures each: 0 1 2, 3 4 5, 6 7 8, 9 10 11."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for first in range(0, 12, 3):
        collage(first, first + 1, first + 2).save(folder / f"{first}.png")
    with Gallery.create(tmp_path / "g", patches=True) as gallery:
        gallery.add([folder], progress=False)
        yield gallery


# ------------------------------------------------------------------ geometry


@pytest.mark.parametrize("size", [(600, 400), (400, 600), (97, 97), (1, 1), (1, 50), (5000, 30)])
def test_patches_cover_the_image_and_no_more(size: tuple[int, int]) -> None:
    boxes = patch_boxes(*size)
    assert (boxes[:, :2].min(), *boxes[:, 2:].max(0)) == (0, *size)
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides[:, 0] == sides[:, 1]).all()
    assert set(sides[:, 0].tolist()) == {min(size), max(1, round(0.62 * min(size)))}
    assert len(boxes) <= 12 + 12 * 2
    if max(size) <= 2 * min(size):  # neighbours overlap by about a half
        large = np.unique(boxes[sides[:, 0] < min(size)][:, 0])
        assert (np.diff(large) <= 0.75 * sides[-1, 0]).all()


@pytest.mark.parametrize(("size", "tile", "count"), [((300, 200), 100, 6), ((301, 200), 100, 8), ((5, 5), 100, 1)])
def test_tiles(size: tuple[int, int], tile: int, count: int) -> None:
    boxes = tiles_of(*size, tile)
    assert len(boxes) == count
    assert (boxes[:, 2:] - boxes[:, :2]).max() <= tile
    assert ((boxes[:, 2:] - boxes[:, :2]).prod(1)).sum() == size[0] * size[1]


def test_compare_is_half_the_whole_and_half_the_three_best() -> None:
    random = np.random.default_rng(0)

    def patches(n: int) -> Patches:
        features = random.normal(size=(n, 8)).astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        return Patches(random.integers(0, 9, (n, 4)).astype(np.int32), np.zeros((n, 1), np.uint8), features)

    query, reference = patches(6), patches(5)
    table = [[float(a @ b) for b in reference.features] for a in query.features]
    best = sorted((max(row) for row in table[1:]), reverse=True)[:3]
    match = compare(query, reference)
    assert match.cosine == pytest.approx(table[0][0] / 2 + sum(best) / 6, abs=1e-6)
    pair = max((value, i, j) for i, row in enumerate(table) if i for j, value in enumerate(row))
    assert (match.query_region, match.region) == (as_box(query.boxes[pair[1]]), as_box(reference.boxes[pair[2]]))


def test_without_features_codes_estimate_the_cosine() -> None:
    codes = np.array([[0, 0], [255, 0], [255, 255]], np.uint8)
    patches = Patches(np.zeros((3, 4), np.int32), codes, np.empty((3, 0), np.float32))
    np.testing.assert_allclose(similarity(patches.only(0), patches), [[1, 0, -1]], atol=1e-6)


# ------------------------------------------------------------------ searching


def test_a_part_finds_its_whole_and_where(gallery: Gallery) -> None:
    for seed in range(12):
        (hit,) = gallery.search(picture(seed, 40, 40), patches=True)
        assert hit.path.stem == str(seed - seed % 3)
        assert 64 * (seed % 3) <= hit.region[0] < hit.region[2] <= 64 * (seed % 3) + 64
        assert hit.query_region[2] <= 40
    assert gallery.search(picture(5, 40, 40), patches=False)[0].region is None


def test_every_region_has_its_own_reference(gallery: Gallery) -> None:
    """A photo of parts of three images: each tile finds its own, and the place in it."""
    found = gallery.search_regions(collage(7, 0, 5), tile=64, k=2)
    assert [part[0].path.stem for part in found] == ["6", "0", "3"]
    assert [part[0].region for part in found] == [(64, 0, 128, 64), (0, 0, 64, 64), (128, 0, 192, 64)]
    assert [part[0].query_region for part in found] == [(0, 0, 64, 64), (64, 0, 128, 64), (128, 0, 192, 64)]
    for part in found:
        assert len({hit.path for hit in part}) == 2
        assert (part[0].distance, part[0].cosine) == (0, 1.0)
        assert part[0].score == gallery.encoder.score(0, 1.0) > part[1].score


def test_changes_are_seen(gallery: Gallery, tmp_path: Path) -> None:
    assert gallery.search_regions(picture(20, 64, 64), 64)[0][0].cosine != 1
    collage(19, 20, 21).save(tmp_path / "new.png")
    with Gallery.open(gallery.folder) as other:
        other.add([tmp_path / "new.png"], progress=False)
    (hit,) = gallery.search_regions(picture(20, 64, 64), 64)[0]
    assert (hit.path.name, hit.region, hit.cosine) == ("new.png", (64, 0, 128, 64), 1.0)


def test_probes(tmp_path: Path) -> None:
    """A mirrored photo, and a photo that shows more than the reference does, come nearer with probes."""
    near = tmp_path / "near.png"
    whole = picture(1, 96, 64)
    whole.crop(centre_box(96, 64, 0.5)).save(near)
    picture(2, 96, 64).save(tmp_path / "other.png")
    with Gallery.create(tmp_path / "g") as gallery:
        gallery.add([tmp_path], progress=False)
        mirrored = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        plain, scales = gallery.search(whole), gallery.search(whole, probes=["scales"])
        both = gallery.search(mirrored, probes=["flips", "scales"])
        assert scales[0][:2] == both[0][:2] == (near, 0)
        assert plain[0].cosine < scales[0].cosine == both[0].cosine == 1
        with pytest.raises(InputError, match="no probe 'turns'; there are: flips, scales"):
            gallery.search(whole, probes=["turns"])
        with pytest.raises(InputError, match="keeps no patches; let it: ragsr gallery build"):
            gallery.search_regions(whole, 32)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, folder, query = tmp_path / "photos", tmp_path / "g", tmp_path / "q.png"
    photos.mkdir()
    for first in (0, 3):
        collage(first, first + 1, first + 2).save(photos / f"{first}.png")
    collage(4, 2).save(query)

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert main(["gallery", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    run("build", photos, "-o", folder)
    assert "patches       none kept\n" in run("info", folder)
    assert json.loads(run("build", photos, "-o", folder, "--patches", "--json"))["completed"] == 2
    assert "patches       of 2 images\n" in run("info", folder)
    found = json.loads(run("search", query, "--gallery", folder, "--tile", "64", "--json"))
    assert [(Path(hit["path"]).stem, hit["region"]) for hit in found["hits"]] == [
        ("3", [64, 0, 128, 64]),
        ("0", [128, 0, 192, 64]),
    ]
    line = run("search", query, "--gallery", folder, "--tile", "64").splitlines()[1]
    assert line == f"{photos / '0.png'}  distance 0 of 64, cosine 1.00, score 1.00, 64x64+128+0 for 64x64+64+0"
    assert ", of no use" in run("search", query, "--gallery", folder, "--threshold", "1.1")
    assert main(["gallery", "build", str(photos), "-o", str(folder), "--no-features"]) == 2
    assert "keeps features; build another gallery to have none" in capsys.readouterr().err


# ------------------------------------------------------------------ restoring


def test_every_tile_of_a_large_photo_gets_a_reference(gallery):
    """A photo of three places, each of which is in another image."""
    pipeline = RefSRPipeline(Transfer(4), tile=64)
    low = pipeline.load(collage(0, 4, 8))
    found, _ = pipeline.retrieve(gallery, low, 1, threshold=0)
    assert {one.path.name for one in found} >= {"0.png", "3.png", "6.png"}
    assert len({one.path for one in found}) == len(found)
    assert all(one.region for one in found)
    whole = RefSRPipeline(Transfer(4), tile=256)  # one tile: nothing more to look for
    assert len(whole.retrieve(gallery, low, 1, threshold=0)[0]) == 1
    found, _ = pipeline.retrieve(gallery, low, 1, threshold=1.01)
    assert found == []  # what is not of use is not added either
    restored = pipeline(collage(0, 4, 8), gallery=gallery, threshold=0)
    assert len(restored.references) >= 3
