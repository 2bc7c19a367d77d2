"""How little of stage 1 is enough? Priors from less of everything, on the toy model.

    python -m studies.enough            # trains and scores what is missing; about three hours of one core
    python -m studies.enough --figures  # the tables in docs/findings.md again, from the committed scores

Everybody is learned by Meta-LoRA on each of the priors, at one learning rate. scores.csv has a line for
each prior and person.
"""

import argparse
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

import train_meta
from bench.documents import write
from flux.errors import UserError
from metalora import load_meta
from metaphd import benchmark
from run.command import run_script
from run.files import atomic
from scoring.tables import markdown
from studies.claim.scores import SIMILAR, Estimate, estimate
from studies.claim.words import number, tell_points
from studies.rows import benchmark_words, mean_scores, put_rows, read_results, whole
from tiny.people import write_people

SCORES = Path(__file__).with_name("scores.csv")
DOCUMENT = Path(__file__).parents[2] / "docs" / "findings.md"
PEOPLE = {"count": 30, "seed": 600}  # who are learned; nothing was chosen on them
LR, STEPS = 8e-3, 30  # of stage 2: early, when the prior matters most

# Stage 1: people, photos of each, and options of train_meta.py. A bucket has 20 people and always 100 steps.
USUAL = {"people": 200, "photos": 20, "steps": 1000, "r1": 32, "resolution": 64, "seed": 0}
PRIORS = {
    **{f"{n} steps": USUAL | {"steps": n} for n in (250, 500, 1000, 2000, 4000, 8000)},
    **{f"{n} people": USUAL | {"people": n, "steps": 4000} for n in (12, 50, 800)},
    **{f"{n} photos": USUAL | {"photos": n} for n in (2, 5)},
    "half the resolution": USUAL | {"resolution": 32},
    **{f"r1 {n}": USUAL | {"r1": n} for n in (16, 64, 128)},
}
# The table's groups, from least to most, each by what it is called there; others are compared with the last.
GROUPS = {
    "steps, of 200 people": {f"{n:,} steps": f"{n} steps" for n in (250, 500, 1000, 2000, 4000, 8000)},
    "people, 4,000 steps": {
        **{f"{n} people": f"{n} people" for n in (12, 50)},
        "200 people": "4000 steps",
        "800 people": "800 people",
    },
    "photos of each, 1,000 steps": {
        **{f"{n} photos": f"{n} photos" for n in (2, 5)},
        "20 photos": "1000 steps",
    },
    "resolution, 1,000 steps": {"half": "half the resolution", "whole": "1000 steps"},
    "r1, 1,000 steps": {"16": "r1 16", "32": "1000 steps", "64": "r1 64", "128": "r1 128"},
}
QUESTIONS = {
    "steps, of 200 people": "How many steps of stage 1 are enough?",
    "people, 4,000 steps": "How many people?",
    "photos of each, 1,000 steps": "How many photos of each?",
    "resolution, 1,000 steps": "Is half the resolution enough in stage 1?",
    "r1, 1,000 steps": "Which r1?",
}
Means = dict[tuple, np.ndarray]  # of `mean_scores`, by (prior,)
LORAS = {f"LoRA, rate {lr:g}": lr for lr in (8e-3, 2e-2)}  # no prior at all


# --- Running -----------------------------------------------------------------------------------------------


def train(out: Path, name: str) -> Path:
    """Run stage 1 for a prior, unless it is there. Priors that differ in steps only are one run."""
    recipe = PRIORS[name]
    file = out / "priors" / f"{name.replace(' ', '-')}.safetensors"
    if file.exists():
        return file
    data = out / f"ids_{recipe['people']}"
    write_people(data, people=recipe["people"], photos=20, seed=100)
    folder = out / "stage1" / "_".join(f"{key}-{value}" for key, value in recipe.items() if key != "steps")
    words = ["--data", data, "--model", "tiny", "--out", folder, "--lr", 4e-3, "--bucket-ids", 20]
    words += ["--uses-per-image", 20 // recipe["photos"], "--max-photos", recipe["photos"]]
    for option in ("steps", "r1", "resolution", "seed"):
        words += [f"--{option}", recipe[option]]
    whole(train_meta.main([str(word) for word in [*words, "--sample-every", 0, "--keep-buckets"]]))
    if load_meta(folder / "meta.safetensors").metadata["steps"] != str(recipe["steps"]):
        raise UserError(f"stage 1 was stopped: {name} is not done")
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as temporary:
        shutil.copy(folder / "meta.safetensors", temporary)
    return file


def measure(out: Path, name: str) -> Iterator[dict]:
    """Learn everybody with a prior, or as LoRA, and yield rows."""
    folder = out / "people"
    write_people(folder, people=PEOPLE["count"], photos=8, seed=PEOPLE["seed"], photo_share=1)
    if name in LORAS:
        options = ["--method", "lora-noaug", "--lr", LORAS[name]]
    else:
        options = ["--method", "meta-lora-noaug", "--lr", LR, "--meta", train(out, name)]
    results = out / "results" / name.replace(" ", "-")
    whole(benchmark.main(benchmark_words(folder, PEOPLE["count"], results, "--steps", STEPS, *options)))
    for system, person, scores in read_results(results):
        if system:  # not the base model
            yield {"prior": name, "person": person, **scores}


# --- What the scores say -----------------------------------------------------------------------------------


def less(means: Means, name: str, most: str) -> Estimate:
    """Return a prior's R-FaceSim minus another's, person by person."""
    return estimate((means[name,] - means[most,])[:, SIMILAR])


def enough(means: Means) -> str:
    """Lay out what everybody reaches with each prior, and the difference to the last of its group."""
    lines = [["", "stage 1", "R-FaceSim", "adherence", "R-FaceSim, less the last's"]]
    for title, names in (GROUPS | {"none": {name: name for name in LORAS}}).items():
        *_, most = names.values()
        for shown, name in names.items():
            if (name,) in means:
                similar, _, adherent = 100 * means[name,][0]
                difference = "" if name in (most, *LORAS) else tell_points(less(means, name, most))
                lines.append([title, shown, number(similar), number(adherent), difference])
                title = ""
    return markdown(lines)


def answers(means: Means) -> str:
    """Answer each question by the least of its group that is not clearly worse than the most."""
    lines = [["question", "answer", "figure [95 % interval]", "command"]]
    for title, question in QUESTIONS.items():
        *lesser, (shown, most) = GROUPS[title].items()
        found = {name: less(means, prior, most) for name, prior in lesser if (prior,) in means}
        answer = next((name for name in found if found[name].high >= 0), shown)
        figure = "; ".join(f"{name} {tell_points(difference)}" for name, difference in found.items())
        figure = f"R-FaceSim after {STEPS} steps of stage 2, less that of {shown}: {figure} points"
        lines.append([question, answer, figure, "`python -m studies.enough`"])
    return markdown(lines)


BLOCKS = {"enough": enough, "least": answers}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/enough"), help="data, priors, pictures")
    parser.add_argument("--priors", nargs="+", choices=[*PRIORS, *LORAS], default=[*PRIORS, *LORAS])
    parser.add_argument("--figures", action="store_true", help="only the tables, from the committed scores")
    args = parser.parse_args(argv)
    if not args.figures:
        for name in args.priors:
            put_rows(SCORES, [*measure(args.out, name)], ["prior"])
    means = mean_scores(SCORES, ["prior"])
    write(DOCUMENT, {name: partial(block, means) for name, block in BLOCKS.items()})
    print(*(block(means) for block in BLOCKS.values()), sep="\n\n")


if __name__ == "__main__":
    run_script(main)
