"""Read one photo: upright, 8-bit RGB, on white."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from flux.errors import UserError
from run.terminal import printable

Size = tuple[int, int]  # (height, width)
Box = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, half open

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
MAX_PIXELS = 200_000_000

# How a photo is turned upright, by its EXIF orientation. ImageOps.exif_transpose would also write the EXIF
# data anew, which fails on odd tags in photos that are otherwise good.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow raises on damaged files, as seen on 200,000 of all six formats. So many types, as its plugins
# read headers without checking them. Not MemoryError: it says nothing about the photo.
DAMAGED = (
    OSError,  # from most decoders; UnidentifiedImageError is one, too
    SyntaxError,  # from headers
    ValueError,
    TypeError,  # a TIFF without its dimensions
    IndexError,  # a GIF with a short palette
    struct.error,  # a tag of another type
    EOFError,  # a missing frame
)


def read_photo(path: Path) -> Image.Image:
    """Read a photo as 8-bit RGB, upright by its EXIF rotation, on white; of an animation the first frame.

    Raises FileNotFoundError, and UserError when the file is no whole picture in one of PHOTO_FORMATS, or has
    more than MAX_PIXELS.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{printable(path)}: no such photo")
    try:
        return decode_photo(path)
    except UserError as error:
        raise UserError(
            f"{printable(path)} is no photo that can be read: {error}. Accepted are whole JPEG, "
            f"PNG, WebP, TIFF, BMP and GIF files of up to {MAX_PIXELS // 10**6} megapixels."
        ) from error


def decode_photo(path: Path) -> Image.Image:
    """Do the work of `read_photo`; its UserError says what is wrong with the file, but not its name."""
    try:
        with any_size(), Image.open(path, formats=PHOTO_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels")
            image.load()  # first: a PNG may have its EXIF data behind the pixels
            turn = TURNS.get(image.getexif().get(ORIENTATION))
            return _to_rgb(image if turn is None else image.transpose(turn))
    except DAMAGED as error:
        if str(error).startswith("out of memory"):  # of a decoder; Pillow turns it into an OSError
            raise MemoryError(f"{printable(path)}: {error}") from error
        # Pillow's "cannot identify image file" repeats the path, which the caller names.
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else printable(error)
        raise UserError(f"{_describe(path)} ({reason})") from error


@contextmanager
def any_size() -> Iterator[None]:
    """Lift Pillow's own limits: it warns at 89 megapixels and stops at 179, but phones make 200."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def photo_size(path: Path) -> Size:
    """Return an upright photo's (height, width) from its header, EXIF read; raises as `read_photo`."""
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    except DAMAGED:
        return read_photo(path).size[::-1]  # it says what is wrong
    return (width, height) if turned else (height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bit grey; Pillow's own conversion would clip at 255
        pixels = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _describe(path: Path) -> str:
    """Say what a file is by its first bytes, for an error message."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    signatures = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WebP", b"GIF8": "GIF", b"%PDF": "PDF"}
    kind = next((name for start, name in signatures.items() if head.startswith(start)), None)
    if head[4:8] == b"ftyp":
        kind = f"{head[8:12].decode('ascii', 'replace').upper()} (HEIC, AVIF or video: export it as JPEG)"
    if kind is None and head and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        kind = "text"
    return f"{kind or f'unknown, beginning with {head[:8]!r}'}, {path.stat().st_size} bytes"
