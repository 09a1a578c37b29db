"""Tiles cover, agree and leave no seam."""

import pytest
import torch
import torch.nn.functional as F

from ragsr.errors import InputError
from ragsr.tiling import OVERLAP, plan_tiles, reflect_to, restore_tiled, tile_size

SCALE, RADIUS = 2, 3
torch.manual_seed(0)
KERNEL = torch.randn(4 * SCALE**2, 3, 2 * RADIUS + 1, 2 * RADIUS + 1) / 7


def local_model(low):
    """Looks `RADIUS` pixels far; continues the image by repetition, so that it sees where a crop ends."""
    mixed = F.conv2d(F.pad(low, (RADIUS,) * 4, mode="replicate"), KERNEL)
    out = F.pixel_shuffle(mixed, SCALE)
    return out[:, :3], out[:, 3:].sigmoid()


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (16, 1009), (300, 65), (199, 17)])
@pytest.mark.parametrize("tile", [64, 70, 101])
def test_tiles_agree_with_the_whole(size, tile):
    low = torch.rand(1, 3, *size)
    whole = local_model(low)
    parts = restore_tiled(local_model, low, SCALE, tile, RADIUS)
    for part, wanted in zip(parts, whole, strict=True):
        assert part.shape == wanted.shape
        torch.testing.assert_close(part, wanted, rtol=0, atol=2e-6)


def test_too_little_context_is_seen():
    """The test above can fail: with a context that is too small, tiles differ from the whole."""
    low = torch.rand(1, 3, 40, 200)
    restored, _ = restore_tiled(local_model, low, SCALE, 64, 0)
    assert (restored - local_model(low)[0]).abs().max() > 1e-3


def test_neighbours_fade_into_each_other():
    """Tiles that disagree by one make a ramp, not a step: at most the steepest slope of a cosine over the overlap."""
    seen = []

    def disagreeing(low):
        seen.append(low)
        out = low.new_full((1, 4, low.shape[2] * SCALE, low.shape[3] * SCALE), len(seen) % 2)
        return out[:, :3], out[:, 3:]

    restored, _ = restore_tiled(disagreeing, torch.rand(1, 3, 20, 500), SCALE, 64, 0)
    steps = restored.diff(dim=-1).abs().max()
    assert len(seen) > 5
    assert 0 < steps <= torch.pi / (2 * OVERLAP * SCALE) + 1e-6


@pytest.mark.parametrize("length", [1, 63, 64, 65, 113, 1000, 30_000])
@pytest.mark.parametrize("tile", [64, 71, 256])
def test_a_plan_covers_with_weights_of_one(length, tile):
    total = torch.zeros(length * SCALE)
    tiles = plan_tiles(5, length, tile)
    for part in tiles:
        assert part.columns.stop - part.columns.start <= tile
        total[part.columns.start * SCALE : part.columns.stop * SCALE] += part.columns.weights(SCALE)
    torch.testing.assert_close(total, torch.ones(length * SCALE))
    sizes = {part.columns.stop - part.columns.start for part in tiles}
    assert len(sizes) == 1  # no sliver at the end
    assert len(tiles) <= 1 + length // (tile - OVERLAP - 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 3), (101, 1)])
def test_tiny_images(size):
    low = torch.rand(1, 3, *size)
    restored, weight = restore_tiled(lambda x: local_model(checked(x)), low, SCALE, 64, RADIUS)
    assert restored.shape == (1, 3, size[0] * SCALE, size[1] * SCALE)
    assert weight.shape == (1, 1, size[0] * SCALE, size[1] * SCALE)
    assert restored.isfinite().all()


def checked(x):
    assert min(x.shape[-2:]) >= 16
    return x


def test_reflection_goes_to_and_fro():
    row = torch.tensor([[0, 1, 2]])
    assert reflect_to(row, 1, 9).tolist() == [[0, 1, 2, 1, 0, 1, 2, 1, 0]]
    assert reflect_to(row, 3, 2).tolist() == [[0, 1, 2]] * 3
    assert torch.equal(reflect_to(row, 1, 5)[:, :5], F.pad(row[None].float(), (0, 2), mode="reflect")[0].long())


def test_working_memory_does_not_grow_with_the_image():
    largest = 0

    def watched(low):
        nonlocal largest
        largest = max(largest, low.shape[2] * low.shape[3])
        return local_model(low)

    restored, _ = restore_tiled(watched, torch.rand(1, 3, 16, 30_000), SCALE, 256, RADIUS)
    assert restored.shape[-1] == 60_000
    assert largest <= 16 * (256 + 2 * RADIUS)


def test_tile_sizes():
    assert (tile_size("auto"), tile_size("128"), tile_size(64)) == (256, 128, 64)
    for wrong in ("big", 63, "0", "-64", "64.5"):
        with pytest.raises(
            InputError, match=f'tile is {wrong!r}; it is "auto" or a number of low-quality pixels from 64'
        ):
            tile_size(wrong)
