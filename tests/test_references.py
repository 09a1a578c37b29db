"""References of every shape, mode and size, from the file to the restored photo: nothing breaks, nothing gets worse."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from skimage import data

import ragsr
import ragsr.image
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.image import image_to_tensor, load_image, load_reduced
from ragsr.metrics import psnr
from ragsr.models import RefNet, Transfer, views
from ragsr.models.alignment import MAX_REFERENCES, matches
from ragsr.models.fusion import FusionNet
from ragsr.pipelines import RefSRPipeline
from ragsr.pipelines.refsr import read_reference, usable_size

SIZE = (128, 96)
CORNERS = {"astronaut": (180, 60), "chelsea": (120, 90), "coffee": (250, 120)}
TOLERATED = 0.05  # dB that a reference may cost
BICUBIC = Image.Resampling.BICUBIC


@cache
def whole(name):
    return Image.fromarray(getattr(data, name)())


@cache
def crop(name, right=0, down=0):
    x, y = CORNERS[name]
    return whole(name).crop((x + right, y + down, x + right + SIZE[0], y + down + SIZE[1]))


def reduced(good):
    return good.resize((SIZE[0] // 4, SIZE[1] // 4), BICUBIC)


def see_through(good):
    """The upper half is good, of the lower half nothing is to be seen."""
    shown = good.convert("RGBA")
    shown.paste((9, 9, 9, 0), (0, SIZE[1] // 2, *SIZE))
    return shown


def deep(gray):
    """8-bit gray as 16-bit gray."""
    return Image.fromarray(np.asarray(gray, dtype=np.uint16) * 257)


def twenty(name):
    """Six that show some of the photo, more than a model registers, behind fourteen small ones that do not."""
    others = [other for other in CORNERS if other != name]
    apart = [crop(others[i % 2], 10 * i, -5 * i).crop((0, 0, 40, 30)) for i in range(14)]
    return apart + [crop(name, 6 * i, 3 * i).crop((24, 16, 104, 80)) for i in range(6)]


CASES = {
    "8x8": lambda name: [crop(name).crop((60, 40, 68, 48))],
    "8x4000": lambda name: [crop(name).resize((8, 4000))],
    "4000x8": lambda name: [crop(name).resize((4000, 8))],
    "a row of the photo": lambda name: [whole(name).crop((0, 100, whole(name).width, 109))],
    "gray": lambda name: [crop(name).convert("L")],
    "gray with alpha": lambda name: [crop(name).convert("LA")],
    "gray, 16 bits": lambda name: [deep(crop(name).convert("L"))],
    "palette": lambda name: [crop(name).quantize(16)],
    "half transparent": lambda name: [see_through(crop(name))],
    "the low-quality photo": lambda name: [reduced(crop(name))],
    "the low-quality photo, enlarged": lambda name: [reduced(crop(name)).resize(SIZE, BICUBIC)],
    "one colour": lambda name: [Image.new("RGB", SIZE, (200, 30, 60))],
    "black and white": lambda name: [Image.new("1", SIZE, 0), Image.new("1", SIZE, 1)],
    "the same twice": lambda name: [crop(name, 6, 3)] * 2,
    "twenty": twenty,
}


@cache
def pipeline_of(name):
    if name == "transfer":
        return RefSRPipeline(Transfer())
    torch.manual_seed(0)
    net = FusionNet(channels=8, before=1, after=1, guide_blocks=1)
    for weights in net.parameters():  # what training starts from hides the references
        torch.nn.init.normal_(weights, std=0.1)
    return RefSRPipeline(RefNet(net))


@pytest.fixture(params=["transfer", "refnet"])
def pipeline(request):
    return pipeline_of(request.param)


@cache
def alone(model, name):
    return pipeline_of(model)(reduced(crop(name)))


@cache
def with_case(model, case, name):
    return pipeline_of(model)(reduced(crop(name)), CASES[case](name))


class Recording:
    """Enlarges with the nearest pixel, and keeps the references it was given."""

    name, scale, context = "recording", 4, 0

    def prepare(self, references):
        self.given = references
        self.prepared = getattr(self, "prepared", 0) + 1

    def __call__(self, low, prepared):
        restored = torch.nn.functional.interpolate(low, scale_factor=4)
        return restored, torch.zeros_like(restored[:, :1])


@pytest.fixture
def recording():
    return RefSRPipeline(Recording())


@pytest.fixture
def few(monkeypatch):
    """Models that use 4096 pixels of a reference."""
    monkeypatch.setattr(views, "MAX_PIXELS", 1 << 12)


# ------------------------------------------------------------------ with the models


@pytest.mark.parametrize("case", CASES)
def test_any_reference_gives_a_picture(pipeline, case):
    restored = with_case(pipeline.model.name, case, "astronaut")
    assert restored.image.size == SIZE
    assert restored.weight.shape == (1, 1, *SIZE[::-1])
    assert 0 <= restored.weight.min() <= restored.weight.max() <= 1
    assert [(one.path, one.note) for one in restored.references] == [(None, None)] * len(CASES[case]("astronaut"))


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in CORNERS for case in CASES if name == "astronaut" or case != "twenty"],  # twenty take 1 s
)
def test_no_reference_does_harm(case, name):
    restored = with_case("transfer", case, name)
    assert psnr(restored.image, crop(name)) >= psnr(alone("transfer", name).image, crop(name)) - TOLERATED


def test_a_good_reference_is_seen(pipeline):
    """What the other tests rest on: both models take something from a reference that fits."""
    restored = pipeline(reduced(crop("astronaut")), [crop("astronaut", 6, 3)])
    assert restored.reference_share > 0.01
    assert restored.image != alone(pipeline.model.name, "astronaut").image


@pytest.mark.parametrize(
    ("given", "copy"),
    [
        (lambda good: good.convert("L"), lambda good: good.convert("L").convert("RGB")),
        (lambda good: good.convert("LA"), lambda good: good.convert("L").convert("RGB")),
        (lambda good: deep(good.convert("L")), lambda good: good.convert("L").convert("RGB")),
        (lambda good: good.quantize(16), lambda good: good.quantize(16).convert("RGB")),
        (lambda good: good.convert("RGBA"), lambda good: good),
        (see_through, lambda good: whiten_below(good)),
    ],
    ids=["gray", "gray with alpha", "16 bits", "palette", "opaque", "half transparent"],
)
def test_the_mode_makes_no_difference(pipeline, given, copy, tmp_path):
    low, good = reduced(crop("astronaut")), crop("astronaut", 6, 3)
    wanted = pipeline(low, [copy(good)])
    given(good).save(tmp_path / "reference.png")
    found = pipeline(low, [tmp_path / "reference.png"])
    assert found.image == wanted.image
    assert torch.equal(found.weight, wanted.weight)
    assert wanted.reference_share > 0.005
    in_memory, from_file = (read_reference(one, 1)[0] for one in (given(good), tmp_path / "reference.png"))
    assert torch.equal(image_to_tensor(in_memory), image_to_tensor(from_file))


def whiten_below(good):
    whitened = good.copy()
    whitened.paste((255, 255, 255), (0, SIZE[1] // 2, *SIZE))
    return whitened


def test_twenty_references_count_like_those_that_were_picked(pipeline):
    low, references = reduced(crop("astronaut")), twenty("astronaut")
    prepared, _ = pipeline.prepare(references)
    zooms = [match.view for match in matches(image_to_tensor(low), prepared, 4)]
    picked = [i for i, own in enumerate(prepared.views) if any(zoom in own for zoom in zooms)]
    assert len(picked) == MAX_REFERENCES
    assert min(picked) >= 14  # those of the photo itself
    many = with_case(pipeline.model.name, "twenty", "astronaut")
    some = pipeline(low, [references[i] for i in picked])
    assert many.image == some.image
    assert torch.equal(many.weight, some.weight)
    assert len(many.references) == 20


def test_the_same_reference_twice_is_one_to_transfer():
    low, good = reduced(crop("astronaut")), crop("astronaut", 6, 3)
    once, twice = (pipeline_of("transfer")(low, [good] * n) for n in (1, 2))
    assert once.image == twice.image


# ------------------------------------------------------------------ too small


@pytest.mark.parametrize("size", [(4, 4), (7, 100), (100, 7), (1, 1), (4, 2000)])
def test_a_tiny_reference_is_named(few, recording, size, tmp_path):
    Image.new("RGB", size).save(tmp_path / "tiny.png")
    message = f"{size[0]}x{size[1]} pixels are too few for a reference; both sides must be at least 8: leave it out"
    with pytest.raises(InputError, match=f"tiny.png: {message}"):
        recording(reduced(crop("astronaut")), [crop("astronaut"), tmp_path / "tiny.png"])
    with pytest.raises(InputError, match=f"^reference 2: {message}"):
        recording(reduced(crop("astronaut")), [crop("astronaut"), Image.new("RGB", size)])


def test_a_tiny_reference_through_the_public_function(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    with pytest.raises(InputError, match=r"tiny\.png: 4x4 pixels are too few"):
        ragsr.restore(reduced(crop("astronaut")), references=tmp_path / "tiny.png", model="transfer")


def test_a_tiny_image_of_a_gallery_is_named(recording, tmp_path):
    Image.new("RGB", (5, 40)).save(tmp_path / "tiny.png")
    with Gallery.create(tmp_path / "gallery") as gallery:
        gallery.add([tmp_path / "tiny.png"], progress=False)
        with pytest.raises(InputError, match=r"tiny\.png: 5x40 pixels are too few"):
            recording(reduced(crop("astronaut")), gallery=gallery, threshold=0)


# ------------------------------------------------------------------ too large


def test_a_jpeg_of_108_megapixels_is_never_decoded_in_full(recording, tmp_path, monkeypatch):
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (decoded.append(self.size), load(self))[1])
    Image.new("L", (12_000, 9_000), 90).save(tmp_path / "huge.jpg")
    restored = recording(reduced(crop("astronaut")), [tmp_path / "huge.jpg"])
    assert set(decoded) == {(6000, 4500)}
    assert recording.model.given[0].shape == (1, 3, 1773, 2364)
    assert recording.model.given[0].unique().mul(255).round().tolist() == [90]
    assert restored.references[0].note == (
        "reduced from 12000x9000 to 2364x1773; models use 4 megapixels of a reference"
    )


@pytest.mark.parametrize("suffix", ["jpg", "mpo", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_file_is_reduced_upright(few, tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole("coffee").save(tmp_path / f"large.{suffix}", exif=exif, quality=95)  # 600 x 400
    upright = load_image(tmp_path / f"large.{suffix}")
    size = (78, 52) if orientation < 5 else (52, 78)
    found, note = read_reference(tmp_path / f"large.{suffix}", 1)
    assert found.size == size
    assert note.startswith(f"reduced from {upright.width}x{upright.height} to {size[0]}x{size[1]}; models use")
    assert psnr(found, upright.resize(size, BICUBIC)) > 45


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_a_large_picture_is_reduced_like_its_rgb_copy(few, mode):
    picture = deep(whole("coffee").convert("L")) if mode == "I;16" else whole("coffee").convert(mode)
    found, note = read_reference(picture, 1)
    assert found.size == (78, 52)
    assert psnr(found, ragsr.image.to_rgb(picture).resize(found.size, BICUBIC)) > 45
    assert note.startswith("reduced from 600x400 to 78x52")


def test_a_reference_within_the_limit_is_left_as_it_is(recording, tmp_path, monkeypatch):
    crop("coffee").save(tmp_path / "x.jpg")
    monkeypatch.setattr(views, "MAX_PIXELS", SIZE[0] * SIZE[1])
    for reference in (tmp_path / "x.jpg", load_image(tmp_path / "x.jpg")):
        restored = recording(reduced(crop("coffee")), [reference])
        assert torch.equal(recording.model.given[0], image_to_tensor(load_image(tmp_path / "x.jpg")))
        assert restored.references[0].note is None
    monkeypatch.setattr(views, "MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    assert read_reference(tmp_path / "x.jpg", 1)[1].startswith("reduced from 128x96 to 127x95")


def test_the_models_take_what_was_reduced_as_it_is(few):
    """The pipeline and the models agree on the limit: nothing is reduced twice."""
    picture, _ = read_reference(whole("coffee"), 1)
    zooms = views.views_of(image_to_tensor(picture), 4)
    assert torch.equal(zooms[0].reference, image_to_tensor(picture))


def test_the_note_is_remembered(few, recording, tmp_path):
    whole("coffee").save(tmp_path / "large.png")
    crop("coffee").crop((0, 0, 60, 60)).save(tmp_path / "small.png")
    low = reduced(crop("coffee"))
    first, second = (recording(low, [tmp_path / "large.png", tmp_path / "small.png"]).references for _ in range(2))
    assert recording.model.prepared == 1
    assert [one.note is None for one in first] == [False, True]
    assert second == first


def test_a_gallery_hit_carries_its_note(few, recording, tmp_path):
    whole("coffee").save(tmp_path / "large.png")
    with Gallery.create(tmp_path / "gallery") as gallery:
        gallery.add([tmp_path / "large.png"], progress=False)
        hit = recording(reduced(crop("coffee")), gallery=gallery, threshold=0).references[0]
    assert hit.note.startswith("reduced from 600x400")
    assert (hit.path.name, hit.distance is None) == ("large.png", False)


def test_beyond_the_limit_of_files_only_a_jpeg_is_taken(few, tmp_path, monkeypatch):
    whole("coffee").save(tmp_path / "large.jpg")
    whole("coffee").save(tmp_path / "large.png")
    monkeypatch.setattr(ragsr.image, "MAX_PIXELS", 100_000)  # less than 600 x 400, more than half the sides
    assert load_reduced(tmp_path / "large.jpg", 1 << 12)[0].size == (300, 200)
    assert load_reduced(tmp_path / "large.jpg", 1 << 12)[1] == (600, 400)
    for name in ("large.jpg", "large.png"):
        with pytest.raises(InputError, match=f"{name}: 600x400 is 0 megapixels; at most 0 are taken"):
            load_image(tmp_path / name)
    with pytest.raises(InputError, match=r"large\.png: 600x400"):
        read_reference(tmp_path / "large.png", 1)


def test_a_jpeg_that_is_cut_off(few, tmp_path):
    whole("coffee").save(tmp_path / "large.jpg")
    (tmp_path / "large.jpg").write_bytes((tmp_path / "large.jpg").read_bytes()[:9000])
    with pytest.raises(InputError, match=r"large\.jpg: damaged or cut off"):
        read_reference(tmp_path / "large.jpg", 1)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((2048, 2048), (2048, 2048)),
        ((2049, 2048), (2048, 2047)),
        ((12_000, 9_000), (2364, 1773)),
        ((8, 1_000_000), (8, 524_288)),  # the shape must give way
        ((3_000_000, 20), (524_288, 8)),
    ],
)
def test_usable_size(size, wanted):
    assert usable_size(*size) == wanted
