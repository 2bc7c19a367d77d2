"""Look at every photo and caption before anything expensive: what is used, converted or skipped, and why.

The result is a file of one line per person. It is read person by person, so that ten thousand people take no
memory, and it is the memory of the next look: what has not changed is not read again.
"""

import hashlib
import json
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from flux.errors import UserError
from people.folders import Person, Photo, list_folders, photo_paths, read_caption
from people.photos import PHOTO_FORMATS, PHOTO_SUFFIXES, Size, any_size, decode_photo
from run.files import atomic
from run.terminal import printable

VERSION = 1  # raise it whenever `examine` finds something else: everything is then read again
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".jfif", ".jxl")
THREADS = 4


@dataclass
class Report:
    """What a look found: how much is used; by verdict and reason what is not, or not as it is."""

    people: int = 0
    photos: int = 0
    found: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, verdict: str, reason: str, where: str, detail: str = "") -> None:
        """verdict: "converted", "noted", "skipped", or "left out" of a person as a whole."""
        self.found[verdict, reason].append(printable(f"{where}: {detail}" if detail else where))

    def table(self, examples: int = 3) -> str:
        """Lay the findings out, a reason to a line, with a few examples each; empty when there are none."""
        lines = []
        for (verdict, reason), cases in sorted(self.found.items()):
            more = f", and {len(cases) - examples} more" if len(cases) > examples else ""
            lines.append(
                f"  {verdict:<9} {len(cases):>6}  {reason}\n{'':19} {'; '.join(cases[:examples])}{more}"
            )
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write all findings, tabs between verdict, reason and case."""
        with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for (verdict, reason), cases in sorted(self.found.items()):
                file.writelines(f"{verdict}\t{reason}\t{case}\n" for case in cases)

    def tell(self, folder: Path, path: Path, strict: bool) -> None:
        """Print what is used and the table, write all to `path`; strict: ValueError if there is anything."""
        print(f"{self.people} people, {self.photos} photos, in {folder}")
        if not self.found:
            path.unlink(missing_ok=True)
            return
        self.write(path)
        table = f"{self.table()}\n  all of them: {path}"
        if strict:
            raise UserError(f"--strict: {folder} is not as it should be\n{table}")
        print(table)


class Manifest:
    """The people of a scan, read from its file one by one; in memory there is a number for each."""

    def __init__(self, file: Path, folder: Path, starts: list[int]):
        self.file, self.folder, self.starts = file, folder, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, pid: int) -> Person:
        with self.file.open("rb") as lines:
            lines.seek(self.starts[pid])
            entry = _unpack(lines.readline())
        photos = tuple(
            Photo(self.folder / entry["name"] / name, caption, tuple(known["size"]), known["digest"])
            for name, caption in entry["photos"].items()
            for known in [entry["files"][name]]
        )
        return Person(pid, entry["name"], photos)

    def __iter__(self) -> Iterator[Person]:
        return (self[pid] for pid in range(len(self)))

    def contents(self) -> dict[str, str]:
        """Return by person how many photos there are, and a hash of them and their captions."""
        contents = {}
        for person in self:
            parts = [[photo.path.name, photo.digest, photo.caption] for photo in person.photos]
            digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
            contents[f"photos of {person.name}"] = f"{len(parts)} ({digest})"
        return contents


def scan_photos(
    folder: Path,
    file: Path,
    usable: Callable[[Size], object],
    min_side: int = 1,
    min_photos: int = 1,
    option: str = "--data",
) -> tuple[Manifest, Report]:
    """Examine all photos and captions of `<folder>/<person>/*` and write what there is to `file`.

    usable: raises ValueError for a size (height, width) that cannot be trained. A bad photo is left out, and
    a person with fewer than min_photos good ones; a bad caption gives way to the default one.
    Raises FileNotFoundError or ValueError when the folder is laid out otherwise, or nobody is left.
    """
    folders, report, seen, starts = list_folders(folder, option), Report(), {}, []
    known = _Known(file)
    with (
        atomic(file) as temporary,
        temporary.open("wb") as lines,
        ThreadPoolExecutor(THREADS) as pool,
        any_size(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # PIL's, about what the report tells with the photo's name
        for path in tqdm(folders, "people", disable=len(folders) < 50):
            files = _examine_all(path, known.files_of(path.name), pool, report)
            photos = _choose(path, files, usable, min_side, report)
            if len(photos) < min_photos:
                fewest = f"{len(photos)}, at least {min_photos} are needed"
                report.add("left out", "people with too few photos", path.name, fewest)
                photos = {}
            elif twin := _twin(path.name, {files[name]["digest"] for name in photos}, seen, report):
                report.add("left out", "people with the photos of another", path.name, f"as {twin}")
                photos = {}
            report.people, report.photos = report.people + bool(photos), report.photos + len(photos)
            starts += [lines.tell()] if photos else []
            lines.write(_pack({"version": VERSION, "name": path.name, "files": files, "photos": photos}))
    if not report.people:
        kinds = ", ".join(PHOTO_SUFFIXES)
        raise UserError(f"{option} {folder} has nobody to train on ({kinds}):\n{report.table()}")
    return Manifest(file, folder, starts), report


def _pack(entry: dict) -> bytes:
    """Write an entry as a line that begins with its checksum."""
    text = json.dumps(entry).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _unpack(line: bytes) -> dict:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if int(checksum, 16) != zlib.crc32(text):
        raise UserError("damaged")
    return json.loads(text)


class _Known:
    """What the last survey found, by person; nothing of a line that is damaged or of another version."""

    def __init__(self, file: Path):
        self.file, self.starts = file, {}
        if file.is_file():
            with file.open("rb") as lines:
                for line in iter(lines.readline, b""):
                    try:
                        entry = _unpack(line)
                    except ValueError:
                        continue
                    if entry["version"] == VERSION:
                        self.starts[entry["name"]] = lines.tell() - len(line)

    def files_of(self, name: str) -> dict:
        if name not in self.starts:
            return {}
        with self.file.open("rb") as lines:
            lines.seek(self.starts[name])
            return _unpack(lines.readline())["files"]


def _examine_all(folder: Path, known: dict, pool: ThreadPoolExecutor, report: Report) -> dict[str, dict]:
    """Return what is known of each photo in a folder, by name; only what has changed is opened."""
    try:
        paths = photo_paths(folder)
        others = [path for path in folder.iterdir() if path.suffix.lower() in OTHER_SUFFIXES]
    except OSError as error:
        report.add("skipped", "folders that cannot be read", folder.name, error.strerror)
        return {}
    for path in sorted(others):
        if not path.name.startswith("."):
            report.add("skipped", f"not one of {', '.join(PHOTO_SUFFIXES)}", f"{folder.name}/{path.name}")
    states = {path: _state(path) for path in paths}
    # What was refused is tried again: it may have been the disk's fault, not the photo's.
    good = {name: entry for name, entry in known.items() if "refused" not in entry}
    changed = [path for path in paths if good.get(path.name, {}).get("state", "none") != states[path]]
    fresh = dict(zip(changed, pool.map(examine, changed)))
    return {path.name: {**(fresh.get(path) or good[path.name]), "state": states[path]} for path in paths}


def _state(path: Path) -> list[int] | None:
    """Return what changes whenever a file does. The change time also tells a copy with an old date."""
    try:
        status = path.stat()
    except OSError:  # a link to nothing, or to itself
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def examine(path: Path) -> dict:
    """Read a photo whole: its digest, upright size and what `read_photo` changes; or why it is refused."""
    if not path.is_file():  # a folder; a link to nothing; a pipe, on which opening would wait for ever
        return {"refused": "no file" if path.exists() else "a link to nothing"}
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        image = decode_photo(path)
        return {"digest": digest, "size": [image.height, image.width], "changes": _changes(path)}
    except (OSError, ValueError) as error:
        return {"refused": printable(error)}


def _changes(path: Path) -> list[str]:
    """Name what `read_photo` does to a photo beyond reading it."""
    with Image.open(path, formats=PHOTO_FORMATS) as image:
        raw, mode, frames = str(image.tile), image.mode, getattr(image, "n_frames", 1)
        turned, clear = image.getexif().get(0x0112, 1) not in (0, 1), image.has_transparency_data
    changes = {
        "turned upright by its EXIF data": turned,
        "transparent: put on white": clear,
        "16 bits a channel: reduced to 8": mode.startswith("I") or ";16" in raw,
        "animated: only the first frame is used": frames > 1,
        f"{mode} colours: converted to RGB": mode in ("CMYK", "YCCK", "LAB", "HSV"),
    }
    return [change for change, applies in changes.items() if applies]


def _choose(folder: Path, files: dict, usable: Callable, min_side: int, report: Report) -> dict:
    """Return by name the photos that are used, with their captions, and tell the report of all others."""
    photos, first = {}, {}
    for name, found in files.items():
        where = f"{folder.name}/{name}"
        if "refused" in found:
            report.add("skipped", "no photos that can be read", where, found["refused"])
            continue
        if twin := first.get(found["digest"]):
            report.add("skipped", "the same as another of the same person", where, f"as {twin}")
            continue
        size = tuple(found["size"])
        try:
            if min(size) < min_side:
                raise UserError(f"{size[0]} x {size[1]} pixels (h x w)")
            usable(size)
        except ValueError as error:
            report.add("skipped", f"too small (--min-side {min_side}) or too narrow", where, str(error))
            continue
        first[found["digest"]] = name
        for change in found["changes"]:
            report.add("converted", change, where)
        try:
            photos[name] = read_caption(folder / name)
        except (OSError, ValueError) as error:
            fault = printable(error).removeprefix(printable((folder / name).with_suffix(".txt")))
            report.add(
                "converted", "no caption that can be read: the default one is used", where, fault.strip()
            )
            photos[name] = None
    return photos


def _twin(name: str, digests: set[str], seen: dict[int, str], report: Report) -> str | None:
    """Return who has all these photos already. Sharing some is only told: two people may be on a photo."""
    keys = [int(digest[:15], 16) for digest in digests]  # small, for there may be a million
    shared = [seen[key] for key in keys if key in seen]
    if len(shared) == len(keys) and len(set(shared)) == 1:
        return shared[0]
    for other in sorted(set(shared)):
        report.add("noted", "people who share photos", name, f"{shared.count(other)} with {other}")
    seen.update(dict.fromkeys(keys, name))
    return None
