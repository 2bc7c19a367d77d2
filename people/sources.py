"""Where the photos of each person are: in a folder of their own, in one a level down, or in a list."""

import csv
import io
import unicodedata
from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

from flux.errors import UserError, listed
from flux.texts import read_text
from people.folders import (
    UNREADABLE,
    Contents,
    composed,
    folders_in,
    list_beside,
    list_contents,
    list_folders,
    name_people,
    photos_in,
)
from run.terminal import printable

LISTS = {".tsv": "tabs", ".csv": "commas", ".txt": "spaces or tabs"}  # what is between the columns
COLUMNS = ("path", "person", "caption")  # the last one may be missing


@dataclass(frozen=True)
class Source:
    """Where the photos of a person are."""

    name: str
    label: str  # in reports: the folder, or again the name
    contents: Callable[[], Contents]
    folder: Path | None = None  # None: the photos are named by a list


@dataclass(frozen=True)
class Sources:
    """The people of a data set, sorted by name."""

    root: Path  # to which the names of photos are relative
    people: list[Source]
    beside: list[Contents] = field(default_factory=list)  # what lies beside the people's folders
    remark: str = ""  # how the data were understood, where that is not obvious


def find_people(data: Path, option: str = "--data") -> Sources:
    """Find the people in a list, in a folder that holds a folder for each, or in folders one level down.

    option: what `data` is called in messages. Only lists are read, no photos.
    Raises FileNotFoundError or UserError when there is nobody, or it is not clear who they are.
    """
    if data.is_file() or data.suffix.lower() in LISTS and not data.is_dir():
        return _list_people(data, option)
    tops = list_folders(data, option)
    groups = _groups(tops)
    folders = [path for group in groups for path in folders_in(group)] or tops
    beside = [list_beside(place, data) for place in (data, *groups)]
    captions = ChainMap(*(contents.listed for contents in beside))
    remark = ""
    if groups:
        _refuse_namesakes(folders, data, option)
        folders.sort(key=lambda path: path.name)
        where = printable(listed((path.name for path in groups), most=5))
        remark = f"each folder in {where} is a person"
        for path in tops:
            if path not in groups:
                beside[0].leave_out(path, "folders beside those that hold the people's")
    names = name_people(folders)
    people = []
    for path in folders:
        contents = partial(list_contents, path, data, captions)
        people.append(Source(names[path], path.relative_to(data).as_posix(), contents, path))
    return Sources(data, people, beside, remark)


def _groups(tops: list[Path]) -> list[Path]:
    """Return those of the folders that are no people's but hold the people's folders; [] if all are people's.

    Where each has one folder of photos at most, anna/photos and boris/photos, it is still that of a person.
    """
    if any(photos_in(path) for path in tops):
        return []
    # Two of each suffice to tell.
    below = {path: [*islice(filter(photos_in, folders_in(path)), 2)] for path in tops}
    groups = [path for path in tops if below[path]]
    return groups if len(tops) == 1 or any(len(below[path]) > 1 for path in groups) else []


def _refuse_namesakes(folders: list[Path], data: Path, option: str) -> None:
    """Raise UserError when folders in several groups have one name: are these views, or other people?"""
    counts = Counter(composed(path.name) for path in folders)
    twice = [path for path in folders if counts[composed(path.name)] > 1]
    if twice:
        alike = [path for path in twice if composed(path.name) == composed(twice[0].name)]
        places = printable(" and ".join(path.relative_to(data).as_posix() for path in alike[:2]))
        raise UserError(
            f"{option} {data}: is {places} one person, or two? Give a folder in which each person has one "
            f"folder, or a list ({', '.join(LISTS)})"
        )


# Lists


def _list_people(file: Path, option: str) -> Sources:
    root = file.parent
    beside = lru_cache(maxsize=32)(partial(list_contents, root=root, below=False))  # it may be one for all
    people = []
    for name, photos in sorted(read_list(file, option).items()):
        people.append(Source(name, name, partial(_listed_contents, photos, root, beside)))
    return Sources(root, people)


def read_list(file: Path, option: str = "--data") -> dict[str, dict[str, str]]:
    """Return for each person the paths, as they are in the list, with their captions, "" without one.

    Each line has a path, a person and perhaps a caption; the first may be COLUMNS. Raises UserError, naming
    the line, when that is not so.
    """
    if file.suffix.lower() not in LISTS:
        raise UserError(f"{option} {file} is a file; it may be a list ({', '.join(LISTS)}), or a folder")
    people, between, places = defaultdict(dict), LISTS[file.suffix.lower()], set()
    for k, (number, cells) in enumerate(_rows(file)):
        if k == 0 and tuple(map(str.lower, cells)) in (COLUMNS, COLUMNS[:2]):
            continue
        where = f"{file}, line {number}"
        if len(cells) not in (2, 3) or not all(cells[:2]):
            raise UserError(
                f"{where}: {listed(map(repr, cells), most=4)}; must be path, person and perhaps a caption, "
                f"with {between} between them"
            )
        path, person, *caption = cells
        if any(unicodedata.category(char) == "Cc" for char in path + person):
            raise UserError(f"{where}: a path or person with control characters")
        place = composed(person), file.parent / path  # a.jpg and ./a.jpg are one
        if place in places:
            raise UserError(f"{where}: {path} of {person} is in the list already")
        places.add(place)
        people[composed(person)][path] = caption[0] if caption else ""
    if not people:
        raise UserError(f"{option} {file} is empty; it should have a path and a person in each line")
    return people


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number and columns of each line that is not blank."""
    suffix, lines = file.suffix.lower(), io.StringIO(read_text(file), newline=None)
    if suffix == ".csv":
        reader = csv.reader(lines, strict=True)
        rows = ((reader.line_num, cells) for cells in reader)
    else:
        split = lambda line: line.split("\t") if suffix == ".tsv" or "\t" in line else line.split(None, 2)
        rows = ((number, split(line)) for number, line in enumerate(lines, 1))
    try:
        for number, cells in rows:
            if any(cells := [cell.strip() for cell in cells]):
                yield number, cells
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}") from error


def _listed_contents(photos: Mapping[str, str], root: Path, beside: Callable[[Path], Contents]) -> Contents:
    """Return the listed photos of a person, sorted by name, with the captions of the list and beside them.

    What else is beside them is not looked at.
    """
    paths = {root / path: caption for path, caption in sorted(photos.items())}
    places = [beside(place) for place in dict.fromkeys(path.parent for path in paths)]
    contents = Contents(
        root,
        [*paths],
        ChainMap({}, *(place.texts for place in places)),
        ChainMap({}, *(place.listed for place in places)),
        {path: caption for path, caption in paths.items() if caption},
    )
    for place in places:
        contents.unused[UNREADABLE] += place.unused.pop(UNREADABLE, [])
    return contents
