"""Eyes: the frozen networks that embed the face in a photo for the predictor.

An eye should not be the network that scores the likeness later: such scores would flatter the prediction.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flux.hashes import fingerprint
from flux.loading import ModelFiles, folder_around
from people.faces import known_face
from people.photos import Box
from vision import inception_resnet, small
from vision.clip_vit import find_clip_vit, load_clip_vit
from vision.detector import find_faces, load_detector

MARGIN = 1.5  # the side of the square that CLIP sees, relative to the longer side of the face's box


class Eye:
    """Embed the face in a photo. `name` and `weights`, a fingerprint, say which eye it is."""

    name: str
    weights: str

    @torch.no_grad()
    def embed(self, path: Path, photo: Image.Image) -> Tensor | None:
        """Return a vector (width,) on the CPU; None when no face is found."""
        raise NotImplementedError


class SmallEye(Eye):
    """The small recogniser of `vision/small.py`, on whole pictures: a model folder's `eye.safetensors`."""

    def __init__(self, file: Path, device: torch.device | str = "cpu"):
        self.name, self.weights = "small", fingerprint(file)
        self.network = small.load_identity(file, device)

    def embed(self, path: Path, photo: Image.Image) -> Tensor:
        return self.network.embed_faces([small.shrink(photo)])[0].cpu()


class FaceEye(Eye):
    """CLIP's image tower or a face recogniser, on the largest face of a photo."""

    def __init__(self, name: str, file: Path | None, device: torch.device | str = "cpu"):
        """name: clip or recognizer; file: its weights, None for those that are downloaded."""
        self.name, self.detector = name, load_detector()
        if name == "clip":
            self.network = load_clip_vit(file, device)
            self.weights = fingerprint(find_clip_vit(file))
        else:
            self.network = inception_resnet.load_recognizer(file, device)
            self.weights = fingerprint(file) if file else inception_resnet.SHA256

    def embed(self, path: Path, photo: Image.Image) -> Tensor | None:
        box = known_face(path) or next((face.box for face in find_faces(photo, self.detector)), None)
        if box is None:
            return None
        if self.name == "clip":
            return self.network.embed_images([square_around(photo, box)])[0].float().cpu()
        return self.network.embed_faces([photo], [box])[0].float().cpu()


def square_around(photo: Image.Image, box: Box) -> Image.Image:
    """Cut out a square around a face, MARGIN times as large; what is outside the photo is black."""
    x0, y0, x1, y1 = box
    x, y, half = (x0 + x1) / 2, (y0 + y1) / 2, MARGIN * max(x1 - x0, y1 - y0) / 2
    return photo.convert("RGB").crop(tuple(round(side) for side in (x - half, y - half, x + half, y + half)))


EYES = ("small", "clip", "recognizer")


def add_eye_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `find_eye` reads."""
    group = parser.add_argument_group("eye")
    group.add_argument("--eye", choices=EYES, help="default: small if the model brings one, else clip")
    group.add_argument("--eye-weights", type=Path, metavar="FILE", help="default: the model's, or downloaded")


def find_eye(name: str | None, weights: Path | None, files: ModelFiles, device: torch.device) -> Eye:
    """Return an eye by its name, on the device."""
    own = folder_around(files.transformer) / "eye.safetensors"
    if name is None:
        name = "small" if own.is_file() else "clip"
    return SmallEye(weights or own, device) if name == "small" else FaceEye(name, weights, device)
