"""Means over people, their intervals, and tables of them."""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from run.files import atomic

TITLES = {"clip-t": "CLIP-T", "clip-i": "CLIP-I", "facesim": "FaceSim", "r-facesim": "R-FaceSim"}


# Tables


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lay out lines of text as a Markdown table, the first as its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, which makes 95 % intervals of few people."""
    # At t = sqrt(freedom) tan(a), a has the density cos(a) ** (freedom - 1).
    ends, step = np.linspace(0, math.pi / 2, 10**5 + 1, retstep=True)
    mass = np.cumsum(np.cos(ends[1:] - step / 2) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * mass[-1], mass, ends[1:]))


def _metrics(systems: Iterable[dict]) -> list[str]:
    found = {metric for scores in systems for metric in scores["overall"]}
    return [metric for metric in TITLES if metric in found]


def relative_difference(facesim: float, r_facesim: float) -> float | None:
    """Return what FaceSim loses without the reference (paper, Table 3): -0.11 for a copier of poses."""
    return (r_facesim - facesim) / facesim if facesim > 0 else None


def average(scores: Sequence[tuple[str, float | None]]) -> float | None:
    """Average one person's (prompt, score) over seeds, then over prompts; None are pictures left out."""
    seeds = defaultdict(list)
    for prompt, value in scores:
        if value is not None:
            seeds[prompt].append(value)
    return fmean(map(fmean, seeds.values())) if seeds else None


def interval(people: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of a mean over people, by Student's t; None for one."""
    n = len(people)
    return student(n - 1) * stdev(people) / math.sqrt(n) if n > 1 else None


def summarize(rows: Sequence[dict], metrics: Sequence[str]) -> dict[str, dict]:
    """Average the rows of `score` for each person, class, and over all people; cosines, not times 100."""
    people, groups = {}, {}
    for name in dict.fromkeys(row["person"] for row in rows):
        own = [row for row in rows if row["person"] == name]
        means = {metric: average([(row["prompt"], row[metric]) for row in own]) for metric in metrics}
        people[name] = {"class": own[0]["class"], **means}
        groups.setdefault(own[0]["class"], []).append(people[name])
    classes = {kind: describe(groups[kind], metrics) for kind in sorted(groups)}
    return {"overall": describe([*people.values()], metrics), "classes": classes, "people": people}


def describe(people: Sequence[dict], metrics: Sequence[str]) -> dict:
    """Return the mean over people of each metric, its interval, and Table 3's relative difference."""
    summary = {"people": len(people)}
    for metric in metrics:
        values = [person[metric] for person in people if person[metric] is not None]
        mean = fmean(values) if values else None
        summary[metric] = {"mean": mean, "ci95": interval(values), "people": len(values)}
    pairs = [(person.get("facesim"), person.get("r-facesim")) for person in people]
    pairs = [pair for pair in pairs if None not in pair]  # the same people on both sides
    if pairs and summary["facesim"]["mean"] > (summary["facesim"]["ci95"] or 0.1):  # else divided by chance
        summary["relative difference"] = relative_difference(*map(fmean, zip(*pairs)))
    return summary


def table(groups: dict[str, dict], metrics: Sequence[str]) -> str:
    """Lay out in Markdown, as the paper's tables: times 100, mean ± half the 95 % interval.

    groups: what `describe` returned, a line each: the classes of one system, or several systems.
    """
    lines = [["", "people", *(TITLES[metric] for metric in metrics), "relative difference"]]
    for name, group in groups.items():
        lines.append([name, str(group["people"])])
        for mean, half, n in (group[metric].values() for metric in metrics):
            cell = "–" if mean is None else f"{100 * mean:.2f}" + (f" ± {100 * half:.2f}" if n > 1 else "")
            lines[-1].append(cell + (f" (of {n})" if 0 < n < group["people"] else ""))
        change = group.get("relative difference")
        lines[-1].append("–" if change is None else f"{change:+.1%}")
    return markdown(lines if metrics[-2:] == ["facesim", "r-facesim"] else [line[:-1] for line in lines])


def write_scores(path: Path, scores: dict, metrics: Sequence[str]) -> str:
    """Write all numbers as JSON, the pictures' as CSV, table and remarks as Markdown; return the latter."""
    groups = scores["classes"] if len(scores["classes"]) > 1 else {}
    text = table({**groups, "overall": scores["overall"]}, metrics)
    notes = [f"{title}: {shorten(names)}" for title, names in scores["remarks"].items()]
    text = "\n\n".join([text, *filter(None, [scores["judges"]["note"]]), *notes])
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".json")
    with (
        atomic(path.with_name(name + ".csv")) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, scores["pictures"][0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(scores["pictures"])
    for suffix, content in {".md": text + "\n", ".json": json.dumps(scores, indent=1, default=str)}.items():
        with atomic(path.with_name(name + suffix)) as temporary:
            temporary.write_text(content, "utf-8")
    return text


def shorten(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
