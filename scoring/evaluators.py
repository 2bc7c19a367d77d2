"""Evaluators: the frozen networks that turn pictures, prompts and faces into embeddings for `metrics.py`.

The paper's are CLIP ViT-B/32 and, for the faces that YuNet finds, Inception-ResNet-v1. A model folder may
bring small ones of its own.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux.conditioner import clip_tokenizer
from flux.errors import UserError
from flux.hashes import fingerprint
from flux.loading import folder_around
from people.cache import TensorCache, content_key
from people.photos import READING, Box, read_photo
from run.models import named_model
from vision import clip_vit, inception_resnet, small
from vision import detector as yunet
from vision.clip_vit import CLIPViT, find_clip_vit, load_clip_vit

if TYPE_CHECKING:
    import cv2

BATCH = 16  # pictures embedded at once
FACE_VERSION = 1  # raise it when boxes or crops change, so that all faces are embedded anew

Entry = dict[str, Tensor]  # what the cache keeps of one picture


@dataclass(frozen=True, eq=False)
class Faces:
    """All faces of a picture: embeddings (n, d), and middles (n, 2), x and y as parts of its sides."""

    embedded: Tensor
    middles: Tensor


def add_evaluator_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for `load_evaluators`, except --model, and how to score a picture without a face."""
    group = parser.add_argument_group("evaluators")
    file = {"type": Path, "metavar": "FILE"}
    group.add_argument(
        "--clip", type=Path, metavar="DIR", help="weights and tokenizer; default: ViT-B/32 from the hub"
    )
    group.add_argument("--recognizer", **file, help="Inception-ResNet-v1; default: VGGFace2's, downloaded")
    group.add_argument("--detector", **file, help="YuNet's .onnx file; default: the one in vision/")
    group.add_argument("--no-face", choices=["zero", "skip"], default="zero", help="if no face is found")


class Evaluators:
    """Embed prompts, pictures and faces; embeddings of pictures are kept by the content of the files."""

    name = ""  # which networks they are
    note = ""  # what to know of their scores

    def __init__(self, cache: TensorCache, device: torch.device | str = "cpu"):
        self.cache, self.device = cache, device
        self.used: dict[str, str] = {}  # fingerprints of the weights used so far, by network

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed prompts, (n, d); the dot product with the embedding of a picture is CLIP-T."""
        raise NotImplementedError

    def embed_images(self, paths: Sequence[Path]) -> Tensor:
        """Embed pictures, (n, d)."""
        raise NotImplementedError

    def embed_faces(self, paths: Sequence[Path]) -> tuple[Tensor, list[int]]:
        """Embed each picture's largest face, (n, d), and count its faces; without one the row is zero."""
        raise NotImplementedError

    def at_hand(self) -> dict[str, bool]:
        """Tell of FaceSim and CLIP-T whether their networks are on this disk already."""
        return {"facesim": True, "clip-t": True}

    def embed_reference(self, path: Path, face: Box | None = None) -> Tensor | None:
        """Embed the face in the box, without one the photo's largest, (d,); None if there is no face."""
        (embedding,), (count,) = self.embed_faces([path])
        return embedding if count else None

    def embed_all_faces(self, paths: Sequence[Path]) -> list[Faces]:
        """Embed every face of each picture, largest first."""
        raise NotImplementedError

    def read(self, path: Path) -> Image.Image:
        return read_photo(path)

    def _embed_files(
        self,
        recipe: tuple,
        weights: dict[str, str],
        paths: Sequence[Path],
        embed: Callable[[list], Iterable[Entry]],
        read: Callable[[Path], object] | None = None,
    ) -> list[Entry]:
        """Return the entry of each file; files that are not in the cache are embedded in batches.

        recipe: names the method and its version; weights: fingerprints of the networks; read: what makes of a
        file what `embed` takes, by default a picture.
        """
        read = read or self.read
        self.used |= weights
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        keys = [content_key(*recipe, READING, *weights.values(), digest) for digest in digests]
        entries = {key: self.cache.get(key) for key in keys}
        new = [(key, path) for key, path in dict(zip(keys, paths)).items() if entries[key] is None]
        with tqdm(
            total=len(new), desc=f"embedding ({recipe[0]})", unit="picture", disable=len(new) < 200
        ) as bar:
            for start in range(0, len(new), BATCH):
                batch = new[start : start + BATCH]
                embedded = embed([read(path) for _, path in batch])
                for (key, _), entry in zip(batch, embedded, strict=True):
                    self.cache.put(key, entry)
                    entries[key] = entry
                    bar.update()
        return [entries[key] for key in keys]


class PaperEvaluators(Evaluators):
    """CLIP ViT-B/32, and Inception-ResNet-v1 on the faces that YuNet finds; each is loaded at first use."""

    name = "CLIP, Inception-ResNet-v1 and YuNet"

    def __init__(
        self,
        cache: TensorCache,
        device: torch.device | str = "cpu",
        clip: Path | None = None,
        recognizer: Path | None = None,
        detector: Path | None = None,
    ):
        """clip, recognizer, detector: weight files; None uses the paper's.

        Of the paper's, CLIP and the recognizer are downloaded.
        """
        super().__init__(cache, device)
        self.clip_path, self.recognizer_path, self.detector_path = clip, recognizer, detector

    @cached_property
    def clip(self) -> CLIPViT:
        return load_clip_vit(self.clip_path, self.device)

    @cached_property
    def recognizer(self) -> inception_resnet.InceptionResnet:
        return inception_resnet.load_recognizer(self.recognizer_path, self.device)

    @cached_property
    def detector(self) -> "cv2.FaceDetectorYN":
        return yunet.load_detector(self.detector_path)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed prompts with CLIP, (n, d); a prompt of more than 77 tokens is cut, with a warning."""
        unique = list(dict.fromkeys(texts))
        tokens = clip_tokenizer(find_clip_vit(self.clip_path).parent)(unique)
        embedded = self.clip.embed_texts(tokens).cpu()
        return embedded[[unique.index(text) for text in texts]]

    def embed_images(self, paths: Sequence[Path]) -> Tensor:
        weights = {"CLIP": fingerprint(find_clip_vit(self.clip_path))}
        entries = self._embed_files(("CLIP",), weights, paths, self._embed_with_clip)
        return torch.stack([entry["image"] for entry in entries])

    def embed_faces(self, paths: Sequence[Path]) -> tuple[Tensor, list[int]]:
        recipe = "face", FACE_VERSION
        entries = self._embed_files(recipe, self._face_weights(), paths, self._find_and_embed_faces)
        width = next((len(entry["face"]) for entry in entries if "face" in entry), 1)
        faces = torch.stack([entry.get("face", torch.zeros(width)) for entry in entries])
        return faces, [int(entry["count"]) for entry in entries]

    def at_hand(self) -> dict[str, bool]:
        recognizer = self.recognizer_path or inception_resnet.place().is_file()
        return {"facesim": bool(recognizer), "clip-t": bool(self.clip_path) or clip_vit.is_cached()}

    def embed_reference(self, path: Path, face: Box | None = None) -> Tensor | None:
        if face is None:
            return super().embed_reference(path)
        self.used["recognizer"] = _identify(self.recognizer_path, inception_resnet.SHA256)
        return self.recognizer.embed_faces([self.read(path)], [face])[0].cpu()

    def embed_all_faces(self, paths: Sequence[Path]) -> list[Faces]:
        recipe = "all faces", FACE_VERSION
        entries = self._embed_files(recipe, self._face_weights(), paths, self._find_and_embed_all_faces)
        return [Faces(entry["faces"], entry["middles"]) for entry in entries]

    def _face_weights(self) -> dict[str, str]:
        return {
            "recognizer": _identify(self.recognizer_path, inception_resnet.SHA256),
            "detector": _identify(self.detector_path, yunet.SHA256),
        }

    def _embed_with_clip(self, images: list[Image.Image]) -> list[Entry]:
        return [{"image": embedding} for embedding in self.clip.embed_images(images).cpu()]

    def _find_and_embed_faces(self, images: list[Image.Image]) -> list[Entry]:
        """Return for each image the number of faces and, if there is any, the embedding of the largest."""
        faces = [yunet.find_faces(image, self.detector) for image in images]
        entries = [{"count": torch.tensor(len(faces_of_image))} for faces_of_image in faces]
        with_face = [k for k, entry in enumerate(entries) if entry["count"]]
        if with_face:
            boxes = [faces[k][0].box for k in with_face]
            embedded = self.recognizer.embed_faces([images[k] for k in with_face], boxes).cpu()
            for k, embedding in zip(with_face, embedded):
                entries[k]["face"] = embedding
        return entries

    def _find_and_embed_all_faces(self, images: list[Image.Image]) -> Iterable[Entry]:
        for image in images:
            boxes = [face.box for face in yunet.find_faces(image, self.detector)]
            sides = torch.tensor([image.width, image.height])
            middles = torch.tensor(boxes).reshape(-1, 2, 2).float().mean(dim=1) / sides  # corners (n, 2, 2)
            embedded = (
                self.recognizer.embed_faces([image] * len(boxes), boxes).cpu() if boxes else torch.zeros(0, 1)
            )
            yield {"faces": embedded, "middles": middles}


def _identify(path: Path | None, pinned: str) -> str:
    """Return the fingerprint of a weights file, or the pinned hash of the one that is downloaded."""
    return fingerprint(path) if path else pinned


class SmallEvaluators(Evaluators):
    """The two networks of `vision/small.py`, for the pictures of a model that brings them along."""

    def __init__(self, folder: Path, cache: TensorCache, device: torch.device | str = "cpu"):
        super().__init__(cache, device)
        self.folder, self.name = folder, str(folder)
        self.identity, self.prompt = small.load_judges(folder, device)
        self.note = (
            f"scored by {Path(*folder.parts[-3:])}: CLIP-T is the mean probability that the picture shows "
            "what the prompt names, CLIP-I the cosine of all such probabilities of two pictures, and the "
            "whole picture serves as the face"
        )

    def read(self, path: Path) -> Image.Image:
        """Read a picture; a large one is shrunk to the size that the networks were trained on."""
        return self._shrunk(super().read(path), path)

    def _shrunk(self, image: Image.Image, path: Path) -> Image.Image:
        try:
            return small.shrink(image)
        except UserError as error:
            raise UserError(f"{path}: {error}, for {self.name}") from error

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Weight the words that each prompt names equally, (n, words); UserError if it names none."""
        return self.prompt.embed_texts(texts)

    def embed_images(self, paths: Sequence[Path]) -> Tensor:
        """Return the probability that each picture shows each known word, (n, words)."""
        return self._embed("prompt", paths, self.prompt.embed_images)

    def embed_faces(self, paths: Sequence[Path]) -> tuple[Tensor, list[int]]:
        """Embed whole pictures, (n, d). There is no detector, so each counts as one face."""
        return self._embed("identity", paths, self.identity.embed_faces), [1] * len(paths)

    def embed_all_faces(self, paths: Sequence[Path]) -> list[Faces]:
        """Embed the faces of pictures as wide as they have faces, each in a square of its own."""

        def embed(pictures: list[list[Image.Image]]) -> Iterable[Entry]:
            return ({"faces": self.identity.embed_faces(squares).cpu()} for squares in pictures)

        weights, found = {"identity": fingerprint(self.folder / "identity.safetensors")}, []
        for entry in self._embed_files(("squares",), weights, paths, embed, self._read_squares):
            x = (torch.arange(len(entry["faces"])) + 0.5) / len(entry["faces"])
            found.append(Faces(entry["faces"], torch.stack([x, torch.full_like(x, 0.5)], dim=1)))
        return found

    def _read_squares(self, path: Path) -> list[Image.Image]:
        """Read a picture and cut it into about square ones, from left to right, of the networks' size."""
        image = super().read(path)
        count = max(1, round(image.width / image.height))
        edges = [round(k * image.width / count) for k in range(count + 1)]
        return [
            self._shrunk(image.crop((*x, image.height)), path) for x in zip(edges, [0] * count, edges[1:])
        ]

    def _embed(
        self, network: str, paths: Sequence[Path], embed: Callable[[list[Image.Image]], Tensor]
    ) -> Tensor:
        weights = {network: fingerprint(self.folder / f"{network}.safetensors")}
        rows = lambda images: [{"row": row} for row in embed(images).cpu()]
        entries = self._embed_files(("small",), weights, paths, rows)
        return torch.stack([entry["row"] for entry in entries])


def load_evaluators(
    model: str | None,
    cache: TensorCache,
    device: torch.device | str = "cpu",
    clip: Path | None = None,
    recognizer: Path | None = None,
    detector: Path | None = None,
) -> Evaluators:
    """Return the evaluators that a model brings along in its folder `judges`, else the paper's.

    model: as --model; clip, recognizer, detector: weight files; None uses the paper's (CLIP and the
    recognizer are downloaded).
    """
    for option, path in {"clip": clip, "recognizer": recognizer, "detector": detector}.items():
        if path and not path.exists():
            raise FileNotFoundError(f"--{option} {path}: no such file")
    path, _ = named_model(model) if model else (None, None)
    if path:
        folder = (path if path.is_dir() else folder_around(path)) / "judges"
        if folder.is_dir():
            if clip or recognizer:
                option = "clip" if clip else "recognizer"
                raise UserError(f"--{option} is of no use: --model {model} brings evaluators of its own")
            return SmallEvaluators(folder, cache, device)
    return PaperEvaluators(cache, device, clip, recognizer, detector)
