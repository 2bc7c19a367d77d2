"""Meta-LoRA against LoRA in the small world: runs and evaluates the study that docs/claim.md planned.

    python bench/claim.py --quick              # a smaller answer from the shipped weights, about 10 minutes
    python bench/claim.py --bases tiny second  # all of it; hours; the same command again goes on
    python bench/claim.py --figures            # tables and pictures anew from the committed scores

A cell is a system of benchmark.py: method, placement, rank, learning rate, prior and base. Its scores go to
docs/claim/<part>.csv, a line per step count, person and seed, averaged over prompts. Pictures stay in --out.
"""

import argparse
import csv
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

import benchmark
import train_meta
from flux.loading import LOCAL_MODELS, atomic
from metalora import load_meta, write_tensors
from report import markdown
from tiny.people import write_people

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "bench" / "claim_prompts.txt"
STEPS = (10, 20, 30, 45, 60, 90, 120, 180)
RATES = (4e-3, 8e-3, 2e-2, 4e-2)
LEVELS = (0.4, 0.5, 0.6, 0.7)  # of R-FaceSim
LIMIT = 0.03  # how much of the base model's prompt adherence may be lost
PEOPLE = {
    "validation": (12, 200),
    "test": (30, 300),
    "quick": (8, 400),
}  # how many, and the seed they are drawn from
METRICS = ("r-facesim", "facesim", "clip-t")
KEY = ("base", "prior", "targets", "method", "draws", "rank", "lr")  # what makes a cell
PLACE = ("steps", "person", "seed")  # a line of a cell


@dataclass(frozen=True)
class Group:
    """Cells that one call of benchmark.py makes."""

    part: str
    base: str = "tiny"
    prior: str = "0"  # the seed of stage 1; or a control made from it; "" for LoRA alone
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
    for people in (
        "validation",
        "test",
    ):  # the rates are looked at on validation people, and all reported on test people
        for targets in ("all", "no-modulation"):
            groups.append(Group("primary" if people == "test" else people, targets=targets, people=people))
    for base in bases:
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
    groups.append(Group("attention", targets="attention"))
    groups.append(Group("crops", methods=("meta-lora", "lora")))
    groups.append(Group("ranks", ranks=(2, 4, 8, 16), rates=(8e-3,)))
    return list(dict.fromkeys(groups))


QUICK = [
    Group("quick", targets="all", rates=(8e-3, 2e-2), people="quick", steps=(15, 30, 60, 120)),
]


# --- Running -----------------------------------------------------------------------------------------------


def folder_of(base: str) -> Path:
    return LOCAL_MODELS.get(base, Path(base))


def find_prior(group: Group, out: Path) -> Path:
    """Return a group's stage-1 file, after making it: trained, or a control made from the trained one."""
    if group.base == "tiny" and group.prior == "0" and group.targets == "all":
        return folder_of("tiny") / "meta.safetensors"
    folder = out / "priors" / "-".join((Path(group.base).name, group.targets, group.prior))
    path = folder / "meta.safetensors"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if not group.prior.isdecimal():
        trained = find_prior(Group(group.part, group.base, "0", group.targets), out)
        tensors, metadata = load_meta(trained)
        generator = torch.Generator().manual_seed(0)
        made = {name: CONTROLS[group.prior](down.float(), generator) for name, down in tensors.items()}
        write_tensors({name: down.half() for name, down in made.items()}, path, metadata)
        return path
    write_people(out / "meta_people", people=400, photos=20, seed=100)
    argv = ["--data", out / "meta_people", "--model", group.base, "--out", folder, "--r1", 32]
    argv += ["--targets", group.targets, "--steps", 4000, "--bucket-ids", 20, "--uses-per-image", 2]
    argv += ["--lr", 4e-3, "--seed", group.prior, "--sample-every", 0, "--no-checkpointing"]
    train_meta.main([*map(str, argv)])
    shutil.rmtree(folder / "buckets")
    return path


def random_like(down: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return what stage 1 started from: uniform up to 1 / sqrt(inputs)."""
    return (2 * torch.rand(down.shape, generator=generator) - 1) / down.shape[-1] ** 0.5


def flatten(down: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Keep the learned row space of each part, with all singular values as large as the start's were."""
    u, _, vt = torch.linalg.svd(down, full_matrices=False)
    return u @ vt * random_like(down, generator).norm(dim=(-2, -1), keepdim=True) / down.shape[-2] ** 0.5


CONTROLS = {"random": random_like, "flat": flatten}


def run(group: Group, out: Path) -> None:
    """Make all pictures and scores of a group; what is there is not made again."""
    people = out / "people" / group.people
    count, seed = PEOPLE[group.people]
    write_people(people, people=count, photos=8, seed=seed, photo_share=1)
    judges = folder_of(group.base) / "judges"
    if not judges.exists():
        shutil.copytree(folder_of("tiny") / "judges", judges)
    argv = ["--people", people, "--out", out / group.name, "--model", group.base, "--prompts", PROMPTS]
    argv += ["--meta", find_prior(group, out), "--targets", group.targets, "--method", *group.methods]
    argv += ["--lr", *group.rates, "--ranks", *group.ranks, "--steps", *group.steps, "--draws", group.draws]
    argv += ["--seeds", group.seeds, "--sample-steps", 8, "--at-once", count, "--no-checkpointing"]
    benchmark.main([*map(str, argv)])


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


# --- Evaluating --------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """Scores (steps, people, seeds, metrics) of a system at each of its step counts, the base model first."""

    steps: list[int]
    scores: np.ndarray


def read_scores(path: Path) -> dict[tuple, Cell]:
    """Read a part's cells by KEY; ValueError when one lacks a person, a seed or the base model."""
    table = defaultdict(dict)
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            place = int(row["steps"]), row["person"], row["seed"]
            table[tuple(row[name] for name in KEY)][place] = [float(row[metric]) for metric in METRICS]
    bases = {key[0]: table.pop(key) for key in [*table] if key[KEY.index("method")] == "base"}
    cells = {}
    for key, own in table.items():
        own = {**bases[key[0]], **own}
        steps, people, seeds = (sorted({place[k] for place in own}) for k in range(3))
        if len(own) != len(steps) * len(people) * len(seeds):
            raise ValueError(f"{path}: {key} is not whole")
        shape = (len(steps), len(people), len(seeds), len(METRICS))
        cells[key] = Cell(steps, np.array([own[place] for place in sorted(own)]).reshape(shape))
    return cells


def steps_to(level: float, cell: Cell, means: np.ndarray, limit: float | None) -> float:
    """Return the least number of steps at which R-FaceSim is `level` and adherence above the base's - limit.

    means: (steps, metrics), interpolated linearly between step counts. Infinite when that is never so.
    """
    grid = np.arange(cell.steps[-1] + 1)
    similar, adherent = (
        np.interp(grid, cell.steps, means[:, METRICS.index(m)]) for m in ("r-facesim", "clip-t")
    )
    good = similar >= level
    if limit is not None:
        good &= adherent >= adherent[0] - limit
    return float(grid[good][0]) if good.any() else np.inf


def compare(
    ours: Sequence[Cell], theirs: Sequence[Cell], level: float, limit: float | None, resamples: int
) -> dict:
    """Return steps of the fastest of theirs by those of the fastest of ours, with a paired bootstrap.

    People and seeds are drawn anew, the same for both sides, and the fastest cells chosen again each time.
    """
    rng = np.random.default_rng(0)
    _, people, seeds, _ = ours[0].scores.shape

    def fastest(cells: Sequence[Cell], who: np.ndarray, which: np.ndarray) -> float:
        means = [cell.scores[:, who][:, :, which].mean(axis=(1, 2)) for cell in cells]
        return min(steps_to(level, cell, mean, limit) for cell, mean in zip(cells, means))

    everybody = np.arange(people), np.arange(seeds)
    both = [(fastest(ours, *everybody), fastest(theirs, *everybody))]
    for _ in range(resamples):
        draw = rng.integers(people, size=people), rng.integers(seeds, size=seeds)
        both.append((fastest(ours, *draw), fastest(theirs, *draw)))
    ratios = np.array(
        [np.nan if np.isinf(a) and np.isinf(b) else b / a if np.isfinite(a) else 0 for a, b in both]
    )
    known = ratios[1:][~np.isnan(ratios[1:])]
    low, high = np.quantile(known, [0.025, 0.975], method="nearest") if len(known) else (np.nan, np.nan)
    return {"ours": both[0][0], "theirs": both[0][1], "ratio": ratios[0], "low": low, "high": high,
            "neither": float(np.isnan(ratios[1:]).mean()) if resamples else 0.0}  # fmt: skip


def choose(cells: dict[tuple, Cell], **wanted: str | Sequence[str]) -> list[Cell]:
    """Return the cells whose key has the wanted values."""
    allowed = {
        KEY.index(name): [value] if isinstance(value, str) else value for name, value in wanted.items()
    }
    return [cell for key, cell in cells.items() if all(key[k] in some for k, some in allowed.items())]


def ratio_table(cells: dict[tuple, Cell], resamples: int) -> str:
    """Lay out the primary measure: a line per base, prior, placement, adherence limit and level."""
    lines = [["base", "prior", "placement", "limit", "R-FaceSim", "Meta-LoRA", "LoRA", "ratio", "95 %"]]
    for base, prior in sorted({key[:2] for key in cells if key[1]}):
        ours = lambda targets: choose(
            cells, base=base, prior=prior, targets=targets, method="meta-lora-noaug"
        )
        theirs = lambda targets: choose(cells, base=base, targets=targets, method="lora-noaug")
        placements = sorted({key[2] for key in cells if key[:2] == (base, prior)})
        pairs = {f"{targets} in both": (targets, targets) for targets in placements}
        pairs["each at its best"] = (placements, placements)
        for name, (own, other) in pairs.items():
            for limit in (LIMIT, None):
                for level in LEVELS:
                    found = compare(ours(own), theirs(other), level, limit, resamples)
                    if np.isinf([found["ours"], found["theirs"]]).all():
                        continue
                    ends = f"{found['low']:.2f} to {found['high']:.2f}"
                    counts = [f"{found[side]:.0f}".replace("inf", "never") for side in ("ours", "theirs")]
                    told = f"{limit}" if limit else "none"
                    ratio = f"{found['ratio']:.2f}"
                    lines.append([base, prior, name, told, f"{level}", *counts, ratio, ends])
    return markdown(lines)


def mean_table(cells: dict[tuple, Cell]) -> str:
    """Lay out R-FaceSim / adherence, percent, of every cell at each of its step counts."""
    steps = sorted({n for cell in cells.values() for n in cell.steps})
    lines = [[*KEY, *map(str, steps)]]
    for key, cell in sorted(cells.items()):
        similar, _, adherent = 100 * cell.scores.mean(axis=(1, 2)).T  # as METRICS
        told = {n: f"{a:.1f} / {b:.1f}" for n, a, b in zip(cell.steps, similar, adherent)}
        lines.append([*key, *(told.get(n, "") for n in steps)])
    return markdown(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="eight people, the shipped base and prior")
    parser.add_argument(
        "--figures", action="store_true", help="run nothing, evaluate the scores that are there"
    )
    parser.add_argument(
        "--bases", nargs="+", default=["tiny"], help="model folders; the first should be tiny"
    )
    parser.add_argument("--parts", nargs="+", help="only these, such as primary")
    parser.add_argument("--out", type=Path, default=Path("out/claim"), help="pictures, LoRAs, priors")
    parser.add_argument(
        "--scores", type=Path, default=ROOT / "docs" / "claim", help="folder of the CSV files"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args(argv)
    groups = QUICK if args.quick else plan(args.bases)
    groups = [group for group in groups if not args.parts or group.part in args.parts]
    args.scores = args.out if args.quick else args.scores
    args.scores.mkdir(parents=True, exist_ok=True)
    for group in [] if args.figures else groups:
        run(group, args.out)
        collect(groups, args.out, args.scores)
    looked = ["looked"] if args.figures and "looked" in (args.parts or ["looked"]) else []
    for part in dict.fromkeys([*looked, *(group.part for group in groups)]):
        if (file := args.scores / f"{part}.csv").exists():
            cells = read_scores(file)
            print(f"\n{part}\n\n{mean_table(cells)}\n\n{ratio_table(cells, args.resamples)}")


if __name__ == "__main__":
    main()
