"""What a stopped run continues from, on disk: its checkpoints, its other buckets, its settings."""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flux.errors import UserError, first_line
from run.files import atomic
from run.terminal import printable

KEPT = 2  # checkpoints
FORMAT = 2  # of what is saved: a run that was begun with another one cannot continue


def write_state(state: dict, file: Path) -> None:
    """Write a dictionary of tensors, or raise OSError on a full disk and leave the file as it was."""
    with atomic(file) as temporary, temporary.open("wb") as opened:
        try:
            torch.save(state, opened)
        except RuntimeError as error:
            # On a full disk torch's writer raises a RuntimeError while it handles the OSError.
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else error) from None


def read_state(file: Path) -> dict:
    """Read what `write_state` has written; UserError when the file is damaged, be it by a single bit."""
    try:
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()  # compares checksums, which torch.load does not
        if damaged is None:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    # A damaged directory or pickle can raise nearly anything: BadZipFile, zlib.error, EOFError, struct.error,
    # NotImplementedError, UnpicklingError, OSError, KeyError, AttributeError, RuntimeError and more.
    except Exception as error:
        raise UserError(f"{file} is damaged ({first_line(error)})") from error
    raise UserError(f"{file} is damaged (checksum of {damaged})")


class Checkpoints:
    """The last two checkpoints of a run, `<step>.pt` in a folder.

    writes: False only reads, for the ranks other than 0.
    """

    def __init__(self, folder: Path, writes: bool = True):
        self.folder, self.writes = folder, writes
        folder.mkdir(parents=True, exist_ok=True)

    def files(self) -> list[Path]:
        """Return the checkpoints' files, the newest first."""
        files = [file for file in self.folder.glob("*.pt") if file.stem.isdecimal()]
        return sorted(files, key=lambda file: -int(file.stem))

    def any(self) -> bool:
        """Say whether there are checkpoints, be they damaged."""
        return bool(self.files() or list(self.folder.glob("*.damaged")))

    def save(self, step: int, state: dict) -> None:
        """Write a checkpoint, then delete all but the last two; OSError on a full disk deletes none."""
        if not self.writes:
            return
        try:
            write_state(state, self.folder / f"{step:06d}.pt")
        except OSError as error:
            files = self.files()
            kept = f"the checkpoint of step {int(files[0].stem)} is whole" if files else "there is none yet"
            raise OSError(
                f"{self.folder}: step {step} cannot be saved ({error.strerror}); {kept}. Make room on the "
                "disk, then give the same command again"
            ) from error
        for old in self.files()[KEPT:]:
            old.unlink()

    def load(self) -> dict | None:
        """Return the newest checkpoint that is not damaged, or None when there are no checkpoints.

        Damaged ones are renamed, and named in a message. Raises UserError when all are damaged: whether to
        start again from the beginning is for the user to decide.
        """
        reasons = []
        for file in self.files():
            try:
                state = read_state(file)
            except UserError as error:
                reasons.append(str(error))
                file.rename(file.with_suffix(".damaged"))
                continue
            if reasons:
                print(f"{'; '.join(reasons)}: going on from the checkpoint before, of step {int(file.stem)}")
            return state
        damaged = sorted(self.folder.glob("*.damaged"))
        if damaged:
            names = ", ".join(file.name for file in damaged)
            raise UserError(f"{self.folder}: no checkpoint is whole ({names}); take another --out")
        return None


class BucketStore:
    """The buckets that are not in training: mid, up and optimizer state of each in a file, read ahead.

    A file is named by its bucket and by the visit, the turn, after which it was written. An older file of a
    bucket is kept while a checkpoint needs it: the run must be able to continue from that.
    writes: False only reads, for the ranks other than 0.
    """

    def __init__(self, folder: Path, buckets: int, writes: bool = True):
        self.folder, self.buckets, self.writes = folder, buckets, writes
        self.pool, self.ahead = ThreadPoolExecutor(1), {}
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, visit: int) -> Path:
        return self.folder / f"bucket{visit % self.buckets:04d}_visit{visit:06d}.pt"

    def put(self, visit: int, state: dict) -> None:
        """Write the bucket's state after a visit."""
        if self.writes:
            write_state(state, self.file(visit))

    def read_ahead(self, visit: int) -> None:
        """Begin to read, in a thread, what `fetch` will return for the given visit."""
        file = self.file(visit - self.buckets)
        if visit not in self.ahead and file.exists():
            self.ahead = {visit: self.pool.submit(read_state, file)}

    def fetch(self, visit: int) -> dict:
        """Return a visit's bucket as its last turn left it; UserError when it is not there."""
        reading = self.ahead.pop(visit, None)
        if reading:
            return reading.result()
        file = self.file(visit - self.buckets)
        if not file.exists():
            raise UserError(f"{file} does not exist, but the run needs it; start again in another --out")
        return read_state(file)

    def forget(self, before: int = 0, since: int | None = None) -> None:
        """Delete the files of visits earlier than `before`, and of `since` and later ones."""
        for file in self.folder.glob("bucket*_visit*.pt") if self.writes else ():
            visit = int(file.stem.partition("_visit")[2])
            if visit < before or since is not None and visit >= since:
                file.unlink()


def check_settings(out: Path, settings: dict, may_change: tuple[str, ...]) -> None:
    """Write settings.json; if the folder holds a run already, compare the settings with that run's first.

    may_change: names of settings that do not matter. Raises UserError with a list of the others that differ.
    """
    file = out / "settings.json"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    settings["format"] = FORMAT
    if Checkpoints(out / "checkpoints").any():
        try:
            before = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file}, the settings of the run in this folder, cannot be read") from error
        fixed = [key for key in before | settings if key not in may_change]
        changed = [key for key in fixed if before.get(key) != settings.get(key)]
        if changed:
            # Keys hold names of folders, in which line ends are possible.
            lines = [printable(f"  {key}: {before.get(key)} -> {settings.get(key)}") for key in changed[:20]]
            lines += [f"  ... and {len(changed) - 20} more"] if len(changed) > 20 else []
            raise UserError(
                f"{out} holds a run with other settings; take another --out, or the same settings:\n"
                + "\n".join(lines)
            )
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
