"""List the people, photos and captions in a folder."""

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
    caption: str | None  # None: the default one, "a photo of a <class>"
    # Known after a scan, see people/manifest.py:
    size: Size | None = None  # of the upright photo
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
    Raises FileNotFoundError or UserError when the folder has another layout, or a person has no photo.
    """
    folders = list_folders(folder, option)
    people = [Person(pid, path.name, _list_photos(path)) for pid, path in enumerate(folders)]
    empty = [printable(person.name) for person in people if not person.photos]
    if empty:
        names = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
        kinds = ", ".join(PHOTO_SUFFIXES)
        raise UserError(f"{len(empty)} of {len(people)} people in {folder} have no photo ({kinds}): {names}")
    names = [f"{person.name}/{photo.path.name}" for person in people for photo in person.photos]
    odd = [printable(name) for name in names if {*map(unicodedata.category, name)} & {"Cc", "Cs", "Zl"}]
    if odd:
        # Files and tables of results use these names.
        raise UserError(f"{folder}: these names have control characters, rename them: {', '.join(odd[:5])}")
    return people


def list_folders(folder: Path, option: str = "--data") -> list[Path]:
    """Return the people's folders, sorted by name.

    Raises FileNotFoundError or UserError when there are none, or the folder is a level too high or too low.
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
    if not folders:
        photos = len(photo_paths(folder))
        if photos:
            raise UserError(
                f"{option} {folder} is a level too low: it holds {photos} photos; give the folder above it"
            )
        raise UserError(f"{option} {folder} is empty; it should hold one folder of photos per person")
    return folders


def photo_paths(folder: Path) -> list[Path]:
    """Return the files of a folder that have a photo's suffix, sorted by name, without hidden ones."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    return [path for path in paths if not path.name.startswith(".")]


def _list_photos(folder: Path) -> tuple[Photo, ...]:
    return tuple(Photo(path, read_caption(path)) for path in photo_paths(folder))


def read_caption(photo: Path) -> str | None:
    """Return the text of the `.txt` file beside a photo, on one line; None when there is no such file.

    Control characters become spaces. Raises UserError when the text is empty, very long, or not UTF-8.
    """
    path = photo.with_suffix(".txt")
    if not path.is_file():
        return None
    with path.open("rb") as file:
        content = file.read(MAX_CAPTION + 1)
    if len(content) > MAX_CAPTION:
        raise UserError(f"{printable(path)} is too long for a caption: at most {MAX_CAPTION} bytes")
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
