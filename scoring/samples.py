"""Pictures by a system as folders, and what they are scored against: photos and prompts."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flux.errors import UserError
from people.folders import Person, scan_people
from people.photos import PHOTO_FORMATS, PHOTO_SUFFIXES

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
        raise UserError(f"--images {folder}: pictures should be <person>/<prompt>/<seed>.png; {found}")
    samples = {}
    for file in files:
        person, prompt, _ = file.parts
        number = re.match(r"\d+", prompt)
        place = (person, f"{int(number[0]):02d}" if number else prompt, file.stem)
        if place in samples:
            raise UserError(f"{samples[place].path} and {folder / file} have the same prompt and seed")
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
        raise UserError(f"{sample.path.parent}: a prompt's folder should begin with {places}")
    text, written = prompts[int(sample.prompt)], written_prompt(sample.path)
    if written is not None and written.split() != text.split():
        raise UserError(
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
            raise UserError(f"--people {folder}: several photos are called {', '.join(twice)}")
    for option, names in {"--images": needed, "--references": references}.items():
        if strange := set(names) - {person.name for person in people}:
            raise UserError(
                f"{option} names {', '.join(sorted(strange))}, whom --people {folder} does not have"
            )
    if few := [person.name for person in people if len(person.photos) < least]:
        raise UserError(f"--people {folder}: {', '.join(few)} must have at least {least} photos")
    photos = {}
    for person in people:
        name = references.get(person.name, person.photos[0].path.name)
        paths = sorted((photo.path for photo in person.photos), key=lambda path: path.name != name)
        if paths[0].name != name:
            raise UserError(f"--references: {folder / person.name} has no photo {name}")
        if copies := [path for path in paths[1:] if path.read_bytes() == paths[0].read_bytes()]:
            raise UserError(f"{copies[0]} is a copy of the reference {name}: remove it")
        photos[person.name] = paths
    return photos


def read_names(path: Path | None, option: str) -> dict[str, str]:
    """Read a JSON object from people's names to strings; ValueError when the file holds something else."""
    names = read_json(path, f"{option} {path}") if path else {}
    if not all(isinstance(value, str) for value in names.values()):
        raise UserError(f'{option} {path} should read like {{"anna": "...", "boris": "..."}}')
    return names


def read_json(path: Path, called: str) -> dict:
    """Read a JSON object; ValueError, saying what the file is called, when it holds something else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise OSError(f"{called} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{called} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f'{called} should read like {{"anna": ..., "boris": ...}}')
    return found


def class_of(person: str, classes: dict[str, str]) -> str:
    """Return a person's class: as given, else what the name begins with, as woman_07 does, else "person"."""
    named = re.match(r"(man|woman)(?![a-z])", person)
    kind = classes.get(person) or (named[1] if named else "person")
    if not re.fullmatch(r"\w[\w -]*", kind):  # folders and lists of prompts are called after it
        raise UserError(f"--classes: {kind!r} must be a word, as woman")
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
        raise UserError(f"{file}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 text") from error
    if not (prompts := [" ".join(line.split()) for line in lines if line.strip()]):
        raise UserError(f"{file} holds no prompts")
    slot = re.compile(r"\[([^][/]*)/([^][/]*)\]")
    if kind not in ("man", "woman") and any(map(slot.search, prompts)):
        raise UserError(
            f"{file} has slots such as [man/woman], for which the class {kind} has no word: give --classes"
        )
    return [slot.sub(r"\1" if kind == "man" else r"\2", prompt) for prompt in prompts]
