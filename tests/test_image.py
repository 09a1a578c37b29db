"""Image files, PIL pictures and tensors."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ragsr.image
from ragsr.errors import InputError
from ragsr.image import find_images, image_to_tensor, load_image, save_image, tensor_to_image


def gradient(width: int = 33, height: int = 17) -> Image.Image:
    """A picture in which every pixel differs, and left from right."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack((x * 7 % 256, y * 15 % 256, (x + y) * 5 % 256), -1).astype(np.uint8))


def pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm", "jpg", "gif", "jp2"])
def test_reads_the_common_formats(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (33, 17), (200, 100, 50))
    image.save(tmp_path / f"x.{suffix}")
    found = pixels(tmp_path / f"x.{suffix}")
    assert found.shape == (17, 33, 3)
    assert np.abs(found.astype(int) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = gradient()
    # how the camera stored it: the inverse of the turn that EXIF asks for
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if stored is None else upright.transpose(stored)).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "x.png"), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    gradient().save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff rubbish")
    assert np.array_equal(pixels(tmp_path / "x.png"), np.asarray(gradient()))


def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for name in ("x.png", "x.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(pixels(tmp_path / name)[..., 0], values // 257)
    dark = np.full((4, 4), 2570, dtype=np.uint16)  # a dark picture stays dark
    Image.fromarray(dark).save(tmp_path / "dark.png")
    assert (pixels(tmp_path / "dark.png") == 10).all()


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_16_bit_byte_orders(tmp_path: Path, byte_order: str) -> None:
    values = np.array([[0, 257, 65535]], dtype=byte_order)
    Image.frombytes("I;16B" if byte_order == ">u2" else "I;16", (3, 1), values.tobytes()).save(tmp_path / "x.tif")
    assert pixels(tmp_path / "x.tif")[0, :, 0].tolist() == [0, 1, 255]


def test_32_bit_integers(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-5, 0, 1 << 20, 1 << 21]], dtype=np.int32)).save(tmp_path / "x.tif")
    assert pixels(tmp_path / "x.tif")[0, :, 0].tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize(
    ("values", "wanted"), [([-1.0, 0.0, 0.5, 1.0], [0, 0, 128, 255]), ([0.0, 50.0, 100.0, 200.0], [0, 64, 128, 255])]
)
def test_float_pictures(tmp_path: Path, values: list[float], wanted: list[int]) -> None:
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "x.tif")
    assert pixels(tmp_path / "x.tif")[0, :, 0].tolist() == wanted


def test_float_picture_with_nan(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif: .*NaN"):
        load_image(tmp_path / "x.tif")


def test_alpha_lies_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = 0, 51, 255  # black: invisible, faint, solid
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert pixels(tmp_path / "rgba.png")[0, :, 0].tolist() == [255, 204, 0]
    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png")[0, :, 0].tolist() == [255, 204, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert pixels(tmp_path / "p.png")[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_cmyk_gray_palette_and_bilevel(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert pixels(tmp_path / "cmyk.tif")[0, 0].tolist() == [255, 0, 0]
    Image.new("L", (8, 8), 77).save(tmp_path / "l.png")
    assert (pixels(tmp_path / "l.png") == 77).all()
    Image.new("1", (8, 8), 1).save(tmp_path / "one.png")
    assert (pixels(tmp_path / "one.png") == 255).all()
    gradient(9, 9).quantize(256).save(tmp_path / "p.png")
    assert np.abs(pixels(tmp_path / "p.png").astype(int) - np.asarray(gradient(9, 9))).max() < 32


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "x.gif", save_all=True, append_images=[second])
    assert pixels(tmp_path / "x.gif")[0, 0].tolist() == [255, 0, 0]


def test_one_pixel_and_a_panorama(tmp_path: Path) -> None:
    for size in ((1, 1), (30_000, 16)):
        Image.new("RGB", size).save(tmp_path / "x.png")
        assert load_image(tmp_path / "x.png").size == size


# ------------------------------------------------------------------ bad input


def test_missing_folder_and_text(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"gone\.png: there is no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="cannot be read"):
        load_image(tmp_path)
    for name in ("x.png", "empty.png"):
        with pytest.raises(InputError, match=rf"{name}: not an image"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp", "gif"])
def test_cut_off(tmp_path: Path, suffix: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, format=Image.registered_extensions()[f".{suffix}"])
    data = buffer.getvalue()
    for share in (0.3, 0.7):
        (tmp_path / f"x.{suffix}").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError, match=rf"x\.{suffix}: "):
            load_image(tmp_path / f"x.{suffix}")


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient(20, 20).save(tmp_path / "x.png")
    monkeypatch.setattr(ragsr.image, "MAX_PIXELS", 399)
    with pytest.raises(InputError, match=r"x\.png: 20x20 is .* megapixels"):
        load_image(tmp_path / "x.png")


def test_pillows_own_limit_is_lifted_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient(20, 20).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "x.png").size == (20, 20)
    assert Image.MAX_IMAGE_PIXELS == 10


# ------------------------------------------------------------------ tensors


def test_tensor_and_back() -> None:
    image = gradient()
    x = image_to_tensor(image)
    assert x.shape == (1, 3, 17, 33)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert x[0, 0, 0, 1].item() == pytest.approx(7 / 255)
    assert np.array_equal(np.asarray(tensor_to_image(x)), np.asarray(image))


def test_tensor_is_clamped_and_rounded() -> None:
    x = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 2.0]).expand(1, 3, 1, 4)
    assert np.asarray(tensor_to_image(x))[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tensor_with_nan(bad: float) -> None:
    x = torch.zeros(1, 3, 4, 4)
    x[0, 1, 2, 3] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        tensor_to_image(x)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4, 4), (1, 1, 4, 4), (1, 3, 0, 4)])
def test_tensor_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\[1, 3, height, width\]"):
        tensor_to_image(torch.zeros(shape))


# ------------------------------------------------------------------ writing and finding


def test_save_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    save_image(gradient(), tmp_path / "a" / "b" / "x.PNG")
    assert np.array_equal(pixels(tmp_path / "a" / "b" / "x.PNG"), np.asarray(gradient()))
    assert os.listdir(tmp_path / "a" / "b") == ["x.PNG"]


def test_save_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(gradient(), tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()

    def broken(self: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_image(gradient(5, 5), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["x.png"]


@pytest.mark.parametrize("name", ["x", "x.txt", "x.cur"])
def test_save_with_an_unknown_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"use \.png, \.jpg or \.webp"):
        save_image(gradient(), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", "deep/er/c.webp", ".hidden.png", ".trash/d.png", "odd.name"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path)  # a loop
    found = find_images([tmp_path, tmp_path / "a.png", str(tmp_path / "odd.name")])
    assert found == [tmp_path / name for name in ("a.png", "b.JPG", "deep/er/c.webp", "odd.name")]


def test_find_images_complains(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone: there is no such file or folder"):
        find_images([tmp_path, tmp_path / "gone"])
    with pytest.raises(InputError, match="no images in"):
        find_images([tmp_path])
    with pytest.raises(InputError, match="no images in an empty list"):
        find_images([])
