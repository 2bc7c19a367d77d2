"""The tables of the main comparison: speed, adherence, what was looked at first, and costs on FLUX.1-dev."""

from collections.abc import Iterable, Sequence

import numpy as np

from run.costs import Plan, Workload
from run.costs import estimate as estimate_cost
from run.speeds import SHARE, speeds_of
from scoring.tables import markdown
from studies.claim.scores import (
    ADHERENT,
    FACESIM,
    KEY,
    LEVELS,
    LIMIT,
    LORA,
    META,
    SIMILAR,
    Cell,
    Sample,
    Speed,
    at_level,
    best_tradeoff,
    compare_speed,
    estimate,
)
from studies.claim.study import PLACEMENTS, Study
from studies.claim.words import count, number, tell_points, tell_rate, tell_speed

WORDS = PLACEMENTS | {META: "Meta-LoRA", LORA: "LoRA", "meta-lora": "Meta-LoRA, crops", "lora": "LoRA, crops"}
WORDS |= {"targets": "placement", "lr": "rate"}
SHOWN = (30, 60, 120, 180)  # steps, in tables of differences


def speeds(
    sample: Sample, placements: str | Sequence[str], limit: float | None, **which: str | None
) -> list[Speed]:
    """Return the primary measure at every level, or the same at one learning rate (lr="0.008")."""
    ours, theirs = (sample.curves(placements, method, **which) for method in (META, LORA))
    return [compare_speed(ours, theirs, level, limit) for level in LEVELS] if ours and theirs else []


def primary(study: Study) -> str:
    """Lay out the primary measure, pooled and for each replicate, with and without the adherence limit."""

    def table(limit: float | None) -> str:
        lines = [["base", "prior", "placement", *(f"to {level}" for level in LEVELS)]]
        for name, placements in study.placements().items():
            pool = study.replicates(placements)
            if len(pool) > 1:
                found = speeds(study.pooled(placements), placements, limit)
                lines.append(["pooled", count(len(pool), "replicate"), name, *map(tell_speed, found)])
        for base, prior in study.replicates([]):
            for name, placements in study.placements().items():
                if (base, prior) in study.replicates(placements):
                    sample = Sample(study.cells, [(base, prior)], study.resamples)
                    found = speeds(sample, placements, limit)
                    lines.append([base, prior, name, *map(tell_speed, found)])
        return markdown(lines)

    parts = [
        "Steps of Meta-LoRA / of LoRA: LoRA's relative to Meta-LoRA's [95 %], bold where the interval leaves "
        "out 1; ∞ and 0 where only one of them gets there; unknown is the share of resamples in which "
        "neither does.",
        table(LIMIT),
        "<details><summary>The same without the limit on adherence</summary>",
        table(None),
        "</details>",
    ]
    if len(study.replicates([])) > 1:
        parts.insert(
            1,
            "Pooled rows are of the mean over replicates, with one best rate for all of them; their "
            "resamples also draw the bases, and the priors of each. Two of a kind are few to draw from, "
            "so these intervals are too narrow rather than too wide.",
        )
    parts.append(
        "Planned and not run, or in part:\n\n" + "\n".join(f"- {part}" for part in study.missing)
        if study.missing
        else "All that was planned was run."
    )
    return "\n\n".join(parts)


def rates(study: Study) -> str:
    """Lay out the secondary measure: both methods at the same learning rate, over all replicates."""
    lines = [["placement", "rate of both", *(f"to {level}" for level in LEVELS)]]
    for targets, name in PLACEMENTS.items():
        if study.replicates([targets]):
            sample = study.pooled([targets])
            for _, lr in sorted(sample.curves(targets, META), key=lambda key: float(key[1])):
                found = speeds(sample, targets, LIMIT, lr=lr)
                lines.append([name, tell_rate(lr), *map(tell_speed, found)])
    return markdown(lines)


def equal(study: Study) -> str:
    """Lay out adherence, and FaceSim minus R-FaceSim, where both methods have the same R-FaceSim."""
    head = ["adherence: LoRA", "Meta-LoRA", "difference", "FaceSim - R-FaceSim: LoRA", "Meta-LoRA"]
    lines, told = [["placement", "R-FaceSim", *head, "difference"]], []
    for name, placements in study.placements().items():
        sample = study.pooled(placements)
        ours, theirs = (sample.curves(placements, method) for method in (META, LORA))
        best = best_tradeoff(theirs)
        top = max(curve[0, :, SIMILAR].max() for curve in ours.values())
        told.append(
            f"With {name} LoRA's best trade-off is at {number(100 * best)}; Meta-LoRA "
            + ("gets there." if top >= best else f"gets to {number(100 * top)} at the most.")
        )
        for level in sorted({*LEVELS, 0.8, best}):
            a, b = at_level(ours, level), at_level(theirs, level)
            gaps = [scores[:, FACESIM] - scores[:, SIMILAR] for scores in (a, b)]
            line = [name, number(100 * level) + " (LoRA's best)" * (level == best)]
            for mine, other in ((a[:, ADHERENT], b[:, ADHERENT]), gaps):
                line += [number(100 * other[0]), number(100 * mine[0]), tell_points(estimate(mine - other))]
            lines.append(line)
    return f"{markdown(lines)}\n\n{' '.join(told)}"


def means(cells: dict[tuple, Cell], steps: Iterable[int], drop: Sequence[str] = ()) -> str:
    """Lay out R-FaceSim / adherence, percent, of every cell at some step counts."""
    kept = [k for k, name in enumerate(KEY) if name not in drop]
    lines = [[*(WORDS.get(KEY[k], KEY[k]) for k in kept), *map(str, steps)]]
    for key, cell in sorted(cells.items(), key=lambda item: (*item[0][:-1], float(item[0][-1]))):
        mean = 100 * cell.scores.mean(axis=(1, 2))
        pairs = {n: f"{number(one[SIMILAR])} / {number(one[ADHERENT])}" for n, one in zip(cell.steps, mean)}
        told = [*(WORDS.get(word, word) for word in key[:-1]), tell_rate(key[-1])]
        lines.append([*(told[k] for k in kept), *(pairs.get(n, "") for n in steps)])
    return markdown(lines)


def differences(pairs: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]], head: Sequence[str]) -> str:
    """Lay out what the first curve of each pair has more than the second, at some step counts."""
    lines = [[*head, "", *(f"at {n}" for n in SHOWN)]]
    for label, (a, b) in pairs.items():
        for metric, name in ((SIMILAR, "R-FaceSim"), (ADHERENT, "adherence")):
            some = [n for n in SHOWN if n < min(a.shape[1], b.shape[1])]
            told = [tell_points(estimate(a[:, n, metric] - b[:, n, metric])) for n in some]
            lines.append([*label, name, *told, *[""] * (len(SHOWN) - len(told))])
    return markdown(lines)


def looked(study: Study) -> str:
    """Lay out what the people for choosing showed."""
    cells = study.aside["looked"]
    base = 100 * next(iter(cells.values())).scores[0].mean(axis=(0, 1))
    return (
        f"R-FaceSim / adherence, percent (base: {number(base[SIMILAR])} / {number(base[ADHERENT])}):\n\n"
        + means(cells, SHOWN, ("base", "prior", "rank"))
    )


def flux_cost(study: Study) -> str:
    """Lay out what a study like this takes on FLUX.1-dev, by the operations that run/costs.py counts."""
    priors, people, rates, steps, stops, each, euler = 2, 30, 4, 750, 6, 16, 30
    runs = people * rates * (priors + 1)  # LoRA has no prior, and is trained once
    pictures = runs * stops * each
    cards, total = ("A6000", "H100"), np.zeros(2)
    lines = [["", "steps", *(f"a step, {card}" for card in cards), *(f"days, {card}" for card in cards)]]
    for name, workload, memory_plan, number_of in (
        (
            f"stage 1, {priors} priors",
            Workload("stage1", batch=4, identities=50),
            Plan("all"),
            priors * 50_000,
        ),
        (f"stage 2, {runs} trainings", Workload("stage2"), Plan("all"), runs * steps),
        (f"{pictures:,} pictures", Workload("sample"), Plan("none"), pictures * euler),
    ):
        seconds = np.array([estimate_cost(workload, memory_plan, speeds_of(card)).seconds for card in cards])
        days = seconds * number_of / 86400
        total += days
        lines.append([name, f"{number_of:,}", *(f"{s:.2g} s" for s in seconds), *(f"{d:.1f}" for d in days)])
    lines.append(["together", "", "", "", *(f"{d:.1f}" for d in total)])
    return (
        f"{people} people, {rates} learning rates, a base, a placement, {priors} priors and LoRA, {steps} "
        f"steps, {each} pictures at each of {stops} step counts with {euler} Euler steps, 1024x1024, all "
        f"blocks recomputed in the backward pass, {SHARE:.0%} of a card's peak:\n\n" + markdown(lines)
    )
