"""Photos are read upright, in 8-bit RGB, on white; damaged ones are refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from people import photos
from people.photos import photo_size, read_photo


def halves(height: int = 40, width: int = 60) -> Image.Image:
    """A picture whose left half is red and whose right half is blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view: the left half comes to the top
    halves().save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    image = read_photo(tmp_path / "a.jpg")
    assert (image.mode, image.size) == ("RGB", (40, 60))
    assert image.getpixel((20, 5))[0] > 200 and image.getpixel((20, 55))[2] > 200


@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("RGBA", "webp"), ("LA", "png"), ("P", "png")])
def test_transparency_is_white(tmp_path, mode, suffix):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / f"a.{suffix}", lossless=True)
    read = read_photo(tmp_path / f"a.{suffix}")
    assert read.mode == "RGB"
    assert read.getpixel((1, 4)) == (255, 255, 255) and read.getpixel((6, 4)) == (0, 0, 0)


@pytest.mark.parametrize("mode, suffix", [("CMYK", "jpg"), ("CMYK", "tiff"), ("P", "png"), ("P", "gif")])
def test_colours_survive_other_modes(tmp_path, mode, suffix):
    options = {"quality": 95} if suffix == "jpg" else {}
    halves().convert(mode).save(tmp_path / f"a.{suffix}", **options)
    read = np.asarray(read_photo(tmp_path / f"a.{suffix}")).astype(int)
    assert read.shape == (40, 60, 3) and abs(read - np.asarray(halves()).astype(int)).mean() < 5


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    read = np.asarray(read_photo(tmp_path / f"a.{suffix}"))
    assert np.array_equal(read[..., 1], ramp // 256)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for suffix in ("webp", "png", "gif"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert read_photo(tmp_path / f"a.{suffix}").getpixel((4, 4))[0] > 240


def test_large_photos_are_read_and_absurd_ones_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_000_000)
    Image.new("L", (14_000, 14_000)).save(tmp_path / "a.png")  # 196 megapixels: PIL alone refuses 179
    assert read_photo(tmp_path / "a.png").size == (14_000, 14_000)
    monkeypatch.setattr(photos, "MAX_PIXELS", 100_000_000)
    with pytest.raises(ValueError, match="14000 x 14000 pixels, more than 100 megapixels"):
        read_photo(tmp_path / "a.png")
    assert Image.MAX_IMAGE_PIXELS == 89_000_000


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("notes.jpg", b"Dear diary,\ntoday", "text, 17 bytes"),
        ("half.jpg", jpeg_bytes()[:4000], "JPEG, 4000 bytes"),
        ("empty.png", b"", "0 bytes"),
        ("phone.jpg", b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        ("scan.jpg", b"%PDF-1.7" + bytes(40), "PDF"),
        ("noise.png", bytes(range(40)), "unknown"),
        ("half.png", b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
    ],
)
def test_what_is_no_photo_is_named_and_described(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=found) as error:
        read_photo(tmp_path / name)
    assert name in str(error.value) and "JPEG, PNG, WebP" in str(error.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_every_truncation_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    content = path.read_bytes()
    for length in range(0, len(content) * 9 // 10, max(1, len(content) // 60)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="whole JPEG"):
            read_photo(path)


def test_missing_photo(tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody.jpg"):
        read_photo(tmp_path / "nobody.jpg")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photo_size_is_that_of_the_upright_photo(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 32)).save(tmp_path / "a.jpg", exif=exif)
    assert photo_size(tmp_path / "a.jpg") == read_photo(tmp_path / "a.jpg").size[::-1]
