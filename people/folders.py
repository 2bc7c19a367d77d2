"""List the people, photos and captions in a folder."""

import csv
import io
import json
import os
import re
import unicodedata
import warnings
from collections import ChainMap, Counter, defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flux.errors import UserError, listed
from flux.texts import read_text
from people.photos import PHOTO_SUFFIXES, Size, is_photo
from people.signatures import NOT_READ
from run.terminal import printable

MAX_CAPTION = 2**16  # bytes
CAPTION_SUFFIXES = (".txt", ".caption", ".json")  # the first that is there counts
CAPTION_KEYS = ("caption", "text", "prompt")  # in JSON
# Captions of a folder: lines as {"file_name": "01.jpg", "text": "..."}, or a table with such columns.
METADATA = ("metadata.jsonl", "metadata.csv")
OURS = ("faces.json", "people.json")  # see people/faces.py and tiny/people.py
# What systems leave in folders of photos; nothing is said of it.
LITTER = {".ds_store", "thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "#recycle"}
LITTER |= {"system volume information", "lost+found", ".spotlight-v100", ".trashes", ".fseventsd"}
MASK = re.compile(r".*-(mask|cond)label\d*", re.I)  # OneTrainer's, beside the photo of the same name
KOHYA = re.compile(r"(\d+)_(\S+) (\S.*)")  # sd-scripts' names of folders: repeats, person, class

NO_CAPTION_OF = "captions of no photo"
NO_PHOTO = "files that are no photos"
UNREADABLE = "captions that cannot be read"
EXPORT = "photos in formats that are not read: export them as JPEG"


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


@dataclass
class Contents:
    """What is in a person's folder, or what a list names of a person."""

    root: Path  # to which names in messages are relative
    photos: list[Path] = field(default_factory=list)  # and other files, which their content will tell apart
    texts: MutableMapping[str, Path] = field(default_factory=dict)  # files that may be captions, by `_key`
    listed: MutableMapping[str, str] = field(default_factory=dict)  # from METADATA, by `_key` of the photo
    given: Mapping[Path, str] = field(default_factory=dict)  # captions from a list of people, by photo
    # What is not used, by reason.
    unused: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def leave_out(self, path: Path, reason: str, detail: str = "") -> None:
        where = name_in(path, self.root)
        self.unused[reason].append(f"{where}: {detail}" if detail else where)


def name_in(path: Path, root: Path) -> str:
    """Return a path as seen from a folder, or as it is where it is not below it."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def scan_people(folder: Path, option: str = "--data") -> list[Person]:
    """List the people of a folder with a folder of photos for each, and the captions beside the photos.

    People and photos are sorted by name; pids count from 0. Warns, in one line, of all that is left out.
    option: what the folder is called in messages.
    Raises FileNotFoundError or UserError when the folder has another layout, or a person has no photo.
    """
    folders = list_folders(folder, option)
    _refuse_folders_below(folders, folder, option)
    names, beside = name_people(folders), list_beside(folder, folder)
    people, unused = [], [beside.unused]
    for pid, path in enumerate(folders):
        contents = list_contents(path, folder, beside.listed)
        photos = tuple(Photo(file, read_caption(file, contents)[0]) for file in _choose_photos(contents))
        unused.append(contents.unused)
        people.append(Person(pid, names[path], photos))
    empty = [printable(person.name) for person in people if not person.photos]
    if empty:
        kinds = ", ".join(PHOTO_SUFFIXES)
        where = f"{len(empty)} of {len(people)} people in {folder}"
        raise UserError(f"{where} have no photo ({kinds}): {listed(empty, most=10)}")
    texts = [f"{person.name}/{photo.path.name}" for person in people for photo in person.photos]
    odd = [printable(text) for text in texts if {*map(unicodedata.category, text)} & {"Cc", "Cs", "Zl"}]
    if odd:
        # Files and tables of results use these names.
        raise UserError(f"{folder}: these names have control characters, rename them: {listed(odd, most=5)}")
    _warn_of(unused, f"{option} {folder}")
    return people


def _warn_of(unused: list[dict[str, list[str]]], where: str) -> None:
    lines = []
    for reason in dict.fromkeys(reason for part in unused for reason in part):
        cases = [case for part in unused for case in part.get(reason, [])]
        more = ", ..." if len(cases) > 3 else ""
        lines.append(f"{len(cases)} {reason} ({printable(', '.join(cases[:3]))}{more})")
    if lines:
        warnings.warn(f"{where}: left out are {'; '.join(lines)}", stacklevel=2)


def list_folders(folder: Path, option: str = "--data") -> list[Path]:
    """Return the people's folders, sorted by name, without LITTER and hidden ones.

    Raises FileNotFoundError or UserError when there are none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{option} {folder}: no such folder; it should hold one folder of photos per person"
        )
    folders = folders_in(folder)
    if not folders:
        photos = len(photos_in(folder))
        if photos:
            raise UserError(
                f"{option} {folder} is a level too low: it holds {photos} photos; give the folder above it"
            )
        raise UserError(f"{option} {folder} is empty; it should hold one folder of photos per person")
    return folders


def _refuse_folders_below(folders: list[Path], root: Path, option: str) -> None:
    """Raise UserError when the photos are not in these folders but in those below them."""
    if not any(photos_in(path) for path in folders):
        below = [path for parent in folders for path in folders_in(parent) if photos_in(path)]
        if below:
            sample = printable(below[0].relative_to(root))
            problem = f"is a level too high: a person's photos should not be in {sample}"
            raise UserError(f"{option} {root} {problem}")


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted by name, without LITTER and hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def photos_in(folder: Path) -> list[Path]:
    """Return the photos of a folder, without those in folders below it, sorted by name."""
    return [path for path in list_contents(folder, folder, below=False).photos if is_photo(path)]


def _choose_photos(contents: Contents) -> list[Path]:
    """Return the files that are photos; the others are added to what is not used."""
    photos = []
    for file in contents.photos:
        if is_photo(file):
            photos.append(file)
        else:
            contents.leave_out(file, EXPORT if file.suffix.lower() in NOT_READ else NO_PHOTO)
    return photos


def expand_folders(paths: Sequence[Path]) -> list[Path]:
    """Replace folders by the photos in them, each once; warns of all else in them but captions.

    Raises UserError when a folder holds no photos.
    """
    photos = []
    for path in paths:
        if not path.is_dir():
            photos.append(path)
            continue
        contents = list_contents(path, path, below=False)
        found = _choose_photos(contents)
        for folder in folders_in(path):
            contents.leave_out(folder, "folders below it")
        _warn_of([contents.unused], str(path))
        if not found:
            raise UserError(f"{path} is a folder without photos; give a photo, or a folder of one person's")
        photos += found
    return list(dict.fromkeys(photos))


def captions_beside(photos: Sequence[Path]) -> list[Path]:
    """Return the files beside photos that look like their captions, for a command that does not use them."""
    names = [photo.with_suffix(suffix) for photo in photos for suffix in (".txt", ".caption")]
    return [name for name in names if name.is_file()]


def name_people(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the name of each person: that of the folder, composed, and of 20_anna woman only anna.

    Where that would give two people one name, they keep those of their folders.
    """
    names = {}
    for path in folders:
        match = KOHYA.fullmatch(path.name)
        names[path] = composed(match[2] if match else path.name)
    counts = Counter(names.values())
    return {path: name if counts[name] == 1 else path.name for path, name in names.items()}


def list_beside(folder: Path, root: Path) -> Contents:
    """List what lies beside the people's folders: of that, only captions in METADATA are used."""
    contents = list_contents(folder, root, below=False)
    for path in [*contents.photos, *contents.texts.values()]:
        contents.leave_out(path, "files beside the people's folders")
    return contents


def list_contents(
    folder: Path, root: Path, listed: Mapping[str, str] | None = None, below: bool = True
) -> Contents:
    """List what is in a folder and, after that, in the folders below it, sorted by name.

    root: to which the names are relative of what is not used; listed: captions from above.
    """
    contents = Contents(root, listed=ChainMap({}, listed or {}))

    def fail(error: OSError) -> None:
        contents.leave_out(Path(error.filename), "folders that cannot be read", error.strerror)

    for place, folders, files in os.walk(folder, onerror=fail):
        place = Path(place)
        for name in sorted(files) + sorted(folders):
            if is_hidden(name) and not is_litter(name):
                contents.leave_out(place / name, "hidden files and folders")
        for name in sorted(files):
            if not is_hidden(name):
                _sort_file(place / name, contents)
        shown = sorted(name for name in folders if below and not is_hidden(name))
        for name in shown:
            if (place / name).is_symlink():
                contents.leave_out(place / name, "links to folders")
        folders[:] = [name for name in shown if not (place / name).is_symlink()]
    if below:
        used = {text for photo in contents.photos for text in caption_files(photo, contents)}
        for path in contents.texts.values():
            if path not in used:
                contents.leave_out(path, NO_CAPTION_OF)
    return contents


def _sort_file(path: Path, contents: Contents) -> None:
    """Add a file to those that may be photos, to the captions, or to what is not used."""
    if path.name in OURS:
        return
    is_text = path.suffix.lower() in CAPTION_SUFFIXES and path.is_file()  # not a pipe: that would block
    if path.name in METADATA and path.is_file():
        try:
            contents.listed.update(read_metadata(path))
        except (OSError, UserError) as error:
            contents.leave_out(path, UNREADABLE, relative(error, path.parent))
    elif MASK.fullmatch(path.stem):
        contents.leave_out(path, "masks")
    elif is_text and _key(path) in contents.texts:
        contents.leave_out(path, NO_CAPTION_OF)  # a second one, of the same name but for its spelling
    elif is_text:
        contents.texts[_key(path)] = path
    else:
        contents.photos.append(path)


def relative(error: Exception, root: Path) -> str:
    """Return a message with the names of files relative to a folder."""
    return printable(error).replace(printable(root / "_")[:-1], "")


def composed(name: str) -> str:
    """Return a name in composed form (NFC). Some systems write it decomposed (NFD), letters and accents."""
    return unicodedata.normalize("NFC", name)


def is_litter(name: str) -> bool:
    """Say whether a file or folder is one that systems make, of which nothing is said."""
    return name.lower() in LITTER or name.startswith("._")


def is_hidden(name: str) -> bool:
    """Say whether a file or folder is litter, or begins with a dot."""
    return name.startswith(".") or is_litter(name)


# Captions


def caption_files(photo: Path, contents: Contents) -> list[Path]:
    """Return the files beside a photo that may have its caption: of 01.png 01.png.txt, 01.txt, 01.caption."""
    names = (str(photo), os.path.splitext(photo)[0])
    keys = [_key(name + suffix) for name in names for suffix in CAPTION_SUFFIXES]
    return [contents.texts[key] for key in dict.fromkeys(keys) if key in contents.texts]


def _key(path: Path | str) -> str:
    """Return what is the same for two spellings of a name: composed or not (NFC, NFD), .TXT or .txt."""
    folder, name = os.path.split(path)
    name, suffix = os.path.splitext(name)
    name, inner = os.path.splitext(name)
    return os.path.join(folder, composed(name + (inner + suffix).lower()))


def read_caption(photo: Path, contents: Contents) -> tuple[str | None, str | None]:
    """Return a photo's caption on one line, and where it is from, as ".txt"; (None, None) without one.

    That of a list of people comes first, then those of files beside the photo, then those of METADATA.
    Control characters become spaces. JSON without a caption is added to what is not used. Raises UserError
    when the text is empty, very long, or no text.
    """
    if photo in contents.given:
        return _one_line(contents.given[photo], f"the caption of {photo} in the list"), "the list"
    for path in caption_files(photo, contents):
        text = read_text(path, MAX_CAPTION)
        if path.suffix.lower() == ".json":
            text = _caption_in(_parse(text, path))
        if text is not None:
            return _one_line(text, path), path.suffix.lower()
        contents.leave_out(path, "JSON files without a caption")
    text = contents.listed.get(_key(photo))
    if text is None:
        return None, None
    return _one_line(text, f"the caption of {photo.name} in the metadata file"), "metadata"


def _one_line(text: str, source: Path | str) -> str:
    caption = " ".join("".join(" " if unicodedata.category(char) == "Cc" else char for char in text).split())
    if not caption:
        raise UserError(f"{source} is empty: write a caption, or remove it to use the default one")
    return caption


def read_metadata(file: Path) -> dict[str, str]:
    """Read captions from one of METADATA, by `_key` of the photo."""
    text, captions = read_text(file), {}
    if file.suffix == ".csv":
        entries = _read_table(text, file)
    else:
        entries = [_parse(line, file) for line in text.split("\n") if line.strip()]
    for entry in entries:
        name = entry.get("file_name") if isinstance(entry, dict) else None
        caption = _caption_in(entry)
        if isinstance(name, str) and caption is not None:
            captions[_key(file.parent / name)] = caption
    if not captions:
        raise UserError(f"{file} has no lines with file_name and one of {', '.join(CAPTION_KEYS)}")
    return captions


def _parse(text: str, file: Path) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error})") from error


def _read_table(text: str, file: Path) -> list[dict]:
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UserError(f"{file} is no table of comma-separated values ({error})") from error


def _caption_in(content: object) -> str | None:
    """Return the caption in what a JSON file holds: a string alone, or that of the first of CAPTION_KEYS."""
    if isinstance(content, dict):
        content = next((content[key] for key in CAPTION_KEYS if key in content), None)
    return content if isinstance(content, str) else None
