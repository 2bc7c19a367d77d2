"""The argument parser of all scripts: checks types and limits, and ends with one line on a mistake."""

import argparse
import math
import re
from pathlib import Path

from run.terminal import printable

MOST = 10**7
# The smallest and the largest value of each option, by its name.
LIMITS = {
    **dict.fromkeys(("steps", "sample_steps", "batch", "save_every", "uses_per_image"), (1, MOST)),
    **dict.fromkeys(("bucket_ids", "min_photos", "max_people", "max_photos", "at_once", "watch"), (1, MOST)),
    **dict.fromkeys(("r1", "r2", "rank", "ranks", "n", "seeds"), (1, 2**14)),
    **dict.fromkeys(("sample_every", "min_side"), (0, MOST)),
    "seed": (0, 2**32 - 1),
    "codes": (1, 2**14),
    "hidden": (0, 2**16),
    "resolution": (16, 2**14),
    "t5_length": (1, 2**12),
    "samples": (0, 6),
    **dict.fromkeys(("weight_decay", "t_std", "guidance", "train_guidance", "cfg"), (0, math.inf)),
    **dict.fromkeys(("lr", "clip_grad", "strengths", "stack_strengths"), (0, math.inf)),
    "vram": (0, math.inf),
    "max_yaw": (0, 90),
}
OPEN = ("lr", "clip_grad", "vram", "strengths", "stack_strengths")  # the smallest value itself is not allowed


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that wants whole names, UTF-8, finite numbers within LIMITS and no empty paths."""

    def __init__(self, *args, limits: dict[str, tuple[float, float]] | None = None, **options):
        """limits: of this command, where they differ from LIMITS."""
        super().__init__(*args, allow_abbrev=False, **options)
        self.limits = LIMITS | (limits or {})
        self._negative_number_matcher = re.compile(r"-\.?\d")  # as from Python 3.14 on: --face -2,10,50,70
        for kind, read in ((None, read_text), (int, read_whole), (float, read_number), (Path, read_path)):
            self.register("type", kind, read)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed = super().parse_args(args, namespace)
        for name in self.limits:
            values = getattr(parsed, name, None)
            for value in values if isinstance(values, list) else [values]:
                if isinstance(value, int | float):
                    self.check_limits(name, value)
        return parsed

    def check_limits(self, name: str, value: float) -> None:
        """End with an error when an option's value is outside of its limits."""
        least, most = self.limits[name]
        is_open = name in OPEN
        if least < value <= most or value == least and not is_open:
            return
        bounds = f"above {least}" if is_open else f"at least {least}"
        bounds += f" and at most {most}" if most < math.inf else ""
        self.error(f"--{name.replace('_', '-')} {value}: must be {bounds}")

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {printable(message[:400])}; --help lists all options\n")


def read_text(text: str) -> str:
    """Return the text; raise argparse's error when it is not UTF-8."""
    if any("\ud800" <= char <= "\udfff" for char in text):  # what Python makes of bytes it cannot decode
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not UTF-8 text")
    return text


def read_whole(text: str) -> int:
    """Read a whole number; raise argparse's error when it is none."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None


def read_number(text: str) -> float:
    """Read a finite number; raise argparse's error when it is none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number")
    return number


def read_path(text: str) -> Path:
    """Read a path; raise argparse's error when it is empty."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty, must be a path")
    return Path(text)


def parse_box(text: str) -> tuple[int, int, int, int]:
    """Read x0,y0,x1,y1."""
    try:
        x0, y0, x1, y1 = (round(float(number)) for number in text.split(","))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not four numbers x0,y0,x1,y1") from None
    return x0, y0, x1, y1


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show an option's default, unless there is none or the help text says it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        no_default = action.default is None or action.default is False or action.default == ""
        if no_default or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)


class Manual(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Print descriptions with their own line breaks."""
