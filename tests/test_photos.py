"""Photos are read upright, in 8-bit RGB, on white; damaged ones are refused by name."""

import io
import random
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from flux.errors import UserError
from people import photos
from people.manifest import examine
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


@pytest.mark.parametrize("orientation", range(10))
def test_all_orientations_are_applied_as_by_pillow(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((40, 32), 50).save(tmp_path / "a.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png")).convert("RGB")
    photo = read_photo(tmp_path / "a.png")
    assert photo.size == expected.size and photo.tobytes() == expected.tobytes()
    assert photo_size(tmp_path / "a.png") == (photo.height, photo.width)


def test_odd_exif_tags_do_not_matter(tmp_path):
    """Pillow cannot write such tags again, which `ImageOps.exif_transpose` would do."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    odd = exif.tobytes().replace(b"\x01\x0e\0\x02", b"\x01\0\0\x02")  # the width consists of words
    halves().save(tmp_path / "a.jpg", exif=odd)
    with pytest.raises(struct.error), Image.open(tmp_path / "a.jpg") as image:
        ImageOps.exif_transpose(image)
    assert read_photo(tmp_path / "a.jpg").size == (40, 60)


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
    Image.new("L", (2000, 1500)).save(path := tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(Image.DecompressionBombError):  # Pillow refuses twice its limit
        Image.open(path)
    assert read_photo(path).size == (2000, 1500)
    monkeypatch.setattr(photos, "MAX_PIXELS", 2_000_000)
    with pytest.raises(UserError, match="more than 2 megapixels"):
        read_photo(path)
    assert Image.MAX_IMAGE_PIXELS == 1_000_000


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
    with pytest.raises(UserError, match=found) as error:
        read_photo(tmp_path / name)
    assert name in str(error.value) and "JPEG, PNG, WebP" in str(error.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_every_truncation_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    content = path.read_bytes()
    for length in range(0, len(content) * 9 // 10, max(1, len(content) // 60)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="whole JPEG"):
            read_photo(path)


def test_missing_photo(tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody.jpg"):
        read_photo(tmp_path / "nobody.jpg")


# Damaged files


def damaged_files(count: int) -> Iterator[bytes]:
    """Yield photos of all formats with a few bits flipped, bytes replaced or removed, or the end cut off."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "words", 72.5
    frames = {"save_all": True, "append_images": [halves(8, 12).rotate(90)]}
    kinds = [("JPEG", "RGB", {}), ("PNG", "RGB", {}), ("PNG", "P", {"transparency": 1}), ("WEBP", "RGB", {})]
    kinds += [("TIFF", "RGB", {}), ("TIFF", "P", {"compression": "tiff_lzw"}), ("GIF", "RGB", frames)]
    kinds += [("BMP", "P", {}), ("BMP", "RGB", {}), ("PNG", "RGB", frames), ("WEBP", "RGB", frames)]
    wholes = []
    for name, mode, options in kinds:
        if name not in ("GIF", "BMP"):
            options = options | {"exif": exif}
        halves(8, 12).convert(mode).save(file := io.BytesIO(), name, **options)
        wholes.append(file.getvalue())
    draw = random.Random(0)
    for k in range(count):
        content = bytearray(wholes[k % len(wholes)])
        for _ in range(draw.choice([1, 2, 3, 8])):
            at = draw.randrange(min(len(content), draw.choice([60, 300, 10_000])))
            change = draw.randrange(4)
            if change == 0:
                content[at] ^= 1 << draw.randrange(8)
            elif change == 1:
                content[at : at + 4] = draw.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\1"])
            elif change == 2:
                del content[at + 1 : at + draw.randrange(2, 9)]
            else:
                content[at:at] = draw.randbytes(3)
        yield bytes(content[: draw.randrange(len(content))] if k % 7 == 0 else content)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_raise_nothing_but_our_error(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "MAX_PIXELS", 100_000)  # a damaged header may say anything; this saves time
    path, seen, read = tmp_path / "a.jpg", set(), 0
    for k, content in enumerate(damaged_files(2000)):
        path.write_bytes(content)
        if k % 4 == 0:
            examine(path)
        try:
            read += read_photo(path).mode == "RGB"
        except UserError as error:
            seen.add(type(error.__cause__.__cause__))
    assert 200 < read < 1800
    assert {UnidentifiedImageError, OSError, ValueError} <= seen


@pytest.mark.parametrize("error", [MemoryError, AttributeError, NameError])
@pytest.mark.parametrize("place", ["PIL.Image.Image.convert", "people.photos._to_rgb"])
def test_bugs_and_lack_of_memory_are_no_fault_of_the_photo(tmp_path, monkeypatch, place, error):
    halves().save(tmp_path / "a.png")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(place, fail)
    with pytest.raises(error):
        read_photo(tmp_path / "a.png")


def test_a_decoder_that_lacks_memory_is_no_fault_of_the_photo(tmp_path, monkeypatch):
    halves().save(tmp_path / "a.jpg")

    class Decoder(ImageFile.PyDecoder):
        def decode(self, buffer):
            return -1, -9  # IMAGING_CODEC_MEMORY, as C decoders return it

    monkeypatch.setattr(Image, "_getdecoder", lambda mode, name, args, extra: Decoder(mode, *args))
    with pytest.raises(OSError, match="out of memory"):
        Image.open(tmp_path / "a.jpg").load()
    with pytest.raises(MemoryError, match="a.jpg"):
        read_photo(tmp_path / "a.jpg")
    with pytest.raises(MemoryError):
        examine(tmp_path / "a.jpg")
