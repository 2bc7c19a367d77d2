"""The log of a training run: a line for each step, a progress bar, a curve of the loss."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from run.files import atomic
from run.terminal import printable


class Log:
    """`log.jsonl`, with a line for each step, and a progress bar; opened to continue after `step`.

    Lines of later steps are dropped: the run continues from its checkpoint and will write them again. Damaged
    lines, whose step is not known, are dropped too. writes: False does nothing, for the ranks other than 0.
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
        self.bar = tqdm(total=steps, initial=step, desc="training", mininterval=1, dynamic_ncols=True)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self.writes:
            self.bar.close()
            self.opened.close()

    def write(self, line: dict) -> None:
        """Log a step; if the line has photos and t, the step was skipped, and that is printed as well."""
        if not self.writes:
            return
        numbers = {key: finite(value) for key, value in line.items()}
        self.opened.write(json.dumps({"time": round(time.time(), 1), **numbers}) + "\n")
        shown = {key: line[key] for key in ("bucket", "phase") if key in line}
        shown |= {"memory": f"{line['memory']:.1f} GiB"} if "memory" in line else {}
        self.bar.set_postfix(loss=f"{line['loss']:.3f}", **shown, refresh=False)
        self.bar.update()
        if "photos" in line:
            cases = zip(line["photos"], line["t"])
            where = "; ".join(f"{printable(photo)} at t = {t:.4f}" for photo, t in cases)
            fault = "the loss or a gradient is not finite, the step is skipped"
            self.bar.write(f"step {line['step']}: {fault}: {where}", file=sys.stderr)

    def plot(self) -> None:
        """Draw the curve of the loss beside the log."""
        if self.writes:
            plot_curve(self.file, self.file.with_name("loss.png"))


def step_of(line: bytes) -> int:
    """Return the step that a line of the log belongs to, or 0 when the line is damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else 0
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def finite(value: object) -> object:
    """Round a float to six digits; return None, JSON's null, for infinity and NaN."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def plot_curve(log: Path, path: Path) -> None:
    """Draw the loss over the steps: a grey point for each, and a running mean over 5 % of them."""
    losses = np.fromiter(_losses(log), np.float32)
    if not len(losses):
        return
    window = max(1, len(losses) // 20)
    sums = np.concatenate([[0], losses.cumsum(dtype=np.float64)])
    means = (sums[window:] - sums[:-window]) / window
    low, high = np.quantile(losses, [0.0, 0.995])
    span = max(high - low, 1e-9)
    height, width = 400, 1000
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)

    def place(steps: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
        """Return at most 20,000 points of the picture."""
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
            except (ValueError, KeyError, TypeError, RecursionError):  # a damaged line
                continue
            if isinstance(loss, (int, float)):  # None in a skipped step
                yield loss
