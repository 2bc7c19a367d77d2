"""What an identity LoRA does beside the likeness, on the toy model: strength, a style on top, other faces.

    python -m studies.beside --people 12    # trains and scores what is missing; 10 minutes on a free core
    python -m studies.beside --table        # the tables in docs/findings.md again, from the committed scores

Synthetic people whom nobody trained on, each learned from one whole photo by three methods. The second LoRA
is trained here, on 64 other people in neon. scores.csv has a line per system and person.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import personalize
from bench.documents import write
from metaphd import benchmark
from metaphd.others import OTHER
from people.photos import read_photo
from run.command import run_script
from run.models import SHIPPED
from scoring.intervals import half_interval
from scoring.tables import markdown
from studies.claim.scores import LIMIT
from studies.rows import benchmark_words, read_rows, whole, write_rows
from tiny.people import STYLES, VIEW, draw_identities, draw_views, render, to_pil, write_people
from vision.small import load_judges

SCORES = Path(__file__).with_name("scores.csv")
DOCUMENT = Path(__file__).parents[2] / "docs" / "findings.md"
METHODS = {"lora-noaug": "LoRA", "meta-lora-noaug": "Meta-LoRA", "predicted": "predicted"}
SEED = 500
STRENGTHS, STACKS = (0.5, 0.75, 1.0, 1.25, 1.5), (0.5, 1.0)
STYLE = "neon"  # none of the prompts asks for it
METRICS = ("r-facesim", "clip-t", "style", "class-bleed", "shows class")
KEY = ("method", "strength", "stack")


# --- Running -----------------------------------------------------------------------------------------------


def train_style(folder: Path) -> Path:
    """Train a plain LoRA on 64 people's pictures in the style, with a caption that does not name it."""
    lora, photos = folder / "style.safetensors", folder / "style"
    if lora.exists():
        return lora
    photos.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(900)
    people = draw_identities(64, generator)
    views = draw_views(64, generator, style=float([*STYLES].index(STYLE)))
    for k, image in enumerate(render(people, views)[0]):
        to_pil(image).save(photos / f"{k:03d}.png")
    words = [photos, "--model", "tiny", "--method", "lora", "--no-augment", "--caption", "a photo"]
    words += ["--rank", 4, "--lr", 1e-2, "--batch", 8, "--steps", 300, "--draws", "spread", "--samples", 0]
    personalize.main([str(word) for word in [*words, "--out", lora]])
    return lora


def make(out: Path, people: int) -> None:
    """Train, generate and score everyone; what is there is not made again."""
    folder = out / f"people_{people}"
    write_people(folder, people=people, photos=8, seed=SEED, photo_share=1)
    options = ["--method", *METHODS, "--lr", 8e-3, "--steps", 60]
    stack = ["--stack", train_style(out), "--stack-text", STYLES[STYLE]]
    for results, more in (
        ("uses", [*stack, "--stack-strengths", *STACKS]),
        ("others", ["--class-bleed"]),  # a folder of its own: at strength 1 only
        ("uses", [*stack, "--strengths", *STRENGTHS]),
    ):
        whole(benchmark.main(benchmark_words(folder, people, out / results, *options, *more)))


def collect(out: Path) -> list[dict]:
    """Return a row per system and person from the files of scores."""
    rows = {}
    for folder, metrics in (("uses", METRICS[:3]), ("others", METRICS[3:4])):
        for file in sorted((out / folder / "scores").glob("*.json")):
            found = json.loads(file.read_text())
            use = {"method": "base", "strength": 1.0, "stack": 0.0} | found["system"]
            for person, scores in found["people"].items():
                place = {name: use[name] for name in KEY} | {"person": person}
                row = rows.setdefault(tuple(place.values()), place | dict.fromkeys(METRICS, ""))
                row |= {metric: round(scores[metric], 4) for metric in metrics if metric in scores}
                if folder == "others":
                    own = [one for one in found["pictures"] if one["person"] == person]
                    row["shows class"] = round(shown_class(own), 4)
    names = sorted({row["person"] for row in rows.values()})
    return [rows[key] for key in sorted(rows)] + [*render_truth(names)]


def shown_class(rows: list[dict]) -> float:
    """Return the mean probability that pictures of the other class, as prompted, show it."""
    judge, paths = load_judges(SHIPPED["tiny"] / "judges")[1], []
    for row in rows:
        if row["prompt"].startswith("other-class"):
            paths.append(row["path"])
            word = OTHER[row["class"]]
    odds = judge.embed_images([read_photo(Path(path)) for path in paths])
    return (odds @ judge.embed_texts([f"a {word}"])[0]).mean().item()


def render_truth(names: list[str]) -> Iterator[dict]:
    """Yield a row per person for pictures that are right by construction, without the style and with it."""
    judge = load_judges(SHIPPED["tiny"] / "judges")[0]
    for name in names:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + int(name[-3:]))  # as `write_people`
        identity, views = draw_identities(1, generator), draw_views(16, generator)
        for stack, style in ((0.0, "photo"), (1.0, STYLE)):
            views[:8, VIEW.index("style")], views[8:, VIEW.index("style")] = 0, [*STYLES].index(style)
            photos, shown = judge(render(identity.expand(16, -1), views)[0]).chunk(2)
            place = {"method": "truth", "strength": 1.0, "stack": stack, "person": name}
            alike = (shown @ photos[1:].mT).mean().item()
            yield place | dict.fromkeys(METRICS, "") | {"r-facesim": round(alike, 4)}


# --- What the scores say -----------------------------------------------------------------------------------


class Scores:
    """The scores (people,) of each system, times 100, people in one order."""

    def __init__(self, rows: list[dict]):
        self.table: dict[tuple, dict[str, float]] = {}
        for row in sorted(rows, key=lambda row: row["person"]):
            for metric in METRICS:
                if row[metric] != "":
                    key = metric, row["method"], float(row["strength"]), float(row["stack"])
                    self.table.setdefault(key, {})[row["person"]] = 100 * float(row[metric])

    def of(self, metric: str, method: str, strength: float = 1.0, stack: float = 0.0) -> np.ndarray:
        return np.array([*self.table[metric, method, strength, stack].values()])


def tell(values: np.ndarray, sign: str = "") -> str:
    """Write a mean over people with half its 95 % interval."""
    return f"{values.mean():{sign}.1f} ± {half_interval(values.tolist()):.1f}"


def best_strength(scores: Scores, method: str) -> float:
    """Return the strength of the highest R-FaceSim at which at most LIMIT of the base's adherence is lost."""
    floor = scores.of("clip-t", "base").mean() - 100 * LIMIT
    kept = [x for x in STRENGTHS if scores.of("clip-t", method, x).mean() >= floor]
    return max(kept, key=lambda x: scores.of("r-facesim", method, x).mean())


def strengths(scores: Scores) -> str:
    """Lay out likeness and adherence at each strength, and the differences from strength 1."""
    lines = [["", "strength", "R-FaceSim", "minus that at 1", "adherence", "minus the base's"]]
    for method, name in METHODS.items():
        for x in STRENGTHS:
            alike, kept = scores.of("r-facesim", method, x), scores.of("clip-t", method, x)
            gain = "" if x == 1 else tell(alike - scores.of("r-facesim", method), "+")
            cells = [tell(alike), gain, tell(kept), tell(kept - scores.of("clip-t", "base"), "+")]
            lines.append([name, f"{x:g}", *cells])
    return markdown(lines)


def stacks(scores: Scores) -> str:
    """Lay out what a style LoRA on top takes from the likeness, and the person's LoRA from the style."""
    lines = [
        ["", "style's strength", "R-FaceSim", "minus that without", "adherence", "minus the base's", "style"]
    ]
    for method, name in {"base": "base model", **METHODS}.items():
        for x in (0.0, *STACKS):
            alike, kept = (scores.of(metric, method, 1.0, x) for metric in METRICS[:2])
            lost = tell(alike - scores.of("r-facesim", method), "+") if x and method != "base" else ""
            other = "" if method == "base" else tell(kept - scores.of("clip-t", "base", 1.0, x), "+")
            cells = ["" if method == "base" else tell(alike), lost, tell(kept), other]
            lines.append([name, f"{x:g}", *cells, tell(scores.of("style", method, 1.0, x))])
    return markdown(lines)


def bleeding(scores: Scores) -> str:
    """Lay out how much the other class's faces look like the person, beside the likeness of the person's."""
    lines = [["", "class bleed", "R-FaceSim of the person", "bleed divided by that", "shows the other class"]]
    for method, name in METHODS.items():
        bled, alike = scores.of("class-bleed", method), scores.of("r-facesim", method)
        part, shown = f"{bled.mean() / alike.mean():.0%}", tell(scores.of("shows class", method))
        lines.append([name, tell(bled, "+"), tell(alike), part, shown])
    lines.append(["base model", "", "", "", tell(scores.of("shows class", "base"))])
    return markdown(lines)


def answers(scores: Scores) -> str:
    """Lay out the questions with their answers."""
    best = {method: best_strength(scores, method) for method in METHODS}
    gains = {m: scores.of("r-facesim", m, x) - scores.of("r-facesim", m) for m, x in best.items()}
    losses = {m: scores.of("r-facesim", m, 1, 1) - scores.of("r-facesim", m) for m in METHODS}
    bled = {method: scores.of("class-bleed", method) for method in METHODS}
    own = {method: scores.of("r-facesim", method) for method in METHODS}
    truth = scores.of("r-facesim", "truth", 1, 1) - scores.of("r-facesim", "truth")

    def each(values: dict[str, np.ndarray], sign: str = "+") -> str:
        return ", ".join(f"{METHODS[method]} {tell(value, sign)}" for method, value in values.items())

    lines = [["question", "answer", "figure ± half the 95 % interval", "command"]]
    lines.append(
        [
            f"Which strength gives most R-FaceSim, if {100 * LIMIT:g} points of adherence may be lost?",
            "; ".join(f"{METHODS[m]} {x:g}{judge_gain(gains[m])}" for m, x in best.items()),
            f"R-FaceSim there minus that at 1: {each(gains)}",
        ]
    )
    lines.append(
        [
            "Does the likeness break with a style LoRA on top, at strength 1?",
            "; ".join(f"{METHODS[m]}: {judge_loss(x)}" for m, x in losses.items()),
            f"R-FaceSim with the style minus without: {each(losses)}; of right pictures {tell(truth, '+')}",
        ]
    )
    lines.append(
        [
            "Do faces of the other class look like the person?",
            "; ".join(f"{METHODS[m]}: {judge_bleed(x)}" for m, x in bled.items()),
            f"class bleed: {each(bled)}; R-FaceSim of the person {each(own, '')}",
        ]
    )
    command = f"`python -m studies.beside --people {len(truth)}`"
    return markdown([lines[0], *([*line, command] for line in lines[1:])])


def is_clear(values: np.ndarray) -> bool:
    return abs(values.mean()) > half_interval(values.tolist())


def judge_gain(values: np.ndarray) -> str:
    return "" if is_clear(values) or not values.any() else ", undecided against 1"


def judge_loss(values: np.ndarray) -> str:
    return ("it loses" if values.mean() < 0 else "it gains") if is_clear(values) else "undecided"


def judge_bleed(values: np.ndarray) -> str:
    return ("yes" if values.mean() > 0 else "less than the base's") if is_clear(values) else "undecided"


BLOCKS = {"beside": answers, "strengths": strengths, "stacks": stacks, "bleeding": bleeding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/beside"), help="folder for all that is made")
    parser.add_argument("--people", type=int, default=30, help="how many")
    parser.add_argument("--table", action="store_true", help="only the tables, from the committed scores")
    args = parser.parse_args()
    if not args.table:
        make(args.out, args.people)
        write_rows(SCORES, collect(args.out))
    scores = Scores(read_rows(SCORES))
    for block in BLOCKS.values():
        print(block(scores), end="\n\n")
    write(DOCUMENT, {name: lambda block=block: block(scores) for name, block in BLOCKS.items()})


if __name__ == "__main__":
    run_script(main)
