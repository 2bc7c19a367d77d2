"""The sheet of --watch: a column of pictures for each state, the photo first, and the scores above them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from run.pictures import GAP, contact_sheet
from scoring.curves import COLOURS
from scoring.tables import TITLES

COLUMNS = 12  # of states; of more than that every second, third, .. has pictures, and the last
CELL = 144  # pixels, both sides
PANEL, TITLE = 110, 24  # pixels: height of a curve, and of the line above it


@dataclass(frozen=True)
class State:
    """What was seen after a number of updates: a picture of each prompt, and their scores by metric."""

    step: int
    pictures: list[Image.Image]
    scores: dict[str, list[float]]  # nan where a prompt is not scored

    @property
    def means(self) -> dict[str, float]:
        return {metric: float(np.nanmean(values)) for metric, values in self.scores.items()}


def lay_out_sheet(photo: Image.Image, states: Sequence[State], prompts: Sequence[str]) -> Image.Image:
    """Return the sheet; the curves have a point for each state, also for those that are not shown."""
    stride = -(-max(1, len(states) - 1) // (COLUMNS - 1))
    shown = [*states[:-1:stride], states[-1]]
    columns = [[_mark(*pair) for pair in zip(state.pictures, _likeness(state))] for state in shown]
    rows = [[photo if k == 0 else None, *row] for k, row in enumerate(zip(*columns))]
    titles = ["photo", *(f"step {state.step}" for state in shown)]
    strip = contact_sheet(rows, prompts, titles, (CELL, CELL))
    if not states[0].scores:
        return strip
    left = strip.width - len(shown) * (CELL + GAP)  # of the first state's column
    middles = left + CELL / 2 + np.arange(len(shown)) * (CELL + GAP)
    curves = plot_curves(states, [state.step for state in shown], middles, left, strip.width)
    sheet = Image.new("RGB", (strip.width, curves.height + strip.height), "white")
    sheet.paste(curves, (0, 0))
    sheet.paste(strip, (0, curves.height))
    return sheet


def _likeness(state: State) -> list[float | None]:
    return state.scores.get("facesim") or [None] * len(state.pictures)


def _mark(picture: Image.Image, likeness: float | None) -> Image.Image:
    """Write FaceSim into a corner of a picture, shrunk or enlarged to its cell."""
    cell = ImageOps.pad(picture, (CELL, CELL), color=(128, 128, 128))
    if likeness is not None:
        draw, font = ImageDraw.Draw(cell), ImageFont.load_default(size=13)
        text, place = f"{likeness:.2f}", (5, CELL - 20)
        x0, y0, x1, y1 = draw.textbbox(place, text, font)
        draw.rectangle((x0 - 3, y0 - 3, x1 + 3, y1 + 3), fill="white")
        draw.text(place, text, "black", font)
    return cell


def plot_curves(
    states: Sequence[State], steps: Sequence[int], middles: np.ndarray, left: int, width: int
) -> Image.Image:
    """Plot each metric over the steps, the mean and every picture, so that a point stands over its column.

    steps, middles: of the columns, their updates and where they are, in pixels; left, width: of the axes'
    left side and of the whole, in pixels.
    """
    import matplotlib  # takes a second, and only this function needs it
    from matplotlib.figure import Figure

    metrics = [*states[0].scores]
    height = len(metrics) * (PANEL + TITLE) + GAP
    x = np.interp([state.step for state in states], steps, middles)
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e8"}
    with matplotlib.rc_context({**style, "font.size": 8, "axes.axisbelow": True}):
        figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        for k, (metric, colour) in enumerate(zip(metrics, COLOURS)):
            low = height - (k + 1) * (PANEL + TITLE)
            place = [left / width, low / height, (width - left) / width, PANEL / height]
            axes = figure.add_axes(place, xlim=(left, width), xticks=middles, xticklabels=[])
            values = np.array([state.scores[metric] for state in states])  # (states, prompts)
            for column in values.T:
                axes.plot(x, column, "o", color=colour, markersize=3, alpha=0.3, linewidth=0)
            axes.plot(
                x, [state.means[metric] for state in states], "o-", color=colour, markersize=5, linewidth=1.5
            )
            axes.margins(y=0.12)
            note = ", whose number is on it" if metric == "facesim" else ""
            axes.set_title(f"{TITLES[metric]}: the mean, and each picture{note}", loc="left", fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
