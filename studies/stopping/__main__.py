"""Stop a training by what it shows without a judge, or after a fixed number of steps? In the toy model.

    python -m studies.stopping            # trains and scores what is missing; about an hour on one busy core
    python -m studies.stopping --table    # the table in docs/findings.md again, from the committed files

Thresholds are chosen on 12 synthetic people and measured on 30 others. scores.csv has a line per person and
state, averaged over prompts, signals.csv one with what is seen without a judge.
"""

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.documents import write
from metaphd import benchmark
from run.command import run_script
from run.files import atomic
from studies.stopping.rules import Course, tabulate
from studies.stopping.signals import SIGNALS, look
from tiny.people import write_people

FOLDER = Path(__file__).parent
DOCUMENT = FOLDER.parents[1] / "docs" / "findings.md"
PROMPTS = FOLDER.parent / "claim" / "prompts.txt"
PEOPLE = {"choosing": (12, 200), "fresh": (30, 500)}  # how many, and their seed
METHODS, STEPS = ("meta-lora-noaug", "lora-noaug"), (20, 40, 60, 90, 120, 180, 240)
METRICS = ("r-facesim", "clip-t")
KEY = ("people", "method", "steps", "person")


def measure(out: Path, people: str) -> tuple[list[dict], list[dict]]:
    """Train, generate and score everyone with the benchmark; return rows of scores and of signals."""
    count, seed = PEOPLE[people]
    folder = out / "people" / people
    write_people(folder, people=count, photos=8, seed=seed, photo_share=1)
    words = ["--people", folder, "--model", "tiny", "--prompts", PROMPTS, "--out", out / people]
    words += ["--method", *METHODS, "--lr", 8e-3, "--steps", *STEPS, "--draws", "spread"]
    words = [str(word) for word in [*words, "--seeds", 1, "--sample-steps", 8, "--at-once", count]]
    benchmark.main(words)
    scores = []
    for file in sorted((out / people / "scores").glob("*.json")):
        found, sums = json.loads(file.read_text()), defaultdict(list)
        for row in found["pictures"]:
            sums[row["person"]].append([row[metric] for metric in METRICS])
        system = found["system"]
        for person, values in sums.items():
            key = (people, system.get("method", "base"), system.get("steps", 0), person)
            scores.append(dict(zip((*KEY, *METRICS), (*key, *(f"{x:.4f}" for x in np.mean(values, axis=0))))))
    again = benchmark.Benchmark(benchmark.parse_arguments(words))
    again.check()
    again.encode()
    again.load()
    return scores, [{"people": people} | row for run in again.runs for row in look(again, run)]


def read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def save(path: Path, rows: Sequence[dict]) -> None:
    rows = sorted(rows, key=lambda row: (row["people"], row["method"], int(row["steps"]), row["person"]))
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def courses(people: str) -> dict[str, Course]:
    """Return the trainings of some people by each method; ValueError when a file lacks any of them."""
    scores, signals = (
        {tuple(row[name] for name in KEY[1:]): row for row in read(FOLDER / file) if row["people"] == people}
        for file in ("scores.csv", "signals.csv")
    )
    found = {}
    for method in METHODS:
        names = sorted({person for _, _, person in signals})
        place = lambda steps, person: (method if steps else "base", str(steps), person)
        values = [[[float(scores[place(n, x)][m]) for m in METRICS] for n in (0, *STEPS)] for x in names]
        seen = {
            name: np.array([[float(signals[method, str(n), x][name]) for n in (0, *STEPS)] for x in names])
            for name in SIGNALS
        }
        found[method] = Course(np.array((0, *STEPS)), np.array(values), seen)
    return found


def table() -> str:
    return tabulate(courses("choosing"), courses("fresh"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/stopping"), help="folder for all that is made")
    parser.add_argument("--table", action="store_true", help="only the table, from the committed files")
    args = parser.parse_args(argv)
    if not args.table:
        measured = [measure(args.out, people) for people in PEOPLE]
        for name, parts in zip(("scores.csv", "signals.csv"), zip(*measured)):
            save(FOLDER / name, [row for part in parts for row in part])
    print(table())
    write(DOCUMENT, {"stopping": table})


if __name__ == "__main__":
    run_script(main)
