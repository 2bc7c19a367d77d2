"""May these photos and prompts be used? (paper, section 4.1)"""

import argparse
import csv
import hashlib
import json
import re
import sys
from pathlib import Path

from tqdm import tqdm

from flux.errors import UserError
from people.folders import scan_people
from people.photos import PHOTO_SUFFIXES, read_photo
from run.arguments import Manual, Parser
from run.files import atomic
from scoring.samples import read_prompts
from vision.detector import find_faces, load_detector, yaw

# Admission: may these photos and prompts be used?

MAX_YAW = 30  # degrees; paper, section 4.1, of the FFHQ part
MIN_SIDE = 720  # pixels; the paper asks it of training photos, and says nothing of Meta-PHD's
MIN_PHOTOS = {"unsplash": 4, "people": 2}  # paper, section 4.1; what R-FaceSim needs
LISTS = {"man": 20, "woman": 20, "frontal": 10}  # prompts; paper, section 4.1
OTHER_WORDS = {"man": r"\b(woman|hers?|she)\b", "woman": r"\b(man|his|him|he)\b"}


def list_parts(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the photos of each person in each part; a folder without parts holds people itself."""
    parts = [part for part in ("unsplash", "ffhq") if (folder / part).is_dir()]
    whole = not parts and not (folder / "prompts").is_dir()
    scanned = {part: scan_people(folder / part, "check") for part in parts}
    if whole:
        people = scan_people(folder, "check")
        scanned["ffhq" if {person.name for person in people} <= {"man", "woman"} else "people"] = people
    photos = {part: {p.name: [photo.path for photo in p.photos] for p in scanned[part]} for part in scanned}
    kinds = photos.pop("ffhq", {})  # its folders are no people but classes: a part of its own each
    if strange := kinds.keys() - {"man", "woman"}:
        raise UserError(f"{folder / 'ffhq'} should hold man and woman, not {', '.join(sorted(strange))}")
    return photos | {f"ffhq/{kind}": {kind: kinds[kind]} for kind in kinds}


def inspect(path: Path, detector, min_side: int, max_yaw: float | None) -> dict:
    """Measure a photo, and list the reasons not to admit it; a file that cannot be read has no numbers."""
    row, reasons = dict.fromkeys(("width", "height", "faces", "yaw")), []
    try:
        image = read_photo(path)
    except ValueError as error:
        return {**row, "reasons": [f"no photo that can be read ({error.__cause__})"]}
    faces = find_faces(image, detector)
    row |= {"width": image.width, "height": image.height, "faces": len(faces)}
    if min(image.size) < min_side:
        reasons.append(f"{image.width} x {image.height} pixels, the short side must be {min_side} or more")
    if len(faces) != 1:
        reasons.append(f"{len(faces)} faces, must be one" if faces else "no face found")
    if faces:
        row["yaw"] = round(yaw(faces[0].landmarks), 1)
        if max_yaw is not None and abs(row["yaw"]) > max_yaw:
            side = "right" if row["yaw"] > 0 else "left"
            degrees = f"{abs(row['yaw']):.0f} degrees"
            reasons.append(f"turned by {degrees} to the picture's {side}, at most {max_yaw:g} are allowed")
    return {**row, "reasons": reasons}


def check_photos(
    parts: dict[str, dict[str, list[Path]]],
    detector,
    min_side: int = MIN_SIDE,
    max_yaw: float | None = None,
    min_photos: int | None = None,
) -> tuple[list[dict], list[str]]:
    """Return a row of numbers and reasons for each photo, and the people of whom too few are left.

    max_yaw, min_photos: None for each part's own limit. Of two equal files the first is admitted.
    """
    rows, few, first = [], [], {}
    total = sum(len(paths) for people in parts.values() for paths in people.values())
    bar = tqdm(total=total, unit="photo", disable=total < 50)
    for part, people in parts.items():
        turn = MAX_YAW if max_yaw is None and part.startswith("ffhq") else max_yaw
        for person, paths in people.items():
            for path in paths:
                row = inspect(path, detector, min_side, turn)
                original = first.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
                if original != path:
                    row["reasons"].append(f"the same file as {original}")
                rows.append({"path": path, "part": part, "person": person, **row})
                bar.update()
            left = sum(not row["reasons"] for row in rows[-len(paths) :])
            least = MIN_PHOTOS.get(part, 1) if min_photos is None or part.startswith("ffhq") else min_photos
            if left < least:
                few.append(f"{paths[0].parent}: {left} photos admitted, must be {least} or more")
    bar.close()
    return rows, few


def check_prompts(folder: Path) -> list[str]:
    """List what is wrong with the lists of prompts in a folder."""
    files = [folder / f"{name}.txt" for name in LISTS]
    problems = [f"{file} is not there" for file in files if not file.is_file()]
    for file in sorted(folder.glob("*.txt")):
        for kind in [file.stem] if file.stem in OTHER_WORDS else OTHER_WORDS:
            try:
                prompts = read_prompts(file, kind)
            except ValueError as error:
                problems.append(str(error))
                break
            if len(prompts) != LISTS.get(file.stem, len(prompts)):
                problems.append(f"{file}: {len(prompts)} prompts, must be {LISTS[file.stem]}")
            for n, prompt in enumerate(prompts):
                wrong = "the same as an earlier one" if prompt in prompts[:n] else ""
                if re.search(r"[][]", prompt):
                    wrong = "a slot should read like [man/woman] or [his/her]"
                elif not re.search(rf"\b{kind}\b", prompt):
                    wrong = f"it does not say {kind}"
                elif found := re.search(OTHER_WORDS[kind], prompt):
                    wrong = f"it says {found[0]}"
                problems += [f"{file}: number {n:02d} for a {kind}, {prompt!r}: {wrong}"] if wrong else []
    return list(dict.fromkeys(problems))


MANUAL = f"""
Check photos and prompts by what can be measured of Meta-PHD's rules (paper, section 4.1 and appendix M).
Each rejected photo is told with its reason; the exit status is 1 if there is any, as a linter's.

DIR holds one or more of
  unsplash/<person>/*.jpg     4 to 10 photos of each in similar clothes and places and in varied poses, for
                              R-FaceSim; systems learn from the first by name. The paper has 16 people
  ffhq/<man|woman>/*.jpg      one photo of each person, for CLIP-T. The paper has 30 men and 30 women
  prompts/*.txt               man.txt and woman.txt with 20 prompts, frontal.txt with 10, as in our prompts/
or else is a folder of people, <person>/*.jpg. Other endings: {", ".join(PHOTO_SUFFIXES)}.

rules:
  a photo can be read, and no other has the same bytes
  its short side has --min-side pixels or more
  there is just one face: "only one individual is present", so a bystander far behind counts too, if YuNet
    sees him. The paper says it of ffhq; we ask it of all, for else one would have to guess whose photo it is
  it is turned by at most --max-yaw degrees, as five landmarks tell, with an error of some degrees. In ffhq
    only, unless given: unsplash is there for its poses
  --min-photos photos of a person are left
  the prompts are as many as in the paper, all different, and name the class and no other

not measured, so look yourself: whether the person agreed and the licence allows the use; whether the photos
of a folder show one person, and no person is there twice or in the training set; open eyes; nothing before
the face (sunglasses, hat, hands); people whose face is hidden or turned away; photos alike, not to the byte.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m metaphd check", description=MANUAL, formatter_class=Manual)
    parser.add_argument("command", choices=["check"], metavar="check")
    parser.add_argument("folder", type=Path, metavar="DIR", help="photos and prompts")
    parser.add_argument("--min-side", type=int, metavar="N", default=MIN_SIDE, help="pixels")
    parser.add_argument(
        "--max-yaw", type=float, metavar="N", help=f"degrees; default: {MAX_YAW} in ffhq, else any"
    )
    parser.add_argument(
        "--min-photos", type=int, metavar="N", help="default: 4 in unsplash, 2 of other people"
    )
    parser.add_argument(
        "--detector", type=Path, metavar="FILE", help="YuNet's .onnx file; default: from the hub"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="FILE.json or FILE.csv for all numbers; default: none"
    )
    args = parser.parse_args(argv)
    if args.out and args.out.suffix not in (".json", ".csv"):
        parser.error(f"--out {args.out}: must end in .json or .csv")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    parts, lists = list_parts(args.folder), args.folder / "prompts"
    detector = load_detector(args.detector) if parts else None
    rows, few = check_photos(parts, detector, args.min_side, args.max_yaw, args.min_photos)
    wrong = check_prompts(lists) if lists.is_dir() else []
    rejected = [f"{row['path']}: {'; '.join(row['reasons'])}" for row in rows if row["reasons"]]
    for problem in (problems := rejected + few + wrong):
        print(problem)
    for part, people in parts.items():
        bad = [bool(row["reasons"]) for row in rows if row["part"] == part]
        admitted = f"{len(bad) - sum(bad)} photos admitted, {sum(bad)} rejected"
        print(f"{part}: {admitted}" + ("" if part.startswith("ffhq") else f", of {len(people)} people"))
    if lists.is_dir():
        print(f"prompts: {len(wrong)} mistakes")
    if args.out:
        write_check(args.out, {"settings": vars(args), "problems": problems, "photos": rows})
    if problems:
        sys.exit(1)


def write_check(path: Path, found: dict) -> None:
    """Write everything as JSON, or the photos' rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            json.dump(found, file, indent=1, default=str)
        elif found["photos"]:
            writer = csv.DictWriter(file, found["photos"][0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "reasons": "; ".join(row["reasons"])} for row in found["photos"])
