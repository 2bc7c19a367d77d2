"""Photos read, laid out, cropped and dealt as the paper says; wrong ones refused by name."""

import io
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from people import folders, photos
from people.buckets import deal_batches, deal_buckets
from people.cache import MemoryCache, TensorCache
from people.crops import common_shape, crop_boxes, fit_shape, to_tensor
from people.folders import scan_people
from people.latents import Picture
from people.photos import photo_size, read_photo
from run.files import atomic
from run.pictures import contact_sheet
from tiny.pretrain import encode_pictures


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def halves(height: int = 40, width: int = 60) -> Image.Image:
    """A picture whose left half is red and whose right half is blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


# Reading


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


# Folders


def make_people(folder, **photos):
    for person, names in photos.items():
        (folder / person).mkdir(parents=True)
        for name in names:
            (folder / person / name).write_bytes(b"")


def test_scan_people(tmp_path):
    make_people(tmp_path, bea=["2.jpg", "1.PNG", "1.txt", "faces.json"], abe=["x.webp", "x.txt", ".y.jpg"])
    make_people(tmp_path / ".git", hooks=[])
    (tmp_path / "abe" / "x.txt").write_bytes("\ufeffa man\n  in Köln\n".encode())
    (tmp_path / "bea" / "1.txt").write_text("a woman")
    (tmp_path / "sheet.png").write_bytes(b"")
    abe, bea = scan_people(tmp_path)
    assert (abe.pid, abe.name, bea.pid, bea.name) == (0, "abe", 1, "bea")
    assert [(photo.path.name, photo.caption) for photo in abe.photos] == [("x.webp", "a man in Köln")]
    assert [(photo.path.name, photo.caption) for photo in bea.photos] == [
        ("1.PNG", "a woman"),
        ("2.jpg", None),
    ]


def test_scan_people_says_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        scan_people(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        scan_people(tmp_path / "empty")
    make_people(tmp_path / "ids", abe=["1.jpg"], bea=["1.jpg", "2.jpg"])
    with pytest.raises(ValueError, match="holds 2 photos; give the folder above"):
        scan_people(tmp_path / "ids" / "bea")
    (tmp_path / "empty").rmdir()
    with pytest.raises(ValueError, match="a level too high.*ids.abe"):
        scan_people(tmp_path)
    make_people(tmp_path / "ids", cid=["1.heic"], dan=[])
    with pytest.raises(ValueError, match=r"2 of 4 people .*\.webp.*: cid, dan"):
        scan_people(tmp_path / "ids")


def test_captions_must_be_text(tmp_path):
    make_people(tmp_path, abe=["1.jpg", "1.txt"])
    with pytest.raises(ValueError, match="1.txt is empty"):
        scan_people(tmp_path)
    (tmp_path / "abe" / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="1.txt is not UTF-8"):
        scan_people(tmp_path)


# Shapes


@pytest.mark.parametrize(
    "size, shape",
    [
        ((1024, 1024), (1024, 1024)),
        ((3000, 3000), (1024, 1024)),
        ((1080, 1920), (768, 1360)),
        ((4000, 3000), (1168, 880)),  # .753; (1184, 880) would be .743
        ((250, 250), (240, 240)),
        ((700, 1500), (688, 1488)),
        ((16, 16), (16, 16)),
    ],
)
def test_fit_shape_by_hand(size, shape):
    assert fit_shape(size, 1024, 16) == shape


def test_fit_shape_is_not_thrown_off_by_rounding():
    assert fit_shape((644, 644), 512, 8) == (512, 512)  # 644 * (512 / 644) / 8 is 63.99999999999999


def test_fit_shape_properties():
    draw = random.Random(0)
    for _ in range(3000):
        multiple = draw.choice([4, 8, 16, 24])
        resolution = draw.choice([64, 256, 512, 1000, 1024])
        height, width = draw.randint(multiple, 4000), draw.randint(multiple, 4000)
        if max(height / width, width / height) > resolution / multiple / 4:
            continue
        h, w = fit_shape((height, width), resolution, multiple)
        assert h % multiple == w % multiple == 0
        assert multiple <= h <= height and multiple <= w <= width and h * w <= resolution**2
        # Within a block of the ideal on both sides, so nothing is shrunk more than the grid demands.
        scale = min(1, resolution / (height * width) ** 0.5)
        assert abs(h - height * scale) <= multiple and abs(w - width * scale) <= multiple


@pytest.mark.parametrize("size", [(15, 400), (400, 15), (100, 10_000)])
def test_fit_shape_refuses_what_is_too_small(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels.*resolution 64.* 16 pixels"):
        fit_shape(size, 64, 16)


def test_to_tensor_covers_and_cuts_the_middle():
    image = halves(40, 60)
    tensor = to_tensor(image, (40, 60))
    assert tensor.shape == (3, 40, 60) and tensor.dtype == torch.float32
    assert torch.equal(tensor[:, 5, 5], torch.tensor([1.0, -1, -1]))  # red on the left
    assert torch.equal(to_tensor(image, (40, 60), flip=True), tensor.flip(-1))
    # Of a box that is 4 pixels too wide, 2 are cut on each side; no pixel is resampled.
    assert torch.equal(to_tensor(image, (20, 30), (8, 10, 42, 30)), tensor[:, 10:30, 10:40])
    assert torch.equal(to_tensor(image, (24, 30), (10, 4, 40, 30)), tensor[:, 5:29, 10:40])


def test_to_tensor_shrinks_without_aliasing():
    checks = np.indices((256, 256)).sum(0) % 2 * 255
    tensor = to_tensor(Image.fromarray(checks.astype(np.uint8)).convert("RGB"), (32, 32))
    assert tensor[:, 4:-4, 4:-4].abs().max() < 0.02


# Crops


def crop_boxes_slowly(size, face):
    """Appendix D once more, one pixel at a time: grow each crop until it has its size or leaves the photo."""
    f_long = max(face[2] - face[0], face[3] - face[1])
    sizes = []
    for across, down in ((16, 9), (4, 3), (1, 1), (3, 4), (9, 16)):
        for factor in (1.5, 2, 2.5, 3.5, 4.5):
            w = h = 0
            for short in range(1, int(f_long * factor) + 1):
                long = round(short * max(across, down) / min(across, down))
                if (long if across > down else short) > size[1] or (short if across > down else long) > size[
                    0
                ]:
                    break
                w, h = (long, short) if across > down else (short, long)
            if (w, h) not in sizes:
                sizes.append((w, h))
    return sizes


def test_crop_boxes_by_hand():
    # A face of 100 pixels in the middle of a large photo: all 25 fit.
    boxes = crop_boxes((4000, 4000), (1960, 1950, 2040, 2050))
    assert len(boxes) == 25
    assert boxes[0] == (1866, 1925, 2133, 2075)  # 16:9, 267 x 150
    assert boxes[10:15] == [(2000 - r, 2000 - r, 2000 + r, 2000 + r) for r in (75, 100, 125, 175, 225)]
    assert boxes[24] == (1775, 1600, 2225, 2400)  # 9:16, short side 450
    # The same face in a photo of 300: of the squares 150, 200, 250 fit, and 300 once in place of 350 and 450.
    boxes = crop_boxes((300, 300), (0, 100, 80, 200))
    assert [box for box in boxes if box[2] - box[0] == box[3] - box[1]] == [
        (0, 75, 150, 225),
        (0, 50, 200, 250),
        (0, 25, 250, 275),
        (0, 0, 300, 300),
    ]
    # The largest 1:1 is 250, which 2.5 times the face has taken already.
    boxes = crop_boxes((250, 250), (75, 75, 175, 175))
    assert [box[2] - box[0] for box in boxes if box[2] - box[0] == box[3] - box[1]] == [150, 200, 250]
    # A face taller than any 16:9 crop of an upright portrait: full width, centred on the face.
    assert crop_boxes((400, 320), (60, 20, 260, 380))[0] == (0, 110, 320, 290)


def test_crop_boxes_properties():
    draw = random.Random(0)
    for _ in range(300):
        height, width = draw.randint(60, 700), draw.randint(60, 700)
        x0, y0 = draw.randrange(width - 20), draw.randrange(height - 20)
        x1, y1 = draw.randint(x0 + 10, width), draw.randint(y0 + 10, height)
        boxes = crop_boxes((height, width), (x0, y0, x1, y1))
        sizes = [(box[2] - box[0], box[3] - box[1]) for box in boxes]
        assert 5 <= len(boxes) <= 25 and len(set(boxes)) == len(boxes)
        slow = crop_boxes_slowly((height, width), (x0, y0, x1, y1))
        assert len(sizes) == len(slow)
        for (w, h), (left, top, right, bottom), other in zip(sizes, boxes, slow, strict=True):
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            aspect = min(((16, 9), (4, 3), (1, 1), (3, 4), (9, 16)), key=lambda a: abs(w / h - a[0] / a[1]))
            assert abs(w - h * aspect[0] / aspect[1]) <= 1 or abs(h - w * aspect[1] / aspect[0]) <= 1
            assert (
                abs(w - other[0]) <= 2 and abs(h - other[1]) <= 2
            )  # the slow way rounds the short side first
            # Centred up to half a pixel, unless the photo's border is in the way.
            for low, high, a, b, end in ((left, right, x0, x1, width), (top, bottom, y0, y1, height)):
                off = (low + high) / 2 - (a + b) / 2
                assert abs(off) <= 0.5 or (off > 0 and low == 0) or (off < 0 and high == end)
                if high - low > b - a:
                    assert low <= a and b <= high
                else:
                    assert a - 1 <= low and high <= b + 1


@pytest.mark.parametrize("face", [(10, 10, 10, 20), (-1, 0, 5, 5), (90, 90, 101, 99), (0, 0, 100, 81)])
def test_crop_boxes_refuses_a_face_outside(face):
    with pytest.raises(ValueError, match="not inside the photo of 100 x 80"):
        crop_boxes((80, 100), face)


# Order


@pytest.mark.parametrize(
    "count, sizes", [(100, [50, 50]), (51, [26, 25]), (50, [50]), (3, [3]), (101, [34, 34, 33])]
)
def test_buckets_are_even_and_hold_everyone_once(count, sizes):
    people = [folders.Person(pid, str(pid), ()) for pid in range(count)]
    buckets = deal_buckets(people, 50, generator())
    assert [len(bucket) for bucket in buckets] == sizes
    assert sorted(person.pid for bucket in buckets for person in bucket) == list(range(count))
    assert buckets == deal_buckets(people, 50, generator())
    assert buckets != deal_buckets(people, 50, generator(1))


def test_nobody_cannot_be_dealt():
    with pytest.raises(ValueError, match="0 people into buckets of 50"):
        deal_buckets([], 50, generator())


def test_batches_of_the_paper():
    batches = deal_batches([(1024, 1024)] * 1000, uses=10, batch=4, generator=generator())
    assert len(batches) == 2500 and {len(batch) for batch in batches} == {4}
    for first in range(0, 2500, 250):  # 1,000 images are 250 batches, so passes are visible
        assert sorted(sum(batches[first : first + 250], [])) == list(range(1000))


def test_batches_of_many_shapes():
    draw = random.Random(0)
    for seed in range(50):
        shapes = [draw.choice([(8, 8), (8, 16), (16, 8)]) for _ in range(draw.randint(1, 40))]
        uses, batch = draw.randint(1, 5), draw.randint(1, 6)
        batches = deal_batches(shapes, uses, batch, generator(seed))
        assert Counter(sum(batches, [])) == dict.fromkeys(range(len(shapes)), uses)
        assert all(len({shapes[index] for index in indices}) == 1 for indices in batches)
        for shape in set(shapes):
            own = [indices for indices in batches if shapes[indices[0]] == shape]
            assert [len(indices) for indices in own[:-1]] == [batch] * (len(own) - 1) and len(
                own[-1]
            ) <= batch
            flat, members = sum(own, []), shapes.count(shape)
            for start in range(0, len(flat), members):
                assert len(set(flat[start : start + members])) == members
        assert batches == deal_batches(shapes, uses, batch, generator(seed))


def test_shapes_alternate():
    batches = deal_batches([(8, 8)] * 20 + [(8, 16)] * 20, uses=10, batch=4, generator=generator())
    switches = sum((a[0] < 20) != (b[0] < 20) for a, b in zip(batches, batches[1:], strict=False))
    assert 30 < switches < 70  # of 99; independent tosses of a coin give 50 +- 5


def test_common_shapes_are_few_and_never_enlarge():
    random.seed(0)
    sizes = [(random.randint(720, 2500), random.randint(720, 2500)) for _ in range(1000)]
    shapes = [common_shape(size, 1024, 16) for size in sizes]
    assert len(set(shapes)) <= 9 * 6 and len({fit_shape(size, 1024, 16) for size in sizes}) > 150
    for (height, width), (h, w) in zip(sizes, shapes):
        assert h <= height and w <= width and h * w <= 1024**2 and h % 16 == w % 16 == 0
        assert abs(math.log(h / w * width / height)) < 0.35 or max(height / width, width / height) > 16 / 9
        assert h * w >= 0.25 * min(1024**2, height * width)
    assert common_shape((64, 64), 64, 8) == (64, 64) and common_shape((2000, 2000), 1024, 16) == (1024, 1024)
    assert common_shape((40, 24), 1024, 16) == (32, 16)


# Files


def test_atomic_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic(path) as temporary:
        Image.new("RGB", (4, 4)).save(temporary)
        assert path.read_text() == "old"
    assert Image.open(path).size == (4, 4) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensor_cache(tmp_path, dtype):
    cache = TensorCache(tmp_path / "latents")
    mean = torch.randn(16, 4, 6, generator=generator()).to(dtype).transpose(1, 2)
    assert cache.get("a") is None
    cache.put("a", {"mean": mean, "std": mean + 1})
    got = TensorCache(tmp_path / "latents").get("a")
    assert got["mean"].dtype == dtype
    assert torch.equal(got["mean"], mean) and torch.equal(got["std"], mean + 1)
    file = tmp_path / "latents" / "a.safetensors"
    content = file.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        file.write_bytes(content[:length])
        assert cache.get("a") is None
    cache.put("a", {"mean": mean})
    assert torch.equal(cache.get("a")["mean"], mean)


def test_latent_keys_differ_with_everything_that_matters(tmp_path):
    photos = [tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "copy.jpg"]
    for photo, content in zip(photos, (b"a", b"b", b"a"), strict=True):
        photo.write_bytes(content)
    picture = Picture(photos[0], (8, 8), (0, 0, 9, 9), flip=False)
    changes = [{"path": photos[1]}, {"shape": (8, 16)}, {"box": None}, {"flip": True}]
    keys = [replace(picture, **change).key("x") for change in [{}, *changes]] + [picture.key("y")]
    assert len(set(keys)) == len(keys)
    assert replace(picture, path=photos[2]).key("x") == keys[0]  # the content counts, not the name


class CountingEncoder(torch.nn.Linear):
    """Stands for the autoencoder: its mean is the image in eighths, and it counts its calls."""

    calls = 0

    def encode_moments(self, image):
        self.calls += 1
        return image[..., ::8, ::8], torch.ones_like(image[..., ::8, ::8])


def test_pictures_are_encoded_once(tmp_path):
    Image.new("RGB", (40, 32), "red").save(tmp_path / "a.png")
    pictures = [Picture(tmp_path / "a.png", (16, 16), flip=flip) for flip in (False, True)]
    encoder = CountingEncoder(1, 1)
    for cache in (TensorCache(tmp_path / "cache"), TensorCache(tmp_path / "cache"), MemoryCache()):
        keys = encode_pictures(pictures, encoder, "one", cache)
        assert (
            cache.get(keys[0])["mean"].shape == (3, 2, 2) and cache.get(keys[1])["std"].dtype == torch.float16
        )
    assert (
        encoder.calls == 4
    )  # twice for the disk, whose second use finds everything, and twice for the memory


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photo_size_is_that_of_the_upright_photo(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 32)).save(tmp_path / "a.jpg", exif=exif)
    assert photo_size(tmp_path / "a.jpg") == read_photo(tmp_path / "a.jpg").size[::-1]


# Sheets


def test_contact_sheet_places_every_picture():
    red, blue = Image.new("RGB", (10, 30), "red"), Image.new("L", (500, 500), 90)
    sheet = np.asarray(
        contact_sheet([[red, blue], [None, red], [blue]], ["a", "b"], ["x", "y"], cell=(40, 80))
    )
    bare = np.asarray(contact_sheet([[red, blue], [None, red], [blue]], cell=(40, 80)))
    assert bare.shape == (4 + 3 * 44, 4 + 2 * 84, 3)
    cells = [[bare[4 + i * 44 : 44 + i * 44, 4 + j * 84 : 84 + j * 84] for j in range(2)] for i in range(3)]
    assert cells[0][0][20, 40].tolist() == [255, 0, 0] and cells[0][0][20, 2].tolist() == [128, 128, 128]
    assert cells[0][1][20, 40].tolist() == [90, 90, 90]
    assert (cells[1][0] == 255).all() and (cells[2][1] == 255).all()
    assert cells[1][1][20, 40].tolist() == [255, 0, 0]
    assert sheet.shape[0] > bare.shape[0] and sheet.shape[1] > bare.shape[1] and (sheet < 60).all(-1).any()
    assert contact_sheet([[red]], ["word " * 99], ["word " * 99]).size[1] < 500
