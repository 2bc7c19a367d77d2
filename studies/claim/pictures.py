"""The pictures of README.md, in the manner of the paper's figures 3 and 6, with a panel per placement."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from run.files import atomic
from scoring.curves import COLOURS
from studies.claim.scores import ADHERENT, FACESIM, LIMIT, LORA, META, SIMILAR, Sample, best_rate
from studies.claim.study import CONTROLS, PLACEMENTS, Study
from studies.claim.words import tell_rate

TITLES = {LORA: "LoRA", META: "Meta-LoRA"}
COLOUR = {LORA: COLOURS[1], META: COLOURS[0]} | dict(zip(CONTROLS, COLOURS[2:]))
MEASURED = (10, 20, 30, 45, 60, 90, 120, 180)  # steps with a marker; between them is interpolated
NAMED = (20, 60, 180)  # steps with a number


def plot_pictures(study: Study) -> None:
    """Plot all pictures for which there are scores into the study's folder."""
    panels = {
        name: (study.pooled([targets]), targets)
        for targets, name in PLACEMENTS.items()
        if study.replicates([targets])
    }
    with page(study.folder / "frontier.png", 1, panels, "upper left") as axes:
        ends = [plot_frontier(ax, *panel) for ax, panel in zip(axes[0], panels.values())]
        axes[0, 0].set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    with page(study.folder / "steps.png", 2, panels, "lower right") as axes:
        for column, (sample, targets) in zip(axes.T, panels.values()):
            plot_steps(column, sample, targets)
    with page(study.folder / "facesim.png", 1, panels, "upper left") as axes:
        for ax, (sample, targets) in zip(axes[0], panels.values()):
            plot_facesim(ax, sample, targets)
    panels = {
        name: (study.first(), targets)
        for targets, name in PLACEMENTS.items()
        if any(study.first().curves(targets, META, prior=control) for control in CONTROLS)
    }
    if panels:
        with page(study.folder / "controls.png", 1, panels, "lower right") as axes:
            for ax, (sample, targets) in zip(axes[0], panels.values()):
                plot_controls(ax, sample, targets)


@contextmanager
def page(path: Path, rows: int, panels: dict[str, object], legend: str) -> Iterator[np.ndarray]:
    """Give axes (rows, panels) to plot in, with the panels' names on top, and save them."""
    import matplotlib  # takes a second, and only pictures need it
    from matplotlib.figure import Figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e8"}
    with matplotlib.rc_context({**style, "font.size": 9, "text.parse_math": False, "axes.axisbelow": True}):
        size = (max(6.2, 4.9 * len(panels)), (3.0 if rows > 1 else 4.2) * rows)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, len(panels), squeeze=False, sharey="row", sharex="row")
        yield axes
        for ax, name in zip(axes[0], panels):
            ax.set_title(name, fontsize=9)
        for ax in axes[:, 1:].flat:
            ax.set_ylabel("")
        for ax in axes[0]:
            ax.legend(frameon=False, fontsize=8, handlelength=1.6, loc=legend)
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})


def each_method(sample: Sample, targets: str) -> Iterator[tuple[str, str, np.ndarray, dict]]:
    """Yield each method's title, colour, curve at its best rate, and its curves at the others."""
    for method in (LORA, META):
        curves = sample.curves(targets, method)
        best = best_rate(curves)
        title = f"{TITLES[method]}, rate {tell_rate(best[1])}"
        yield title, COLOUR[method], curves[best], {k: c for k, c in curves.items() if k != best}


def marked(curve: np.ndarray) -> list[int]:
    """Return the measured step counts of a curve."""
    return [n for n in MEASURED if n < curve.shape[-2]]


def plot_frontier(ax, sample: Sample, targets: str) -> tuple[float, float]:
    """Plot R-FaceSim against adherence over steps; the other rates pale, the base a star.

    Returns the ends of the vertical axis, out of which rates that are far too high may run.
    """
    from matplotlib.patheffects import withStroke

    ends = []
    for title, colour, curve, others in each_method(sample, targets):
        for (_, lr), other in others.items():
            ax.plot(*plane(other), color=colour, linewidth=0.8, alpha=0.3)
            end = dict(xy=[scores[-1] for scores in plane(other)], xytext=(2, 0), textcoords="offset points")
            ax.annotate(tell_rate(lr), **end, fontsize=6, color=colour, alpha=0.6, annotation_clip=True)
        x, y = plane(curve)
        steps = marked(curve)
        ax.plot(x, y, color=colour, linewidth=1.6, label=title)
        ax.plot(x[steps], y[steps], "o", color=colour, markersize=4)
        ends += [*y]
        for n in NAMED:
            away = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
            away["path_effects"] = [withStroke(linewidth=2.5, foreground="white")]
            place = (0, 9 if colour == COLOUR[LORA] else -10)  # LoRA's above, Meta-LoRA's below
            ax.annotate(str(n), (x[n], y[n]), place, textcoords="offset points", **away)
    ax.plot(x[0], y[0], "*", color="#333333", markersize=11, zorder=3)
    ax.annotate("base", (x[0], y[0]), (8, 8), textcoords="offset points")
    ax.axhline(y[0] - 100 * LIMIT, color="#999999", linewidth=0.8, linestyle=":")
    ax.annotate("limit", (x[0], y[0] - 100 * LIMIT), (2, -11), textcoords="offset points", color="#777777")
    ax.set(xlabel="R-FaceSim, percent", ylabel="adherence, percent")
    return min([y[0] - 100 * LIMIT, *ends]) - 1, max(ends) + 1.5


def plane(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return R-FaceSim and adherence, percent, at every step."""
    return 100 * curve[0, :, SIMILAR], 100 * curve[0, :, ADHERENT]


def plot_band(ax, curve: np.ndarray, value: Callable[[np.ndarray], np.ndarray], **look) -> None:
    """Plot a value of the scores over steps with its 95 % interval."""
    values, steps = 100 * value(curve), marked(curve)
    low, high = np.quantile(values[1:], [0.025, 0.975], axis=0)
    ax.fill_between(range(values.shape[1]), low, high, alpha=0.15, linewidth=0, color=look["color"])
    ax.plot(steps, values[0, steps], "o", markersize=3.5, color=look["color"])
    ax.plot(values[0], linewidth=1.5, **look)


def plot_steps(column, sample: Sample, targets: str) -> None:
    """Plot R-FaceSim, and below it adherence, over steps."""
    for title, colour, curve, _ in each_method(sample, targets):
        for ax, metric in zip(column, (SIMILAR, ADHERENT)):
            plot_band(ax, curve, lambda scores, m=metric: scores[..., m], color=colour, label=title)
    column[0].set(ylabel="R-FaceSim, percent")
    column[1].set(ylabel="adherence, percent", xlabel="steps")


def plot_facesim(ax, sample: Sample, targets: str) -> None:
    """Plot how much FaceSim exceeds R-FaceSim, against R-FaceSim."""
    for title, colour, curve, _ in each_method(sample, targets):
        x, gap = 100 * curve[0, :, SIMILAR], 100 * (curve[..., FACESIM] - curve[..., SIMILAR])
        low, high = np.quantile(gap[1:], [0.025, 0.975], axis=0)
        steps = marked(curve)
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, gap[0], color=colour, linewidth=1.6, label=title)
        ax.plot(x[steps], gap[0, steps], "o", color=colour, markersize=4)
    ax.axhline(0, color="#999999", linewidth=0.8)
    ax.set(xlabel="R-FaceSim, percent", ylabel="FaceSim - R-FaceSim, points")


def plot_controls(ax, sample: Sample, targets: str) -> None:
    """Plot R-FaceSim over steps of the learned meta_down, of its controls, and of LoRA."""
    for title, colour, curve, _ in each_method(sample, targets):
        plot_band(ax, curve, lambda scores: scores[..., SIMILAR], color=colour, label=title)
    for control in CONTROLS:
        curves = sample.curves(targets, META, prior=control)
        if curves:
            best = best_rate(curves)
            look = {"color": COLOUR[control], "label": f"{control}, rate {tell_rate(best[1])}"}
            plot_band(ax, curves[best], lambda scores: scores[..., SIMILAR], **look)
    ax.set(xlabel="steps", ylabel="R-FaceSim, percent")
