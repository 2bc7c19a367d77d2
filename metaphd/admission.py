"""Check photos and prompts by the admission rules of Meta-PHD (paper, section 4.1); see docs/benchmark.md."""

import argparse
import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from flux.errors import UserError
from people.folders import scan_people
from people.photos import read_photo
from run.arguments import Manual, Parser
from run.files import atomic
from scoring.inputs import read_prompts
from vision.detector import find_faces, load_detector, yaw

if TYPE_CHECKING:
    import cv2

MAX_YAW = 30  # degrees; paper, section 4.1, of the FFHQ part
MIN_SIDE = 720  # pixels; the paper asks it of training photos, and says nothing of Meta-PHD's
MIN_PHOTOS = {"unsplash": 4, "people": 2}  # paper, section 4.1; what R-FaceSim needs
LISTS = {"man": 20, "woman": 20, "frontal": 10}  # prompts; paper, section 4.1
OTHER_WORDS = {"man": r"\b(woman|hers?|she)\b", "woman": r"\b(man|his|him|he)\b"}

Parts = dict[str, dict[str, list[Path]]]  # photos of each person in each part


# Photos


def list_parts(folder: Path) -> Parts:
    """List the photos of each person in each part; a folder without parts is a part of its own.

    In ffhq a folder holds photos of many people of one class: each class is a part. UserError for others.
    """
    names = [name for name in ("unsplash", "ffhq") if (folder / name).is_dir()]
    scanned = {name: scan_people(folder / name, "check") for name in names}
    if not names and not (folder / "prompts").is_dir():
        people = scan_people(folder, "check")
        scanned["ffhq" if {person.name for person in people} <= {"man", "woman"} else "people"] = people
    parts = {}
    for name, people in scanned.items():
        for person in people:
            part = name
            if name == "ffhq":
                if person.name not in ("man", "woman"):
                    raise UserError(f"{folder / 'ffhq'} should hold man and woman, not {person.name}")
                part = f"ffhq/{person.name}"
            parts.setdefault(part, {})[person.name] = [photo.path for photo in person.photos]
    return parts


def inspect(
    path: Path, detector: "cv2.FaceDetectorYN", min_side: int, max_yaw: float | None
) -> dict[str, object]:
    """Measure a photo, and list the reasons not to admit it; a file that cannot be read has no numbers."""
    row = {"width": None, "height": None, "faces": None, "yaw": None, "reasons": []}
    try:
        image = read_photo(path)
    except UserError as error:
        row["reasons"].append(f"no photo that can be read ({error.__cause__})")
        return row
    faces = find_faces(image, detector)
    row |= {"width": image.width, "height": image.height, "faces": len(faces)}
    if min(image.size) < min_side:
        size = f"{image.width} x {image.height} pixels"
        row["reasons"].append(f"{size}, the short side must be {min_side} or more")
    if not faces:
        row["reasons"].append("no face found")
        return row
    if len(faces) > 1:
        row["reasons"].append(f"{len(faces)} faces, must be one")
    turn = round(yaw(faces[0].landmarks), 1)
    row["yaw"] = turn
    if max_yaw is not None and abs(turn) > max_yaw:
        side = "right" if turn > 0 else "left"
        row["reasons"].append(
            f"turned by {abs(turn):.0f} degrees to the picture's {side}, at most {max_yaw:g} are allowed"
        )
    return row


def check_photos(
    parts: Parts,
    detector: "cv2.FaceDetectorYN | None",
    min_side: int = MIN_SIDE,
    max_yaw: float | None = None,
    min_photos: int | None = None,
) -> tuple[list[dict], list[str]]:
    """Return a row of numbers and reasons for each photo, and a message for each person with too few left.

    max_yaw, min_photos: None for the part's own limit. Of two equal files the first is admitted.
    """
    rows, few, first_by_digest = [], [], {}
    total = 0
    for people in parts.values():
        total += sum(map(len, people.values()))
    bar = tqdm(total=total, unit="photo", disable=total < 50)
    for part, people in parts.items():
        turn, least = max_yaw, min_photos
        if part.startswith("ffhq"):
            turn, least = MAX_YAW if max_yaw is None else max_yaw, 1
        if least is None:
            least = MIN_PHOTOS.get(part, 1)
        for person, paths in people.items():
            for path in paths:
                row = inspect(path, detector, min_side, turn)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                original = first_by_digest.setdefault(digest, path)
                if original != path:
                    row["reasons"].append(f"the same file as {original}")
                rows.append({"path": path, "part": part, "person": person, **row})
                bar.update()
            left = sum(not row["reasons"] for row in rows[-len(paths) :])
            if left < least:
                few.append(f"{paths[0].parent}: {left} photos admitted, must be {least} or more")
    bar.close()
    return rows, few


# Prompts


def check_prompts(folder: Path) -> list[str]:
    """List what is wrong with the prompt lists in a folder."""
    expected = [folder / f"{name}.txt" for name in LISTS]
    problems = [f"{file} is not there" for file in expected if not file.is_file()]
    for file in sorted(folder.glob("*.txt")):
        problems += check_list(file)
    return list(dict.fromkeys(problems))


def check_list(file: Path) -> Iterator[str]:
    """Yield what is wrong with a prompt list: man.txt and woman.txt are for a class, others for both."""
    for kind in [file.stem] if file.stem in OTHER_WORDS else OTHER_WORDS:
        try:
            prompts = read_prompts(file, kind)
        except UserError as error:
            yield str(error)
            return
        expected = LISTS.get(file.stem, len(prompts))
        if len(prompts) != expected:
            yield f"{file}: {len(prompts)} prompts, must be {expected}"
        for number, prompt in enumerate(prompts):
            fault = find_fault(prompt, kind)
            if prompt in prompts[:number] and not fault:
                fault = "the same as an earlier one"
            if fault:
                yield f"{file}: number {number:02d} for a {kind}, {prompt!r}: {fault}"


def find_fault(prompt: str, kind: str) -> str | None:
    """Say what is wrong with a prompt, its placeholders filled in, for a class; None when nothing is."""
    if re.search(r"[][]", prompt):
        return "a placeholder should read like [man/woman] or [his/her]"
    if not re.search(rf"\b{kind}\b", prompt):
        return f"it does not say {kind}"
    other = re.search(OTHER_WORDS[kind], prompt)
    return f"it says {other[0]}" if other else None


# The command

HELP = """
Check photos and prompts by the rules of Meta-PHD that can be measured (paper, section 4.1 and appendix M).
See docs/benchmark.md.

examples:
  python -m metaphd check people
  python -m metaphd check metaphd-photos --out check.csv
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m metaphd check", description=HELP, formatter_class=Manual)
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="unsplash/<person>/*.jpg, ffhq/<man|woman>/*.jpg and prompts/*.txt, or some of them; or else "
        "people, <person>/*.jpg",
    )
    parser.add_argument(
        "--min-side", type=int, metavar="N", default=MIN_SIDE, help="pixels of the short side, at least"
    )
    parser.add_argument(
        "--max-yaw",
        type=float,
        metavar="N",
        help=f"degrees by which a face may be turned; default: {MAX_YAW} in ffhq, elsewhere any",
    )
    parser.add_argument(
        "--min-photos",
        type=int,
        metavar="N",
        help="admitted photos of a person, at least; default: 4 in unsplash, 2 elsewhere",
    )
    parser.add_argument(
        "--detector", type=Path, metavar="FILE", help="YuNet's .onnx file; default: the one that comes along"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="FILE.json or FILE.csv, for all numbers")
    args = parser.parse_args(argv)
    if args.out and args.out.suffix not in (".json", ".csv"):
        parser.error(f"--out {args.out}: must end in .json or .csv")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    parts, lists = list_parts(args.folder), args.folder / "prompts"
    detector = load_detector(args.detector) if parts else None
    rows, few = check_photos(parts, detector, args.min_side, args.max_yaw, args.min_photos)
    mistakes = check_prompts(lists) if lists.is_dir() else []
    rejected = [f"{row['path']}: {'; '.join(row['reasons'])}" for row in rows if row["reasons"]]
    problems = rejected + few + mistakes
    for problem in problems:
        print(problem)
    for part, people in parts.items():
        reasons = [row["reasons"] for row in rows if row["part"] == part]
        bad = sum(map(bool, reasons))
        count = "" if part.startswith("ffhq") else f", of {len(people)} people"
        print(f"{part}: {len(reasons) - bad} photos admitted, {bad} rejected{count}")
    if lists.is_dir():
        print(f"prompts: {len(mistakes)} mistakes")
    if args.out:
        if args.out.exists():
            print(f"{args.out} is replaced")
        write_check(args.out, vars(args), problems, rows)
    if problems:
        sys.exit(1)


def write_check(path: Path, settings: dict[str, object], problems: list[str], rows: list[dict]) -> None:
    """Write everything as JSON, or the photos' rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            report = {"settings": settings, "problems": problems, "photos": rows}
            json.dump(report, file, indent=1, default=str)
        elif rows:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "reasons": "; ".join(row["reasons"])} for row in rows)
