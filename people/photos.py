"""Read one photo: upright, 8-bit sRGB, on white."""

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from flux.errors import UserError
from people.colours import SOURCES, find_adobe_rgb, find_transform
from people.signatures import NOT_READ, RAW, RAW_SUFFIXES, describe
from run.terminal import printable

Size = tuple[int, int]  # (height, width)
Box = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, half open

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif")
PHOTO_SUFFIXES += (".jp2", ".j2k", ".psd", ".tga", ".ppm", ".mpo")
# What Pillow may take a file for, by its content. Not all that it knows: some would start other programs.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PSD", "PPM")
READ = "JPEG, PNG, WebP, AVIF, TIFF, BMP, GIF, JPEG 2000, PSD, TGA and PPM"
MAX_PIXELS = 200_000_000
READING = 2  # raise it whenever `read_photo` changes; caches of what is made from photos are then made anew

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
SIDEWAYS = (5, 6, 7, 8)
TIFF_KIND, DNG_VERSION = 0x00FE, 0xC612
BAD_PROFILE = "colour profile that cannot be used: read as sRGB"

# What Pillow raises on damaged files, as seen on many thousands of each format. So many types, as its plugins
# read headers without checking them. Not MemoryError: it says nothing about the photo.
DAMAGED = (
    OSError,  # from most decoders; UnidentifiedImageError is one, too
    SyntaxError,  # from headers
    ValueError,
    TypeError,  # a TIFF without its dimensions
    IndexError,  # a GIF with a short palette
    struct.error,  # a tag of another type
    EOFError,  # a missing frame
    RuntimeError,  # from AVIF's decoder
    ZeroDivisionError,  # an AVIF animation without a clock
    Image.DecompressionBombError,  # above MAX_PIXELS, see `opened`
)


@dataclass(frozen=True)
class Decoded:
    """A photo's pixels as they are stored, and what is to be done with them."""

    pixels: Image.Image
    orientation: int  # of TURNS; others mean that the photo is upright
    profile: bytes | None  # of its colours, if that is another than sRGB and can be used
    changes: dict[str, str]  # what `picture` changes, with details

    @property
    def size(self) -> Size:
        """(height, width) of the upright photo"""
        return self.pixels.size if self.orientation in SIDEWAYS else self.pixels.size[::-1]

    def picture(self) -> Image.Image:
        """Return the photo upright, in 8-bit sRGB, on white."""
        image = _to_rgb(self.pixels, self.profile)
        return image.transpose(TURNS[self.orientation]) if self.orientation in TURNS else image


def is_photo(path: Path) -> bool:
    """Say whether a file should be a photo: by its suffix, or by its content if that says nothing."""
    suffix = path.suffix.lower()
    if suffix in (*PHOTO_SUFFIXES, *NOT_READ) or not path.is_file():
        return suffix in PHOTO_SUFFIXES
    try:
        with opened(path):
            return True
    except (*DAMAGED, UserError):
        return False


def read_photo(path: Path) -> Image.Image:
    """Read a photo as 8-bit sRGB, upright by its EXIF rotation, on white; of an animation the first frame.

    Warns of a colour profile that cannot be used. Raises FileNotFoundError, and UserError when the file is no
    whole picture in a format that is read, or has more than MAX_PIXELS.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{printable(path)}: no such photo")
    try:
        with own_limit():
            decoded = decode_photo(path)
            picture = decoded.picture()
    except UserError as error:
        raise UserError(
            f"{printable(path)} is no photo that can be read: {error}. Accepted are whole {READ} files of up "
            f"to {MAX_PIXELS // 10**6} megapixels."
        ) from error
    if BAD_PROFILE in decoded.changes:
        warnings.warn(f"{printable(path)}: {BAD_PROFILE} ({decoded.changes[BAD_PROFILE]})", stacklevel=2)
    return picture


def decode_photo(path: Path) -> Decoded:
    """Decode a photo; a UserError says what is wrong with the file, but not its name."""
    if path.suffix.lower() in RAW_SUFFIXES:
        raise UserError(f"{RAW} ({path.suffix})")
    try:
        try:
            return _decode(path)
        except DAMAGED:
            if not _is_png(path):
                raise
            return _decode_png_alone(path)
    except Image.DecompressionBombError as error:
        raise UserError(f"more than {MAX_PIXELS // 10**6} megapixels") from error
    except DAMAGED as error:
        if "out of memory" in str(error).lower():  # of a decoder; Pillow makes another error of it
            raise MemoryError(f"{printable(path)}: {error}") from error
        # Pillow's "cannot identify image file" repeats the path, which the caller names.
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else printable(error)
        raise UserError(f"{describe(path)} ({reason})") from error


def photo_size(path: Path) -> Size:
    """Return an upright photo's (height, width) from its header, EXIF read; raises as `read_photo`."""
    try:
        with opened(path) as image:
            size, orientation = image.size, _take_orientation(image)
            is_turned = image.format == "TIFF"  # Pillow gives the size of the upright photo
    except (*DAMAGED, UserError):
        return read_photo(path).size[::-1]  # it says what is wrong
    return size if orientation in SIDEWAYS and not is_turned else size[::-1]


@contextmanager
def opened(path: Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """Open a photo, whatever its suffix, and read its header; content: other than that of the file.

    Raises DAMAGED, and UserError for the thumbnail in a camera's raw file.
    """
    # Not by its path: then Pillow would map some TIFFs to memory, and confuse the sides of those that lie on
    # one. Of JPEG 2000 it would read as much as a damaged length says, if it were not all in memory.
    with path.open("rb") if content is None else io.BytesIO(content) as file, own_limit():
        is_jpeg_2000 = file.read(8)[4:] == b"jP  "
        file.seek(0)
        source = io.BytesIO(file.read()) if is_jpeg_2000 else file
        # A TGA cannot be told from other files by its content.
        formats = (*PHOTO_FORMATS, "TGA") if path.suffix.lower() == ".tga" else PHOTO_FORMATS
        with Image.open(source, formats=formats) as image:
            tags = getattr(image, "tag_v2", {})
            if DNG_VERSION in tags or tags.get(TIFF_KIND) == 1:
                raise UserError(f"{RAW}, or a thumbnail")
            yield image


@contextmanager
def own_limit() -> Iterator[None]:
    """Replace Pillow's limit, 179 megapixels, by ours, and silence its warnings, which do not name the photo.

    Several threads that read photos need it around all of them.
    """
    # Pillow warns above its limit, and raises above twice that.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS / 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decode(path: Path, content: bytes | None = None) -> Decoded:
    with opened(path, content) as image:
        if not image.tile and image.format != "WEBP":
            raise OSError("it holds no pixels")  # of which Pillow would make black ones
        changes = _list_changes(image)  # before pixels are decoded, as the next line may do
        profile, more = _find_profile(image)
        orientation = _take_orientation(image)  # before Pillow turns a TIFF itself, and fails on odd tags
        image.load()
        # The size of a TIFF is already that of the upright photo, unlike its pixels.
        pixels = image.copy() if image.im.size != image.size else image
    if orientation in TURNS:
        more["turned upright by its EXIF data"] = ""
    _to_rgb(pixels.crop((0, 0, 1, 1)), profile)  # can they be converted? One is enough to see
    return Decoded(pixels, orientation, profile, changes | more)


def _take_orientation(image: Image.Image) -> int:
    """Remove the orientation from an image's EXIF data and return it; 0 if there is none that can be read."""
    try:
        value = image.getexif().pop(ORIENTATION, 0)
        if isinstance(value, tuple | bytes):  # an odd type, or several
            value = value[0]
        return int(value)
    except (*DAMAGED, ArithmeticError):  # ArithmeticError: an infinite fraction
        return 0


def _find_profile(image: Image.Image) -> tuple[bytes | None, dict[str, str]]:
    """Return the colour profile by which an image is converted, if it needs one, and what to say of it."""
    profile = image.info.get("icc_profile")
    if not profile:
        try:
            profile = find_adobe_rgb(image.getexif())
        except (*DAMAGED, LookupError, AttributeError, ArithmeticError):  # as its EXIF reader checks little
            return None, {}
    if not profile:
        return None, {}
    try:
        name, mode, transform = find_transform(profile)
        if _grey(image.mode) not in SOURCES[mode]:
            raise UserError(f"{name} is for {mode} pixels, these are {image.mode}")
    except UserError as error:
        return None, {BAD_PROFILE: str(error)}
    return (profile, {"colour profile: converted to sRGB": name}) if transform else (None, {})


def _grey(mode: str) -> str:
    return "L" if mode.startswith("I") else mode  # 16 bit grey


def _list_changes(image: Image.Image) -> dict[str, str]:
    """List what `Decoded.picture` changes in an image, but for its orientation and profile."""
    try:
        frames = getattr(image, "is_animated", False)
    except DAMAGED:  # in the second frame, which is not used
        frames = True
    changes = {
        "transparent: put on white": image.has_transparency_data,
        "16 bits a channel: reduced to 8": image.mode.startswith("I") or ";16" in str(image.tile),
        "animated: only the first frame is used": frames and image.format in ("GIF", "WEBP", "PNG", "AVIF"),
        "several pages: only the first is used": frames and image.format == "TIFF",
        f"{image.mode} colours: converted to RGB": image.mode in ("CMYK", "YCCK", "LAB", "HSV"),
    }
    return {change: "" for change, applies in changes.items() if applies}


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image of any mode to 8-bit sRGB, on white."""
    if image.mode == "F":
        raise UserError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bit grey; Pillow's own conversion would clip at 255
        pixels = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile:
        _, mode, transform = find_transform(profile)
        image = transform.apply(image.convert(mode))
    elif image.mode == "LAB":
        lab = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *lab, outputMode="RGB")
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


# What Pillow stumbles over in a PNG whose pixels are whole: long or damaged texts and profiles.

PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def _decode_png_alone(path: Path) -> Decoded:
    """Decode a PNG without what its pixels do not need; without its profile, too, if that is at fault."""
    content = path.read_bytes()
    try:
        return _decode(path, _keep_chunks(content, (*PIXEL_CHUNKS, b"eXIf", b"iCCP")))
    except DAMAGED:
        decoded = _decode(path, _keep_chunks(content, (*PIXEL_CHUNKS, b"eXIf")))
        if b"iCCP" in content:
            decoded.changes[BAD_PROFILE] = "it is damaged, or very long"
        return decoded


def _keep_chunks(content: bytes, kept: Sequence[bytes]) -> bytes:
    """Return a PNG with these chunks alone; raises struct.error when a chunk is cut off."""
    parts, at = [content[:8]], 8
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length  # its length, kind and checksum take 12 bytes
        if kind in kept:
            parts.append(content[at:end])
        at = end
    return b"".join(parts)
