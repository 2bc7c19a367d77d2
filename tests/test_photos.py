"""Photos are read upright, in 8-bit RGB, on white; damaged ones are refused by name."""

import io
import random
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from flux.errors import UserError
from people import photos
from people.manifest import examine
from people.photos import BAD_PROFILE, is_photo, photo_size, read_photo
from scoring.samples import written_prompt


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


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_that_lie_on_a_side(tmp_path, orientation, compression):
    """Pillow turns them itself, and where it maps the file to memory (grey, uncompressed) it garbles them."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 40), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ("RGB", "L"):
        image = Image.fromarray(noise).convert(mode)
        image.save(tmp_path / "a.tif", exif=exif, compression=compression)
        with Image.open(io.BytesIO((tmp_path / "a.tif").read_bytes())) as image:
            image.load()  # from memory Pillow does it right
        photo = read_photo(tmp_path / "a.tif")
        assert photo.tobytes() == image.convert("RGB").tobytes()
        assert photo_size(tmp_path / "a.tif") == (photo.height, photo.width) == image.size[::-1]
        assert examine(tmp_path / "a.tif")["size"] == [photo.height, photo.width]


def test_a_tiff_with_odd_tags_that_lies_on_a_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    halves().save(file := io.BytesIO(), "TIFF", exif=exif)
    odd = file.getvalue().replace(b"\x0e\x01\x02\0", b"\x0e\x01\x10\0")  # a type that there is not
    (tmp_path / "a.tif").write_bytes(odd)
    photo = read_photo(tmp_path / "a.tif")
    assert photo.size == (40, 60) and photo.getpixel((20, 5)) == (255, 0, 0)


@pytest.mark.parametrize(
    "value, turned",
    [
        (struct.pack(">HHII", 0x0112, 3, 1, 6 << 16), True),  # as it should be, a number of 16 bits
        (struct.pack(">HHII", 0x0112, 4, 1, 6), True),  # 32 bits
        (struct.pack(">HHII", 0x0112, 1, 1, 6 << 24), True),  # a byte
        (struct.pack(">HHI4s", 0x0112, 2, 2, b"6\0"), True),  # the letter 6
        (struct.pack(">HHII", 0x0112, 3, 2, (6 << 16) + 6), True),  # twice
        (struct.pack(">HHII", 0x0112, 5, 1, 2**31), False),  # a fraction that is not in the file
        (struct.pack(">HHI4s", 0x0112, 2, 2, b"x\0"), False),
        (struct.pack(">HHII", 0x0112, 3, 1, 9 << 16), False),
    ],
)
def test_odd_types_of_the_orientation(tmp_path, value, turned):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + value + bytes(4)
    for suffix in ("jpg", "png", "webp"):
        halves().save(tmp_path / f"a.{suffix}", exif=exif)
        assert read_photo(tmp_path / f"a.{suffix}").size == ((40, 60) if turned else (60, 40))


@pytest.mark.parametrize("exif", [b"", b"nonsense", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_data_that_are_none(tmp_path, suffix, exif):
    halves().save(tmp_path / f"a.{suffix}", exif=exif)
    assert read_photo(tmp_path / f"a.{suffix}").size == (60, 40)
    assert examine(tmp_path / f"a.{suffix}")["changes"] == {}


def test_exif_data_behind_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    halves().save(file := io.BytesIO(), "PNG")
    content, place = file.getvalue(), file.getvalue().index(b"IEND") - 4
    chunk = png_chunk(b"eXIf", exif.tobytes()[6:])
    (tmp_path / "a.png").write_bytes(content[:place] + chunk + content[place:])
    assert read_photo(tmp_path / "a.png").size == (40, 60) and photo_size(tmp_path / "a.png") == (60, 40)
    assert examine(tmp_path / "a.png")["changes"] == {"turned upright by its EXIF data": ""}


def test_16_bit_colours_are_reduced_and_that_is_said(tmp_path):
    rows = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(">u2")
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [png_chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0))]
    chunks += [png_chunk(b"IDAT", zlib.compress(pixels)), png_chunk(b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert np.array_equal(read_photo(tmp_path / "a.png"), rows >> 8)
    assert examine(tmp_path / "a.png")["changes"] == {"16 bits a channel: reduced to 8": ""}


# Other formats


@pytest.mark.parametrize(
    "name", ["a.avif", "a.jp2", "a.tga", "a.ppm", "a.mpo", "a.jpe", "a.JFIF", "a.bmp", "a"]
)
def test_formats_are_read_as_by_pillow(tmp_path, name):
    path = tmp_path / name
    halves().save(path, {"a": "PNG", "a.JFIF": "JPEG", "a.mpo": "MPO"}.get(name))
    with Image.open(path) as image:
        expected = image.convert("RGB").tobytes()
    assert is_photo(path) and read_photo(path).tobytes() == expected
    assert examine(path)["size"] == [40, 60] and examine(path)["changes"] == {}


def psd_bytes() -> bytes:
    """A PSD of the picture alone, as its format's specification says."""
    head = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 40, 60, 8, 3)
    return head + bytes(12) + b"\0\0" + np.asarray(halves()).transpose(2, 0, 1).tobytes()


def test_the_content_counts_not_the_suffix(tmp_path):
    halves().save(file := io.BytesIO(), "JPEG", quality=95)
    for name, content in {"a.psd": psd_bytes(), "b.jpg": psd_bytes(), "c.png": file.getvalue()}.items():
        (tmp_path / name).write_bytes(content)
        assert read_photo(tmp_path / name).getpixel((5, 20))[0] > 250
    (tmp_path / "d.xyz").write_bytes(file.getvalue())
    (tmp_path / "e.xyz").write_bytes(b"something else")
    assert is_photo(tmp_path / "d.xyz") and not is_photo(tmp_path / "e.xyz")
    assert not is_photo(tmp_path / "a.heic")  # not even if it is there


def test_a_phones_mpo_is_no_animation_and_a_tiff_has_pages(tmp_path):
    for name, kind in {"a.jpg": "MPO", "a.tif": "TIFF", "a.gif": "GIF"}.items():
        halves().save(tmp_path / name, kind, save_all=True, append_images=[halves().rotate(180)])
    assert examine(tmp_path / "a.jpg")["changes"] == {}
    assert examine(tmp_path / "a.tif")["changes"] == {"several pages: only the first is used": ""}
    assert examine(tmp_path / "a.gif")["changes"] == {"animated: only the first frame is used": ""}
    for suffix in ("jpg", "tif", "gif"):
        assert read_photo(tmp_path / f"a.{suffix}").getpixel((5, 20))[0] > 250


@pytest.mark.parametrize("name", ["a.NEF", "a.tif"])
def test_raw_files_are_named_and_their_thumbnails_not_used(tmp_path, name):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1  # a smaller version of another picture in the file
    halves().save(tmp_path / name, "TIFF", tiffinfo=tags)
    Image.open(tmp_path / name).load()  # Pillow reads it
    with pytest.raises(UserError, match="raw file.*export it as JPEG"):
        read_photo(tmp_path / name)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "chunk, changes",
    [
        (png_chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"x" * 2**21)), {}),
        (png_chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"x" * 2**21)), {}),
        (png_chunk(b"zTXt", b"prompt\0\7"), {}),  # a compression that there is not
        (png_chunk(b"tEXt", b"prompt\0x")[:-1] + b"?", {}),  # its checksum is wrong
        (
            png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**21))),
            {BAD_PROFILE: "it is damaged, or very long"},
        ),
    ],
)
def test_what_pillow_stumbles_over_in_a_png_whose_pixels_are_whole(tmp_path, chunk, changes, after):
    exif = Image.Exif()
    exif[0x0112] = 6
    (image := Image.effect_noise((60, 40), 50).convert("RGB")).save(file := io.BytesIO(), "PNG", exif=exif)
    content, path = file.getvalue(), tmp_path / "a.png"
    place = content.index(b"IEND" if after else b"IDAT") - 4
    path.write_bytes(content[:place] + chunk + content[place:])
    if not (after and b"tEXt" in chunk):  # there Pillow checks no checksum
        with pytest.raises((ValueError, SyntaxError, OSError)), Image.open(path) as stumbling:
            stumbling.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profile
        assert read_photo(path).tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert photo_size(path) == (60, 40)
    assert examine(path)["changes"] == changes | {"turned upright by its EXIF data": ""}
    if not after:
        path.write_bytes(content[:place] + chunk + content[place:-500])  # pixels are missing
        with pytest.raises(UserError, match="PNG"):
            read_photo(path)


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
        ("empty.png", b"", ": empty"),
        ("phone.jpg", b"\0\0\0\x18ftypheic" + bytes(40), "HEIC: export it as JPEG"),
        ("clip.jpg", b"\0\0\0\x18ftypisom" + bytes(40), "video"),
        ("new.jpg", b"\xff\x0a" + bytes(40), "JPEG XL"),
        ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("gone.jpg", b"<!DOCTYPE html><title>404", "a web page"),
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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "jp2", "tga", "ppm", "gif", "bmp", "tif"])
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
    exif[0x0112], exif[0x010E], exif[0x011A], exif[0x8769] = 6, "words", 72.5, {0xA005: {1: "R03"}}
    exif, plain = exif.tobytes(), Image.Exif()
    plain[0x0112], plain[0x010E] = 6, "words"
    frames = {"save_all": True, "append_images": [halves(8, 12).rotate(90)]}
    kinds = [("JPEG", "RGB", {}), ("PNG", "RGB", {}), ("PNG", "P", {"transparency": 1}), ("WEBP", "RGB", {})]
    kinds += [("TIFF", "RGB", {}), ("TIFF", "P", {"compression": "tiff_lzw"}), ("GIF", "RGB", frames)]
    kinds += [("BMP", "P", {}), ("BMP", "RGB", {}), ("PNG", "RGB", frames), ("WEBP", "RGB", frames)]
    kinds += [("AVIF", "RGB", frames), ("AVIF", "RGB", {}), ("JPEG2000", "RGBA", {}), ("TGA", "RGB", {})]
    kinds += [("PPM", "RGB", {}), ("MPO", "RGB", frames), ("TIFF", "L", {}), ("JPEG", "CMYK", {})]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wholes = [psd_bytes()]
    for name, mode, options in kinds:
        # Not an AVIF animation, at which Pillow 13 crashes.
        if name in ("JPEG", "PNG", "WEBP", "TIFF") or (name, options) == ("AVIF", {}):
            options = options | {"exif": plain if name == "TIFF" else exif, "icc_profile": profile}
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


@pytest.mark.filterwarnings("ignore:.*colour profile")
def test_damaged_files_raise_nothing_but_our_error(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "MAX_PIXELS", 100_000)  # a damaged header may say anything; this saves time
    seen, read = set(), 0
    for k, content in enumerate(damaged_files(2500)):
        path = tmp_path / ("a.jpg" if k % 2 else "a.tga")
        path.write_bytes(content)
        size = photo = None
        try:
            photo = read_photo(path)
            read += photo.mode == "RGB"
        except UserError as error:
            seen.add(type(error.__cause__.__cause__))
        try:
            size = photo_size(path)
        except UserError:
            assert photo is None
        # All that looks at photos agrees on which can be read, and on their size.
        entry = examine(path)
        assert ("refused" in entry) == (photo is None)
        if photo:
            assert size == tuple(entry["size"]) == (photo.height, photo.width)
        assert written_prompt(path) is None and is_photo(path.rename(tmp_path / "a")) in (True, False)
    assert 200 < read < 2000
    assert {UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError} <= seen


def test_the_limit_holds_wherever_photos_are_looked_at(tmp_path, monkeypatch):
    """Of damaged animations some claim more pixels than Pillow allows, and fewer than we do."""
    frames = {"save_all": True, "append_images": [halves().rotate(90)]}
    for suffix in ("webp", "png", "gif", "avif"):
        halves().save(tmp_path / f"a.{suffix}", **frames)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(Image.DecompressionBombError):
            Image.open(tmp_path / f"a.{suffix}").load()
        assert read_photo(tmp_path / f"a.{suffix}").size == (60, 40)
        assert photo_size(tmp_path / f"a.{suffix}") == (40, 60)
        assert examine(tmp_path / f"a.{suffix}")["size"] == [40, 60] and is_photo(tmp_path / f"a.{suffix}")
        assert written_prompt(tmp_path / f"a.{suffix}") is None
        assert Image.MAX_IMAGE_PIXELS == 1000
        monkeypatch.undo()


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
