"""Measure --draws spread against independent, learning from crops, in the toy model.

    python -m studies.draws            # trains and scores what is missing; about 40 minutes on one busy core
    python -m studies.draws --table    # the table in docs/findings.md again, from the committed scores

Twelve synthetic people in photos of 160 pixels, three seeds, both methods. scores.csv has a line per person.
"""

import argparse
import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import fmean

from bench.documents import write
from metaphd import benchmark
from run.command import run_script
from scoring.intervals import half_interval
from scoring.tables import markdown
from studies.rows import read_rows, whole, write_rows
from tiny.people import write_people

SCORES = Path(__file__).with_name("scores.csv")
DOCUMENT = Path(__file__).parents[2] / "docs" / "findings.md"
PROMPTS = Path(__file__).parents[2] / "tiny" / "prompts.txt"
METHODS, DRAWS, SEEDS, STEPS = ("lora", "meta-lora"), ("independent", "spread"), (0, 1, 2), (30, 90)
METRICS = ("r-facesim", "clip-t")


def measure(out: Path) -> list[dict]:
    """Train, generate and score everyone, and return a row per person."""
    people = out / "people"
    if not people.exists():
        write_people(people, people=12, photos=8, seed=200, photo_share=1.0, size=160)
    rows = []
    for draws, seed in product(DRAWS, SEEDS):
        folder = out / f"{draws}_{seed}"
        words = ["--model", "tiny", "--people", people, "--prompts", PROMPTS, "--out", folder, "--lr", 1e-2]
        words += ["--method", *METHODS, "--steps", *STEPS, "--draws", draws, "--seed", seed]
        words += ["--seeds", 1, "--sample-steps", 12, "--at-once", 12]
        whole(benchmark.main([str(word) for word in words]))
        for method, steps in product(METHODS, STEPS):
            file = folder / "scores" / f"{method}_r1_lr0.01_s{steps}.json"
            for person, scores in json.loads(file.read_text())["people"].items():
                place = {"draws": draws, "seed": seed, "method": method, "steps": steps, "person": person}
                rows.append(place | {metric: round(scores[metric], 4) for metric in METRICS})
    return rows


def table(rows: list[dict]) -> str:
    """Compare the two ways to draw, person by person: means x 100 over seeds, and the paired difference."""
    means = defaultdict(list)
    for row in rows:
        for metric in METRICS:
            key = metric, row["method"], int(row["steps"]), row["draws"], row["person"]
            means[key].append(float(row[metric]))
    people = sorted({row["person"] for row in rows})
    lines = [["", "steps", *DRAWS, "difference [95 %]"]]
    for metric, method, steps in product(METRICS, METHODS, STEPS):
        columns = [[100 * fmean(means[metric, method, steps, draws, x]) for x in people] for draws in DRAWS]
        gains = [spread - independent for independent, spread in zip(*columns)]
        gain = f"{fmean(gains):+.1f} ± {half_interval(gains):.1f}"
        name = {"r-facesim": "R-FaceSim", "clip-t": "prompt"}[metric]
        lines.append([f"{name}, {method}", str(steps), *(f"{fmean(x):.1f}" for x in columns), gain])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/draws"), help="folder for all that is made")
    parser.add_argument("--table", action="store_true", help="only the table, from the committed scores")
    args = parser.parse_args()
    if args.table:
        rows = read_rows(SCORES)
    else:
        rows = measure(args.out)
        write_rows(SCORES, rows)
    print(table(rows))
    write(DOCUMENT, {"draws": lambda: table(rows)})


if __name__ == "__main__":
    run_script(main)
