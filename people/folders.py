"""Folders of people: whose photos there are, and their captions."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from flux.errors import UserError
from people.photos import PHOTO_SUFFIXES, Size
from run.terminal import printable

MAX_CAPTION = 2**16  # bytes


@dataclass(frozen=True, slots=True)
class Photo:
    path: Path
    caption: str | None  # None: the trainer says "a photo of a <class>"
    size: Size | None = None  # of the upright photo; where nobody has looked yet, None
    digest: str | None = None  # SHA-256 of the file


@dataclass(frozen=True)
class Person:
    pid: int
    name: str
    photos: tuple[Photo, ...]


def scan_people(folder: Path, option: str = "--data") -> list[Person]:
    """List the people of `<folder>/<person>/*.jpg|jpeg|png|webp`, each with or without a `.txt` caption.

    People and photos are sorted by name; pids count from 0. Hidden files and folders are left out.
    option: what the folder is called in messages.
    Raises FileNotFoundError or ValueError when the folder is laid out otherwise, or a person has no photo.
    """
    folders = list_folders(folder, option)
    people = [Person(pid, path.name, _list_photos(path)) for pid, path in enumerate(folders)]
    if empty := [printable(person.name) for person in people if not person.photos]:
        names = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
        kinds = ", ".join(PHOTO_SUFFIXES)
        raise UserError(f"{len(empty)} of {len(people)} people in {folder} have no photo ({kinds}): {names}")
    names = [f"{person.name}/{photo.path.name}" for person in people for photo in person.photos]
    if odd := [printable(name) for name in names if {*map(unicodedata.category, name)} & {"Cc", "Cs", "Zl"}]:
        # Files and pages are called after them, in which such names would be lost or obeyed.
        raise UserError(f"{folder}: rename what has control characters in its name: {', '.join(odd[:5])}")
    return people


def list_folders(folder: Path, option: str = "--data") -> list[Path]:
    """Return the people's folders, sorted by name.

    Raises FileNotFoundError or ValueError when there are none, or the folder is a level too high or too low.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{option} {folder}: no such folder; it should hold one folder of photos per person"
        )
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if folders and not any(photo_paths(path) for path in folders):
        below = sorted(path for path in folder.glob("*/*") if path.is_dir() and photo_paths(path))
        if below:
            sample = printable(below[0].relative_to(folder))
            problem = f"is a level too high: a person's photos should not be in {sample}"
            raise UserError(f"{option} {folder} {problem}")
    if not folders and (photos := photo_paths(folder)):
        raise UserError(
            f"{option} {folder} is a level too low: it holds {len(photos)} photos; give the folder above it"
        )
    if not folders:
        raise UserError(f"{option} {folder} is empty; it should hold one folder of photos per person")
    return folders


def photo_paths(folder: Path) -> list[Path]:
    """Return what is called like a photo in a folder, sorted by name; hidden files are left out."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    return [path for path in paths if not path.name.startswith(".")]


def _list_photos(folder: Path) -> tuple[Photo, ...]:
    return tuple(Photo(path, read_caption(path)) for path in photo_paths(folder))


def read_caption(photo: Path) -> str | None:
    """Return the text beside a photo, in one line and without control characters; None when there is none.

    Raises ValueError when it is empty, very long, or not UTF-8.
    """
    path = photo.with_suffix(".txt")
    if not path.is_file():
        return None
    with path.open("rb") as file:
        content = file.read(MAX_CAPTION + 1)
    if len(content) > MAX_CAPTION:
        raise UserError(f"{printable(path)} is longer than a caption can be, {MAX_CAPTION} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(path)} is not UTF-8 text ({error})") from error
    words = "".join(" " if unicodedata.category(char) == "Cc" else char for char in text).split()
    caption = " ".join(words)
    if not caption:
        raise UserError(
            f"{printable(path)} is empty: write a caption, or delete the file to use the default one"
        )
    return caption
