"""Tables of scores in Markdown, and the files of a system's scores."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from run.files import atomic

OPTIONAL = {"style": "Style", "bleed": "Bleed", "class-bleed": "Class bleed"}  # not all have the input
TITLES = {"clip-t": "CLIP-T", "clip-i": "CLIP-I", **OPTIONAL, "facesim": "FaceSim", "r-facesim": "R-FaceSim"}


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of lines of cells; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def scored_metrics(systems: Iterable[dict]) -> list[str]:
    """Return the metrics that at least one system has, in the order of TITLES."""
    known = {metric for scores in systems for metric in scores["overall"]}
    return [metric for metric in TITLES if metric in known]


def table(groups: dict[str, dict], metrics: Sequence[str]) -> str:
    """Return a Markdown table in the units of the paper's: 100 times the mean ± half its 95 % interval.

    groups: a line for each, by its name: a class of one system, or a system. See `metrics.describe`.
    """
    related = list(metrics[-2:]) == ["facesim", "r-facesim"]
    lines = [["", "people", *(TITLES[metric] for metric in metrics)] + ["relative difference"] * related]
    for name, group in groups.items():
        line = [name, str(group["people"]), *(_cell(group[metric], group["people"]) for metric in metrics)]
        if related:
            change = group.get("relative difference")
            line.append("–" if change is None else f"{change:+.1%}")
        lines.append(line)
    return markdown(lines)


def _cell(score: dict, people: int) -> str:
    """score: mean, ci95, and of how many people; people: how many there are in all."""
    mean, half, n = score["mean"], score["ci95"], score["people"]
    if mean is None:
        return "–"
    cell = f"{100 * mean:.2f}"
    if n > 1:
        cell += f" ± {100 * half:.2f}"
    if n < people:
        cell += f" (of {n})"
    return cell


def write_scores(path: Path, scores: dict, metrics: Sequence[str]) -> str:
    """Write all scores as JSON, those of the pictures as CSV, and the table as Markdown; return the table."""
    groups = scores["classes"] if len(scores["classes"]) > 1 else {}
    text = table({**groups, "overall": scores["overall"]}, metrics)
    notes = [f"{title}: {shorten(names)}" for title, names in scores["remarks"].items()]
    text = "\n\n".join([text, *filter(None, [scores["evaluators"]["note"]]), *notes])
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".json")
    with (
        atomic(path.with_name(name + ".csv")) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        columns = dict.fromkeys(key for row in scores["pictures"] for key in row)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(scores["pictures"])
    for suffix, content in {".md": text + "\n", ".json": json.dumps(scores, indent=1, default=str)}.items():
        with atomic(path.with_name(name + suffix)) as temporary:
            temporary.write_text(content, "utf-8")
    return text


def shorten(names: Sequence[str]) -> str:
    """Return how many names there are, and the first five."""
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
