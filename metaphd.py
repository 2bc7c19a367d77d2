"""Meta-PHD as folders (paper, section 4.1): whose photos, which prompts, and what a system made of them.

python metaphd.py check metaphd        # may these photos and prompts be used?
"""

import argparse
import csv
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from arguments import Parser
from data import PHOTO_FORMATS, PHOTO_SUFFIXES, Person, read_photo, scan_people
from flux.loading import Manual, atomic, run_script
from vision.detector import find_faces, load_detector, yaw

# Pictures by a system


@dataclass(frozen=True)
class Sample:
    """A picture that a system made, `<person>/<prompt>/<seed>.png`."""

    person: str
    prompt: str  # "03" of the folders 03, 3 and 03_any-words; the whole name when it begins with no number
    seed: str
    path: Path


def scan_samples(folder: Path) -> list[Sample]:
    """List a system's pictures, sorted; ValueError when there are none, one lies elsewhere, or two alike."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder}: no such folder")
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*"))]
    files = [file for file in files if file.suffix.lower() in PHOTO_SUFFIXES and file.name[0] != "."]
    if not files or (stray := [file for file in files if len(file.parts) != 3]):
        found = f"{len(stray)} of {len(files)} are not, such as {stray[0]}" if files else "there are none"
        raise ValueError(f"--images {folder}: pictures should be <person>/<prompt>/<seed>.png; {found}")
    samples = {}
    for file in files:
        person, prompt, _ = file.parts
        number = re.match(r"\d+", prompt)
        place = (person, f"{int(number[0]):02d}" if number else prompt, file.stem)
        if place in samples:
            raise ValueError(f"{samples[place].path} and {folder / file} have the same prompt and seed")
        samples[place] = Sample(*place, folder / file)
    return list(samples.values())


def make_rows(samples: Sequence[Sample], classes: dict[str, str], prompts=None, base=None) -> list[dict]:
    """Return a row for each picture: what it is, its prompt, and the base model's picture to compare with.

    classes: of each person; prompts: a list for each class; base: a folder, see `find_base`.
    """
    rows = [{**vars(sample), "class": classes[sample.person]} for sample in samples]
    for sample, row in zip(samples, rows):
        if prompts:
            row["text"] = find_text(sample, prompts[row["class"]])
        if base:
            row["base"] = find_base(sample, base, row["class"])
    return rows


def find_missing(
    samples: Sequence[Sample], classes: dict[str, str], prompts: dict[str, list[str]] | None = None
) -> list[str]:
    """List what lacks for everybody in `classes` to have every prompt with every seed.

    The prompts are those of the list for the class if there is one, else all that anybody has.
    """
    have = {(sample.person, sample.prompt, sample.seed) for sample in samples}
    folders, seeds = sorted({prompt for _, prompt, _ in have}), sorted({seed for _, _, seed in have})
    numbers = {kind: [f"{n:02d}" for n in range(len(texts))] for kind, texts in (prompts or {}).items()}
    places = [(person, prompt) for person in classes for prompt in numbers.get(classes[person], folders)]
    return [
        f"{person}/{prompt}/{s}"
        for person, prompt in places
        for s in seeds
        if (person, prompt, s) not in have
    ]


def find_text(sample: Sample, prompts: Sequence[str]) -> str:
    """Return the prompt of a picture by its number.

    Raises ValueError when the list has no such number, and when the picture says it was made from another
    prompt: a wrong list of the right length would otherwise go unnoticed.
    """
    if not sample.prompt.isdecimal() or int(sample.prompt) >= len(prompts):
        places = f"a number from 00 to {len(prompts) - 1:02d}, its place in the list of prompts"
        raise ValueError(f"{sample.path.parent}: a prompt's folder should begin with {places}")
    text, written = prompts[int(sample.prompt)], written_prompt(sample.path)
    if written is not None and written.split() != text.split():
        raise ValueError(
            f"{sample.path} was made from the prompt {written!r}, but number {sample.prompt} in the list of "
            f"prompts is {text!r}"
        )
    return text


def written_prompt(picture: Path) -> str | None:
    """Return the prompt that `sample.py` wrote into a picture's header; None when there is none to read."""
    try:
        with Image.open(picture, formats=PHOTO_FORMATS) as image:
            return image.info.get("prompt")
    except (OSError, ValueError, SyntaxError):  # damaged: whoever reads its pixels will say how
        return None


def find_base(sample: Sample, base: Path, kind: str) -> Path:
    """Return the base model's picture of the same name, below the person, the person's class, or neither."""
    name = Path(*sample.path.parts[-2:])
    for path in (base / sample.person / name, base / kind / name, base / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"--base {base} has no {name} to compare with {sample.path}")


# People and prompts


def find_photos(
    folder: Path, references: dict[str, str], needed: Sequence[str] = (), least: int = 1
) -> dict[str, list[Path]]:
    """Return everybody's photos, first the reference a system was given: as named, else the first by name.

    In a folder of man and woman alone, as Meta-PHD's ffhq/, each photo is a person, such as man_00123, and
    `least` does not apply. Raises ValueError when someone needed is not there, or has fewer than `least`
    photos, and when a reference is not there, or is there twice: R-FaceSim must not compare with it.
    """
    people = scan_people(folder, "--people")
    if {person.name for person in people} <= {"man", "woman"}:
        singles = [(f"{p.name}_{photo.path.stem}", photo) for p in people for photo in p.photos]
        people, least = [Person(0, name, (photo,)) for name, photo in singles], 1
        if twice := [name for name, n in Counter(person.name for person in people).items() if n > 1]:
            raise ValueError(f"--people {folder}: several photos are called {', '.join(twice)}")
    for option, names in {"--images": needed, "--references": references}.items():
        if strange := set(names) - {person.name for person in people}:
            raise ValueError(
                f"{option} names {', '.join(sorted(strange))}, whom --people {folder} does not have"
            )
    if few := [person.name for person in people if len(person.photos) < least]:
        raise ValueError(f"--people {folder}: {', '.join(few)} must have at least {least} photos")
    photos = {}
    for person in people:
        name = references.get(person.name, person.photos[0].path.name)
        paths = sorted((photo.path for photo in person.photos), key=lambda path: path.name != name)
        if paths[0].name != name:
            raise ValueError(f"--references: {folder / person.name} has no photo {name}")
        if copies := [path for path in paths[1:] if path.read_bytes() == paths[0].read_bytes()]:
            raise ValueError(f"{copies[0]} is a copy of the reference {name}: remove it")
        photos[person.name] = paths
    return photos


def read_names(path: Path | None, option: str) -> dict[str, str]:
    """Read a JSON object from people's names to strings; ValueError when the file holds something else."""
    names = read_json(path, f"{option} {path}") if path else {}
    if not all(isinstance(value, str) for value in names.values()):
        raise ValueError(f'{option} {path} should read like {{"anna": "...", "boris": "..."}}')
    return names


def read_json(path: Path, called: str) -> dict:
    """Read a JSON object; ValueError, saying what the file is called, when it holds something else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise OSError(f"{called} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{called} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f'{called} should read like {{"anna": ..., "boris": ...}}')
    return found


def class_of(person: str, classes: dict[str, str]) -> str:
    """Return a person's class: as given, else what the name begins with, as woman_07 does, else "person"."""
    named = re.match(r"(man|woman)(?![a-z])", person)
    kind = classes.get(person) or (named[1] if named else "person")
    if not re.fullmatch(r"\w[\w -]*", kind):  # folders and lists of prompts are called after it
        raise ValueError(f"--classes: {kind!r} must be a word, as woman")
    return kind


def read_prompts(path: Path, kind: str) -> list[str]:
    """Read a prompt per line, blank ones left out, for a class; [his/her] becomes "his" for man, else "her".

    path: a file, or a folder with a `<class>.txt` for each class. Raises ValueError on bytes that are not
    UTF-8, on a list without prompts, and on slots for people who are neither man nor woman.
    """
    file = path / f"{kind}.txt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"--prompts {file}: no such file")
    data = file.read_bytes()
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 text") from error
    if not (prompts := [" ".join(line.split()) for line in lines if line.strip()]):
        raise ValueError(f"{file} holds no prompts")
    slot = re.compile(r"\[([^][/]*)/([^][/]*)\]")
    if kind not in ("man", "woman") and any(map(slot.search, prompts)):
        raise ValueError(
            f"{file} has slots such as [man/woman], for which the class {kind} has no word: give --classes"
        )
    return [slot.sub(r"\1" if kind == "man" else r"\2", prompt) for prompt in prompts]


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
        raise ValueError(f"{folder / 'ffhq'} should hold man and woman, not {', '.join(sorted(strange))}")
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
    parser = Parser(description=MANUAL, formatter_class=Manual)
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


if __name__ == "__main__":
    run_script(main)
