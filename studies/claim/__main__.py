"""Meta-LoRA against LoRA on the toy model: run the study that README.md planned.

    python -m studies.claim --quick              # a smaller answer from the shipped weights, in minutes
    python -m studies.claim --bases tiny second  # all of it; hours; the same command again continues
    python -m studies.claim --figures            # tables and pictures anew from the committed scores

A cell is a system of the benchmark: method, placement, rank, learning rate, prior and base. Its scores go to
<part>.csv, a line per step count, person and seed, averaged over prompts. Pictures stay in --out.
"""

import argparse
import csv
import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train_meta
from lora.writing import write_tensors
from metalora import load_meta
from metaphd import benchmark
from run.files import atomic
from run.models import SHIPPED
from studies.claim.documents import BLOCKS, write_documents
from studies.claim.pictures import plot_pictures
from studies.claim.scores import KEY, METRICS, PLACE, read_scores
from studies.claim.study import PLACEMENTS, Study
from studies.claim.tables import means, primary
from studies.rows import whole
from tiny.people import write_people

SCORES = Path(__file__).parent
PROMPTS = Path(__file__).with_name("prompts.txt")
STEPS = (10, 20, 30, 45, 60, 90, 120, 180)
STEPS_LOOKED = (15, 30, 45, 60, 90, 120, 180)  # of attempts, and of looked.csv
RATES = (4e-3, 8e-3, 2e-2, 4e-2)
PEOPLE = {  # how many, the seed they are drawn from, and the side of a photo in pixels
    "validation": (12, 200, 64),
    "large": (12, 200, 160),
    "test": (30, 300, 64),
    "quick": (8, 400, 64),
}


@dataclass(frozen=True)
class Group:
    """Cells that one call of the benchmark makes."""

    part: str
    base: str = "tiny"
    prior: str = "0"  # the seed of stage 1, or a name of SPECTRA or RECIPES
    targets: str = "all"
    methods: tuple[str, ...] = ("meta-lora-noaug", "lora-noaug")
    rates: tuple[float, ...] = RATES
    ranks: tuple[int, ...] = (1,)
    draws: str = "spread"
    people: str = "test"
    steps: tuple[int, ...] = STEPS
    seeds: int = 2

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.part, Path(self.base).name, self.prior, self.targets, self.draws)))


def plan(bases: Sequence[str]) -> list[Group]:
    """List the whole study, what matters most first."""
    groups = []
    for people in ("validation", "test"):  # rates are looked at on the first, all is reported on the second
        for targets in ("all", "no-modulation"):
            groups.append(Group("primary" if people == "test" else people, targets=targets, people=people))
    for base in bases[:2]:
        for targets in ("all", "no-modulation"):
            for prior in ("0", "1"):
                # LoRA has no prior, so it comes with the first one.
                methods = Group.methods if prior == "0" else Group.methods[:1]
                groups.append(Group("primary", base, prior, targets, methods))
    only = Group.methods[:1]
    for targets in ("all", "no-modulation"):
        for control in ("random", "flat"):
            groups.append(Group("controls", prior=control, targets=targets, methods=only))
        groups.append(Group("draws", targets=targets, draws="independent", rates=(8e-3, 2e-2)))
    groups.append(Group("controls", prior="even-layers", methods=only, rates=(8e-3, 2e-2, 4e-2)))
    groups.append(Group("attention", targets="attention"))
    groups.append(Group("crops", methods=("meta-lora", "lora")))
    groups.append(Group("ranks", ranks=(2, 4, 8, 16), rates=(8e-3,)))
    attempt = partial(Group, "attempts", people="validation", steps=STEPS_LOOKED)
    groups.append(attempt(rates=(1.3e-2, 2.8e-2)))
    groups += [
        attempt(prior=name, methods=only, rates=(8e-3, 2e-2))
        for name in ("even-layers", "root-of-spectrum", "principal-axes", *RECIPES)
    ]
    groups += [attempt(base, rates=(8e-3, 2e-2)) for base in bases[2:]]
    methods, rates, steps = ("lora", "lora-noaug"), (8e-3,), (180, 360, 720)
    groups.append(Group("large", methods=methods, rates=rates, people="large", steps=steps))
    return list(dict.fromkeys(groups))


QUICK = [
    Group("quick", targets="all", rates=(8e-3, 2e-2), people="quick", steps=(15, 30, 60, 120)),
]


# --- Running -----------------------------------------------------------------------------------------------


def folder_of(base: str) -> Path:
    return SHIPPED.get(base, Path(base))


def find_prior(group: Group, out: Path) -> Path:
    """Return a group's stage-1 file, after making it: trained, or a control made from the trained one."""
    if group.base == "tiny" and group.prior == "0" and group.targets == "all":
        return folder_of("tiny") / "meta.safetensors"
    folder = out / "priors" / "-".join((Path(group.base).name, group.targets, group.prior))
    path = folder / "meta.safetensors"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if group.prior in SPECTRA:
        trained = find_prior(Group(group.part, group.base, "0", group.targets), out)
        learned, generator = load_meta(trained), torch.Generator().manual_seed(0)
        change = SPECTRA[group.prior]
        made = {name: change(down.float(), generator) for name, down in learned.tensors.items()}
        write_tensors({name: down.half().contiguous() for name, down in made.items()}, path, learned.metadata)
        return path
    recipe = RECIPE | RECIPES.get(group.prior, {})
    people = recipe.pop("people")
    data = out / f"meta_people_{people}"
    write_people(data, people=people, photos=20, seed=100)
    seed = group.prior if group.prior.isdecimal() else 0
    argv = ["--data", data, "--model", group.base, "--out", folder, "--targets", group.targets]
    argv += ["--seed", seed, "--sample-every", 0]
    argv += itertools.chain.from_iterable((f"--{name}", value) for name, value in recipe.items())
    whole(train_meta.main([*map(str, argv)]))
    shutil.rmtree(folder / "buckets")
    return path


# Options of train_meta.py, and how many people it sees: the prior of the study, and attempts at a better one.
RECIPE = {"people": 400, "r1": 32, "steps": 4000, "bucket-ids": 20, "uses-per-image": 2, "lr": 4e-3}
RECIPES = {
    "uses-10": {"uses-per-image": 10},
    "r1-8": {"r1": 8},
    "steps-12000-people-1200": {"steps": 12000, "people": 1200},
    "r1-64": {"r1": 64},
    "buckets-of-5": {"bucket-ids": 5},
}


def random_like(down: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return what stage 1 started from: uniform up to 1 / sqrt(inputs)."""
    return (2 * torch.rand(down.shape, generator=generator) - 1) / down.shape[-1] ** 0.5


def flatten(down: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep the learned row space of each part, with all singular values as large as the start's were."""
    u, _, vt = torch.linalg.svd(down, full_matrices=False)
    return u @ vt * random_like(down, generator).norm(dim=(-2, -1), keepdim=True) / down.shape[-2] ** 0.5


def even_layers(down: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep the directions and the shape of the spectrum, with each part as large as it was at the start."""
    return down * (random_like(down, generator).norm(dim=(-2, -1)) / down.norm(dim=(-2, -1)))[..., None, None]


def root_of_spectrum(down: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Replace the singular values of each part by their square roots, its norm kept."""
    u, values, vt = torch.linalg.svd(down, full_matrices=False)
    made = u * values.sqrt()[..., None, :] @ vt
    return made * (values.norm(dim=-1) / made.norm(dim=(-2, -1)))[..., None, None]


def principal_axes(down: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate the rows to the singular vectors, so that Adam steps along these."""
    _, values, vt = torch.linalg.svd(down, full_matrices=False)
    return values[..., None] * vt


SPECTRA = {  # meta_downs that are made from the trained one
    "random": random_like,
    "even-layers": even_layers,
    "flat": flatten,
    "root-of-spectrum": root_of_spectrum,
    "principal-axes": principal_axes,
}


def run(group: Group, out: Path) -> None:
    """Make all pictures and scores of a group; what is there is not made again."""
    people = out / "people" / group.people
    count, seed, size = PEOPLE[group.people]
    write_people(people, people=count, photos=8, seed=seed, photo_share=1, size=size)
    judges = folder_of(group.base) / "judges"
    if not judges.exists():
        shutil.copytree(folder_of("tiny") / "judges", judges)
    argv = ["--people", people, "--out", out / group.name, "--model", group.base, "--prompts", PROMPTS]
    argv += ["--meta", find_prior(group, out), "--targets", group.targets, "--method", *group.methods]
    argv += ["--lr", *group.rates, "--ranks", *group.ranks, "--steps", *group.steps, "--draws", group.draws]
    argv += ["--seeds", group.seeds, "--sample-steps", 8, "--at-once", count]
    whole(benchmark.main([*map(str, argv)]))


def collect(groups: Sequence[Group], out: Path, scores: Path) -> None:
    """Write the scores of the groups that are there, a CSV for each part."""
    lines = defaultdict(list)
    for group in groups:
        for file in sorted((out / group.name / "scores").glob("*.json")):
            lines[group.part].extend(read_lines(group, json.loads(file.read_text())))
    for part, some in lines.items():
        some = sorted(dict.fromkeys(some))  # the base's are in several groups
        with atomic(scores / f"{part}.csv") as temporary, temporary.open("w", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*KEY, *PLACE, *METRICS])
            writer.writerows(some)


def read_lines(group: Group, found: dict) -> Iterator[tuple]:
    """Yield a system's scores, averaged over prompts; the base model is a system of 0 steps."""
    system, sums = found["system"], defaultdict(list)
    for row in found["pictures"]:
        sums[row["person"], row["seed"]].append([row[metric] for metric in METRICS])
    method = system.get("method", "base")
    prior = group.prior if method.startswith("meta") else ""
    targets, draws = ("", "") if method == "base" else (group.targets, group.draws)
    key = (Path(group.base).name, prior, targets, method, draws, system.get("rank", ""), system.get("lr", ""))
    for (person, seed), values in sums.items():
        means = (f"{value:.4f}" for value in np.mean(values, axis=0))
        yield (*map(str, key), str(system.get("steps", 0)), person, seed, *means)


# --- What is there -----------------------------------------------------------------------------------------


def missing(groups: Sequence[Group], scores: Path) -> list[str]:
    """Name what was planned for the test people and has no scores yet, a part at a time."""
    parts = {file.stem: read_scores(file) for file in scores.glob("*.csv")}
    planned, absent = defaultdict(list), defaultdict(list)
    for group in groups:
        if group.people != "test":
            continue
        wanted = set(itertools.product(group.methods, map(str, group.ranks), map(str, group.rates)))
        there = {
            (key[3], *key[5:])
            for key in parts.get(group.part, ())
            if key[0] == Path(group.base).name and key[1] in ("", group.prior)
            if (key[2], key[4]) == (group.targets, group.draws)
        }
        name = f"{Path(group.base).name} {group.prior}, {PLACEMENTS.get(group.targets, group.targets)}"
        planned[group.part].append(name)
        if not wanted <= there:
            absent[group.part].append(name + ", in part" * bool(wanted & there))
    return [part if some == planned[part] else f"{part} ({'; '.join(some)})" for part, some in absent.items()]


def load_study(scores: Path) -> Study:
    """Read the scores that are there; both bases were planned."""
    return Study(scores, missing(plan(["tiny", "second"]), scores))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="eight people, the shipped base and prior")
    parser.add_argument(
        "--figures", action="store_true", help="run nothing: tables and pictures from the scores there are"
    )
    parser.add_argument(
        "--bases",
        nargs="+",
        default=["tiny"],
        help="model folders: tiny, a second base, and others to attempt a larger effect",
    )
    parser.add_argument("--parts", nargs="+", help="run only these, such as primary")
    parser.add_argument("--out", type=Path, default=Path("out/claim"), help="pictures, LoRAs, priors")
    parser.add_argument("--scores", type=Path, default=SCORES, help="folder of the CSV files")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.figures:
        study = load_study(args.scores)
        write_documents(study)
        plot_pictures(study)
        print(*(f"--- {name}\n\n{block(study)}\n" for name, block in BLOCKS.items()), sep="\n")
        return
    groups = QUICK if args.quick else plan(args.bases)
    groups = [group for group in groups if not args.parts or group.part in args.parts]
    scores = args.out if args.quick else args.scores
    scores.mkdir(parents=True, exist_ok=True)
    for group in groups:
        run(group, args.out)
        collect(groups, args.out, scores)
    for part in dict.fromkeys(group.part for group in groups):
        cells = read_scores(scores / f"{part}.csv")
        print(f"\n{part}\n\n{means(cells, sorted({n for cell in cells.values() for n in cell.steps}))}")
    if args.quick:
        print(f"\n{primary(Study(scores))}")


if __name__ == "__main__":
    main()
