"""The arithmetic of README.md: scores from their files, resamples of them, and what is measured on each.

A resample draws people and seeds anew, the same ones for every system, and where several bases and priors are
pooled also these. Everything is computed for all resamples at once; the first is always the true sample.
"""

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

METRICS = ("r-facesim", "facesim", "clip-t")
KEY = ("base", "prior", "targets", "method", "draws", "rank", "lr")  # what makes a cell
PLACE = ("steps", "person", "seed")  # a line of a cell
LEVELS = (0.4, 0.5, 0.6, 0.7)  # of R-FaceSim
LIMIT = 0.03  # how much of the base model's prompt adherence may be lost
META, LORA = "meta-lora-noaug", "lora-noaug"
SIMILAR, FACESIM, ADHERENT = range(3)  # as METRICS
TINY = 1e-9  # equal but for rounding


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


# --- Resamples ---------------------------------------------------------------------------------------------


@cache
def draw_people(people: int, seeds: int, resamples: int) -> np.ndarray:
    """Return weights (1 + resamples, people, seeds) that sum to 1: everybody's first, then those drawn."""
    rng = np.random.default_rng(0)
    weights = []
    for count in (people, seeds):
        drawn = rng.integers(count, size=(resamples, count))
        times = (drawn[..., None] == np.arange(count)).sum(axis=1)
        weights.append(np.concatenate([np.ones((1, count)), times]) / count)
    return weights[0][:, :, None] * weights[1][:, None]


@cache
def draw_replicates(replicates: tuple[tuple[str, str], ...], resamples: int) -> np.ndarray:
    """Return weights (1 + resamples, replicates) that sum to 1: bases are drawn, then priors of each."""
    rng, own = np.random.default_rng(1), defaultdict(list)
    for k, (base, _) in enumerate(replicates):
        own[base].append(k)
    groups, weights = [*own.values()], np.zeros((1 + resamples, len(replicates)))
    for k, row in enumerate(weights):
        for g in rng.integers(len(groups), size=len(groups)) if k else range(len(groups)):
            priors = rng.choice(groups[g], len(groups[g])) if k else groups[g]
            np.add.at(row, priors, 1 / len(priors) / len(groups))
    return weights


class Sample:
    """Cells of one or several replicates (base, prior), and the resamples of them.

    LoRA has no prior, so a base's LoRA stands beside each of its priors.
    """

    def __init__(self, cells: dict[tuple, Cell], replicates: Sequence[tuple[str, str]], resamples: int):
        self.cells, self.replicates, self.resamples = cells, tuple(replicates), resamples

    def curves(
        self,
        targets: str | Sequence[str],
        method: str,
        draws: str = "spread",
        rank: str = "1",
        lr: str | None = None,
        prior: str | None = None,
    ) -> dict[tuple, np.ndarray]:
        """Return mean scores (1 + resamples, 0 .. steps, metrics) of the systems that every replicate has.

        They come by (targets, rate), interpolated linearly between step counts. A prior replaces all
        replicates' own.
        """
        targets, found = [targets] if isinstance(targets, str) else targets, []
        for base, own in self.replicates:
            given = "" if method.startswith("lora") else own if prior is None else prior
            wanted = {key: cell for key, cell in self.cells.items() if key[:2] == (base, given)}
            wanted = {key[2:]: cell for key, cell in wanted.items() if key[3:6] == (method, draws, rank)}
            found.append({key: cell for key, cell in wanted.items() if key[0] in targets})
        rates = [key for key in found[0] if all(key in one for one in found) and lr in (None, key[-1])]
        return {(key[0], key[-1]): self.curve([one[key] for one in found]) for key in sorted(rates)}

    def curve(self, cells: Sequence[Cell]) -> np.ndarray:
        """Return the mean over a cell for each replicate: (1 + resamples, 0 .. steps, metrics)."""
        end = min(cell.steps[-1] for cell in cells)
        shares, total = draw_replicates(self.replicates, self.resamples), 0.0
        for share, cell in zip(shares.T, cells):
            who = draw_people(*cell.scores.shape[1:3], self.resamples)
            means = np.einsum("rps,kpsm->rkm", who, cell.scores)
            between = [np.interp(range(end + 1), cell.steps, one) for one in np.eye(len(cell.steps))]
            total = total + share[:, None, None] * np.einsum("kg,rkm->rgm", between, means)
        return total


# --- Measures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; `unknown` is the share of resamples in which it has no value."""

    value: float
    low: float
    high: float
    unknown: float = 0.0


def estimate(values: np.ndarray) -> Estimate:
    """Return the first value, with the interval that holds 95 % of the known others; nan is unknown."""
    drawn = values[1:]
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [0.025, 0.975], method="nearest") if len(known) else (np.nan, np.nan)
    return Estimate(values[0], low, high, 1 - len(known) / len(drawn) if len(drawn) else 0.0)


def steps_to(level: float, curve: np.ndarray, limit: float | None) -> np.ndarray:
    """Return the least number of steps at which R-FaceSim is `level` and adherence above the base's - limit.

    curve: (..., 0 .. steps, metrics) -> (...). Infinite when that is never so.
    """
    good = curve[..., SIMILAR] >= level - TINY
    if limit is not None:
        good &= curve[..., ADHERENT] >= curve[..., :1, ADHERENT] - limit - TINY
    return np.where(good.any(axis=-1), good.argmax(axis=-1), np.inf)


def fastest(curves: dict[tuple, np.ndarray], level: float, limit: float | None) -> np.ndarray:
    """Return the steps of whichever curve is first, chosen anew in each resample."""
    return np.min([steps_to(level, curve, limit) for curve in curves.values()], axis=0)


@dataclass(frozen=True)
class Speed(Estimate):
    """The ratio of theirs to ours, and both numbers of steps."""

    ours: float = np.nan
    theirs: float = np.nan


def compare_speed(
    ours: dict[tuple, np.ndarray], theirs: dict[tuple, np.ndarray], level: float, limit: float | None
) -> Speed:
    """Return steps of the fastest of theirs by those of the fastest of ours.

    Infinite when only ours get there, 0 when only theirs do, unknown when neither.
    """
    a, b = fastest(ours, level, limit), fastest(theirs, level, limit)
    here, there = np.isfinite(a), np.isfinite(b)
    ratio = np.divide(b, a, out=np.where(there, 0.0, np.nan), where=here)
    found = estimate(ratio)
    return Speed(found.value, found.low, found.high, found.unknown, a[0], b[0])


def at_level(curves: dict[tuple, np.ndarray], level: float) -> np.ndarray:
    """Return the scores (1 + resamples, metrics) where a curve first has R-FaceSim `level`; nan if never.

    Of several curves it is the one with most adherence there, chosen anew in each resample.
    """
    best = np.full((len(next(iter(curves.values()))), len(METRICS)), np.nan)
    for curve in curves.values():
        steps = steps_to(level, curve, None)
        there = np.isfinite(steps)
        scores = curve[np.arange(len(curve)), np.where(there, steps, 0).astype(int)]
        better = there & ~(scores[:, ADHERENT] <= best[:, ADHERENT])
        best[better] = scores[better]
    return best


def best_tradeoff(curves: dict[tuple, np.ndarray]) -> float:
    """Return the R-FaceSim at which R-FaceSim + adherence is greatest, over all curves and steps."""
    points = np.concatenate([curve[0] for curve in curves.values()])
    return float(points[(points[:, SIMILAR] + points[:, ADHERENT]).argmax(), SIMILAR])


def best_rate(curves: dict[tuple, np.ndarray], level: float = 0.6, limit: float | None = LIMIT) -> tuple:
    """Return the key of the curve that is first at a level; of those that never are, of the highest one."""
    return min(curves, key=lambda key: (steps_to(level, curves[key][0], limit), -curves[key][0, -1, SIMILAR]))
