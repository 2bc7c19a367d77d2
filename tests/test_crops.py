"""The shapes that photos are trained in, and the crops of appendix D."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from test_photos import halves

from people.crops import common_shape, crop_boxes, fit_shape, to_tensor


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
            # The slow way rounds the short side first.
            assert abs(w - other[0]) <= 2 and abs(h - other[1]) <= 2
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
