"""Eyes: the frozen networks that embed the face in a photo for the predictor.

An eye should not be the network that scores the likeness later: such scores would flatter the prediction.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from flux.errors import UserError
from flux.hashes import fingerprint, sha256
from flux.loading import ModelFiles, folder_around
from people.faces import clip_face, known_face
from people.photos import Box
from vision import inception_resnet, small
from vision.clip_vit import find_clip_vit, load_clip_vit
from vision.detector import find_faces, load_detector

if TYPE_CHECKING:
    import cv2

MARGIN = 1.5  # the side of the square that CLIP sees, relative to the longer side of the face's box


class Eye:
    """Embed the face in a photo. `name` and `weights`, a fingerprint, say which eye it is."""

    name: str
    weights: str
    detector: "cv2.FaceDetectorYN | None" = None  # None: it looks at whole pictures

    def embed(self, photo: Image.Image, face: Box | None = None) -> Tensor:
        """Return a vector (width,) on the CPU; face: its box, for an eye with a detector.

        Raises UserError for a photo that is too small.
        """
        raise NotImplementedError

    def embed_file(self, path: Path, photo: Image.Image, face: Box | None = None) -> Tensor:
        """Do the same with a photo from a file, which an error then names."""
        try:
            return self.embed(photo, face)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def find_and_embed(self, path: Path, photo: Image.Image) -> Tensor | None:
        """Embed the face that faces.json has for a photo, or else the largest one; None without a face."""
        face = known_face(path) if self.detector else None
        if face:
            face = clip_face(path, photo, face)
        elif self.detector:
            found = find_faces(photo, self.detector)
            if not found:
                return None
            face = found[0].box
        return self.embed_file(path, photo, face)


class SmallEye(Eye):
    """The small recogniser of `vision/small.py`, on whole pictures: a model folder's `eye.safetensors`."""

    def __init__(self, file: Path, device: torch.device | str = "cpu", detector: Path | None = None):
        self.name, self.weights = "small", fingerprint(file)
        self.network = small.load_identity(file, device)

    def embed(self, photo: Image.Image, face: Box | None = None) -> Tensor:
        return self.network.embed_faces([small.shrink(photo)])[0].cpu()


class CLIPEye(Eye):
    """CLIP's image tower, on a square around the face."""

    def __init__(self, file: Path | None, device: torch.device | str = "cpu", detector: Path | None = None):
        self.name, self.weights = "clip", fingerprint(find_clip_vit(file))
        self.network, self.detector = load_clip_vit(file, device), load_detector(detector)

    def embed(self, photo: Image.Image, face: Box | None = None) -> Tensor:
        return self.network.embed_images([square_around(photo, face)])[0].float().cpu()


class RecognizerEye(Eye):
    """A face recogniser, which must then not score the result."""

    def __init__(self, file: Path | None, device: torch.device | str = "cpu", detector: Path | None = None):
        self.name, self.weights = "recognizer", sha256(file) if file else inception_resnet.SHA256
        self.network, self.detector = inception_resnet.load_recognizer(file, device), load_detector(detector)

    def embed(self, photo: Image.Image, face: Box | None = None) -> Tensor:
        return self.network.embed_faces([photo], [face])[0].float().cpu()


def square_around(photo: Image.Image, box: Box) -> Image.Image:
    """Cut out a square around a face, MARGIN times as large; what is outside the photo is black."""
    x0, y0, x1, y1 = box
    x, y, half = (x0 + x1) / 2, (y0 + y1) / 2, MARGIN * max(x1 - x0, y1 - y0) / 2
    return photo.convert("RGB").crop(tuple(round(side) for side in (x - half, y - half, x + half, y + half)))


EYES = {"small": SmallEye, "clip": CLIPEye, "recognizer": RecognizerEye}


def add_eye_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `find_eye` reads."""
    group = parser.add_argument_group("eye")
    group.add_argument("--eye", choices=EYES, help="default: small if the model brings one, else clip")
    group.add_argument("--eye-weights", type=Path, metavar="FILE", help="default: the model's, or downloaded")


def find_eye(
    name: str | None,
    weights: Path | None,
    files: ModelFiles,
    device: torch.device,
    detector: Path | None = None,
) -> Eye:
    """Return an eye by its name, on the device; None for the model's own or else CLIP.

    weights, detector: files, None for the model's own or those that are downloaded. Raises OSError when
    there are none, UserError for an unknown name.
    """
    beside = folder_around(files.transformer) / "eye.safetensors"
    name = name or ("small" if beside.is_file() else "clip")
    if name not in EYES:  # in a predictor's header
        raise UserError(f"the eye {name!r} is not known, must be one of {', '.join(EYES)}")
    if name == "small" and not (weights or beside).is_file():
        raise FileNotFoundError(
            f"no eye at {weights or beside}: --eye small is for models that bring eye.safetensors, as the "
            "toy model does; take --eye clip"
        )
    return EYES[name](weights or (beside if name == "small" else None), device, detector)
