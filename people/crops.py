"""Choose the crops around a face (paper, appendix D), and the shape in which a picture is trained."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux.errors import UserError
from people.photos import Box, Size

ASPECT_RATIOS = ((16, 9), (4, 3), (1, 1), (3, 4), (9, 16))  # width : height; paper, appendix D
COMMON_RATIOS = (*ASPECT_RATIOS, (3, 2), (2, 3), (5, 4), (4, 5))  # of photos
SHORT_SIDES = (1.5, 2.0, 2.5, 3.5, 4.5)  # times the longer side of the face; paper, appendix D


def fit_shape(size: Size, resolution: int, multiple: int) -> Size:
    """Return the (height, width) in which a picture of `size` is trained.

    Both sides are multiples of `multiple`, the area is at most resolution ** 2, and nothing is enlarged. Of
    the possible shapes the one with the nearest aspect ratio is taken.
    multiple: 16 for FLUX.1, whose autoencoder divides sides by 8 and whose packing divides them by 2.
    Raises UserError, which gives the size but not the path, when the picture is too small or too narrow.
    """
    height, width = size
    blocks = resolution**2 // multiple**2
    scale = min(1.0, resolution / math.sqrt(height * width)) / multiple
    shapes = [
        (rows, columns)
        for rows in (math.floor(height * scale), math.ceil(height * scale))
        for columns in (math.floor(width * scale), math.ceil(width * scale))
        if 0 < rows * columns <= blocks and rows * multiple <= height and columns * multiple <= width
    ]
    if not shapes:
        raise UserError(
            f"a picture of {height} x {width} pixels (h x w) is too small or too narrow: "
            f"at resolution {resolution} both sides must keep at least {multiple} pixels"
        )

    def badness(shape: Size) -> tuple[float, int]:
        rows, columns = shape
        return round(abs(math.log(rows * width / (columns * height))), 6), -rows * columns

    rows, columns = min(shapes, key=badness)
    return rows * multiple, columns * multiple


@lru_cache
def common_shape(size: Size, resolution: int, multiple: int) -> Size:
    """Return the (height, width) in which a photo is trained: one of few, so that photos fill whole batches.

    The aspect ratio is the nearest of COMMON_RATIOS. The area is that of a square with a side of 8/8, 7/8, ..
    1/8 of the resolution, the largest at which nothing is enlarged. A photo too small for all of them gets
    its `fit_shape`.
    """
    height, width = size
    across, down = min(COMMON_RATIOS, key=lambda ratio: abs(math.log(ratio[0] / ratio[1] * height / width)))
    for eighths in range(8, 0, -1):
        side = resolution * eighths // 8
        if side >= 2 * multiple:
            shape = fit_shape((4096 * down, 4096 * across), side, multiple)
            if shape[0] <= height and shape[1] <= width:
                return shape
    return fit_shape(size, resolution, multiple)


def to_tensor(image: Image.Image, shape: Size, box: Box | None = None, flip: bool = False) -> Tensor:
    """Turn an RGB image, or a box of it, into a float32 tensor (3, *shape) in [-1, 1].

    The aspect ratio is kept. If that of the box is another, equal parts are cut off on both sides.
    """
    height, width = shape
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    scale = min((x1 - x0) / width, (y1 - y0) / height)  # source pixels per pixel
    left, top = (x0 + x1 - width * scale) / 2, (y0 + y1 - height * scale) / 2
    # Pillow's resize takes a fractional box and widens its filter when shrinking: one resampling does it all.
    source = (max(left, x0), max(top, y0), min(left + width * scale, x1), min(top + height * scale, y1))
    pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=source))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1  # (3, h, w)
    return tensor.flip(-1) if flip else tensor.contiguous()


def crop_boxes(size: Size, face: Sequence[float]) -> list[Box]:
    """Return the crops of a photo around its face, at most 25, all different (paper, appendix D).

    For each of ASPECT_RATIOS and SHORT_SIDES there is a crop whose short side is that many times f_long, the
    longer side of the face. It is centred on the face and shifted, never padded, to lie inside the photo.
    Crops that are too large for the photo are replaced by the largest of their aspect ratio, which is listed
    once. Such a crop can cut off part of the face (16:9 in an upright portrait); it is centred on the face.

    size: the photo's (height, width). Raises UserError when the face is not inside the photo.
    """
    height, width = size
    x0, y0, x1, y1 = face
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(
            f"face box {tuple(face)} is not inside the photo of {width} x {height} pixels (w x h)"
        )
    f_long = max(x1 - x0, y1 - y0)
    boxes = []
    for across, down in ASPECT_RATIOS:
        largest = min(width / across, height / down)  # pixels per unit of the aspect ratio
        for factor in SHORT_SIDES:
            unit = min(f_long * factor / min(across, down), largest)
            w, h = round(unit * across), round(unit * down)
            left = min(max(round((x0 + x1 - w) / 2), 0), width - w)
            top = min(max(round((y0 + y1 - h) / 2), 0), height - h)
            boxes.append((left, top, left + w, top + h))
    return list(dict.fromkeys(boxes))
