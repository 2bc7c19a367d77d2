"""Check all photos and captions of a people data set, and list those that can be used: the manifest.

The manifest is a file with one line per person. It is read one person at a time, so ten thousand people take
little memory. The next scan starts from it and opens only the photos that have changed since.
"""

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from flux.errors import UserError, listed
from flux.hashes import sha256
from people.folders import (
    EXPORT,
    KOHYA,
    NO_PHOTO,
    Contents,
    Person,
    Photo,
    list_beside,
    list_contents,
    list_folders,
    name_people,
    read_caption,
    relative,
)
from people.photos import PHOTO_SUFFIXES, READ, Size, decode_photo, own_limit
from people.signatures import NOT_READ
from run.files import atomic
from run.terminal import printable

VERSION = 2  # raise it whenever `examine` returns something else, so that all photos are examined anew
THREADS = 4
EXAMPLES = 3  # of each finding in the table


@dataclass
class Report:
    """What a scan found: how many people and photos are used, which were skipped and which were converted."""

    people: int = 0
    photos: int = 0
    captions: Counter = field(default_factory=Counter)  # of the photos, by where they are from, as ".txt"
    # By verdict and reason: the photos or people.
    findings: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, verdict: str, reason: str, where: str, detail: str = "") -> None:
        """Add a finding; verdict: "converted", "noted", "skipped", or of a whole person "left out"."""
        self.findings[verdict, reason].append(printable(f"{where}: {detail}" if detail else where))

    def add_unused(self, contents: Contents) -> None:
        for reason, cases in contents.unused.items():
            for case in cases:
                self.add("skipped", reason, case)

    def table(self) -> str:
        """Return a text with a line for each reason and a few examples below it; "" without findings."""
        lines = []
        for (verdict, reason), cases in sorted(self.findings.items()):
            more = f", and {len(cases) - EXAMPLES} more" if len(cases) > EXAMPLES else ""
            lines.append(
                f"  {verdict:<9} {len(cases):>6}  {reason}\n{'':19} {'; '.join(cases[:EXAMPLES])}{more}"
            )
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write one line per finding: verdict, reason, photo or person, with tabs between them."""
        with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for (verdict, reason), cases in sorted(self.findings.items()):
                file.writelines(f"{verdict}\t{reason}\t{case}\n" for case in cases)

    def tell(self, folder: Path, path: Path, strict: bool) -> None:
        """Print how much is used and the table; write all findings to `path`.

        Raises UserError instead, if `strict` and there is any finding.
        """
        print(f"{self.people} people, {self.photos} photos, in {folder}")
        sources = ", from " + " and ".join(sorted(self.captions)) if self.captions else ""
        print(f"captions for {self.captions.total()} of {self.photos} photos{sources}")
        if not self.findings:
            path.unlink(missing_ok=True)
            return
        self.write(path)
        table = f"{self.table()}\n  all of them: {path}"
        if strict:
            raise UserError(f"--strict: {folder} has faults\n{table}")
        print(table)


class Manifest:
    """The people that a scan accepted. They are read from the file one at a time, by pid.

    starts: where in the file the line of each pid begins.
    """

    def __init__(self, file: Path, folder: Path, starts: list[int]):
        self.file, self.folder, self.starts = file, folder, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, pid: int) -> Person:
        with self.file.open("rb") as lines:
            lines.seek(self.starts[pid])
            entry = _unpack(lines.readline())
        if entry is None:
            raise UserError(f"{self.file} is damaged or has been changed; start the command again")
        photos = []
        for name, caption in entry["photos"].items():
            known = entry["files"][name]
            path = self.folder / entry["folder"] / name
            photos.append(Photo(path, caption, tuple(known["size"]), known["digest"]))
        return Person(pid, entry["name"], tuple(photos))

    def __iter__(self) -> Iterator[Person]:
        return (self[pid] for pid in range(len(self)))

    def contents(self) -> dict[str, str]:
        """Return for each person the number of photos and a hash of the photos and their captions."""
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
    """Examine all photos and captions in `<folder>/<person>/` and below; write the manifest to `file`.

    A photo that cannot be used is left out. A person with fewer than `min_photos` usable photos is left out.
    A caption that cannot be read is replaced by the default one. The report says all this.

    usable: raises UserError for a size (height, width) in which no training is possible.
    min_side: pixels of the shorter side; option: what the folder is called in messages.
    Raises FileNotFoundError or UserError when the folder has another layout, or nobody is left.
    """
    folders, report, starts = list_folders(folder, option), Report(), []
    names, beside = name_people(folders), list_beside(folder)
    report.add_unused(beside)
    owners: dict[int, str] = {}  # of each photo, by the start of its digest
    known = _KnownPhotos(file)
    with (
        atomic(file) as temporary,
        temporary.open("wb") as lines,
        ThreadPoolExecutor(THREADS) as pool,
        own_limit(),
    ):
        for path in tqdm(folders, "people", disable=len(folders) < 50):
            contents = list_contents(path, folder, beside.listed)
            files = _examine_all(path, contents.photos, known.files_of(path.name), pool)
            photos, sources = _choose(path, files, contents, usable, min_side, report)
            report.add_unused(contents)
            if len(photos) < min_photos:
                fewest = f"{len(photos)}, at least {min_photos} are needed"
                report.add("left out", "people with too few photos", path.name, fewest)
                photos = {}
            else:
                digests = {files[name]["digest"] for name in photos}
                twin = _person_with_the_same(digests, path.name, owners, report)
                if twin:
                    report.add("left out", "people with the photos of another", path.name, f"as {twin}")
                    photos = {}
            if photos:
                report.people += 1
                report.photos += len(photos)
                report.captions.update(sources)
                starts.append(lines.tell())
                _note_folder(path, names[path], photos, report)
            entry = {"version": VERSION, "name": names[path], "folder": path.name}
            lines.write(_pack(entry | {"files": files, "photos": photos}))
    if not report.people:
        raise UserError(f"{option} {folder} has nobody to train on (photos may be {READ}):\n{report.table()}")
    return Manifest(file, folder, starts), report


def _pack(entry: dict) -> bytes:
    """Return an entry as a line of the manifest, which begins with a checksum of the rest."""
    text = json.dumps(entry).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _unpack(line: bytes) -> dict | None:
    """Return the entry of a line; None when the line is damaged."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    return json.loads(text) if checksum == b"%08x" % zlib.crc32(text) else None


class _KnownPhotos:
    """What the manifest of the last scan says of photos; damaged lines and other versions do not count."""

    def __init__(self, file: Path):
        self.file, self.starts = file, {}
        if not file.is_file():
            return
        with file.open("rb") as lines:
            for line in iter(lines.readline, b""):
                entry = _unpack(line)
                if entry and entry["version"] == VERSION:
                    self.starts[entry["folder"]] = lines.tell() - len(line)

    def files_of(self, name: str) -> dict[str, dict]:
        """Return what `examine` said of each photo in a person's folder, by file name."""
        if name not in self.starts:
            return {}
        with self.file.open("rb") as lines:
            lines.seek(self.starts[name])
            return _unpack(lines.readline())["files"]


def _examine_all(folder: Path, paths: list[Path], known: dict, pool: ThreadPoolExecutor) -> dict[str, dict]:
    """Return what `examine` says of each photo, by its name in the folder; only changed ones are opened."""
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    states = {path: _state(path) for path in paths}
    # Photos that were refused are tried again: the disk may have been at fault, not the photo.
    good = {name: entry for name, entry in known.items() if "refused" not in entry}
    changed = [path for path in paths if good.get(names[path], {}).get("state", "none") != states[path]]
    fresh = dict(zip(changed, pool.map(examine, changed)))
    entries = {name: fresh.get(path) or good[name] for path, name in names.items()}
    return {name: {**entries[name], "state": states[path]} for path, name in names.items()}


def _state(path: Path) -> list[int] | None:
    """Return numbers that change whenever the file does.

    ctime also reveals a replacement that kept its old modification time.
    """
    try:
        status = path.stat()
    except OSError:  # a link to nothing, or to itself
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def examine(path: Path) -> dict:
    """Decode a photo; return its digest, its upright size and what `read_photo` changes, or why not."""
    if not path.is_file():  # a link to nothing, or a pipe, which would block when opened
        return {"refused": "not a regular file" if path.exists() else "a link to nothing"}
    try:
        photo = decode_photo(path)
        return {"digest": sha256(path), "size": list(photo.size), "changes": photo.changes}
    except (OSError, UserError) as error:
        return {"refused": printable(error)}


def _choose(
    folder: Path,
    files: dict[str, dict],
    contents: Contents,
    usable: Callable[[Size], object],
    min_side: int,
    report: Report,
) -> tuple[dict[str, str | None], list[str]]:
    """Return the captions of the photos that are used, by name, and where they are from.

    All other photos are added to the report.
    """
    captions, sources, names = {}, [], {}  # names: by digest
    for name, entry in files.items():
        where = f"{folder.name}/{name}"
        if "refused" in entry:
            report.add("skipped", _reason(Path(name).suffix.lower()), where, entry["refused"])
            continue
        if entry["digest"] in names:
            twin = names[entry["digest"]]
            report.add("skipped", "the same as another of the same person", where, f"as {twin}")
            continue
        size = tuple(entry["size"])
        try:
            if min(size) < min_side:
                raise UserError(f"{size[0]} x {size[1]} pixels (h x w)")
            usable(size)
        except UserError as error:
            report.add("skipped", f"too small (--min-side {min_side}) or too narrow", where, str(error))
            continue
        names[entry["digest"]] = name
        for change, detail in entry["changes"].items():
            report.add("converted", change, where, detail)
        try:
            captions[name], source = read_caption(folder / name, contents)
        except (OSError, UserError) as error:
            reason = "no caption that can be read: the default one is used"
            report.add("converted", reason, where, relative(error, contents.root))
            captions[name], source = None, None
        sources += [source] if source else []
    return captions, sources


def _reason(suffix: str) -> str:
    """Return what a report says of a file that cannot be read."""
    if suffix in PHOTO_SUFFIXES:
        return "photos that cannot be read"
    return EXPORT if suffix in NOT_READ else NO_PHOTO


def _note_folder(folder: Path, name: str, photos: dict, report: Report) -> None:
    """Add to the report what was understood of a person's folder."""
    below = sorted({str(Path(photo).parent) for photo in photos} - {"."})
    if below:
        places = listed(below, most=EXAMPLES)
        report.add("noted", "photos in folders below a person's are used", folder.name, places)
    match = KOHYA.fullmatch(folder.name)
    if match:
        ignored = f"{name}; {match[1]} repeats and the class {match[3]} are ignored"
        report.add("noted", "people by names of kohya's form", folder.name, ignored)


def _person_with_the_same(digests: set[str], name: str, owners: dict[int, str], report: Report) -> str | None:
    """Return the earlier person with all these photos, or None; otherwise record this person as their owner.

    Sharing only some photos is allowed, as two people may be on one photo; the report mentions it.
    """
    keys = [int(digest[:15], 16) for digest in digests]  # small numbers, as there may be a million
    shared = [owners[key] for key in keys if key in owners]
    if len(shared) == len(keys) and len(set(shared)) == 1:
        return shared[0]
    for other in sorted(set(shared)):
        report.add("noted", "people who share photos", name, f"{shared.count(other)} with {other}")
    owners.update(dict.fromkeys(keys, name))
    return None
