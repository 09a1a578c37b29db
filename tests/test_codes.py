"""Image codes, and the index that is searched with them."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

import ragsr.search
from ragsr.codes import DESCRIPTOR_SIZE, CodeEncoder, coins, describe, hyperplanes, load_encoder
from ragsr.codes.hashing import ASSETS
from ragsr.codes.vgg import VGG16, VGGFeatures
from ragsr.errors import InputError
from ragsr.search import Index


def drawing(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """A picture of coloured shapes, another one for every seed."""
    random: Any = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), tuple(random.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = random.integers(0, width), random.integers(0, height)
        w, h = random.integers(20, 160, 2)
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def degraded(image: Image.Image) -> Image.Image:
    """A quarter of the size, blurred, through JPEG."""
    small = image.filter(ImageFilter.GaussianBlur(2)).resize((image.width // 4, image.height // 4))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=30)
    return Image.open(buffer)


def distances(a: list[Image.Image], b: list[Image.Image]) -> torch.Tensor:
    encoder = load_encoder("baseline-64")
    return torch.ops.ragsr.hamming_distance(encoder.encode(a), encoder.encode(b))


# ------------------------------------------------------------------ the encoder


def test_codes_have_the_promised_shape() -> None:
    encoder = load_encoder("baseline-64")
    assert (encoder.id, encoder.bits) == ("baseline-64@1", 64)
    for images in ([], [drawing(0)], [drawing(0), drawing(1, 1, 1), drawing(2, 4000, 16)]):
        codes = encoder.encode(images)
        assert codes.shape == (len(images), 8)
        assert codes.dtype == torch.uint8


def test_features_come_with_the_codes() -> None:
    encoder, images = load_encoder("baseline-64"), [drawing(0), drawing(1)]
    codes, features = encoder.describe(images)
    assert torch.equal(codes, encoder.encode(images))
    assert (features.shape, features.dtype) == ((2, encoder.features), torch.float32)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert (encoder.score(0, 0.25), encoder.score(0, -0.25)) == (0.25, 0)


def test_unknown_encoder() -> None:
    with pytest.raises(InputError, match="no encoder 'vgg'; there are: baseline-64"):
        load_encoder("vgg")


def test_a_batch_is_its_pictures() -> None:
    encoder, images = load_encoder("baseline-64"), [drawing(seed) for seed in range(5)]
    assert torch.equal(encoder.encode(images), torch.cat([encoder.encode([image]) for image in images]))


def test_codes_of_version_1_never_change() -> None:
    """A change here makes every gallery on disk useless: raise the encoder's version instead of the numbers."""
    y, x = np.mgrid[:64, :64]
    picture = Image.fromarray(np.stack((x * 4, y * 4, 255 - x * 2), -1).astype(np.uint8))
    assert load_encoder("baseline-64").encode([picture]).numpy().tobytes().hex() == "d0014da6258e8831"


def test_degraded_copies_stay_nearest() -> None:
    images = [drawing(seed) for seed in range(40)]
    found = distances([degraded(image) for image in images], images)
    assert torch.equal(found.argmin(1), torch.arange(40))
    assert found.diagonal().max() <= 12


def test_bits_are_balanced() -> None:
    """Over many pictures every bit takes both values, and strangers differ in about half of the bits."""
    images = [drawing(seed) for seed in range(150)]
    bits = np.unpackbits(load_encoder("baseline-64").encode(images).numpy(), axis=1)
    assert bits.mean(0).min() > 0.15
    assert bits.mean(0).max() < 0.85
    strangers = distances(images, images)[~torch.eye(150, dtype=torch.bool)].float()
    assert 26 < strangers.mean() < 34


def test_brightness_and_contrast_do_not_count_for_gray_pictures() -> None:
    image = drawing(3).convert("L")
    darker = image.point(lambda value: value * 0.5 + 20)
    assert distances([image], [darker]).item() <= 2


def test_plain_gray_pictures_have_the_zero_code() -> None:
    for value in (0, 77, 255):
        assert not load_encoder("baseline-64").encode([Image.new("L", (50, 40), value)]).any()
        assert not describe(Image.new("L", (50, 40), value)).round(9).any()


def test_faint_noise_is_not_blown_up() -> None:
    noise = np.random.default_rng(0).integers(127, 129, (64, 64, 3), dtype=np.uint8)
    assert np.linalg.norm(describe(Image.fromarray(noise))) < 0.5


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_mode(mode: str) -> None:
    image = drawing(5)
    wanted = image.convert("L") if mode == "L" else image
    assert distances([image.convert(mode)], [wanted]).item() <= 6


# ------------------------------------------------------------------ learned encoders


@pytest.fixture(scope="module", params=["hash-16", "hash-64", "hash-256"])
def learned(request: pytest.FixtureRequest) -> CodeEncoder:
    return load_encoder(request.param)


def test_shipped_encoders(learned: CodeEncoder) -> None:
    assert learned.id == f"hash-{learned.bits}@1"
    assert (learned.source, learned.features) == (learned.name, 256)
    images = [drawing(0), drawing(1).convert("L"), drawing(2, 4000, 16), drawing(3, 1, 1)]
    codes, features = learned.describe(images)
    assert (codes.shape, codes.dtype) == ((4, learned.bits // 8), torch.uint8)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert torch.equal(codes, torch.cat([learned.encode([image]) for image in images]))
    assert learned.describe([])[1].shape == (0, 256)


def test_degraded_copies_stay_nearest_by_feature(learned: CodeEncoder) -> None:
    """Drawings are not what it learned from; that photos are found, docs/codes.md shows."""
    images = [drawing(seed) for seed in range(24)]
    _, features = learned.describe(images)
    _, found = learned.describe([degraded(image) for image in images])
    assert ((found @ features.T).argmax(1) == torch.arange(24)).float().mean() >= 0.9


def test_scores_are_monotone_and_have_a_use(learned: CodeEncoder) -> None:
    by_distance = [learned.score(d) for d in range(learned.bits + 1)]
    assert by_distance == sorted(by_distance, reverse=True)
    by_cosine = [learned.score(learned.bits // 4, c / 10) for c in range(-10, 11)]
    assert by_cosine == sorted(by_cosine)
    assert learned.score(0, 1.0) > learned.threshold > learned.score(learned.bits // 2, 0.0)


def test_shipped_encoders_share_a_small_backbone() -> None:
    files = list(ASSETS.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) < 3e6
    assert [path.name for path in files].count("backbone.safetensors") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "refnet"}, "is not of a hash encoder"),
        ({"bits": 60}, "a multiple of 8"),
        ({"score": {}}, "score and threshold"),
        ({"bits": 32}, r"2.weight has shape \(16, 1024\), and the model needs \(32, 1024\)"),
        ({"width": 0.5}, "has shape"),
    ],
)
def test_damaged_models(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shutil.copytree(ASSETS / "hash-16", tmp_path / "one")
    shutil.copy(ASSETS / "backbone.safetensors", tmp_path)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert load_encoder(tmp_path / "one").bits == 16
    (tmp_path / "one" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        load_encoder(tmp_path / "one")


# ------------------------------------------------------------------ other people's networks


def test_vgg16_is_torchvisions() -> None:
    """Names and shapes of the published file vgg16-397923af.pth."""
    with torch.device("meta"):
        own = {name: tuple(x.shape) for name, x in VGG16().state_dict().items()}
    convolutions = dict(zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), VGG_CHANNELS[1:], strict=True))
    wanted = {}
    for (place, wide), before in zip(convolutions.items(), VGG_CHANNELS, strict=False):
        wanted |= {f"features.{place}.weight": (wide, before, 3, 3), f"features.{place}.bias": (wide,)}
    for place, wide, before in ((0, 4096, 25088), (3, 4096, 4096), (6, 1000, 4096)):
        wanted |= {f"classifier.{place}.weight": (wide, before), f"classifier.{place}.bias": (wide,)}
    assert own == wanted
    assert sum(math.prod(shape) for shape in own.values()) == 138_357_544


VGG_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def test_vgg_features_are_read_where_the_papers_read_them() -> None:
    class Small(VGG16):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.features = torch.nn.Sequential(torch.nn.MaxPool2d(32))
            relu = torch.nn.ReLU()
            first, second = torch.nn.Linear(147, 8), torch.nn.Linear(8, 4096)
            self.classifier = torch.nn.Sequential(first, relu, relu, second, relu, relu, torch.nn.Linear(4096, 2))

    net = Small()
    for size, wanted in ((512, 3), (4096, 4096)):
        features = VGGFeatures(net, size)([drawing(0)])
        assert features.shape == (1, wanted)
    assert (features >= 0).all()  # after the second ReLU


def test_vgg_without_its_file_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"fetch them .*models/vgg16-397923af.pth"):
        load_encoder("vgg16-512")


def test_clip_and_dinov2_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=16)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(tmp_path / "clip")
    dino = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
    transformers.Dinov2Model(dino).save_pretrained(tmp_path / "dino")
    for name, size in ((f"clip:{tmp_path / 'clip'}", 16), (f"dinov2:{tmp_path / 'dino'}", 32)):
        encoder = load_encoder(name)
        assert (encoder.id, encoder.source, encoder.bits, encoder.features) == (f"{name}@1", name, size, size)
        codes, features = encoder.describe([drawing(0), drawing(1), drawing(0)])
        assert torch.equal(codes[0], codes[2])
        assert not torch.allclose(features[0], features[1], atol=1e-3)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    with pytest.raises(InputError, match=r"cannot be loaded as Dinov2Model .*name a folder"):
        load_encoder(f"dinov2:{tmp_path}")


# ------------------------------------------------------------------ the hyperplanes


def test_coins_follow_the_published_splitmix64() -> None:
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert coins(2, 2, seed=1234567).ravel().tolist() == [output.bit_count() - 32 for output in outputs]


def test_hyperplanes_are_orthonormal_and_start_with_the_first_coins() -> None:
    planes = hyperplanes(64, DESCRIPTOR_SIZE, seed=64)
    assert planes.shape == (64, DESCRIPTOR_SIZE)
    np.testing.assert_allclose(planes @ planes.T, np.eye(64), atol=1e-12)
    first = coins(64, DESCRIPTOR_SIZE, seed=64)[0]
    np.testing.assert_allclose(planes[0], first / np.linalg.norm(first), atol=1e-12)


# ------------------------------------------------------------------ the index


def random_codes(n: int, width: int = 8, values: int = 256) -> np.ndarray:
    return np.random.default_rng(n).integers(0, values, (n, width), dtype=np.uint8)


@pytest.fixture(params=["chosen", "op"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "op":
        monkeypatch.setattr(ragsr.search, "COMPILED", False)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("n", "width", "values"), [(1, 1, 256), (1000, 8, 256), (63, 12, 256), (500, 4, 2)])
def test_index_agrees_with_counting(n: int, width: int, values: int) -> None:
    codes, queries = random_codes(n, width, values), random_codes(7, width, values)
    index = Index(8 * width)
    index.add(codes[: n // 2])
    index.add(codes[n // 2 :])
    assert len(index) == n
    k = min(n, 10)
    found, numbers = index.search(queries, k)
    assert (found.dtype, numbers.dtype) == (np.int32, np.int64)
    all_distances = np.unpackbits(queries[:, None] ^ codes[None], axis=-1).sum(-1)
    order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
    assert np.array_equal(numbers, order)
    assert np.array_equal(found, np.take_along_axis(all_distances, order, 1))


@pytest.mark.usefixtures("kernel")
def test_index_takes_views() -> None:
    codes = random_codes(50, 16)
    index = Index(64)
    index.add(codes[::2, ::2])
    assert index.search(codes[:1, ::2], 1)[1].item() == 0


@pytest.mark.usefixtures("kernel")
def test_index_errors() -> None:
    index = Index(64)
    with pytest.raises(InputError, match="1 nearest codes were asked for and there are 0"):
        index.search(random_codes(1), 1)
    index.add(random_codes(5))
    for k in (0, 6):
        with pytest.raises(InputError, match=f"{k} nearest codes were asked for and there are 5"):
            index.search(random_codes(1), k)
    with pytest.raises(InputError, match="codes have 4 bytes and this index holds codes of 8"):
        index.add(random_codes(2, 4))
    with pytest.raises(InputError, match="queries have 16 bytes"):
        index.search(random_codes(2, 16), 1)
    with pytest.raises(InputError, match="uint8"):
        index.add(np.zeros((2, 8), dtype=np.int64))
    with pytest.raises(InputError, match="multiple of 8"):
        Index(60)
    assert len(index) == 5
