"""The restore API and the refsr pipeline, with `transfer` on small pictures and with a bicubic stand-in."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data

import ragsr
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.image import image_to_tensor
from ragsr.metrics import psnr
from ragsr.pipelines import RefSRPipeline, load_pipeline, restore
from ragsr.pipelines import refsr as refsr_module

PHOTO = Image.fromarray(data.astronaut()).crop((180, 60, 308, 156))
LOW = PHOTO.resize((32, 24), Image.Resampling.BICUBIC)


class Counting:
    """Bicubic, with a weight that tells which references it was given, and a count of its work."""

    name, scale, context = "counting", 4, 2

    def __init__(self):
        self.prepared = 0

    def prepare(self, references):
        self.prepared += 1
        return [float(reference.mean()) for reference in references]

    def __call__(self, low, prepared):
        restored = F.interpolate(low, scale_factor=4, mode="bicubic").clamp(0, 1)
        return restored, torch.full_like(restored[:, :1], sum(prepared))


@pytest.fixture
def model():
    return Counting()


@pytest.fixture
def gallery(tmp_path):
    """Three references on disk, one of which is the photo itself."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, picture in {"self": PHOTO, "cat": data.chelsea(), "coffee": data.coffee()}.items():
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(folder / f"{name}.png")
    with Gallery.create(tmp_path / "gallery") as made:
        made.add([folder], progress=False)
        yield made


# ------------------------------------------------------------------ the public function


def test_the_photo_itself_as_reference_beats_no_reference(gallery):
    alone = ragsr.restore(LOW)
    found = ragsr.restore(LOW, gallery=gallery)
    assert alone.image.size == found.image.size == PHOTO.size
    assert [hit.path.name for hit in found.references] == ["self.png"]
    assert found.references[0].distance is not None
    assert alone.references == []
    assert alone.reference_share == 0 < found.reference_share <= 1
    assert psnr(found.image, PHOTO) > psnr(alone.image, PHOTO) > psnr(LOW.resize(PHOTO.size, 3), PHOTO)
    assert set(found.milliseconds) == {"load", "search", "prepare", "restore"}


def test_every_kind_of_input_gives_the_same(tmp_path):
    LOW.save(tmp_path / "low.png")
    pictures = [
        restore(source).image for source in (tmp_path / "low.png", str(tmp_path / "low.png"), image_to_tensor(LOW))
    ]
    assert all(picture == restore(LOW).image for picture in pictures)


def test_a_gallery_folder_and_a_gallery_give_the_same(gallery):
    assert restore(LOW, gallery=gallery.folder).references == restore(LOW, gallery=gallery).references


def test_the_restore_function_is_not_hidden_by_a_module():
    assert ragsr.Restored.__name__ == "Restored"
    assert callable(ragsr.restore)


@pytest.mark.parametrize("size", [(1, 1), (1, 23), (37, 2), (31, 29)])
def test_odd_sizes(size):
    low = LOW.resize(size)
    assert restore(low, references=PHOTO).image.size == (size[0] * 4, size[1] * 4)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"references": "a.png", "gallery": "b"}, "both given"),
        ({"references": "missing.png"}, "missing.png: there is no such file"),
        ({"gallery": "nowhere"}, "nowhere: no gallery there; build one with"),
        ({"model": "magic"}, "'magic'.*transfer"),
        ({"scale": 3}, "scale 4"),
        ({"pipeline": "refir"}, "refir restores with a diffusion model: name its folder"),
        ({"pipeline": "refir", "speed": 2}, "refir has no option 'speed'; it has: preset, mode"),
        ({"steps": 20}, "quality faithful has none"),
        ({"pipeline": "magic"}, "no pipeline 'magic'; there are: refsr, refir"),
        ({"quality": "rich", "model": "transfer"}, "the model transfer has no rich mode"),
        ({"quality": "best"}, "faithful or rich"),
        ({"tile": 5}, "tile is 5"),
        ({"device": "abacus"}, "no device 'abacus'; use cpu or cuda"),
    ],
)
def test_choices_that_cannot_be(choice, message):
    with pytest.raises(InputError, match=message):
        restore(LOW, **choice)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none():
    with pytest.raises(InputError, match="cuda was asked for and PyTorch sees 0 CUDA devices; use cpu"):
        restore(LOW, device="cuda")


@pytest.mark.parametrize(
    ("low", "message"),
    [
        (torch.full((1, 3, 8, 8), float("nan")), "NaN"),
        (torch.zeros(3, 8, 8), r"must be a tensor \[1, 3, height, width\]; this one is \[3, 8, 8\]"),
        (torch.zeros(1, 3, 0, 8), "height, width"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating-point"),
        (torch.full((1, 3, 8, 8), 255.0), "goes from 255 to 255; values must lie in"),
        (torch.zeros(1, 3, 1, 1).expand(1, 3, 30_000, 2000), "120000 = 960 megapixels, and 500 are allowed"),
    ],
)
def test_tensors_that_cannot_be(low, message):
    with pytest.raises(InputError, match=message):
        restore(low)


def test_more_references_than_the_gallery_holds(gallery):
    with pytest.raises(InputError, match="4 references were asked for and there are 3; ask for 1 to 3"):
        restore(LOW, gallery=gallery, k=4)


def test_a_gallery_whose_images_are_gone(gallery, tmp_path):
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="none of its images is on disk"):
        restore(LOW, gallery=gallery)


# ------------------------------------------------------------------ the pipeline


def test_references_are_prepared_once_for_many_photos(model, tmp_path):
    PHOTO.save(tmp_path / "good.png")
    pipeline = RefSRPipeline(model)
    first = pipeline(LOW, [tmp_path / "good.png"])
    assert pipeline(LOW.rotate(180), [tmp_path / "good.png"]).reference_share == first.reference_share
    assert model.prepared == 1
    pipeline(LOW, [PHOTO])
    pipeline(LOW, [PHOTO.copy()])
    assert model.prepared == 2


def test_a_changed_reference_is_prepared_again(model, tmp_path):
    PHOTO.save(tmp_path / "good.png")
    pipeline = RefSRPipeline(model)
    before = pipeline(LOW, [tmp_path / "good.png"]).reference_share
    Image.new("RGB", PHOTO.size, "white").save(tmp_path / "good.png")
    assert pipeline(LOW, [tmp_path / "good.png"]).reference_share == pytest.approx(1)
    assert before < 0.9


def test_prepared_references_are_forgotten_in_turn(model):
    pipeline = RefSRPipeline(model)
    for shade in range(refsr_module.REMEMBERED + 1):
        pipeline(LOW, [Image.new("RGB", (20, 20), (shade,) * 3)])
    pipeline(LOW, [Image.new("RGB", (20, 20), (1,) * 3)])
    assert model.prepared == refsr_module.REMEMBERED + 1
    pipeline(LOW, [Image.new("RGB", (20, 20), (0,) * 3)])
    assert model.prepared == refsr_module.REMEMBERED + 2


def test_tiles_make_no_difference_to_a_local_model(model):
    low = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 201, 3), dtype=np.uint8))
    whole = RefSRPipeline(model, tile=256)(low).image
    tiles = RefSRPipeline(model, tile=64)(low).image
    assert np.abs(np.int16(whole) - np.int16(tiles)).max() <= 1


def test_the_seed_of_the_caller_is_left_alone(model):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    RefSRPipeline(model, seed=1)(LOW)
    assert torch.equal(torch.rand(3), wanted)


def test_a_panorama_of_30000_pixels(model):
    low = Image.new("RGB", (30_000, 9), (10, 200, 30))
    restored = RefSRPipeline(model)(low).image
    assert restored.size == (120_000, 36)
    assert restored.getextrema() == ((10, 10), (200, 200), (30, 30))


def test_load_pipeline_names_its_model():
    assert load_pipeline(device="cpu").model.name == "auto"
