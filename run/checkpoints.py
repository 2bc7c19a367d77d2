"""What a run of days goes on from: checkpoints, buckets that wait on disk, settings."""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flux.errors import UserError
from run.files import atomic
from run.terminal import printable

KEPT = 2  # checkpoints


# Files of tensors


def write_state(state: dict, file: Path) -> None:
    """Write a dictionary of tensors; on a full disk OSError, and what was there before stays whole."""
    with atomic(file) as temporary, temporary.open("wb") as opened:
        try:
            torch.save(state, opened)
        except RuntimeError as error:
            # Its writer, closing what could not be written, raises this on top of the file's own error.
            hidden = error.__context__
            raise (hidden if isinstance(hidden, OSError) else error) from None


def read_state(file: Path) -> dict:
    """Read what `write_state` wrote; ValueError when a bit of it is wrong, FileNotFoundError without it."""
    try:
        with zipfile.ZipFile(file) as parts:
            wrong = parts.testzip()  # its checksums, which torch.load does not look at
        if wrong is None:
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of many types, from zipfile, pickle and torch
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{file} is damaged ({reason})") from error
    raise UserError(f"{file} is damaged (checksum of {wrong})")


class Checkpoints:
    """The last two checkpoints of a run, `<step>.pt` in a folder of their own. writes: False only reads."""

    def __init__(self, folder: Path, writes: bool = True):
        self.folder, self.writes = folder, writes
        folder.mkdir(parents=True, exist_ok=True)

    def files(self) -> list[Path]:
        """Return them, the newest first."""
        files = [file for file in self.folder.glob("*.pt") if file.stem.isdecimal()]
        return sorted(files, key=lambda file: -int(file.stem))

    def any(self) -> bool:
        """Say whether a run has begun here, even if nothing whole is left of it."""
        return bool(self.files() or list(self.folder.glob("*.damaged")))

    def save(self, step: int, state: dict) -> None:
        """Write one, then drop all but the last two; on a full disk OSError, with those before untouched."""
        if not self.writes:
            return
        try:
            write_state(state, self.folder / f"{step:06d}.pt")
        except OSError as error:
            whole = self.files()
            kept = f"the checkpoint of step {int(whole[0].stem)} is whole" if whole else "there is none yet"
            raise OSError(
                f"{self.folder}: step {step} cannot be saved ({error.strerror}); {kept}. Make room, then "
                "give the same command again"
            ) from error
        for old in self.files()[KEPT:]:
            old.unlink()

    def load(self) -> dict | None:
        """Return the newest that is whole, or None when there is none at all.

        A damaged one is renamed and told of. Raises ValueError when all are damaged: starting afresh, as if
        there were none, is for the user to decide.
        """
        reasons = []
        for file in self.files():
            try:
                state = read_state(file)
            except ValueError as error:
                reasons.append(str(error))
                file.rename(file.with_suffix(".damaged"))
                continue
            if reasons:
                print(f"{'; '.join(reasons)}: going on from step {int(file.stem)}, one checkpoint earlier")
            return state
        if damaged := sorted(self.folder.glob("*.damaged")):
            names = ", ".join(file.name for file in damaged)
            raise UserError(f"{self.folder}: no checkpoint is whole ({names}); take another --out")
        return None


class BucketStore:
    """mid, up and their optimiser of the buckets that are not in training, a file each, read ahead.

    A file is named by its bucket and the visit that left it so. The one before stays as long as a checkpoint
    is kept that comes from its time: going on from there must find the bucket as it was then. writes: False
    only reads.
    """

    def __init__(self, folder: Path, buckets: int, writes: bool = True):
        self.folder, self.buckets, self.writes = folder, buckets, writes
        self.pool, self.ahead = ThreadPoolExecutor(1), {}
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, visit: int) -> Path:
        return self.folder / f"bucket{visit % self.buckets:04d}_visit{visit:06d}.pt"

    def put(self, visit: int, state: dict) -> None:
        if self.writes:
            write_state(state, self.file(visit))

    def read_ahead(self, visit: int) -> None:
        """Begin to read what the given visit will ask for, in a thread."""
        file = self.file(visit - self.buckets)
        if visit not in self.ahead and file.exists():
            self.ahead = {visit: self.pool.submit(read_state, file)}

    def fetch(self, visit: int) -> dict:
        """Return the bucket as it left its turn before the given visit; ValueError when it was not kept."""
        begun = self.ahead.pop(visit, None)
        file = self.file(visit - self.buckets)
        if not begun and not file.exists():
            raise UserError(
                f"{file} does not exist: with the --steps that this run had, the bucket was not to come "
                "back, so it was not kept (--keep-buckets). Start anew in another --out"
            )
        return begun.result() if begun else read_state(file)

    def forget(self, before: int = 0, since: int | None = None) -> None:
        """Delete the files that visits before or since the given ones have left."""
        for file in self.folder.glob("bucket*_visit*.pt") if self.writes else ():
            visit = int(file.stem.partition("_visit")[2])
            if visit < before or since is not None and visit >= since:
                file.unlink()


def check_settings(out: Path, settings: dict, may_change: tuple[str, ...]) -> None:
    """Save the settings beside the result; if a run has started there, compare them with that run's before.

    Raises UserError listing what differs, unless it is in may_change.
    """
    file, started = out / "settings.json", Checkpoints(out / "checkpoints").any()
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    if started:
        try:
            before = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file}, the settings of the run to go on with, cannot be read") from error
        changed = [key for key in before | settings if before.get(key) != settings.get(key)]
        if changed := [key for key in changed if key not in may_change]:
            told = lambda key: printable(f"  {key}: {before.get(key)} -> {settings.get(key)}")
            lines = list(map(told, changed[:20]))
            lines += [f"  ... and {len(changed) - 20} more"] if len(changed) > 20 else []
            raise UserError(
                f"{file.parent} holds a run with other settings; take another --out, or the same settings:\n"
                + "\n".join(lines)
            )
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
