"""Read one photo: upright, 8-bit RGB, on white."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flux.errors import UserError
from run.terminal import printable

Size = tuple[int, int]  # (height, width)
Box = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, half open

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
MAX_PIXELS = 200_000_000


# Photos


def read_photo(path: Path) -> Image.Image:
    """Read a photo as 8-bit RGB, upright by its EXIF rotation, on white; of an animation the first frame.

    Raises FileNotFoundError, or ValueError when the file is no whole picture in one of PHOTO_FORMATS, or has
    more than MAX_PIXELS.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{printable(path)}: no such photo")
    try:
        return decode_photo(path)
    except ValueError as error:
        raise UserError(
            f"{printable(path)} is no photo that can be read: {error}. Accepted are whole JPEG, "
            f"PNG, WebP, TIFF, BMP and GIF files of up to {MAX_PIXELS // 10**6} megapixels."
        ) from error


def decode_photo(path: Path) -> Image.Image:
    """Do the work of `read_photo`; its ValueError says what is wrong with the file, not where it is."""
    try:
        with any_size(), Image.open(path, formats=PHOTO_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels")
            return _to_rgb(ImageOps.exif_transpose(image))
    except (
        Exception
    ) as error:  # PIL raises a dozen types on damaged files, struct.error and TypeError among them
        # Its own "cannot identify image file" repeats the path, which the caller names.
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else printable(error)
        raise UserError(f"{_describe(path)} ({reason})") from error


@contextmanager
def any_size() -> Iterator[None]:
    """Lift PIL's own limits: it warns at 89 megapixels and stops at 179; phones make 200."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def photo_size(path: Path) -> Size:
    """Return an upright photo's (height, width) from its header, EXIF read; ValueError as `read_photo`."""
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # the EXIF orientations that swap the sides
    except Exception:  # of any type, as above
        return read_photo(path).size[::-1]  # which explains what is wrong
    return (width, height) if turned else (height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bit grey; PIL's own conversion would clip at 255
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
        return f"not to be opened: {error.strerror}"
    signatures = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WebP", b"GIF8": "GIF", b"%PDF": "PDF"}
    kind = next((name for start, name in signatures.items() if head.startswith(start)), None)
    if head[4:8] == b"ftyp":
        kind = f"{head[8:12].decode('ascii', 'replace').upper()} (HEIC, AVIF or video: export it as JPEG)"
    if kind is None and head and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        kind = "text"
    return f"{kind or f'unknown, beginning with {head[:8]!r}'}, {path.stat().st_size} bytes"
