"""Plot the paper's figure 3: R-FaceSim against CLIP-T, and both against training steps."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from run.files import atomic
from scoring.tables import TITLES, scored_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"

Key = tuple[str, int, float]  # method, rank and learning rate: what a curve is of
Percents = dict[str, tuple[float, float]]  # by metric: the mean and half its interval, times 100
Curves = dict[Key, dict[int, Percents]]  # the points of each curve by their steps


def plot_curves(path: Path, systems: dict[str, dict]) -> bool:
    """Plot the paper's figure 3 from the scores of systems, over all people; return whether there was any.

    Left: R-FaceSim against CLIP-T. Each method, rank and learning rate has a curve through its numbers of
    steps. A method with several ranks also has a parabola fitted to all its points. Right: both metrics
    against steps, with 95 % intervals, for the smallest rank of each method.

    scores["system"], with "method", "rank", "lr" and "steps", tells on which curve a system is. A system
    without it, such as the base model, is a point at left and a horizontal line at right.
    """
    curves, levels = _collect(systems)
    points = [percents for curve in curves.values() for percents in curve.values()]
    plane = any({"clip-t", "r-facesim"} <= percents.keys() for percents in [*points, *levels.values()])
    timed = [metric for metric in ("r-facesim", "clip-t") if any(metric in percents for percents in points)]
    if not plane and not timed:
        return False

    import matplotlib  # takes a second, and only this function needs it
    from matplotlib.figure import Figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e8"}
    with matplotlib.rc_context({**style, "font.size": 9, "text.parse_math": False, "axes.axisbelow": True}):
        figure = Figure(figsize=(11, 5.4) if plane and timed else (6.5, 5.4), layout="constrained")
        panels = figure.subplot_mosaic([["plane"] * plane + [metric] for metric in timed] or [["plane"]])
        colours = dict(zip(dict.fromkeys((method, lr) for method, _, lr in curves), itertools.cycle(COLOURS)))
        if plane:
            _plot_plane(panels["plane"], curves, levels, colours)
        for metric in timed:
            _plot_time(panels[metric], metric, curves, levels, colours)
        if timed:
            panels[timed[0]].set_title("Bands are 95 % intervals over people", fontsize=9)
            panels[timed[-1]].set_xlabel("steps")
        handles = {}
        for panel in panels.values():  # a curve in several panels has one entry
            for handle, label in zip(*panel.get_legend_handles_labels()):
                handles.setdefault(label, handle)
        columns = min(len(handles), 5)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=150)
    return True


def _collect(systems: dict[str, dict]) -> tuple[Curves, dict[str, Percents]]:
    """Return the curves, sorted by key and steps, and by name the systems that are on none."""
    curves: Curves = {}
    levels: dict[str, Percents] = {}
    for name, scores in systems.items():
        percents: Percents = {}
        for metric in scored_metrics([scores]):
            score = scores["overall"][metric]
            if score["mean"] is not None:
                percents[metric] = 100 * score["mean"], 100 * (score["ci95"] or 0)
        place = scores.get("system") or {}
        if place.get("strength", 1) != 1 or place.get("stack"):  # see strengths.py
            continue
        if place.get("steps") is None:
            levels[name] = percents
        else:
            key = place["method"], place.get("rank") or 0, place.get("lr") or 0
            curves.setdefault(key, {})[place["steps"]] = percents
    return {key: dict(sorted(curves[key].items())) for key in sorted(curves)}, levels


def _plot_plane(axes: "Axes", curves: Curves, levels: dict[str, Percents], colours: dict) -> None:
    """Plot R-FaceSim against CLIP-T."""
    both = ("clip-t", "r-facesim")
    ranks = sorted({rank for _, rank, _ in curves})
    clouds = {}  # by method and rate, the points of all ranks
    for (method, rank, lr), curve in curves.items():
        colour = colours[method, lr]
        steps = [n for n, percents in curve.items() if {*both} <= percents.keys()]
        points = [[curve[n][metric][0] for metric in both] for n in steps]
        clouds.setdefault((method, lr), []).extend(points)
        marker = MARKERS[ranks.index(rank) % len(MARKERS)]
        look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1}
        axes.plot(*zip(*points), label=_curve_name((method, rank, lr), curves), **look)
        every = 1 if len(curves) <= 2 else max(1, len(steps) - 1)  # of many curves, only at both ends
        for n, point in zip(steps[::every], points[::every]):
            axes.annotate(str(n), point, (5, 4), textcoords="offset points", fontsize=7, color=colour)
    for cloud, points in clouds.items():
        if sum((key[0], key[2]) == cloud for key in curves) > 1 and len({x for x, _ in points}) > 3:
            fitted = np.polynomial.Polynomial.fit(*zip(*points), 2)
            axes.plot(*fitted.linspace(), "--", color=colours[cloud], linewidth=1, alpha=0.6, zorder=1)
    for name, percents in levels.items():
        if {*both} <= percents.keys():
            point = [percents[metric][0] for metric in both]
            axes.plot(*point, "*", color="#333333", markersize=11)
            axes.annotate(name, point, (8, 0), textcoords="offset points", va="center")
    fits = "; dashed, a parabola through a method's points" if len(ranks) > 1 else ""
    axes.set_title("Numbers are steps" + fits, fontsize=9)
    axes.set(xlabel="CLIP-T", ylabel="R-FaceSim")
    axes.margins(0.1)


def _plot_time(axes: "Axes", metric: str, curves: Curves, levels: dict[str, Percents], colours: dict) -> None:
    """Plot a metric against steps."""
    smallest_ranks = {(method, lr): rank for method, rank, lr in reversed(curves)}  # the last one stays
    for (method, lr), rank in smallest_ranks.items():
        key, look = (method, rank, lr), {"color": colours[method, lr]}
        known = {n: percents[metric] for n, percents in curves[key].items() if metric in percents}
        steps = [*known]
        means, halves = np.array([*known.values()]).reshape(-1, 2).T
        axes.plot(steps, means, "o-", label=_curve_name(key, curves), markersize=5, **look)
        axes.fill_between(steps, means - halves, means + halves, alpha=0.15, linewidth=0, **look)
        if len(steps) == 1:  # a band would have no width
            axes.errorbar(steps, means, halves, capsize=3, **look)
    for name, percents in levels.items():
        if metric in percents:
            level, place = percents[metric][0], ("axes fraction", "data")
            axes.axhline(level, color="#333333", linewidth=1)
            axes.annotate(name, (1, level), (4, 0), place, textcoords="offset points", va="center")
    axes.set(ylabel=TITLES[metric], xticks=sorted({n for curve in curves.values() for n in curve}))


def _curve_name(key: Key, curves: Curves) -> str:
    method, rank, lr = key
    many_rates = len({rate for *_, rate in curves}) > 1
    return method + (f", rank {rank}" if rank else "") + (f", lr {lr:g}" if many_rates else "")
