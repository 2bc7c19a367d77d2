"""Find faces with YuNet (Wu, Peng and Yu, 2023), run by OpenCV's FaceDetectorYN.

The network lies beside this file; README.md names its source and licence. It sees faces of about 10 to 300
pixels; the sides below bring every face into that range. cv2 is imported only when a detector is loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from flux.errors import UserError

if TYPE_CHECKING:
    import cv2

YUNET = Path(__file__).with_name("face_detection_yunet_2023mar.onnx")
SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"

# The numbers below were measured on 524 news photos, Labeled Faces in the Wild. They have no open licence, so
# the tests use other photos. The main face scores at least .90, noise at most .62.
MIN_SCORE = 0.7
# Part of the smaller box. Two faces share at most .31, one face at two sizes at least .85.
MAX_OVERLAP = 0.5
# Long side in pixels. A face that fills the photo is found in 2 of 66 at 640, 8 at 320, and all 66 at 160.
SIDE = 640
LARGE_FACE_SIDES = (320, 160)
SMALL_FACE_SIDE = 1280

# A face's landmarks: right, down and away from the viewer, in distances between the eyes. Of all symmetric
# shapes the one that, turned, fits those of 262 photos of Labeled Faces in the Wild best: within .026.
SHAPE = np.array([(-0.5, 0, 0), (0.5, 0, 0), (0, 0.51, -0.43), (-0.43, 1.01, -0.05), (0.43, 1.01, -0.05)])


@dataclass(frozen=True, eq=False)
class Face:
    """A face in the photo's own pixels; the box lies inside the photo, the landmarks may not."""

    box: tuple[int, int, int, int]
    # (5, 2) float32, x and y: the person's right eye, left eye, nose, right and left corner of the mouth
    landmarks: np.ndarray
    score: float  # MIN_SCORE .. 1

    @property
    def area(self) -> int:
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)


def load_detector(path: Path | None = None) -> "cv2.FaceDetectorYN":
    """Load YuNet from the file beside this module, or from another one of the same architecture.

    Raises FileNotFoundError when there is no such file; UserError when it is no YuNet network, and when
    OpenCV is not installed.
    """
    path = path or YUNET
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "finding faces needs OpenCV: pip install opencv-python-headless (or give --face x0,y0,x1,y1); "
            f"importing cv2 failed with: {error}"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"--detector {path}: no such file")
    data = path.read_bytes()  # so OpenCV's own file access, which fails on some paths, is not needed

    logging = cv2.utils.logging
    log_level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)  # OpenCV 5 warns of a default it chose itself
    try:
        model = np.frombuffer(data, np.uint8)
        detector = cv2.FaceDetectorYN.create("onnx", model, np.empty(0, np.uint8), (SIDE, SIDE), MIN_SCORE)
        detector.detect(np.zeros((SIDE, SIDE, 3), np.uint8))  # an ONNX file of something else fails only here
    except cv2.error as error:
        message = f"{path} ({len(data)} bytes) is no YuNet network; it should be {YUNET.name}"
        raise UserError(message) from error
    finally:
        logging.setLogLevel(log_level)
    return detector


def find_faces(image: Image.Image, detector: "cv2.FaceDetectorYN") -> list[Face]:
    """Find the faces of an upright photo, largest first.

    YuNet misses large faces. So it looks at the photo with the long side at 640 pixels and, for faces that
    fill more than half of it, smaller still: also when a face was found, because that may be a small one in
    the background. A photo without any face so far gets one more look at 1280, for small ones.
    """
    image = image.convert("RGB")
    faces = _detect(image, detector, SIDE)
    for side in LARGE_FACE_SIDES:
        # Only the large ones: small finds in small pictures are blurred bystanders and hands.
        faces += [face for face in _detect(image, detector, side) if _long_side(face) > max(image.size) / 2]
    if not faces:
        faces = _detect(image, detector, SMALL_FACE_SIDE)
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: face.area, reverse=True):
        if all(_overlap(face, larger) <= MAX_OVERLAP for larger in kept):
            kept.append(face)
    return kept


def yaw(landmarks: np.ndarray) -> float:
    """Return the degrees by which a face is turned about its own vertical axis.

    0 is to the viewer, positive to the picture's right, the person's left. Fits SHAPE, rotated, scaled and
    seen from afar, so a tilted or nodding head is not a turned one. A photo and its mirror image, by YuNet's
    landmarks, differ by 5 degrees (median; 15 in one of twenty): errors are about half of that.
    """
    seen, shape = landmarks - landmarks.mean(axis=0), SHAPE - SHAPE.mean(axis=0)
    rotation = np.eye(3)
    # Alternately: take the depth, which the picture lacks, from the rotation so far; then the rotation
    # between two sets of points in space (Kabsch 1976). Each time the error shrinks by about a sixth.
    for _ in range(200):
        flat = shape @ rotation[:2].T  # (5, 2)
        scale = (seen * flat).sum() / (flat**2).sum()
        u, _, vt = np.linalg.svd(np.column_stack([seen, scale * shape @ rotation[2]]).T @ shape)
        rotation = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    return float(np.degrees(np.arctan2(rotation[2, 0], rotation[2, 2])))  # the row is the way we look


def _detect(image: Image.Image, detector: "cv2.FaceDetectorYN", side: int) -> list[Face]:
    """Detect in the image with its long side resized to `side` pixels."""
    zoom = side / max(image.size)
    small = image.resize([max(1, round(length * zoom)) for length in image.size], Image.Resampling.BICUBIC)
    detector.setInputSize(small.size)
    rows = detector.detect(np.ascontiguousarray(np.asarray(small)[..., ::-1]))[1]  # OpenCV wants BGR
    faces = []
    for row in rows if rows is not None else ():
        left, top, width, height = row[:4]  # then five landmarks and the score
        corners = np.array([left, top, left + width, top + height]) / zoom
        x0, y0, x1, y1 = np.clip(corners.round().astype(int), 0, image.size * 2).tolist()
        if x0 < x1 and y0 < y1:
            faces.append(Face((x0, y0, x1, y1), row[4:14].reshape(5, 2) / zoom, float(row[14])))
    return faces


def _long_side(face: Face) -> int:
    x0, y0, x1, y1 = face.box
    return max(x1 - x0, y1 - y0)


def _overlap(a: Face, b: Face) -> float:
    """Return the intersection of two boxes as a part of the smaller one."""
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    return max(0, width) * max(0, height) / min(a.area, b.area)
