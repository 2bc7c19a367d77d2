"""Plot likeness against adherence over the strengths of LoRAs, alone and with a second LoRA on top."""

import itertools
from pathlib import Path

from run.files import atomic
from scoring.curves import COLOURS, MARKERS
from scoring.tables import TITLES

BOTH = ("clip-t", "r-facesim")
LINES = ("-", "--", ":", "-.")  # without a second LoRA, and with its strengths


def plot_strengths(path: Path, systems: dict[str, dict]) -> bool:
    """Plot R-FaceSim against CLIP-T, a curve over the strengths of each LoRA; return whether there was any.

    scores["system"], with "strength" (1 if missing) and "stack", tells how a LoRA was used; one in a single
    use makes no curve. Systems without LoRA, the base model alone or with the second one, are stars.
    """
    curves, stars = {}, {}
    for name, scores in systems.items():
        use = scores.get("system") or {}
        means = [(scores["overall"].get(metric) or {}).get("mean") for metric in BOTH]
        if None in means:
            continue
        point, stack = [100 * mean for mean in means], use.get("stack", 0)
        if "method" not in use:
            stars[name] = point
        else:
            key = tuple(use.get(key) for key in ("method", "rank", "lr", "steps"))
            curves.setdefault(key, {}).setdefault(stack, {})[use.get("strength", 1)] = point
    curves = {key: curve for key, curve in curves.items() if sum(map(len, curve.values())) > 1}
    if not curves:
        return False

    import matplotlib  # takes a second, and only this function needs it
    from matplotlib.figure import Figure

    stacks = sorted({stack for curve in curves.values() for stack in curve})
    looks = dict(zip(stacks, zip(itertools.cycle(LINES), itertools.cycle(MARKERS))))
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(6.5, 5.4), layout="constrained")
        axes = figure.subplots()
        for (key, curve), colour in zip(curves.items(), itertools.cycle(COLOURS)):
            label = "{}, rank {}, lr {:g}, {} steps".format(*key)
            for stack, points in sorted(curve.items()):
                strengths, look = sorted(points), {"color": colour, "markersize": 4, "linewidth": 1}
                named = label + (f", second LoRA {stack:g}" if stack else "")
                places = [points[strength] for strength in strengths]
                line, marker = looks[stack]
                axes.plot(*zip(*places), marker=marker, linestyle=line, label=named, **look)
                for strength, place in zip(strengths, places):
                    offset = {"textcoords": "offset points", "fontsize": 7, "color": colour}
                    axes.annotate(f"{strength:g}", place, (5, 4), **offset)
        for name, place in stars.items():
            axes.plot(*place, "*", color="#333333", markersize=11)
            axes.annotate(name, place, (8, 0), textcoords="offset points", va="center")
        axes.set_title("Numbers are the strengths of the LoRA", fontsize=9)
        axes.set(xlabel=TITLES["clip-t"], ylabel=TITLES["r-facesim"])
        axes.margins(0.1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e8e8e8")
        figure.legend(loc="outside lower center", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=150)
    return True
