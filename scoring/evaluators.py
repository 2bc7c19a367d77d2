"""Who looks at the pictures: frozen networks, behind one interface for `metrics.py`.

The paper's are CLIP ViT-B/32, and Inception-ResNet-v1 on the faces that a detector finds; a model folder may
bring small ones of its own.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux.conditioner import clip_tokenizer
from flux.errors import UserError
from flux.loading import folder_around
from people.cache import content_key
from people.photos import read_photo
from run.files import fingerprint
from run.models import named_model
from vision import detector as yunet
from vision import inception_resnet, small
from vision.clip_vit import find_clip_vit, load_clip_vit

BATCH = 16  # pictures embedded at once
FACE_VERSION = 1  # raise it when boxes or crops change: faces embedded before are then embedded anew


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_judges` reads, --model aside, and what a picture without a face scores."""
    group, file = parser.add_argument_group("judges"), {"type": Path, "metavar": "FILE"}
    group.add_argument(
        "--clip", type=Path, metavar="DIR", help="weights and tokenizer; default: ViT-B/32 from the hub"
    )
    group.add_argument("--recognizer", **file, help="Inception-ResNet-v1; default: VGGFace2's, downloaded")
    group.add_argument("--detector", **file, help="YuNet's .onnx file; default: from the hub")
    group.add_argument("--no-face", choices=["zero", "skip"], default="zero", help="if no face is found")


class Judges:
    """What all judges share: what one said of a file is kept by the file's content.

    Every kind has `embed_texts(texts)` and `embed_images(paths)`, (n, d), whose dot product is CLIP-T, and
    `embed_faces(paths)`, (n, d) with the number of faces in each picture.
    """

    name = note = ""  # who judges, and what to know of scores by them

    def __init__(self, cache, device="cpu"):
        """cache: a `TensorCache` or `MemoryCache`."""
        self.cache, self.device = cache, device
        self.used: dict[str, str] = {}  # fingerprints of the weights asked so far

    def read(self, path: Path) -> Image.Image:
        return read_photo(path)

    def _remember(
        self, judge: tuple, weights: dict[str, str], paths: Sequence[Path], embed: Callable
    ) -> list[dict[str, Tensor]]:
        """Return the entry of each file, embedding in batches those that the cache does not know."""
        self.used |= weights
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        keys = [content_key(*judge, *weights.values(), digest) for digest in digests]
        entries = {key: self.cache.get(key) for key in keys}
        new = [(key, path) for key, path in dict(zip(keys, paths)).items() if entries[key] is None]
        bar = tqdm(total=len(new), desc=f"judging ({judge[0]})", unit="picture", disable=len(new) < 200)
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            for (key, _), entry in zip(part, embed([self.read(path) for _, path in part])):
                self.cache.put(key, entry)
                entries[key] = entry
                bar.update()
        bar.close()
        return [entries[key] for key in keys]


class PaperJudges(Judges):
    """CLIP, and Inception-ResNet-v1 on the faces that YuNet finds; each is loaded when first asked."""

    name = "CLIP, Inception-ResNet-v1 and YuNet"

    def __init__(
        self, clip: Path | None, recognizer: Path | None, detector: Path | None, cache, device="cpu"
    ):
        """Take files, None for the hub's."""
        super().__init__(cache, device)
        self.clip_path, self.recognizer_path, self.detector_path = clip, recognizer, detector

    @cached_property
    def clip(self):
        return load_clip_vit(self.clip_path, self.device)

    @cached_property
    def recognizer(self):
        return inception_resnet.load_recognizer(self.recognizer_path, self.device)

    @cached_property
    def detector(self):
        return yunet.load_detector(self.detector_path)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed prompts with CLIP, (n, d); what CLIP's 77 tokens do not hold is cut with a warning."""
        unique = list(dict.fromkeys(texts))
        tokens = clip_tokenizer(find_clip_vit(self.clip_path).parent)(unique)
        embedded = self.clip.embed_texts(tokens).cpu()
        return embedded[[unique.index(text) for text in texts]]

    def embed_images(self, paths: Sequence[Path]) -> Tensor:
        """Embed pictures with CLIP, (n, d)."""

        def embed(images: list[Image.Image]) -> list[dict[str, Tensor]]:
            return [{"image": row} for row in self.clip.embed_images(images).cpu()]

        weights = {"CLIP": fingerprint(find_clip_vit(self.clip_path))}
        return torch.stack([entry["image"] for entry in self._remember(("CLIP",), weights, paths, embed)])

    def embed_faces(self, paths: Sequence[Path]) -> tuple[Tensor, list[int]]:
        """Embed each picture's largest face, (n, d), and count its faces; without one the row is zero."""

        def embed(images: list[Image.Image]) -> list[dict[str, Tensor]]:
            found = [yunet.find_faces(image, self.detector) for image in images]
            seen = [(image, faces[0].box) for image, faces in zip(images, found) if faces]
            rows = iter(self.recognizer.embed_faces(*zip(*seen)).cpu() if seen else ())
            entries = [{"count": torch.tensor(len(faces))} for faces in found]
            return [entry | ({"face": next(rows)} if entry["count"] else {}) for entry in entries]

        weights = {
            name: fingerprint(path) if path else pinned
            for name, path, pinned in (
                ("recognizer", self.recognizer_path, inception_resnet.SHA256),
                ("detector", self.detector_path, yunet.SHA256),
            )
        }
        entries = self._remember(("face", FACE_VERSION), weights, paths, embed)
        blank = torch.zeros(next((len(entry["face"]) for entry in entries if "face" in entry), 1))
        faces = torch.stack([entry.get("face", blank) for entry in entries])
        return faces, [int(entry["count"]) for entry in entries]


class SmallJudges(Judges):
    """The two of `vision/small.py`, for pictures of a model that brings them along; large ones are shrunk."""

    def __init__(self, folder: Path, cache, device="cpu"):
        super().__init__(cache, device)
        self.folder, self.name = folder, str(folder)
        self.identity, self.prompt = small.load_judges(folder, device)
        self.note = (
            f"judged by {Path(*folder.parts[-3:])}: CLIP-T is the share of what the prompt names that is "
            "seen, CLIP-I the cosine of what is seen in both, a face the whole picture"
        )

    def read(self, path: Path) -> Image.Image:
        image = super().read(path)
        if small.fits(image.height, image.width):
            return image
        shrink = math.sqrt(image.height * image.width) / small.SIZE
        if shrink < 1:
            size = f"{image.width} x {image.height} pixels"
            raise UserError(
                f"{path} has {size}; {self.name} know pictures of about {small.SIZE} x {small.SIZE}"
            )
        size = round(image.width / shrink), round(image.height / shrink)
        return image.resize(size, Image.Resampling.LANCZOS)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Share 1 among the words that each prompt names, (n, d); ValueError when the judge knows none."""
        return self.prompt.embed_texts(texts)

    def embed_images(self, paths: Sequence[Path]) -> Tensor:
        """Return the probability of every word the judge knows, (n, d)."""
        return self._embed("prompt", paths, self.prompt.embed_images)

    def embed_faces(self, paths: Sequence[Path]) -> tuple[Tensor, list[int]]:
        """Embed whole pictures, (n, d): without a detector each counts as one face."""
        return self._embed("identity", paths, self.identity.embed_faces), [1] * len(paths)

    def _embed(self, judge: str, paths: Sequence[Path], embed: Callable) -> Tensor:
        weights = {judge: fingerprint(self.folder / f"{judge}.safetensors")}
        rows = lambda images: [{"row": row} for row in embed(images).cpu()]
        return torch.stack([entry["row"] for entry in self._remember(("small",), weights, paths, rows)])


def load_judges(args: argparse.Namespace, cache, device="cpu") -> Judges:
    """Return the judges that --model brings along, else the paper's; see `add_judge_arguments`."""
    for name in ("clip", "recognizer", "detector"):
        if vars(args)[name] and not vars(args)[name].exists():
            raise FileNotFoundError(f"--{name} {vars(args)[name]}: no such file")
    place, _ = named_model(args.model) if args.model else (None, None)
    own = (
        place and (place if place.is_dir() else folder_around(place)) / "judges"
    )  # beside a transformer's file
    if own and own.is_dir():
        if unused := [name for name in ("clip", "recognizer") if vars(args)[name]]:
            raise UserError(f"--{unused[0]} is of no use: --model {args.model} brings judges of its own")
        return SmallJudges(own, cache, device)
    return PaperJudges(args.clip, args.recognizer, args.detector, cache, device)
