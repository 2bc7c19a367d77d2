"""An argument parser that lets no nonsense through: the same limits, in the same words, in every script."""

import argparse
import math
from pathlib import Path

from run.terminal import printable

MOST = 10**7
# What an option may be, by its name: least, most.
LIMITS = {
    **dict.fromkeys(("steps", "sample_steps", "batch", "save_every", "uses_per_image"), (1, MOST)),
    **dict.fromkeys(("bucket_ids", "min_photos", "at_once"), (1, MOST)),
    **dict.fromkeys(("r1", "r2", "rank", "ranks", "n", "seeds"), (1, 2**14)),
    **dict.fromkeys(("sample_every", "min_side"), (0, MOST)),
    "seed": (0, 2**32 - 1),
    "resolution": (16, 2**14),
    "t5_length": (1, 2**12),
    "samples": (0, 6),
    **dict.fromkeys(("weight_decay", "t_std", "guidance", "train_guidance", "cfg"), (0, math.inf)),
    **dict.fromkeys(("lr", "clip_grad"), (0, math.inf)),
    "vram": (0, math.inf),
    "max_yaw": (0, 90),
}
OPEN = ("lr", "clip_grad", "vram")  # their least is excluded


class Parser(argparse.ArgumentParser):
    """argparse with LIMITS, UTF-8 texts, finite numbers, no empty paths; a mistake ends with one line."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for kind, read in ((None, read_text), (int, read_whole), (float, read_number), (Path, read_path)):
            self.register("type", kind, read)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed = super().parse_args(args, namespace)
        for name, (least, most) in LIMITS.items():
            values = vars(parsed).get(name)
            for value in values if isinstance(values, list) else [values]:
                number, is_open = isinstance(value, int | float), name in OPEN
                if number and (not least <= value <= most or is_open and value == least):
                    ends = f"above {least}" if is_open else f"at least {least}"
                    ends += f" and at most {most}" if most < math.inf else ""
                    self.error(f"--{name.replace('_', '-')} {value}: must be {ends}")
        return parsed

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {printable(message[:400])}; --help lists all options\n")


def read_text(text: str) -> str:
    """Return text; argparse's error when it is not UTF-8."""
    if any("\ud800" <= char <= "\udfff" for char in text):  # what Python makes of bytes it cannot decode
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not UTF-8 text")
    return text


def read_whole(text: str) -> int:
    """Read a whole number; argparse's error when it is none."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None


def read_number(text: str) -> float:
    """Read a finite number; argparse's error when it is none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number")
    return number


def read_path(text: str) -> Path:
    """Read a path; argparse's error when it is empty."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty, must be a path")
    return Path(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show a default unless there is none, or the help text tells it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        tells = action.default in (None, "", False) or "default:" in action.help
        return action.help if tells else super()._get_help_string(action)


class Manual(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Print descriptions as they stand."""
