"""The files of scores that studies commit: a line for each system and person."""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from run.files import atomic
from studies.claim.scores import METRICS, draw_people

PROMPTS = Path(__file__).parent / "claim" / "prompts.txt"
RESAMPLES = 1000


def benchmark_words(people: Path, count: int, out: Path, *options: object) -> list[str]:
    """Return the arguments with which studies call the benchmark, for the toy model and its people."""
    words = ["--people", people, "--at-once", count, "--out", out, "--model", "tiny", "--prompts", PROMPTS]
    words += ["--seeds", 1, "--sample-steps", 8, "--draws", "spread", *options]
    return [str(word) for word in words]


def whole(status: int | None) -> None:
    """Raise KeyboardInterrupt when a command of a study was stopped, as its exit status says."""
    if status:
        raise KeyboardInterrupt


def read_results(folder: Path) -> Iterator[tuple[dict, str, dict[str, str]]]:
    """Yield each system's settings, each person, and that one's scores, of a benchmark's --out."""
    for file in sorted((folder / "scores").glob("*.json")):
        found = json.loads(file.read_text())
        for person, scores in found["people"].items():
            yield found["system"], person, {metric: f"{scores[metric]:.4f}" for metric in METRICS}


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write rows, sorted."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=_order))


def put_rows(path: Path, rows: Sequence[dict], key: Sequence[str]) -> None:
    """Put rows, which are alike in their key, into a file in the place of those there with that key."""
    same = [str(rows[0][name]) for name in key]
    before = read_rows(path) if path.exists() else []
    write_rows(path, [*rows, *(row for row in before if [row[name] for name in key] != same)])


def _order(row: dict) -> list[tuple[float, str]]:
    """Sort numbers by their value, before words."""
    words = map(str, row.values())
    return [(float(x), "") if x.replace(".", "", 1).isdigit() else (math.inf, x) for x in words]


def mean_scores(path: Path, key: Sequence[str], resamples: int = RESAMPLES) -> dict[tuple, np.ndarray]:
    """Return mean METRICS (1 + resamples, metrics) of each system, named by the columns of the key.

    A resample draws the people anew, the same ones for every system; the first is the true sample.
    """
    table = defaultdict(dict)
    for row in read_rows(path):
        table[tuple(row[name] for name in key)][row["person"]] = [float(row[x]) for x in METRICS]
    means = {}
    for system, own in table.items():
        who = draw_people(len(own), 1, resamples)[:, :, 0]
        means[system] = who @ np.array([own[person] for person in sorted(own)])
    return means
