"""What pictures are compared with: people's real photos with their references and classes, and prompts."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from flux.checkpoint import read_json
from flux.errors import UserError, listed
from flux.texts import read_text
from people.folders import Person, composed, scan_people


def find_photos(
    folder: Path, references: dict[str, str], needed: Iterable[str] = (), least: int = 1
) -> dict[str, list[Path]]:
    """Return each person's photos, the reference first: the photo that `references` names, else the first.

    If the folder holds only man/ and woman/, as Meta-PHD's ffhq/ does, each photo is a person of its own,
    such as man_00123, and `least` does not apply.
    needed: people who must be there; least: number of photos that each must have.
    Raises UserError when a person, a photo or a reference is missing, and when a copy of the reference is
    among the other photos, for R-FaceSim must not compare with it.
    """
    people = scan_people(folder, "--people")
    if {person.name for person in people} <= {"man", "woman"}:
        people, least = _one_per_photo(people, folder), 1
    names = {person.name for person in people}
    for option, required in {"--images": needed, "--references": references}.items():
        unknown = sorted({*required} - names)
        if unknown:
            raise UserError(f"{option} names {listed(unknown)}, whom --people {folder} does not have")
    few = [person.name for person in people if len(person.photos) < least]
    if few:
        raise UserError(f"--people {folder}: {listed(few)} must have at least {least} photos")
    return {person.name: _reference_first(person, references.get(person.name)) for person in people}


def _one_per_photo(classes: list[Person], folder: Path) -> list[Person]:
    """Make a person of each photo in the folders man/ and woman/."""
    people = []
    for kind in classes:
        for photo in kind.photos:
            name = composed(f"{kind.name}_{photo.path.stem}")
            people.append(Person(0, name, (photo,)))
    counts = Counter(person.name for person in people)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise UserError(f"--people {folder}: several photos are called {listed(twice)}")
    return people


def _reference_first(person: Person, name: str | None) -> list[Path]:
    """Return a person's photos with the reference in front: that of the name, else the first."""
    paths = [photo.path for photo in person.photos]
    reference = paths[0]
    if name:
        # The name alone, or behind that of a folder below the person's.
        ends = [(path, composed(f"/{path.as_posix()}")) for path in paths]
        named = [path for path, end in ends if end.endswith(f"/{name}")]
        if not named:
            raise UserError(f"--references: {paths[0].parent} has no photo {name}")
        reference = named[0]
    others = [path for path in paths if path != reference]
    content = reference.read_bytes()
    for path in others:
        if path.read_bytes() == content:
            raise UserError(f"{path} is a copy of the reference {reference.name}: remove it")
    return [reference, *others]


def read_names(path: Path | None, option: str) -> dict[str, str]:
    """Read a JSON object from people's names to strings; UserError when the file holds something else."""
    if path is None:
        return {}
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: no such file")
    example = 'it should read like {"anna": "...", "boris": "..."}'
    try:
        names = read_json(path)
    except UserError as error:
        raise UserError(f"{option} {error}; {example}") from error
    if not all(isinstance(value, str) for value in names.values()):
        raise UserError(f"{option} {path} holds something else than strings; {example}")
    return {composed(name): composed(value) for name, value in names.items()}


def class_of(person: str, classes: dict[str, str]) -> str:
    """Return a person's class: the one in `classes`, else man or woman by the name, else "person".

    The name decides if it begins with the word, as woman_07 does.
    """
    named = re.match(r"(man|woman)(?![a-z])", person)
    kind = classes.get(person) or (named[1] if named else "person")
    if not re.fullmatch(r"\w[\w -]*", kind):  # names of folders and of lists of prompts
        raise UserError(f"--classes: {kind!r} must be a word, as woman")
    return kind


def read_prompts(path: Path, kind: str, option: str = "--prompts") -> list[str]:
    """Read a class's prompts, one per line, without blank lines; [his/her] becomes his for man, else her.

    path: a file, or a folder with a `<class>.txt` for each class. Raises UserError when the file is no
    text or holds no prompts, and on placeholders such as [his/her] for a class other than man and woman.
    """
    file = path / f"{kind}.txt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{option} {file}: no such file")
    prompts = [" ".join(line.split()) for line in read_text(file).splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{file} holds no prompts")
    placeholder = re.compile(r"\[([^][/]*)/([^][/]*)\]")
    if kind not in ("man", "woman") and any(placeholder.search(prompt) for prompt in prompts):
        raise UserError(
            f"{file} has placeholders such as [man/woman], for which the class {kind} has no word: "
            "give --classes"
        )
    return [placeholder.sub(r"\1" if kind == "man" else r"\2", prompt) for prompt in prompts]
