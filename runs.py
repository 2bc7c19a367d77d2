"""What lets a run of days survive: checkpoints, buckets that wait on disk, settings, log, a gentle end."""

import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from flux.loading import atomic, check_writable
from flux.terminal import printable

KEPT = 2  # checkpoints
LEFTOVER = re.compile(r"\..+\.\d+\.\w+")  # the temporary names of `atomic`


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
        raise ValueError(f"{file} is damaged ({reason})") from error
    raise ValueError(f"{file} is damaged (checksum of {wrong})")


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
            raise ValueError(f"{self.folder}: no checkpoint is whole ({names}); take another --out")
        return None


class Bank:
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

    def store(self, visit: int, state: dict) -> None:
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
            raise ValueError(
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


# The run as a whole


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second run out of a folder, OSError if one is there; delete what a killed one was writing."""
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


class Stop:
    """Turn SIGINT and SIGTERM into a wish: `wanted`, which the loop grants after its step.

    Outside `patiently`, or the second time, they raise KeyboardInterrupt at once.
    """

    def __init__(self):
        self.wanted = self.patient = False
        self.resident = {}  # what the run has in memory, for its last words

    def __enter__(self) -> "Stop":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self.patient or self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        os.write(2, b"\nstopping after this step; once more: at once\n")  # print may not be entered twice

    @contextmanager
    def patiently(self) -> Iterator[None]:
        self.patient = True
        try:
            yield
        finally:
            self.patient = False


def command_line(script: str, argv: list[str] | None, start: str = "python") -> str:
    """Return the command that goes on, as it can be pasted; a word with control characters byte by byte."""
    in_hex = lambda word: "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(word)) + "'"
    words = sys.argv[1:] if argv is None else argv
    return " ".join([start, script, *(shlex.quote(x) if x.isprintable() else in_hex(x) for x in words)])


def check_settings(file: Path, settings: dict, may_change: tuple[str, ...], started: bool) -> None:
    """Save the settings beside the result; if a run has `started`, compare them with that run's before.

    Raises ValueError listing what differs, unless it is in may_change.
    """
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    if started:
        try:
            before = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file}, the settings of the run to go on with, cannot be read") from error
        changed = [key for key in before | settings if before.get(key) != settings.get(key)]
        if changed := [key for key in changed if key not in may_change]:
            told = lambda key: printable(f"  {key}: {before.get(key)} -> {settings.get(key)}")
            lines = list(map(told, changed[:20]))
            lines += [f"  ... and {len(changed) - 20} more"] if len(changed) > 20 else []
            raise ValueError(
                f"{file.parent} holds a run with other settings; take another --out, or the same settings:\n"
                + "\n".join(lines)
            )
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


class Log:
    """`log.jsonl`, a line per step, and a progress bar; opened to go on after `step`.

    Lines beyond that step are dropped: the run, which goes on from its checkpoint, will write them again. So
    are damaged ones, which cannot be told from them. writes: False does nothing at all.
    """

    def __init__(self, file: Path, step: int, steps: int, writes: bool = True):
        self.file, self.writes = file, writes
        if not writes:
            return
        with atomic(file) as temporary, temporary.open("wb") as copy:
            if file.exists():
                with file.open("rb") as lines:
                    copy.writelines(line for line in lines if 0 < step_of(line) <= step)
        self.opened = file.open("a", encoding="utf-8", buffering=1)
        self.bar = tqdm(total=steps, initial=step, desc="meta-training", mininterval=1, dynamic_ncols=True)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self.writes:
            self.bar.close()
            self.opened.close()

    def write(self, line: dict) -> None:
        """Log a step. A line with photos and t is one of a skipped step, and is printed as well."""
        if not self.writes:
            return
        numbers = {key: finite(value) for key, value in line.items()}
        self.opened.write(json.dumps({"time": round(time.time(), 1), **numbers}) + "\n")
        shown = {key: line[key] for key in ("bucket", "phase", "memory") if key in line}
        self.bar.set_postfix(loss=f"{line['loss']:.3f}", **shown, refresh=False)
        self.bar.update()
        if "photos" in line:
            cases = zip(line["photos"], line["t"])
            where = "; ".join(f"{printable(photo)} at t = {t:.4f}" for photo, t in cases)
            fault = "the loss or a gradient is not finite, the step is skipped"
            self.bar.write(f"step {line['step']}: {fault}: {where}", file=sys.stderr)

    def draw(self) -> None:
        """Draw the curve beside the log."""
        if self.writes:
            draw_curve(self.file, self.file.with_name("loss.png"))


def step_of(line: bytes) -> int:
    """Return the step of which a whole line of the log is, 0 when it is damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else 0
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def finite(value: object) -> object:
    """Return a number rounded to six digits, and None, as JSON knows no other, in place of nan and inf."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def draw_curve(log: Path, path: Path, height: int = 400, width: int = 1000) -> None:
    """Draw the loss over the steps: every step, pale, and the running mean over 5 % of them."""
    losses = np.fromiter(_losses(log), np.float32)
    if not len(losses):
        return
    window = max(1, len(losses) // 20)
    sums = np.concatenate([[0], losses.cumsum(dtype=np.float64)])
    means = (sums[window:] - sums[:-window]) / window
    low, high = np.quantile(losses, [0.0, 0.995])
    image = Image.new("RGB", (width, height), "white")
    draw, span = ImageDraw.Draw(image), max(high - low, 1e-9)

    def place(steps, values) -> list[tuple[float, float]]:
        """Return up to 20,000 points of the picture."""
        keep = slice(None, None, -(-len(values) // 20_000))
        x = 10 + (width - 20) * steps[keep] / max(len(losses) - 1, 1)
        y = height - 10 - (height - 40) * np.clip((values[keep] - low) / span, 0, 1)
        return list(zip(x.tolist(), y.tolist()))

    draw.point(place(np.arange(len(losses)), losses), "silver")
    draw.line(place(np.arange(len(means)) + (window - 1) / 2, means), "black", 2)
    text = f"loss of {len(losses)} steps, {low:.3f} to {high:.3f}; last mean over {window}: {means[-1]:.4f}"
    draw.text((14, 4), text, "black")
    with atomic(path) as temporary:
        image.save(temporary)


def _losses(log: Path) -> Iterator[float]:
    with log.open("rb") as lines:
        for line in lines:
            try:
                loss = json.loads(line)["loss"]
            except (ValueError, KeyError, TypeError, RecursionError):  # cut short when the power went
                continue
            if isinstance(loss, (int, float)):  # None: of a skipped step
                yield loss


# Memory


def explain_out_of_memory(error: Exception, device: torch.device, resident: dict[str, int]) -> str:
    """Say what lay in the GPU's memory, in bytes by name, and which flags shrink it."""
    lines = [f"  {size / 1e9:7.2f} GB  {what}" for what, size in resident.items()]
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
        rest = max(0, peak - sum(resident.values()))
        lines.append(f"  {rest / 1e9:7.2f} GB  activations and the rest, at the peak")
        lines.append(f"  {total / 1e9:7.2f} GB  is what the card has")
    return "\n".join(
        [
            f"out of memory on {device} ({str(error).strip().partition(chr(10))[0]}). Resident were:",
            *lines,
            "What shrinks it: a --vram below what the card has, if others use it too, for another plan; "
            "--batch 1, --resolution 512, --checkpoint all (activations); --bucket-ids 25 (mid and up); "
            "--r1 64 (meta_down); --stream 57, --base-dtype fp8 (the base)",
        ]
    )


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)
