"""The face of the person in a photo: `known_face` reads it from a faces.json, `find_face` detects it."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from flux.checkpoint import read_json
from flux.errors import UserError
from people.folders import composed
from people.photos import Box
from vision.detector import find_faces

if TYPE_CHECKING:
    import cv2


def known_face(path: Path) -> Box | None:
    """Return the box that a photo has in the faces.json of its folder, {"01.jpg": [x0, y0, x1, y1]}.

    None when there is no such file, or the photo is not in it; UserError when what stands there is no box.
    """
    file = path.with_name("faces.json")
    known = read_json(file) if file.is_file() else {}
    boxes = {composed(name): box for name, box in known.items()}
    name = composed(path.name)
    if name not in boxes:
        return None
    box = boxes[name]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise UserError(f"{file}: {path.name} has {box!r}, must be [x0, y0, x1, y1] in pixels")
    return tuple(box)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def clip_face(path: Path, photo: Image.Image, box: Sequence[float]) -> Box:
    """Return the part of a face's box that is inside the photo; warns if that is not all of it.

    UserError, naming the photo, when nothing is.
    """
    x0, y0, x1, y1 = box
    inside = max(x0, 0), max(y0, 0), min(x1, photo.width), min(y1, photo.height)
    where = f"the photo of {photo.width} x {photo.height} pixels (w x h)"
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise UserError(f"{path}: the face box {tuple(box)} is not inside {where}")
    if inside != tuple(box):
        warnings.warn(
            f"{path}: the face box {tuple(box)} reaches beyond {where}: cut to {inside}", stacklevel=2
        )
    return inside


def locate_face(path: Path, photo: Image.Image, detector: "cv2.FaceDetectorYN", otherwise: str = "") -> Box:
    """Return the face's box, from faces.json or else from the detector, for a command with many people.

    otherwise: what the user can do besides writing to faces.json, as for `find_face`.
    """
    face = known_face(path)
    if face:
        return clip_face(path, photo, face)
    return find_face(path, photo, detector, f"write its box into {path.with_name('faces.json')}{otherwise}")


def find_face(
    path: Path,
    photo: Image.Image,
    detector: "cv2.FaceDetectorYN",
    advice: str = "say where it is: --face x0,y0,x1,y1; or train on the whole photo: --no-augment",
) -> Box:
    """Return the box of the only large face that the detector finds in a photo; faces.json is not read.

    advice: what else the user can do, for the UserError that is raised when there is no face, or several.
    """
    faces = find_faces(photo, detector)
    if not faces:
        raise UserError(
            f"{path}: no face found in {photo.width}x{photo.height} pixels. Take a photo in which the face "
            f"is upright and unobstructed, or {advice}"
        )
    # People far behind do not count.
    prominent = [face for face in faces if face.area > faces[0].area / 4]
    if len(prominent) > 1:
        boxes = "\n".join("  " + ",".join(map(str, face.box)) for face in prominent)
        raise UserError(
            f"{path}: {len(prominent)} faces found. Crop the photo, or {advice}. Largest first:\n{boxes}"
        )
    return faces[0].box
