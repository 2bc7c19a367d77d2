"""Write files whole or not at all, in folders that one run has to itself."""

import json
import os
import re
import secrets
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.\w+")  # the temporary names that `atomic` gives


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; it is renamed to `path` when the block ends, deleted when it fails.

    So a run that is stopped leaves the old file or the new one, never half a file. The name is random, since
    process numbers are not unique among machines and containers that write to one disk.
    """
    # The suffix stays, since PIL chooses the format by it.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if temporary.stat().st_mode != mode:  # safetensors makes files for their owner only
            temporary.chmod(mode)
        temporary.replace(path)
    except SafetensorError as error:  # which safetensors raises, instead of OSError, on a full disk
        raise OSError(f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path, option: str) -> None:
    """Make a folder if it is not there; OSError, naming the option, when no file can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{option}: cannot write to {folder} ({error.strerror})") from error


def sort_header(file: Path) -> None:
    """Sort a safetensors file's metadata, which its writer leaves in another order at every start."""
    with file.open("rb+") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(text) != length:
            raise ValueError(f"{file}: the sorted header has {len(text)} bytes, not {length}")
        f.seek(8)
        f.write(text)


def check_new(path: Path, force: bool) -> None:
    """Raise FileExistsError when there is a file already, unless it may be replaced."""
    if path.exists() and not force:
        raise FileExistsError(f"{path} is there already; --out names another file, --force replaces it")


def beside(path: Path, ending: str) -> Path:
    """Name a file after another: <stem><ending>; ref.png beside ref.safetensors could be the photo."""
    return path.with_name(path.stem + ending)


def name_of(photo: Path) -> str:
    """Name a LoRA: as the photo, with its folder before a mere number (anna/001.png), or as a folder."""
    if photo.is_dir():
        return photo.resolve().name
    is_number = not any(map(str.isalpha, photo.stem))
    return "_".join(filter(None, [photo.parent.resolve().name if is_number else "", photo.stem]))


def next_number(folder: Path) -> int:
    """Return the number after the highest that a picture has in its name, as 03_beach.png or grid_03.png."""
    numbers = [re.match(r"(?:grid_)?([0-9]{2,6})[._]", path.name) for path in folder.glob("*.png")]
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def slug(text: str, most: int = 80) -> str:
    """Return a text as a part of a file name, in so many bytes: letters of any alphabet, digits, hyphens."""
    text = unicodedata.normalize("NFC", text).lower()
    kept = (char if unicodedata.category(char)[0] in "LMN" else "-" for char in text)  # M: accents, vowels
    words = re.sub("-+", "-", "".join(kept)).strip("-")
    return words.encode()[:most].decode(errors="ignore").strip("-")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder for one run, and delete the temporary files that a killed run has left in it.

    Raises OSError while another run holds the lock. On Windows there is no lock.
    """
    check_writable(folder, "--out")
    with (folder / ".lock").open("w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except BlockingIOError as error:
            raise OSError(f"--out {folder}: another run is writing there") from error
        for part in ("", "buckets", "cache", "checkpoints", "samples"):
            for file in (folder / part).glob(".*"):
                if LEFTOVER.fullmatch(file.name):
                    file.unlink()
        yield
