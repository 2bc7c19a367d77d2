"""YuNet on real photos, where they are to be had; errors and geometry without."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from flux.errors import UserError
from vision import detector
from vision.detector import find_faces, load_detector

SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "face_detection_yunet_2023mar.onnx"
PHOTOS = sorted(SHARED.glob("faces/ids/*/*.jpg"))
needs_weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no YuNet weights at {WEIGHTS}")
needs_photos = pytest.mark.skipif(
    not (WEIGHTS.is_file() and PHOTOS), reason=f"no weights or photos in {SHARED}"
)
pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.fixture(scope="module")
def yunet():
    return load_detector(WEIGHTS)


def main_face(image: Image.Image, faces: list[detector.Face]) -> bool:
    """The photos are aligned: the largest face holds the centre, and its landmarks lie in its box."""
    if not faces:
        return False
    x0, y0, x1, y1 = faces[0].box
    centred = x0 < image.width / 2 < x1 and y0 < image.height / 2 < y1
    return centred and bool(((faces[0].landmarks > (x0, y0)) & (faces[0].landmarks < (x1, y1))).all())


@needs_photos
def test_the_face_of_every_photo_is_found(yunet):
    for path in PHOTOS[::5]:
        image = Image.open(path)
        faces = find_faces(image, yunet)
        assert main_face(image, faces), path
        right_eye, left_eye, nose, right_mouth, left_mouth = faces[0].landmarks
        assert right_eye[0] < left_eye[0] and right_mouth[0] < left_mouth[0]  # the person's right is our left
        assert right_eye[1] < nose[1] < left_mouth[1]
        assert [face.area for face in faces] == sorted((face.area for face in faces), reverse=True)


@needs_photos
@pytest.mark.parametrize("part", [1.0, 0.5, 0.4, 0.3])  # .3: forehead to chin is cut off
def test_portraits_of_2048_pixels_are_found(yunet, part):
    """YuNet run at full size misses most of these."""
    for path in PHOTOS[::25]:
        image = Image.open(path)
        margin = round(image.width * (1 - part) / 2)
        box = (margin, margin, image.width - margin, image.height - margin)
        image = image.resize((2048, 2048), Image.Resampling.BICUBIC, box=box)
        faces = find_faces(image, yunet)
        assert main_face(image, faces), path
        assert not any(main_face(image, [other]) for other in faces[1:])  # seen on several scales, told once
        x0, y0, x1, y1 = faces[0].box
        assert 0 <= x0 < x1 <= 2048 and 0 <= y0 < y1 <= 2048
        assert max(x1 - x0, y1 - y0) > 0.35 * 2048 / max(part, 0.45)


@needs_photos
def test_a_face_keeps_its_place_when_the_photo_grows(yunet):
    image = Image.open(PHOTOS[0])
    small = np.array(find_faces(image, yunet)[0].box)
    large = np.array(find_faces(image.resize((1500, 1500), Image.Resampling.BICUBIC), yunet)[0].box)
    assert abs(large / 6 - small).max() < 4


@needs_photos
def test_small_faces_and_groups(yunet):
    people = [Image.open(path) for path in PHOTOS[::140]]  # four people
    group = Image.new("RGB", (1600, 900), "gray")
    for k, person in enumerate(people):
        group.paste(person.resize((300, 300)).crop((70, 60, 230, 250)), (100 + 380 * k, 300))
    assert len(find_faces(group, yunet)) == 4
    crowd = Image.new("RGB", (3000, 2000), "gray")
    crowd.paste(people[0].resize((60, 60)), (1400, 900))  # a face of 24 pixels, 5 at the first scale
    (face,) = find_faces(crowd, yunet)
    assert 1400 <= face.box[0] and face.box[2] <= 1460


@needs_photos
def test_a_bystander_does_not_hide_a_large_portrait(yunet):
    for path in PHOTOS[::50]:
        portrait = Image.open(path).crop((85, 80, 165, 180)).resize((1000, 1250), Image.Resampling.BICUBIC)
        photo = Image.new("RGB", (1200, 1250), "gray")
        photo.paste(portrait, (0, 0))
        photo.paste(Image.open(PHOTOS[7]).resize((200, 200)), (1000, 100))
        x0, y0, x1, y1 = find_faces(photo, yunet)[0].box
        assert x1 - x0 > 600 and x0 < 500 < x1, path


def landscape(seed: int) -> Image.Image:
    """Sky, hills, a lake and trees."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (1200, 800), (150, 190, 230))
    draw = ImageDraw.Draw(image)
    for level, colour in ((350, (110, 130, 120)), (430, (80, 110, 70)), (600, (60, 90, 140))):
        hills = level + 60 * np.sin(np.arange(0, 1201, 20) / rng.uniform(80, 250) + rng.uniform(0, 6))
        outline = list(zip(range(0, 1201, 20), hills.tolist(), strict=True))
        draw.polygon([*outline, (1200, 800), (0, 800)], fill=colour)
    for x, y, r in rng.uniform((0, 400, 8), (1200, 560, 40), (40, 3)).tolist():
        draw.rectangle((x - 3, y, x + 3, y + 2 * r), fill=(70, 50, 30))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(30, 80, 30))
    noise = Image.fromarray(rng.integers(0, 256, (800, 1200, 3), dtype=np.uint8))
    return Image.blend(image, noise, 0.15).filter(ImageFilter.GaussianBlur(1))


@needs_weights
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("size", [(640, 480), (1, 1), (3000, 20)])
def test_a_blank_picture_has_no_face(yunet, mode, size):
    assert find_faces(Image.new(mode, size), yunet) == []


@needs_weights
def test_a_landscape_has_no_face(yunet):
    assert [find_faces(landscape(seed), yunet) for seed in range(8)] == [[]] * 8


@needs_weights
def test_any_yunet_file_may_be_given_but_the_hub_is_held_to_its_hash(tmp_path, monkeypatch):
    other = tmp_path / "ünet 2.onnx"
    other.write_bytes(WEIGHTS.read_bytes())
    assert load_detector(other)
    monkeypatch.setattr(detector, "hub_file", lambda repo, file, revision: other)
    assert load_detector()
    other.write_bytes(WEIGHTS.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=f"not {detector.SHA256}"):
        load_detector()


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1", bytes(range(256)) * 40]
)
def test_what_is_no_network_is_refused(tmp_path, content):
    path = tmp_path / "face.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"face.onnx \({len(content)} bytes\) is no YuNet network"):
        load_detector(path)
    with pytest.raises(FileNotFoundError, match="nothing.onnx"):
        load_detector(tmp_path / "nothing.onnx")


def test_without_network_the_message_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("flux.hub.get_hf_file_metadata", offline)
    with pytest.raises(OSError) as error:
        load_detector()
    for part in (
        detector.FILE,
        f"https://huggingface.co/{detector.REPOSITORY}",
        "--detector FILE",
        "--face x0",
    ):
        assert part in str(error.value)


def test_without_opencv_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="pip install opencv-python-headless"):
        load_detector(WEIGHTS)


def test_importing_the_module_does_not_import_opencv():
    code = "import sys, vision.detector; sys.exit('cv2' in sys.modules)"
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, env=os.environ)
