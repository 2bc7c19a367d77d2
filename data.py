"""Photos of people: folders of identities, prompts, shapes, appendix D's crops, buckets, latents on disk.

It knows pixels and numbers only: encoding belongs to `flux/`, finding faces to `vision/`.
"""

import argparse
import hashlib
import json
import math
import textwrap
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm import tqdm

from flux.loading import atomic
from flux.sampling import draw_times
from flux.terminal import printable

Size = tuple[int, int]  # (height, width)
Box = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, half open

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
MAX_PIXELS = 200_000_000
MAX_CAPTION = 2**16  # bytes

ASPECT_RATIOS = ((16, 9), (4, 3), (1, 1), (3, 4), (9, 16))  # width : height; paper, appendix D
COMMON_RATIOS = (*ASPECT_RATIOS, (3, 2), (2, 3), (5, 4), (4, 5))  # of photos
SHORT_SIDES = (1.5, 2.0, 2.5, 3.5, 4.5)  # times the longer side of the face; paper, appendix D

CACHE_VERSION = 1  # raise it whenever `to_tensor` changes a pixel: latents made before are then encoded anew
CHECKSUM = "crc32"  # of an entry of the cache, in its header
SEAL = f'"{CHECKSUM}":"'.encode()


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
        raise ValueError(
            f"{printable(path)} is no photo that can be read: {error}. Accepted are whole JPEG, "
            f"PNG, WebP, TIFF, BMP and GIF files of up to {MAX_PIXELS // 10**6} megapixels."
        ) from error


def decode_photo(path: Path) -> Image.Image:
    """Do the work of `read_photo`; its ValueError says what is wrong with the file, not where it is."""
    try:
        with any_size(), Image.open(path, formats=PHOTO_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels")
            return _to_rgb(ImageOps.exif_transpose(image))
    except (
        Exception
    ) as error:  # PIL raises a dozen types on damaged files, struct.error and TypeError among them
        # Its own "cannot identify image file" repeats the path, which the caller names.
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else printable(error)
        raise ValueError(f"{_describe(path)} ({reason})") from error


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
        raise ValueError("floating-point pixels, whose range is not known")
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


@dataclass(frozen=True, slots=True)
class Photo:
    path: Path
    caption: str | None  # None: the trainer says "a photo of a <class>"
    size: Size | None = None  # of the upright photo; where nobody has looked yet, None
    digest: str | None = None  # SHA-256 of the file


@dataclass(frozen=True)
class Person:
    pid: int
    name: str
    photos: tuple[Photo, ...]


def scan_people(folder: Path, option: str = "--data") -> list[Person]:
    """List the people of `<folder>/<person>/*.jpg|jpeg|png|webp`, each with or without a `.txt` caption.

    People and photos are sorted by name; pids count from 0. Hidden files and folders are left out.
    option: what the folder is called in messages.
    Raises FileNotFoundError or ValueError when the folder is laid out otherwise, or a person has no photo.
    """
    folders = list_folders(folder, option)
    people = [Person(pid, path.name, _list_photos(path)) for pid, path in enumerate(folders)]
    if empty := [printable(person.name) for person in people if not person.photos]:
        names = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
        kinds = ", ".join(PHOTO_SUFFIXES)
        raise ValueError(f"{len(empty)} of {len(people)} people in {folder} have no photo ({kinds}): {names}")
    names = [f"{person.name}/{photo.path.name}" for person in people for photo in person.photos]
    if odd := [printable(name) for name in names if {*map(unicodedata.category, name)} & {"Cc", "Cs", "Zl"}]:
        # Files and pages are called after them, in which such names would be lost or obeyed.
        raise ValueError(f"{folder}: rename what has control characters in its name: {', '.join(odd[:5])}")
    return people


def list_folders(folder: Path, option: str = "--data") -> list[Path]:
    """Return the people's folders, sorted by name.

    Raises FileNotFoundError or ValueError when there are none, or the folder is a level too high or too low.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{option} {folder}: no such folder; it should hold one folder of photos per person"
        )
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if folders and not any(photo_paths(path) for path in folders):
        below = sorted(path for path in folder.glob("*/*") if path.is_dir() and photo_paths(path))
        if below:
            sample = printable(below[0].relative_to(folder))
            problem = f"is a level too high: a person's photos should not be in {sample}"
            raise ValueError(f"{option} {folder} {problem}")
    if not folders and (photos := photo_paths(folder)):
        raise ValueError(
            f"{option} {folder} is a level too low: it holds {len(photos)} photos; give the folder above it"
        )
    if not folders:
        raise ValueError(f"{option} {folder} is empty; it should hold one folder of photos per person")
    return folders


def photo_paths(folder: Path) -> list[Path]:
    """Return what is called like a photo in a folder, sorted by name; hidden files are left out."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    return [path for path in paths if not path.name.startswith(".")]


def _list_photos(folder: Path) -> tuple[Photo, ...]:
    return tuple(Photo(path, read_caption(path)) for path in photo_paths(folder))


def read_caption(photo: Path) -> str | None:
    """Return the text beside a photo, in one line and without control characters; None when there is none.

    Raises ValueError when it is empty, very long, or not UTF-8.
    """
    path = photo.with_suffix(".txt")
    if not path.is_file():
        return None
    with path.open("rb") as file:
        content = file.read(MAX_CAPTION + 1)
    if len(content) > MAX_CAPTION:
        raise ValueError(f"{printable(path)} is longer than a caption can be, {MAX_CAPTION} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path)} is not UTF-8 text ({error})") from error
    words = "".join(" " if unicodedata.category(char) == "Cc" else char for char in text).split()
    caption = " ".join(words)
    if not caption:
        raise ValueError(
            f"{printable(path)} is empty: write a caption, or delete the file to use the default one"
        )
    return caption


# Shapes and crops


def fit_shape(size: Size, resolution: int, multiple: int) -> Size:
    """Return the shape in which a picture of `size` is trained.

    Both sides are multiples of `multiple`, the area is at most resolution ** 2, nothing is enlarged; of the
    neighbouring shapes the one nearest in aspect wins. FLUX.1: 16, its autoencoder's 8 times its packing's 2.
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
        raise ValueError(
            f"a picture of {height} x {width} pixels (h x w) is too small or too narrow: "
            f"at resolution {resolution} both sides must come to {multiple} pixels at least"
        )

    def badness(shape: Size) -> tuple[float, int]:
        rows, columns = shape
        return round(abs(math.log(rows * width / (columns * height))), 6), -rows * columns

    rows, columns = min(shapes, key=badness)
    return rows * multiple, columns * multiple


@lru_cache
def common_shape(size: Size, resolution: int, multiple: int) -> Size:
    """Return one of few shapes, so that photos of all sizes make whole batches.

    The nearest of nine aspect ratios, in the largest eighth of the resolution in which nothing is enlarged. A
    photo too small for the least of them keeps its own shape.
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
    """Turn an RGB image, or a box of it, into a (3, h, w) float32 tensor in [-1, 1] of the given shape.

    The box is covered, not squeezed: the few pixels by which its aspect differs are cut off on both sides.
    """
    height, width = shape
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    scale = min((x1 - x0) / width, (y1 - y0) / height)  # source pixels per pixel
    left, top = (x0 + x1 - width * scale) / 2, (y0 + y1 - height * scale) / 2
    # PIL's resize reads a fractional box and widens its filter when shrinking, so one resampling does it all.
    source = (max(left, x0), max(top, y0), min(left + width * scale, x1), min(top + height * scale, y1))
    pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=source))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1  # (3, h, w)
    return tensor.flip(-1) if flip else tensor.contiguous()


def crop_boxes(size: Size, face: Sequence[float]) -> list[Box]:
    """Return the crops of a photo around its face, at most 25, all different (paper, appendix D).

    For each aspect ratio and each of SHORT_SIDES, a crop whose short side is that many times the longer side
    of the face, centred on it and shifted, never padded, to stay inside the photo. Crops that do not fit
    give way, once, to the largest of their aspect ratio that does. Even that can be smaller than the face:
    16:9 cuts a tall face in an upright portrait. It stays centred, which keeps as much of the face as can be.

    size: the photo's (height, width). Raises ValueError when the face is not inside the photo.
    """
    height, width = size
    x0, y0, x1, y1 = face
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
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


# The order of training


def deal_buckets(people: Sequence[Person], bucket_ids: int, generator: torch.Generator) -> list[list[Person]]:
    """Deal people at random into the fewest buckets of at most `bucket_ids`, of equal size give or take one.

    Cutting 51 people after 50 would leave a bucket that moves meta_down for one person; so it is 26 and 25.
    """
    if not people or bucket_ids < 1:
        raise ValueError(f"cannot deal {len(people)} people into buckets of {bucket_ids}")
    order = torch.randperm(len(people), generator=generator).tolist()
    count = math.ceil(len(people) / bucket_ids)
    return [[people[i] for i in order[start::count]] for start in range(count)]


def deal_batches(
    shapes: Sequence[Size], uses: int, batch: int, generator: torch.Generator
) -> list[list[int]]:
    """Return a bucket's batches, lists of positions in `shapes`; their number is the paper's q_bucket.

    Every image comes `uses` times, again only after all others of its shape have come. A batch has one
    shape; only the last of a shape may have fewer than `batch` images. Shapes alternate at random.
    """
    queues: dict[Size, list[list[int]]] = {}
    for shape in dict.fromkeys(shapes):
        members = torch.tensor([k for k, other in enumerate(shapes) if other == shape])
        passes = [members[torch.randperm(len(members), generator=generator)] for _ in range(uses)]
        queues[shape] = [part.tolist() for part in torch.cat(passes).split(batch)]
    turns = [shape for shape, queue in queues.items() for _ in queue]
    order = torch.randperm(len(turns), generator=generator).tolist()
    remaining = {shape: iter(queue) for shape, queue in queues.items()}
    return [next(remaining[turns[turn]]) for turn in order]


def count_batches(shapes: Sequence[Size], uses: int, batch: int) -> int:
    """Return how many batches `deal_batches` deals."""
    return sum(-(-count * uses // batch) for count in Counter(shapes).values())


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choices where the paper is silent; the same in both stages."""
    group = parser.add_argument_group("choices where the paper is silent")
    group.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    group.add_argument("--clip-grad", type=float, default=1.0, help="largest norm of a gradient")
    group.add_argument("--t-mean", type=float, default=0.0, help="times are logit-normal with this mean")
    group.add_argument("--t-std", type=float, default=1.0, help="and this standard deviation")
    group.add_argument("--train-guidance", type=float, default=1.0, help="guidance input while training")
    group.add_argument("--latents", choices=["sample", "mean"], default="sample", help="of the posterior")


def make_batch(
    entries: Sequence[tuple[dict, dict]], generator: torch.Generator, args: argparse.Namespace, device, dtype
) -> dict[str, Tensor]:
    """Stack cached (posterior, prompt) pairs and draw noise and times: the arguments of `flow_loss`."""
    posteriors, prompts = zip(*entries)
    latents = torch.stack([entry["mean"] for entry in posteriors]).float()  # (b, z, h, w)
    if args.latents == "sample":
        std = torch.stack([entry["std"] for entry in posteriors]).float()
        latents = latents + std * torch.randn(std.shape, generator=generator)
    return {
        "latents": latents.to(device),
        "noise": torch.randn(latents.shape, generator=generator).to(device),
        "t": draw_times(len(latents), generator, args.t_mean, args.t_std).to(device),
        "txt": torch.stack([prompt["txt"] for prompt in prompts]).to(device, dtype),
        "pooled": torch.stack([prompt["pooled"] for prompt in prompts]).to(device, dtype),
    }


# Files


class TensorCache:
    """Tensors on disk, one file per entry, named by the content they were made from."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Say whether there is a file, whole by its header and length: of thousands none is read."""
        try:
            with safe_open(self.file(key), "pt") as file:
                return CHECKSUM in (file.metadata() or {})
        except (FileNotFoundError, SafetensorError):
            return False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return what was put; None when there is no file, or a bit of it is wrong: then it is deleted."""
        try:
            content = self.file(key).read_bytes()
        except FileNotFoundError:
            return None
        if content == sealed(content):
            return from_bytes(content)
        self.file(key).unlink(missing_ok=True)  # so that `in` says so too, and it is made anew
        return None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        content = sealed(to_bytes(whole, {CHECKSUM: f"{0:08x}"}))
        with atomic(self.file(key)) as path:
            path.write_bytes(content)  # and not save_file, whose error on a full disk is no OSError


def sealed(content: bytes) -> bytes | None:
    """Return a safetensors file with its right checksum, which covers all else; None if it has no place."""
    place = content.find(SEAL) + len(SEAL)
    if place < len(SEAL):
        return None
    blank = content[:place] + b"0" * 8 + content[place + 8 :]
    return content[:place] + b"%08x" % zlib.crc32(blank) + content[place + 8 :]


class MemoryCache(dict):
    """The same without a disk."""

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        self[key] = {name: tensor.cpu() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Picture:
    """What the trainer sees once in a while: a photo, or a box of it, in the shape it is trained in."""

    path: Path
    shape: Size
    box: Box | None = None
    flip: bool = False
    digest: str | None = None  # SHA-256 of the photo's file, if known

    def key(self, encoder: str) -> str:
        """Name its latents. encoder: whatever identifies the autoencoder."""
        digest = self.digest or hashlib.sha256(self.path.read_bytes()).hexdigest()
        return content_key(CACHE_VERSION, digest, self.shape, self.box, self.flip, encoder)


def content_key(*recipe: object) -> str:
    """Hash what an entry of the cache is made from; all of it must survive JSON."""
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


@torch.no_grad()
def encode_pictures(pictures: Sequence[Picture], autoencoder, encoder: str, cache: TensorCache) -> list[str]:
    """Put the posterior of every picture in the cache and return the keys, in order.

    An entry holds mean and std (z, h, w) in float16, scaled as latents: 1 MB at 1024 x 1024. Pictures that
    are there already are not encoded again. autoencoder: a `flux.AutoEncoder`, called one picture at a time.
    """
    keys, read = [], lru_cache(maxsize=1)(read_photo)  # crops of one photo follow each other
    device = next(autoencoder.parameters()).device
    for picture in tqdm(pictures, "latents", disable=len(pictures) < 50):
        keys.append(key := picture.key(encoder))
        if key not in cache:
            image = to_tensor(read(picture.path), picture.shape, picture.box, picture.flip)
            mean, std = autoencoder.encode_moments(image[None].to(device))
            cache.put(key, {"mean": mean[0].half(), "std": std[0].half()})
    return keys


@torch.no_grad()
def encode_prompts(prompts: Sequence[str], conditioner, encoder: str, cache: TensorCache) -> list[str]:
    """Put txt (l, d) and pooled (d,) of every prompt in the cache and return the keys, in order."""
    keys = []
    for prompt in tqdm(prompts, "prompts", disable=len(prompts) < 50):
        keys.append(key := content_key(prompt, encoder))
        if key not in cache:
            txt, pooled = conditioner.encode([prompt])
            cache.put(key, {"txt": txt[0], "pooled": pooled[0]})
    return keys


# Looking at results


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    cell: Size = (256, 256),
) -> Image.Image:
    """Lay pictures out in a labelled grid, each fitted whole into its cell, on grey.

    None and short rows leave cells empty. Long labels are wrapped, and cut at five lines.
    """
    height, width = cell
    gap, font = 4, ImageFont.load_default(size=max(10, min(cell) // 16))
    letters, line = max(1, int(width / font.getlength("n"))), math.ceil(sum(font.getmetrics()) * 1.1)
    wrap = lambda text, width: textwrap.wrap(
        printable(" ".join(text.split())), max(1, width), max_lines=5, placeholder="…"
    )
    labels = [wrap(label, letters // 2) for label in row_labels]
    titles = [wrap(title, letters) for title in column_titles]
    left = gap + (width // 2 if any(labels) else 0)
    top = gap + line * max((len(title) for title in titles), default=0)
    columns = max(len(titles), max((len(row) for row in rows), default=0))
    sheet = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, title in enumerate(titles):
        draw.text((left + j * (width + gap), gap // 2), "\n".join(title), "black", font)
    for i, row in enumerate(rows):
        if i < len(labels):
            draw.text((gap, top + i * (height + gap)), "\n".join(labels[i]), "black", font)
        for j, picture in enumerate(row):
            if picture is not None:
                picture = ImageOps.pad(picture.convert("RGB"), (width, height), color=(128, 128, 128))
                sheet.paste(picture, (left + j * (width + gap), top + i * (height + gap)))
    return sheet
