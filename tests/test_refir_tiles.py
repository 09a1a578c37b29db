"""Tiles with references of their own, and tiles in one batch with the sources, on tiny random models."""

from typing import Any

import pytest
import torch
from PIL import Image
from tiny_hosts import Passes, good, host, picture, pipe, prompts, records

from ragsr.chains import ChainPlan, ReferenceCache
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.hosts import host_of
from ragsr.pipelines import ReFIRPipeline
from ragsr.pipelines.refir_references import Region, region_of

STEPS = 3
PLAN = ChainPlan(steps=(0.5, 1.0), scale=1.0)  # injects in 2 of 3 steps
LEFT, RIGHT = slice(0, 7), slice(8, 15)  # columns of the latent that one tile alone covers; they share the column 7
BOXES = [(0, 0, 32, 32), (28, 0, 60, 32)]


def two_things(right: int) -> torch.Tensor:
    """[1, 3, 32, 60]: the pictures 1 and `right` side by side."""
    return torch.cat((picture(1)[..., :28], picture(right)), dim=3)


def restore(photo: torch.Tensor, cache: ReferenceCache | None = None, made: Any = None, **changes: Any) -> Any:
    pipeline = ReFIRPipeline(made or host("sd15"), cache)
    pipeline.set_progress_bar_config(disable=True)
    given = prompts("sd15") | {"scale": 1, "tile": 32, "strength": 1.0, "num_inference_steps": STEPS, "plan": PLAN}
    return pipeline(photo, **given | {"output_type": "latent"} | changes)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Of the pictures 1, 4 and 6."""
    folder = tmp_path_factory.mktemp("things")
    for seed in (1, 4, 6):
        good(seed, 40, 32).save(folder / f"{seed}.png")
    with Gallery.create(folder / "gallery", "baseline-64") as made:
        made.add([folder], progress=False)
        yield made


def test_every_tile_finds_its_own(gallery):
    """In one step no tile knows of another: each is what it would be if the whole photo had its reference."""
    given: dict[str, Any] = {"gallery": gallery, "references_per": "tile", "threshold": 0.5, "num_inference_steps": 1}
    found = restore(two_things(4), k=3, return_gates=True, **given)
    assert [one.path.stem for one in found.references] == ["1", "4"]
    (other,) = found.rejected
    assert other.path.stem == "6"
    assert other.score < 0.5
    assert [region.box for region in found.regions] == BOXES
    (first, nothing), (none, second) = (region.weights for region in found.regions)
    assert nothing == none == 0
    assert [first, second] == [one.score for one in found.references]
    assert found.weights == [first / 2, second / 2]
    for seed, weight, columns in ((1, first, LEFT), (4, second, RIGHT)):
        alone = restore(two_things(4), references=good(seed, 40, 32), reference_strength=weight, num_inference_steps=1)
        assert torch.equal(found.images[..., columns], alone.images[..., columns])
    for r, (own, others) in enumerate(((LEFT, RIGHT), (RIGHT, LEFT))):
        assert not any(gate[r, :, others].any() for gate in found.gates.values())
        assert all(gate[r, :, own].any() for gate in found.gates.values())
    assert found.share.sum(0).max() <= max(first, second) + 1e-6


def test_a_tile_without_a_reference_is_the_plain_models(gallery):
    given: dict[str, Any] = {"num_inference_steps": 1}
    plain = restore(two_things(9), **given).images
    given |= {"gallery": gallery, "references_per": "tile", "threshold": 0.5}
    found = restore(two_things(9), explain=True, **given)
    assert [region.weights for region in found.regions] == [[found.references[0].score], [0.0]]
    assert torch.equal(found.images[..., RIGHT], plain[..., RIGHT])
    assert not torch.equal(found.images[..., LEFT], plain[..., LEFT])
    assert not found.share[..., 36:].any()  # beyond the shared column and the half of one that enlarging spreads
    with pytest.warns(UserWarning, match="no reference is relevant enough"):
        nothing = restore(two_things(9), **given | {"threshold": 1.1})
    assert torch.equal(nothing.images, plain)
    assert len(nothing.rejected) == 2  # what both tiles found


@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
def test_what_tiles_share_is_run_and_kept_once(gallery, host_bytes):
    cache = ReferenceCache(host_bytes=host_bytes)
    given: dict[str, Any] = {"gallery": gallery, "references_per": "tile", "k": 3}
    with Passes() as passes:
        found = restore(two_things(4), cache, **given)
    assert [[weight > 0 for weight in region.weights] for region in found.regions] == [[True] * 3] * 2
    assert len(passes) == 2 * STEPS + 3 * STEPS  # two tiles and three chains
    assert len({key for key, _ in records(cache)}) == (3 if host_bytes else 0)
    with Passes() as passes:
        again = restore(two_things(4), cache, **given)
    assert len(passes) == 2 * STEPS + (0 if host_bytes else 3 * 2)  # nothing, or the injected steps once each
    assert torch.equal(again.images, found.images)


def test_smaller_tiles_look_at_what_their_region_does():
    regions = [Region(box, [float(i)]) for i, box in enumerate(BOXES)]
    assert [region_of(regions, x, 16).weights for x in (8, 29, 31, 52)] == [[0.0], [0.0], [1.0], [1.0]]


def test_a_batch_takes_the_sources_along_with_the_first_tile():
    """In float64, where the networks do not blow rounding up. The cache is neither asked nor filled."""
    made = pipe("sd15")
    for part in (made.unet, made.vae):
        part.double()
    double, cache, rows = host_of(made), ReferenceCache(), []
    double.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    references = [good(seed, 32, 32) for seed in (2, 4)]
    apart = restore(two_things(4), None, double, references=references)
    rows.clear()
    together, again = (restore(two_things(4), cache, double, references=references, mode="batched") for _ in range(2))
    assert rows == [2 * 3, 2] * 2 * STEPS
    torch.testing.assert_close(together.images, apart.images, rtol=1e-6, atol=1e-6)
    assert torch.equal(again.images, together.images)
    assert (cache.hits, cache.misses, len(records(cache))) == (0, 0, 0)


def test_a_batch_of_own_references(gallery):
    """The first tile has its neighbour's reference beside it, with weight 0."""
    given: dict[str, Any] = {"references_per": "tile", "threshold": 0.5, "explain": True}
    with Gallery.create(gallery.folder.parent / "small", "baseline-64") as small:
        for seed in (1, 4):
            good(seed, 32, 32).save(gallery.folder.parent / f"small-{seed}.png")
        small.add(sorted(gallery.folder.parent.glob("small-*.png")), progress=False)
        apart, together = (restore(two_things(4), gallery=small, mode=m, **given) for m in ("denoise", "batched"))
    assert together.regions == apart.regions
    torch.testing.assert_close(together.share, apart.share, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.images, apart.images, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references_per": "pixel"}, "references_per is 'pixel'; it is one of image, tile"),
        ({"references_per": "tile", "references": good()}, "tiles find theirs in a gallery"),
        ({"mode": "batched", "references": good(2, 32, 60)}, "restored at once, 32x32, not 60x32"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        restore(two_things(4), **changes)


def test_a_gallery_whose_images_are_gone(tmp_path):
    picture_file = tmp_path / "gone.png"
    Image.new("RGB", (40, 40)).save(picture_file)
    with Gallery.create(tmp_path / "gallery", "baseline-64") as lost:
        lost.add([picture_file], progress=False)
        picture_file.unlink()
        with pytest.raises(InputError, match="none of its images is on disk; ragsr gallery info"):
            restore(two_things(4), gallery=lost)
