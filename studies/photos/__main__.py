"""What are several photos of a person worth, and at which rank? Meta-LoRA on the toy model.

    python -m studies.photos            # trains and scores what is missing; about two hours of one core
    python -m studies.photos --figures  # the tables in docs/findings.md again, from the committed scores

People are learned from 1, 2, 4 or 8 photos and compared with the rest of their 16. The caption is the same
for all, as in personalize.py. The rate of each rank was chosen on other people. scores.csv has a line for
each system and person.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from bench.documents import write
from metaphd import benchmark
from run.command import run_script
from scoring.tables import markdown
from studies.claim.scores import ADHERENT, SIMILAR, Estimate, estimate
from studies.claim.words import number, tell_points
from studies.rows import benchmark_words, mean_scores, put_rows, read_results, whole
from tiny.people import write_people

SCORES = Path(__file__).with_name("scores.csv")
DOCUMENT = Path(__file__).parents[2] / "docs" / "findings.md"
PEOPLE = {"choosing": (12, 200), "fresh": (30, 600)}  # how many, and their seed
PHOTOS, RANKS, RATES, STEPS = (1, 2, 4, 8), (1, 2, 4), (4e-3, 8e-3), 90
KEY = ("people", "photos", "rank", "lr")


def measure(out: Path, people: str, photos: int, rates: dict[int, Sequence[float]]) -> list[dict]:
    """Learn everybody from so many photos, at the rates of each rank, and return rows."""
    count, seed = PEOPLE[people]
    folder = out / "people" / people
    write_people(folder, people=count, photos=16, seed=seed, photo_share=1)
    for caption in folder.glob("*/*.txt"):  # several photos have none in common
        caption.unlink()
    results = out / people / f"{photos}_photos"
    options = ["--method", "meta-lora-noaug", "--steps", STEPS, "--photos", photos]
    for rank, of_rank in rates.items():
        which = ["--ranks", rank, "--lr", *of_rank]
        whole(benchmark.main(benchmark_words(folder, count, results, *options, *which)))
    rows = []
    for system, person, scores in read_results(results):
        if system:  # not the base model
            place = {"rank": system["rank"], "lr": f"{system['lr']:g}"}
            rows.append({"people": people, "photos": photos, **place, "person": person, **scores})
    return rows


class Scores:
    """Mean scores of every system, see `mean_scores`, by KEY."""

    def __init__(self, file: Path = SCORES):
        self.means = mean_scores(file, KEY)

    def rate(self, rank: int) -> str:
        """Return a rank's rate: that of most R-FaceSim and adherence together, on the people for choosing."""
        found = {key: x[0] for key, x in self.means.items() if key[0] == "choosing" and key[2] == str(rank)}
        return max(found, key=lambda key: found[key][SIMILAR] + found[key][ADHERENT])[3]

    @property
    def photos(self) -> list[int]:
        """The numbers of photos that were measured."""
        return [n for n in PHOTOS if any(key[:2] == ("fresh", str(n)) for key in self.means)]

    def fresh(self, photos: int, rank: int) -> np.ndarray:
        return self.means["fresh", str(photos), str(rank), self.rate(rank)]


def several(scores: Scores) -> str:
    """Lay out R-FaceSim, the copying of the first photo and adherence, by photos and rank."""
    names = ["R-FaceSim", "FaceSim - R-FaceSim", "adherence", "R-FaceSim, less one photo's"]
    lines = [["photos", "r2", "rate", *names]]
    for photos, rank in product(scores.photos, RANKS):
        means = scores.fresh(photos, rank)
        similar, face, adherent = 100 * means[0]
        gain = tell_points(estimate((means - scores.fresh(1, rank))[:, SIMILAR])) if photos > 1 else ""
        cells = [number(similar), number(face - similar, 1, "+"), number(adherent), gain]
        lines.append([str(photos), str(rank), scores.rate(rank), *cells])
    return markdown(lines)


def answers(scores: Scores) -> str:
    """Say what photos and ranks bring."""
    lines = [["question", "answer", "figure [95 % interval]", "command"]]

    def more(photos: int, rank: int, than: tuple[int, int], metric: int = SIMILAR) -> Estimate:
        return estimate((scores.fresh(photos, rank) - scores.fresh(*than))[:, metric])

    def add(question: str, found: Estimate, figure: str) -> None:
        answer = "Yes" if found.low > 0 else "No, less" if found.high < 0 else "Undecided"
        lines.append(
            [question, answer, f"{figure} points, after {STEPS} steps", "`python -m studies.photos`"]
        )

    gains = {photos: more(photos, 1, than=(1, 1)) for photos in scores.photos[1:]}
    told = "; ".join(f"{photos} photos {tell_points(found)}" for photos, found in gains.items())
    most = scores.photos[-1]
    add("Do several photos give more likeness than one?", gains[most], f"R-FaceSim at r2 1: {told}")
    for photos in (1, most):
        told = []
        for rank in RANKS[1:]:
            similar, adherent = (more(photos, rank, (photos, 1), metric) for metric in (SIMILAR, ADHERENT))
            told.append(f"r2 {rank}: R-FaceSim {tell_points(similar)}, adherence {tell_points(adherent)}")
        noun = "one photo" if photos == 1 else f"{photos} photos"
        highest = more(photos, RANKS[-1], (photos, 1))
        add(f"Does a higher r2 help with {noun}?", highest, f"relative to r2 1, {'; '.join(told)}")
    return markdown(lines)


BLOCKS = {"several": several, "photos": answers}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/photos"), help="people, LoRAs, pictures")
    parser.add_argument("--figures", action="store_true", help="only the tables, from the committed scores")
    args = parser.parse_args(argv)
    if not args.figures:
        put_rows(SCORES, measure(args.out, "choosing", 4, dict.fromkeys(RANKS, RATES)), KEY[:2])
        scores = Scores()
        for photos in PHOTOS:
            chosen = {rank: [float(scores.rate(rank))] for rank in RANKS}
            put_rows(SCORES, measure(args.out, "fresh", photos, chosen), KEY[:2])
    scores = Scores()
    write(DOCUMENT, {name: partial(block, scores) for name, block in BLOCKS.items()})
    print(*(block(scores) for block in BLOCKS.values()), sep="\n\n")


if __name__ == "__main__":
    run_script(main)
