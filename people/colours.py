"""Convert the colours of photos to sRGB, by the profiles that are embedded in them."""

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from flux.errors import UserError

# Pillow's mode for each colour space of a profile.
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# The modes of photos for which such a profile is used: a grey photo with one for RGB is common.
SOURCES = {
    "RGB": ("RGB", "RGBA", "RGBa", "RGBX", "L", "LA", "La", "1", "P", "PA", "YCbCr", "HSV"),
    "L": ("L", "LA", "La", "1"),
    "CMYK": ("CMYK",),
    "LAB": ("LAB",),
}
EXIF_DIRECTORY, INTEROP = 0x8769, 0xA005  # tags: of a directory in the EXIF data, and of one within it
# X, Y and Z of red, green and blue for a white of D50: Adobe RGB (1998) Color Image Encoding, annex A.
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


@lru_cache(maxsize=64)  # most photos of a data set have one of few profiles
def find_transform(profile: bytes) -> tuple[str, str, ImageCms.ImageCmsTransform | None]:
    """Return a profile's name, the mode that it is for, and Pillow's transform from it to sRGB.

    The transform is None when it would change no colour by more than 1 of 255: such a profile is sRGB itself,
    of which there are many makes. Raises UserError when the profile cannot be used.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = MODES.get(source.profile.xcolor_space.strip())
        if mode is None:
            raise UserError(f"it is for {source.profile.xcolor_space.strip()} colours")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        name = " ".join(ImageCms.getProfileDescription(source).split())[:60]
    # Pillow's documented error, and what its reader raises on bytes that are no profile.
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    return name, mode, None if _is_srgb(transform, mode) else transform


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Say whether a transform leaves the colours of a grid over the whole space as they are."""
    if mode not in ("RGB", "L"):
        return False
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
    image = Image.fromarray(grid).convert(mode)
    before, after = (np.asarray(x.convert("RGB"), int) for x in (image, transform.apply(image)))
    return abs(after - before).max() <= 1


def find_adobe_rgb(exif: Image.Exif) -> bytes | None:
    """Return a profile of Adobe RGB if the EXIF data of a photo name it, as cameras do that embed none (DCF).

    Raises what Pillow raises on damaged EXIF data.
    """
    is_adobe = EXIF_DIRECTORY in exif and exif.get_ifd(INTEROP).get(1) == "R03"
    return _matrix_profile("Adobe RGB (1998)", ADOBE_RGB, 563) if is_adobe else None


@lru_cache
def _matrix_profile(name: str, primaries: tuple[tuple[float, ...], ...], gamma: int) -> bytes:
    """Make an ICC profile (version 2.1) of three primaries and a gamma, in 256ths."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return struct.pack(">3i", *(round(value * 2**16) for value in values))

    curve = struct.pack(">4sIIH", b"curv", 0, 1, gamma)
    tags = {b"desc": struct.pack(">4sII", b"desc", 0, len(name) + 1) + name.encode() + bytes(79)}
    tags |= {b"wtpt": b"XYZ \0\0\0\0" + xyz((0.9642, 1, 0.8249))}
    for letter, primary in zip((b"r", b"g", b"b"), primaries):
        tags |= {letter + b"XYZ": b"XYZ \0\0\0\0" + xyz(primary), letter + b"TRC": curve}
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(data)
    head = struct.pack(">I4xI", size, 0x02100000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return (head + xyz((0.9642, 1, 0.8249))).ljust(128, b"\0") + table + data
