"""Check all photos and captions of a people data set, and list those that can be used: the manifest.

The manifest is a file with one line per person. It is read one person at a time, so ten thousand people take
little memory. The next scan starts from it and opens only the photos that have changed since.
"""

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
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
    name_in,
    read_caption,
    relative,
)
from people.photos import PHOTO_SUFFIXES, READ, Size, decode_photo, own_limit
from people.signatures import NOT_READ
from people.sources import Source, find_people
from run.files import atomic
from run.terminal import printable

VERSION = 3  # raise it whenever a line changes, or what `examine` returns: all photos are examined anew
THREADS = 4
EXAMPLES = 3  # of each finding in the table


@dataclass
class Report:
    """What a scan found: how many people and photos are used, which were skipped and which were converted."""

    people: int = 0
    photos: int = 0
    captions: Counter = field(default_factory=Counter)  # of the photos, by where they are from, as ".txt"
    remarks: list[str] = field(default_factory=list)  # what was understood or limited as asked: no fault
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

    def tell(self, data: Path, path: Path, strict: bool) -> None:
        """Print how much of the data is used, and the table; write all findings to `path`.

        Raises UserError instead, if `strict` and there is any finding.
        """
        print(f"{self.people} people, {self.photos} photos, in {data}")
        for remark in self.remarks:
            print(remark)
        sources = ", from " + " and ".join(sorted(self.captions)) if self.captions else ""
        print(f"captions for {self.captions.total()} of {self.photos} photos{sources}")
        if not self.findings:
            path.unlink(missing_ok=True)
            return
        self.write(path)
        table = f"{self.table()}\n  all of them: {path}"
        if strict:
            raise UserError(f"--strict: {data} has faults\n{table}")
        print(table)


class Manifest:
    """The people that a scan accepted. They are read from the file one at a time, by pid.

    root: to which the names of photos are relative; starts: where in the file the line of each pid begins.
    """

    def __init__(self, file: Path, root: Path, starts: list[int]):
        self.file, self.root, self.starts = file, root, starts

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
            photos.append(Photo(self.root / name, caption, tuple(known["size"]), known["digest"]))
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
    data: Path,
    file: Path,
    usable: Callable[[Size], object],
    min_side: int = 1,
    min_photos: int = 1,
    max_people: int | None = None,
    max_photos: int | None = None,
    option: str = "--data",
) -> tuple[Manifest, Report]:
    """Examine all photos and captions of the people that `find_people` finds; write the manifest to `file`.

    A photo that cannot be used is left out. A person with fewer than `min_photos` usable photos is left out.
    A caption that cannot be read is replaced by the default one. The report says all this.

    usable: raises UserError for a size (height, width) in which no training is possible.
    min_side: pixels of the shorter side; max_people, max_photos (of each): how many are used, the first by
    name; option: what `data` is called in messages.
    Raises FileNotFoundError or UserError when the data have another layout, or nobody is left.
    """
    sources, report, starts, beyond = find_people(data, option), Report(), [], 0
    root, people = sources.root, sources.people
    if sources.remark:
        report.remarks.append(sources.remark)
    for contents in sources.beside:
        report.add_unused(contents)
    owners: dict[int, str] = {}  # of each photo, by the start of its digest
    known = _KnownPhotos(file)
    with (
        atomic(file) as temporary,
        temporary.open("wb") as lines,
        ThreadPoolExecutor(THREADS) as pool,
        own_limit(),
    ):
        for k, person in enumerate(tqdm(people, "people", disable=len(people) < 50)):
            if report.people == max_people:
                left = f"the last {len(people) - k} of {len(people)} people by name are left out"
                report.remarks.append(f"--max-people {max_people}: {left}")
                break
            contents = person.contents()
            files = _examine_all(root, contents.photos, known.files_of(person.label), pool)
            captions = _choose(root, files, contents, usable, min_side, report)
            report.add_unused(contents)
            if len(captions) < min_photos:
                fewest = f"{len(captions)}, at least {min_photos} are needed"
                report.add("left out", "people with too few photos", person.label, fewest)
                captions = {}
            else:
                digests = {files[name]["digest"] for name in captions}
                twin = _person_with_the_same(digests, person.label, owners, report)
                if twin:
                    report.add("left out", "people with the photos of another", person.label, f"as {twin}")
                    captions = {}
            used = dict(islice(captions.items(), max_photos))
            beyond += len(captions) - len(used)
            photos = {name: caption for name, (caption, _) in used.items()}
            if photos:
                report.people += 1
                report.photos += len(photos)
                report.captions.update(source for _, source in used.values() if source)
                starts.append(lines.tell())
                _note_folder(person, photos, report)
            entry = {"version": VERSION, "name": person.name, "label": person.label}
            lines.write(_pack(entry | {"files": files, "photos": photos}))
    if beyond:
        report.remarks.append(f"--max-photos {max_photos}: {beyond} good photos are left out")
    if not report.people:
        raise UserError(f"{option} {data} has nobody to train on (photos may be {READ}):\n{report.table()}")
    return Manifest(file, root, starts), report


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
                    self.starts[entry["label"]] = lines.tell() - len(line)

    def files_of(self, label: str) -> dict[str, dict]:
        """Return what `examine` said of each photo of a person, by its name."""
        if label not in self.starts:
            return {}
        with self.file.open("rb") as lines:
            lines.seek(self.starts[label])
            return _unpack(lines.readline())["files"]


def _examine_all(root: Path, paths: list[Path], known: dict, pool: ThreadPoolExecutor) -> dict[str, dict]:
    """Return what `examine` says of each photo, by its name below `root`; only changed ones are opened."""
    names = {path: name_in(path, root) for path in paths}
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
        missing = "a link to nothing" if path.is_symlink() else "no such file"
        return {"refused": "not a regular file" if path.exists() else missing}
    try:
        photo = decode_photo(path)
        return {"digest": sha256(path), "size": list(photo.size), "changes": photo.changes}
    except (OSError, UserError) as error:
        return {"refused": printable(error)}


def _choose(
    root: Path,
    files: dict[str, dict],
    contents: Contents,
    usable: Callable[[Size], object],
    min_side: int,
    report: Report,
) -> dict[str, tuple[str | None, str | None]]:
    """Return the photos that are good, by name, each with its caption and where that is from.

    All other photos are added to the report.
    """
    captions, names = {}, {}  # names: by digest
    for name, entry in files.items():
        if "refused" in entry:
            report.add("skipped", _reason(Path(name).suffix.lower()), name, entry["refused"])
            continue
        if entry["digest"] in names:
            twin = names[entry["digest"]]
            report.add("skipped", "the same as another of the same person", name, f"as {twin}")
            continue
        size = tuple(entry["size"])
        try:
            if min(size) < min_side:
                raise UserError(f"{size[0]} x {size[1]} pixels (h x w)")
            usable(size)
        except UserError as error:
            report.add("skipped", f"too small (--min-side {min_side}) or too narrow", name, str(error))
            continue
        names[entry["digest"]] = name
        for change, detail in entry["changes"].items():
            report.add("converted", change, name, detail)
        try:
            captions[name] = read_caption(root / name, contents)
        except (OSError, UserError) as error:
            reason = "no caption that can be read: the default one is used"
            report.add("converted", reason, name, relative(error, contents.root))
            captions[name] = None, None
    return captions


def _reason(suffix: str) -> str:
    """Return what a report says of a file that cannot be read."""
    if suffix in PHOTO_SUFFIXES:
        return "photos that cannot be read"
    return EXPORT if suffix in NOT_READ else NO_PHOTO


def _note_folder(person: Source, photos: Iterable[str], report: Report) -> None:
    """Add to the report what was understood of a person's folder."""
    if not person.folder:
        return
    below = sorted({str(Path(photo).relative_to(person.label).parent) for photo in photos} - {"."})
    if below:
        places = listed(below, most=EXAMPLES)
        report.add("noted", "photos in folders below a person's are used", person.label, places)
    match = KOHYA.fullmatch(person.folder.name)
    if match:
        ignored = f"{person.name}; {match[1]} repeats and the class {match[3]} are ignored"
        report.add("noted", "people by names of kohya's form", person.label, ignored)


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
