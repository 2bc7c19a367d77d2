"""What surrounds a command: its error messages, its signals, and how to continue after it was stopped."""

import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from flux.errors import UserError, first_line
from run.terminal import Shown, printable_lines

STOPPED = 130  # the exit status of a program that Ctrl-C has ended


def run_script(main: Callable[[], int | None], stopped: str = "stopped") -> None:
    """Run a script's main; an error that its user can mend ends it with one message, a bug with a traceback.

    main returns the exit status, None for 0. SIGTERM ends it as Ctrl-C does, so that no half-written file
    stays. All that is printed is escaped for the terminal. stopped: what is printed when the user stops it.
    """
    script = Path(sys.argv[0])
    name = script.parent.name if script.stem == "__main__" else script.name
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"  # without the line of code
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with redirect_stdout(Shown(sys.stdout)), redirect_stderr(Shown(sys.stderr, bars=True)):
            status = main()
    except (UserError, OSError) as error:
        sys.exit(printable_lines(f"{name}: {error}"))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(printable_lines(f"{name}: out of memory ({first_line(error)})"))
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        status = STOPPED
    sys.exit(status)


class Stop:
    """Let the training loop finish its step when SIGINT or SIGTERM comes: they only set `wanted`.

    The second signal, or one outside of `patiently`, raises KeyboardInterrupt at once.
    """

    def __init__(self):
        self.wanted = self.patient = False
        self.resident = {}  # bytes by name of what the run holds, for the message when memory runs out

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
        # Not by print, which is not reentrant.
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop immediately\n")

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Only set `wanted` in this block."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False


def command_line(script: str, argv: list[str] | None, start: str = "python") -> str:
    """Return the command that continues a run, quoted so that it can be pasted into a shell."""
    words = sys.argv[1:] if argv is None else argv
    return " ".join([start, script, *map(_quoted, words)])


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(word)) + "'"


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out, of the host or of a GPU.

    On a CPU torch raises a plain RuntimeError then, and so it does for what CUDA, cuBLAS and cuDNN report.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = r"out of memory|allocate memory|(BLAS|DNN)_STATUS_(\w+_)?ALLOC(ATION)?_FAILED"
    return isinstance(error, RuntimeError) and bool(re.search(words, first_line(error)))


def explain_out_of_memory(error: Exception, device: torch.device, resident: dict[str, int]) -> str:
    """Return a message that says what was in memory and which options make it less.

    resident: bytes by name.
    """

    def line(size: int, what: str) -> str:
        return f"  {size / 2**30:7.2f} GiB  {what}"

    lines = [line(size, what) for what, size in resident.items()]
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
        rest = max(0, peak - sum(resident.values()))
        lines.append(line(rest, "activations and the rest, at the peak"))
        lines.append(line(total, "is what the card has"))
    return "\n".join(
        [
            f"out of memory on {device} ({first_line(error)}). In memory were:",
            *lines,
            "To need less: --vram, below what the card has if other programs use it too; "
            "--batch 1, --resolution 512, --checkpoint all (activations); --bucket-ids 25 (mid and up); "
            "--r1 64 (meta_down); --stream 57, --base-dtype fp8 (the base)",
        ]
    )
