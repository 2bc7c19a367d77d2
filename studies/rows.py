"""The lines of a study's scores.csv: one for each system and person."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from run.files import atomic
from studies.claim.scores import METRICS, draw_people

RESAMPLES = 1000


def read_results(folder: Path) -> Iterator[tuple[dict, str, dict[str, str]]]:
    """Yield each system's settings, each person, and that one's scores, of a benchmark's --out."""
    for file in sorted((folder / "scores").glob("*.json")):
        found = json.loads(file.read_text())
        for person, scores in found["people"].items():
            yield found["system"], person, {metric: f"{scores[metric]:.4f}" for metric in METRICS}


def put_rows(path: Path, rows: list[dict], key: Sequence[str]) -> None:
    """Put rows, which are alike in their key, into a file in the place of those there with that key."""
    fields, same = [*rows[0]], [str(rows[0][name]) for name in key]
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if [row[name] for name in key] != same] + rows
    rows.sort(key=lambda row: [str(row[name]) for name in fields])
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def mean_scores(path: Path, key: Sequence[str], resamples: int = RESAMPLES) -> dict[tuple, np.ndarray]:
    """Return mean METRICS (1 + resamples, metrics) of each system, named by the columns of the key.

    A resample draws the people anew, the same ones for every system; the first is the true sample.
    """
    table = defaultdict(dict)
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            table[tuple(row[name] for name in key)][row["person"]] = [float(row[x]) for x in METRICS]
    means = {}
    for system, own in table.items():
        who = draw_people(len(own), 1, resamples)[:, :, 0]
        means[system] = who @ np.array([own[person] for person in sorted(own)])
    return means
