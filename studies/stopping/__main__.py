"""Stop a training by what it shows without a judge, or after a fixed number of steps? In the toy model.

    python -m studies.stopping            # trains and scores what is missing; about an hour on one busy core
    python -m studies.stopping --table    # the table in docs/findings.md again, from the committed files

Thresholds are chosen on 12 synthetic people and measured on 30 others. scores.csv has a line per person and
state, averaged over prompts, signals.csv one with what is seen without a judge.
"""

import argparse
from pathlib import Path

import numpy as np

from bench.documents import write
from metaphd import benchmark
from run.command import run_script
from studies.rows import benchmark_words, read_results, read_rows, whole, write_rows
from studies.stopping.rules import Course, tabulate
from studies.stopping.signals import SIGNALS, look
from tiny.people import write_people

FOLDER = Path(__file__).parent
DOCUMENT = FOLDER.parents[1] / "docs" / "findings.md"
PEOPLE = {"choosing": (12, 200), "fresh": (30, 500)}  # how many, and their seed
METHODS, STEPS = ("meta-lora-noaug", "lora-noaug"), (20, 40, 60, 90, 120, 180, 240)
METRICS = ("r-facesim", "clip-t")
KEY = ("people", "method", "steps", "person")


def measure(out: Path, people: str) -> tuple[list[dict], list[dict]]:
    """Train, generate and score everyone with the benchmark; return rows of scores and of signals."""
    count, seed = PEOPLE[people]
    folder = out / "people" / people
    write_people(folder, people=count, photos=8, seed=seed, photo_share=1)
    options = ["--method", *METHODS, "--lr", 8e-3, "--steps", *STEPS]
    words = benchmark_words(folder, count, out / people, *options)
    whole(benchmark.main(words))
    scores = []
    for system, person, own in read_results(out / people):
        key = (people, system.get("method", "base"), system.get("steps", 0), person)
        scores.append(dict(zip((*KEY, *METRICS), (*key, *(own[metric] for metric in METRICS)))))
    again = benchmark.Benchmark(benchmark.parse_arguments(words))
    again.check()
    again.encode()
    again.load()
    return scores, [{"people": people} | row for run in again.runs for row in look(again, run)]


def courses(people: str) -> dict[str, Course]:
    """Return the trainings of some people by each method; ValueError when a file lacks any of them."""
    scores, signals = (
        {
            tuple(row[name] for name in KEY[1:]): row
            for row in read_rows(FOLDER / file)
            if row["people"] == people
        }
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
            write_rows(FOLDER / name, [row for part in parts for row in part])
    print(table())
    write(DOCUMENT, {"stopping": table})


if __name__ == "__main__":
    run_script(main)
