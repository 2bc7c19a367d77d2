"""Photos with colour profiles come back in sRGB, compared with colorimetry in numpy and with Pillow's own."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from people.colours import find_transform
from people.manifest import examine
from people.photos import BAD_PROFILE, read_photo

# CIE x, y of red, green, blue; IEC 61966-2-1, SMPTE EG 432-1, Adobe RGB (1998) Color Image Encoding.
PRIMARIES = {
    "sRGB": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "Display P3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    "Adobe RGB (1998)": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
}
D65, D50 = (0.3127, 0.3290), (0.9642, 1.0, 0.8249)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
S15 = 2**16


def to_xyz(name: str) -> np.ndarray:
    """The matrix from linear RGB to XYZ, for a white of D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in PRIMARIES[name]]).T
    x, y = D65
    return columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y])


def decode(values: np.ndarray, name: str) -> np.ndarray:
    if name.startswith("Adobe"):
        return values**2.19921875
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encode(values: np.ndarray, name: str) -> np.ndarray:
    if name.startswith("Adobe"):
        return values ** (1 / 2.19921875)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def patches(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Colours in sRGB, skin tones among them, and the same in another space; both (8, 8, 3) in 0 .. 255.

    None is nearly saturated: there a step of 1 in the other space is a larger one in sRGB.
    """
    draw = np.random.default_rng(0)
    srgb = draw.integers(50, 225, (8, 8, 1)) + draw.integers(-30, 31, (8, 8, 3))
    srgb[0, :4] = (255, 224, 196), (214, 160, 130), (141, 85, 54), (60, 36, 28)
    linear = decode(srgb / 255, "sRGB") @ to_xyz("sRGB").T @ np.linalg.inv(to_xyz(name)).T
    return srgb, np.rint(encode(linear.clip(0, 1), name) * 255).astype(np.uint8)


def make_profile(
    space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr"
) -> bytes:
    """An ICC profile of version 2.4 or, for parametric curves, 4.0."""
    tags = {b"desc": b"desc\0\0\0\0\0\0\0\x05test\0" + bytes(78), b"wtpt": xyz(D50)} | tags
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI", 128 + len(table + data), 0x02400000) + kind + space + pcs
    return (head.ljust(36, b"\0") + b"acsp").ljust(68, b"\0") + xyz(D50)[8:] + bytes(48) + table + data


def xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * S15) for value in values))


def curve(name: str) -> bytes:
    if name.startswith("Adobe"):
        return struct.pack(">4s4xIH", b"curv", 1, 563)
    points = np.rint(decode(np.linspace(0, 1, 4096), name) * 65535).astype(">u2")
    return struct.pack(">4s4xI", b"curv", len(points)) + points.tobytes()


def rgb_profile(name: str) -> bytes:
    white = to_xyz("sRGB").sum(1)
    gains = (BRADFORD @ D50) / (BRADFORD @ white)
    adapted = np.linalg.inv(BRADFORD) @ np.diag(gains) @ BRADFORD @ to_xyz(name)
    tags = {letter + b"XYZ": xyz(column) for letter, column in zip((b"r", b"g", b"b"), adapted.T)}
    return make_profile(b"RGB ", tags | {letter + b"TRC": curve(name) for letter in (b"r", b"g", b"b")})


def cmyk_profile() -> bytes:
    """A table of two levels of each ink: lightness by the product of their lacks, and some colour."""
    ink = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(16, 4)
    light = 255 * (1 - ink * (0.45, 0.5, 0.15, 0.95)).prod(1)
    lab = np.stack([light, 128 + 40 * (ink[:, 1] - ink[:, 0]), 128 + 50 * ink[:, 2] - 20 * ink[:, 0]], -1)
    line = bytes(range(256))
    table = b"mft1\0\0\0\0\4\3\2\0" + struct.pack(">9i", *np.eye(3, dtype=int).ravel() * S15)
    table += line * 4 + np.rint(lab).astype(np.uint8).tobytes() + line * 3
    return make_profile(b"CMYK", {b"A2B0": table}, b"Lab ", b"prtr")


def save(path, image: Image.Image, **options) -> None:
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    image.save(path, **lossless.get(path.suffix[1:], {}), **options)


@pytest.mark.parametrize("name", ["Display P3", "Adobe RGB (1998)"])
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_colours_come_back_in_srgb(tmp_path, name, suffix):
    srgb, other = patches(name)
    image = Image.fromarray(other.repeat(8, 0).repeat(8, 1))  # for JPEG, whose blocks are of 8 x 8
    save(path := tmp_path / f"a.{suffix}", image, icc_profile=rgb_profile(name))
    difference = np.asarray(read_photo(path))[4::8, 4::8].astype(int) - srgb
    assert abs(difference).max() <= (1 if suffix != "jpg" else 3)
    assert examine(path)["changes"] == {"colour profile: converted to sRGB": "test"}
    save(path, image)  # without the profile they would be far off
    assert abs(np.asarray(read_photo(path))[4::8, 4::8].astype(int) - srgb).max() > 10


@pytest.mark.parametrize("profile", ["created", "made"])
def test_pixels_in_srgb_stay_as_they_are(tmp_path, profile):
    created = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = created if profile == "created" else rgb_profile("sRGB")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    assert (
        np.array_equal(read_photo(tmp_path / "a.png"), pixels)
        and examine(tmp_path / "a.png")["changes"] == {}
    )


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_as_pillow_converts_it(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    profile = cmyk_profile()
    save(path := tmp_path / f"a.{suffix}", Image.fromarray(pixels, "CMYK"), icc_profile=profile)
    with Image.open(path) as image:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        expected = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        plain = image.convert("RGB")
    assert read_photo(path).tobytes() == expected.tobytes() != plain.tobytes()


@pytest.mark.parametrize("mode, suffix", [("L", "jpg"), ("L", "png"), ("LA", "png"), ("I;16", "png")])
def test_grey_profiles(tmp_path, mode, suffix):
    profile = make_profile(b"GRAY", {b"kTRC": struct.pack(">4s4xIH", b"curv", 1, 384)})  # gamma 1.5
    # From 8 on: below, LittleCMS itself is off by 2.
    ramp = np.arange(256, dtype=np.uint8).clip(8).reshape(16, 16).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp)
    save(
        path := tmp_path / f"a.{suffix}",
        image if mode == "I;16" else image.convert(mode),
        icc_profile=profile,
    )
    expected = encode((ramp / 255) ** 1.5, "sRGB") * 255
    difference = np.asarray(read_photo(path)).astype(float) - expected[..., None]
    assert abs(difference).max() <= (1 if suffix == "png" else 3)
    assert abs(expected - ramp).max() > 30


def test_grey_photos_with_a_profile_for_rgb(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(
        tmp_path / "a.png", icc_profile=rgb_profile("Display P3")
    )
    grey = np.asarray(read_photo(tmp_path / "a.png")).astype(int)
    assert abs(grey - np.arange(256).reshape(16, 16, 1)).max() <= 1  # the white is the same


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_photos_with_profiles(tmp_path, mode):
    srgb, other = patches("Display P3")
    image = Image.fromarray(other).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 4, 8, 8))
    image.convert(mode).save(tmp_path / "a.png", icc_profile=rgb_profile("Display P3"))
    read = np.asarray(read_photo(tmp_path / "a.png")).astype(int)
    assert (read[4:] == 255).all() and abs(read[:4] - srgb[:4]).max() <= (1 if mode == "RGBA" else 30)


def test_adobe_rgb_that_only_exif_names(tmp_path):
    """Cameras embed no profile, but write R03 (DCF 2.0)."""
    srgb, other = patches("Adobe RGB (1998)")
    for name in ("R03", "R98"):
        exif = Image.Exif()
        exif[0x8769] = {0xA005: {1: name}}
        Image.fromarray(other).save(tmp_path / f"{name}.png", exif=exif)
    difference = np.asarray(read_photo(tmp_path / "R03.png")).astype(int) - srgb
    assert abs(difference).max() <= 1
    assert examine(tmp_path / "R03.png")["changes"] == {
        "colour profile: converted to sRGB": "Adobe RGB (1998)"
    }
    assert np.array_equal(read_photo(tmp_path / "R98.png"), other)


@pytest.mark.parametrize(
    "profile, mode, reason",
    [
        (b"no profile", "RGB", "cannot open profile"),
        (rgb_profile("Display P3")[:300], "RGB", "cannot build transform"),
        (cmyk_profile(), "RGB", "test is for CMYK pixels, these are RGB"),
        (rgb_profile("Display P3"), "CMYK", "test is for RGB pixels, these are CMYK"),
        (make_profile(b"GRAY", {b"kTRC": curve("sRGB")}), "RGB", "test is for L pixels, these are RGB"),
        (make_profile(b"7CLR", {}), "RGB", "7CLR"),
    ],
)
def test_profiles_that_cannot_be_used_are_named(tmp_path, profile, mode, reason):
    image = Image.effect_noise((32, 32), 60).convert(mode)
    image.save(tmp_path / "a.tif", icc_profile=profile)
    with pytest.warns(UserWarning, match=f"a.tif: {BAD_PROFILE} .*{reason}"):
        assert read_photo(tmp_path / "a.tif").tobytes() == image.convert("RGB").tobytes()
    assert reason in examine(tmp_path / "a.tif")["changes"][BAD_PROFILE]


def test_the_same_profile_is_read_once():
    find_transform.cache_clear()
    assert find_transform(rgb_profile("Display P3")) is find_transform(rgb_profile("Display P3"))
