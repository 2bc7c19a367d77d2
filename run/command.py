"""A command from start to end: its messages, its signals, the command that goes on, memory running out."""

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

from flux.errors import UserError
from run.terminal import Shown, printable_lines


def run_script(main: Callable[[], None], stopped: str = "stopped") -> None:
    """Run a script's main; what its user can mend ends with one message instead of a traceback.

    SIGTERM ends it as Ctrl-C does, so that no half file stays. What is printed can steer no terminal.
    """
    script = Path(sys.argv[0])
    name = script.parent.name if script.stem == "__main__" else script.name
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"  # a line, without the code that warns
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with redirect_stdout(Shown(sys.stdout)), redirect_stderr(Shown(sys.stderr, bars=True)):
            main()
    except (UserError, OSError) as error:
        sys.exit(printable_lines(f"{name}: {error}"))
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", reason):
            raise
        sys.exit(printable_lines(f"{name}: out of memory ({reason}); a lower --vram makes another plan"))
    except KeyboardInterrupt:
        sys.exit(f"\n{stopped}")


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
