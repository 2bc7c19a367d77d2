"""Predicted LoRAs against trained ones on the toy model: run the study that README.md planned.

    python -m studies.predicted            # what is missing is trained, generated and scored; hours
    python -m studies.predicted --figures  # the tables of README.md again, from the committed scores

scores.csv has a line per system, person and seed, averaged over prompts.
"""

import argparse
import itertools
import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

import predictor.__main__ as predictor
from bench.documents import write
from metaphd import benchmark
from run.command import run_script
from scoring.tables import markdown
from studies.claim.scores import (
    ADHERENT,
    FACESIM,
    LIMIT,
    METRICS,
    SIMILAR,
    TINY,
    Estimate,
    draw_people,
    estimate,
)
from studies.claim.words import enumerate_words, number, tell_points
from studies.rows import benchmark_words, put_rows, read_rows, whole
from tiny.people import write_people

FOLDER = Path(__file__).parent
DOCUMENTS = (FOLDER / "README.md", FOLDER.parents[1] / "docs" / "findings.md")
PEOPLE = {"choosing": (12, 200), "fresh": (30, 500)}  # how many, and their seed
LEVELS = (0.5, 0.6, 0.7, 0.8)  # of R-FaceSim
RESAMPLES = 1000
STEPS = dict.fromkeys(("lora-noaug", "refined-noaug"), (10, 20, 30, 45, 60, 90, 120, 180))
RATES = (8e-3, 2e-2)
STRENGTHS = {  # of the LoRAs when they are used
    "predicted": (0.75, 0.9, 1.0, 1.25),
    "lora-noaug": (1.0, 1.25),
    "refined-noaug": (1.0, 1.25),
}
KEY = ("people", "predictor", "method", "lr", "strength")
PLACE = ("steps", "person", "seed")
TOLD = {"lora-noaug": "LoRA", "refined-noaug": "predicted, then trained"}

# Options of `python -m predictor`; "of": how many people it sees.
EARLIER = {
    "of": 1600,
    "r1": 32,
    "hidden": 512,
    "batch": 16,
    "lr": 2e-3,
    "steps": 11_000,
    "bucket-ids": 1600,
    "seed": 0,
}
# The one that ships with the toy model; it was made by two ranks with batches of 32.
RECIPE = EARLIER | {"hidden": 0, "batch": 64, "lr": 1e-3, "t-mean": 0.7, "steps": 3800}
SHORT = EARLIER | {"steps": 2500}
USUAL = "1,600 people"  # what the other short ones are compared with
PREDICTORS = {
    "shipped": RECIPE,
    "later times, 400 people": RECIPE | {"of": 400, "steps": 700},
    "two layers": EARLIER,
    "100 people": SHORT | {"of": 100},
    "400 people": SHORT | {"of": 400},
    USUAL: SHORT,
    "linear": SHORT | {"hidden": 0},
}


# --- Running -----------------------------------------------------------------------------------------------


def find_predictor(name: str, out: Path) -> list[object]:
    """Return the benchmark's option for a predictor, after training it; nothing for the shipped one."""
    if name == "shipped":
        return []
    folder, recipe = out / "predictors" / name.replace(" ", "-").replace(",", ""), dict(PREDICTORS[name])
    data = out / f"ids_{recipe['of']}"
    write_people(data, people=recipe.pop("of"), photos=12, seed=100)
    words = ["--data", data, "--model", "tiny", "--out", folder]
    words += itertools.chain.from_iterable((f"--{option}", value) for option, value in recipe.items())
    if not (folder / "predictor.safetensors").exists():
        whole(predictor.main([str(word) for word in words]))
    return ["--predictor", folder / "predictor.safetensors"]


def measure(out: Path, people: str, name: str) -> list[dict]:
    """Make and score what a predictor predicts; for the shipped one also trainings. Return rows."""
    count, seed = PEOPLE[people]
    folder = out / "people" / people
    write_people(folder, people=count, photos=8, seed=seed, photo_share=1)
    chosen = find_predictor(name, out)
    results = out / people / name.replace(" ", "-").replace(",", "")
    shipped = name == "shipped"
    calls = [(results, "predicted", ["--strengths", *STRENGTHS["predicted"]] if shipped else [])]
    if shipped:  # in a folder of their own, at fewer strengths
        for method, steps in STEPS.items():
            words = ["--lr", *RATES, "--steps", *steps, "--strengths", *STRENGTHS[method]]
            calls.append((results.with_name("trained"), method, words))
    for place, method, words in calls:
        whole(benchmark.main(benchmark_words(folder, count, place, *chosen, "--method", method, *words)))
    rows = {}  # by place, since the base model is scored in both folders
    for file in sorted(
        file for place in {place for place, *_ in calls} for file in place.glob("scores/*.json")
    ):
        found = json.loads(file.read_text())
        system, sums = found["system"], defaultdict(list)
        for row in found["pictures"]:
            sums[row["person"], row["seed"]].append([row[metric] for metric in METRICS])
        method = system.get("method", "base")
        lr = f"{system['lr']:g}" if method in STEPS else ""
        key = (people, name, method, lr, f"{system.get('strength', 1):g}")
        for (person, seed), values in sums.items():
            line = *key, system.get("steps", 0), person, seed
            scores = [f"{value:.4f}" for value in np.mean(values, axis=0)]
            rows[line] = dict(zip((*KEY, *PLACE, *METRICS), (*line, *scores)))
    return [*rows.values()]


# --- What the scores say -----------------------------------------------------------------------------------


class Scores:
    """The scores of some people, and resamples of people and seeds, of which the first is the true sample."""

    def __init__(self, people: str, resamples: int = RESAMPLES):
        table = defaultdict(dict)
        for row in read_rows(FOLDER / "scores.csv"):
            if row["people"] == people:
                place = int(row["steps"]), row["person"], row["seed"]
                table[tuple(row[name] for name in KEY[1:])][place] = [float(row[x]) for x in METRICS]
        # By (predictor, method, rate, strength): steps, and mean scores (1 + resamples, steps, metrics).
        self.curves: dict[tuple, tuple[list[int], np.ndarray]] = {}
        for key, own in table.items():
            steps, who, seeds = (sorted({place[k] for place in own}) for k in range(3))
            values = np.array([own[place] for place in sorted(own)])
            values = values.reshape(len(steps), len(who), len(seeds), len(METRICS))
            weights = draw_people(len(who), len(seeds), resamples)
            self.curves[key] = steps, np.einsum("rps,kpsm->rkm", weights, values)

    def at_once(self, name: str, strength: str = "1") -> np.ndarray:
        """Return the scores (1 + resamples, metrics) of a predictor without training."""
        return self.curves[name, "predicted", "", strength][1][:, 0]

    @property
    def base(self) -> np.ndarray:
        return self.curves["shipped", "base", "", "1"][1][:, 0]

    def trained(self, method: str) -> dict[tuple[str, str], np.ndarray]:
        """Return the curves (1 + resamples, 0 .. steps, metrics) of a method, by rate and strength."""
        found = {}
        for (name, which, lr, strength), (steps, scores) in self.curves.items():
            if (name, which) == ("shipped", method):
                start = self.base if method == "lora-noaug" else self.at_once("shipped", strength)
                whole = np.concatenate([start[:, None], scores], axis=1)
                between = [
                    np.interp(range(steps[-1] + 1), [0, *steps], one) for one in np.eye(len(steps) + 1)
                ]
                found[lr, strength] = np.einsum("kg,rkm->rgm", between, whole)
        return found

    def steps_to(self, method: str, level: float) -> np.ndarray:
        """Return the steps to a level while adherence is kept, of the fastest rate and strength.

        (1 + resamples,); inf where it is not reached.
        """
        floor, steps = self.base[:, None, ADHERENT] - LIMIT - TINY, []
        for curve in self.trained(method).values():
            good = (curve[..., SIMILAR] >= level - TINY) & (curve[..., ADHERENT] >= floor)
            steps.append(np.where(good.any(axis=1), good.argmax(axis=1), np.inf))
        return np.min(steps, axis=0)


def percent(values: np.ndarray) -> str:
    """Write a score in percent with its interval."""
    found = estimate(values)
    return f"{number(100 * found.value)} [{number(100 * found.low)}, {number(100 * found.high)}]"


def predicted(scores: Scores) -> str:
    """Lay out what each predictor reaches without training."""
    names = ["R-FaceSim", "FaceSim - R-FaceSim", "adherence, relative to the base's"]
    lines = [["predictor", "photos in all steps", "strength", *names, f"R-FaceSim, less that of {USUAL}"]]
    for name, recipe in PREDICTORS.items():
        for strength in (f"{one:g}" for one in STRENGTHS["predicted"]):
            if (name, "predicted", "", strength) not in scores.curves:
                continue
            own = scores.at_once(name, strength)
            copied = estimate(own[:, FACESIM] - own[:, SIMILAR])
            kept = estimate(own[:, ADHERENT] - scores.base[:, ADHERENT])
            more = ""
            if recipe["steps"] == SHORT["steps"] and name != USUAL:
                more = tell_points(estimate(own[:, SIMILAR] - scores.at_once(USUAL)[:, SIMILAR]))
            cells = [percent(own[:, SIMILAR]), tell_points(copied), tell_points(kept), more]
            lines.append([name, f"{recipe['batch'] * recipe['steps']:,}", strength, *cells])
    return markdown(lines)


def speed(scores: Scores) -> str:
    """Lay out the steps to each level, of LoRA and from the prediction on."""
    lines = [["R-FaceSim", "LoRA's steps", "steps after the prediction", "ratio"]]
    for level in LEVELS:
        theirs, ours = (scores.steps_to(method, level) for method in ("lora-noaug", "refined-noaug"))
        ratio = np.divide(theirs, ours, out=np.full(len(ours), np.inf), where=ours > 0)
        ratio[np.isinf(ours)] = np.where(np.isinf(theirs[np.isinf(ours)]), np.nan, 0)
        found = [estimate(values) for values in (theirs, ours, ratio)]
        cells = [[number(x, k) for x in (one.value, one.low, one.high)] for one, k in zip(found, (0, 0, 2))]
        lines.append([f"{level}", *(f"{value} [{low}, {high}]" for value, low, high in cells)])
    return markdown(lines)


def courses(scores: Scores) -> str:
    """Lay out R-FaceSim and adherence at each rate, strength and number of steps."""
    counts = sorted({0, *itertools.chain.from_iterable(STEPS.values())})
    lines = [["", "rate", "strength", *map(str, counts)]]
    for method in STEPS:
        for (lr, strength), curve in scores.trained(method).items():
            cells = []
            for n in counts:
                scores_there = curve[0, n, [SIMILAR, ADHERENT]] if n in (0, *STEPS[method]) else ()
                cells.append(" / ".join(f"{100 * score:.1f}" for score in scores_there))
            lines.append([TOLD[method], lr, strength, *cells])
    return markdown(lines)


def ends(scores: Scores) -> str:
    """Say the highest R-FaceSim of both, and the adherence where R-FaceSim is equal."""
    best = {
        method: np.max([curve[..., SIMILAR].max(axis=1) for curve in scores.trained(method).values()], axis=0)
        for method in STEPS
    }
    theirs, ours = best.values()
    text = f"The highest R-FaceSim: {percent(ours)} after the prediction, {percent(theirs)} by LoRA, "
    text += f"a difference of {tell_points(estimate(ours - theirs))}. "
    kept = enumerate_words(
        f"{tell_points(kept_beside(scores, strength))} at strength {strength}"
        for strength in (f"{one:g}" for one in STRENGTHS["predicted"])
        if ("shipped", "predicted", "", strength) in scores.curves
    )
    return text + f"Adherence of the prediction minus LoRA's at the same R-FaceSim, in points: {kept}."


def kept_beside(scores: Scores, strength: str) -> Estimate:
    """Return the adherence of the prediction minus LoRA's where R-FaceSim is the same.

    Of LoRA's rates and strengths the one counts that has most adherence there.
    """
    at_once, same = scores.at_once("shipped", strength), []
    curves = scores.trained("lora-noaug").values()
    for k, level in enumerate(at_once[:, SIMILAR]):
        found = []
        for curve in curves:
            good = curve[k, :, SIMILAR] >= level - TINY
            found += [curve[k, good.argmax(), ADHERENT]] if good.any() else []
        same.append(max(found, default=np.nan))
    return estimate(at_once[:, ADHERENT] - np.array(same))


BLOCKS = {"predicted": predicted, "speed": speed, "courses": courses, "ends": ends}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/predicted"), help="pictures, LoRAs, predictors")
    parser.add_argument("--predictors", nargs="+", choices=PREDICTORS, default=[*PREDICTORS])
    parser.add_argument("--people", nargs="+", choices=PEOPLE, default=[*PEOPLE])
    parser.add_argument("--figures", action="store_true", help="only the tables, from the committed scores")
    args = parser.parse_args(argv)
    if not args.figures:
        for people, name in itertools.product(args.people, args.predictors):
            put_rows(FOLDER / "scores.csv", measure(args.out, people, name), KEY[:2])
    scores = Scores("fresh")
    for path in DOCUMENTS:
        write(path, {name: partial(block, scores) for name, block in BLOCKS.items()})
    print(*(block(scores) for block in BLOCKS.values()), sep="\n\n")


if __name__ == "__main__":
    run_script(main)
