"""Tables, sentences and pictures of README.md from the committed scores: no number is typed by hand.

What stands between <!-- name --> and <!-- end --> in the documents is written by the function of BLOCKS with
that name. A part of the study that has no scores yet is left out.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from bench import documents
from run.plan import PEAKS, SHARE, Plan, Workload
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
    Estimate,
    Sample,
    Speed,
    at_level,
    best_tradeoff,
    compare_speed,
    estimate,
    read_scores,
)

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "studies" / "claim" / "README.md", ROOT / "README.md")
RESAMPLES = 1000
PAPER = 1.67  # how much faster the paper found Meta-LoRA
PLACEMENTS = {"all": "all layers", "no-modulation": "no modulation"}
BEST = "each at its best placement"
WORDS = PLACEMENTS | {META: "Meta-LoRA", LORA: "LoRA", "meta-lora": "Meta-LoRA, crops", "lora": "LoRA, crops"}
WORDS |= {"targets": "placement", "lr": "rate"}
SHOWN = (30, 60, 120, 180)  # steps, in tables of differences
CONTROLS = ("random", "even-layers", "flat")
EQUAL = "0.008"  # a rate at which every attempt was run
ASIDE = ("looked", "attempts", "large", "validation")  # parts with people of their own


class Study:
    """The scores that are there: all of the test people together, the others by their part."""

    def __init__(self, folder: Path, missing: Sequence[str] = (), resamples: int = RESAMPLES):
        self.folder, self.missing, self.resamples = folder, missing, resamples
        parts = {file.stem: read_scores(file) for file in sorted(folder.glob("*.csv"))}
        self.aside = {name: parts.pop(name) for name in ASIDE if name in parts}
        self.cells = {key: cell for cells in parts.values() for key, cell in cells.items()}

    def replicates(self, placements: Sequence[str]) -> list[tuple[str, str]]:
        """Return the (base, prior) that have Meta-LoRA and LoRA at all of the placements."""
        own = {key[:2] for key in self.cells if key[1].isdecimal()}
        needed = [(targets, method) for targets in placements for method in (META, LORA)]
        has = {(key[0], key[1] if key[3] == META else None, key[2], key[3]) for key in self.cells}
        whole = [
            (base, prior)
            for base, prior in own
            if all((base, prior if method == META else None, t, method) in has for t, method in needed)
        ]
        return sorted(whole, key=lambda one: (one[0] != "tiny", one))  # the shipped base first

    def placements(self) -> dict[str, list[str]]:
        """Return the comparisons by name: the same placement for both methods, and each at its best one."""
        there = {name: [targets] for targets, name in PLACEMENTS.items() if self.replicates([targets])}
        if len(there) > 1 and self.replicates([*PLACEMENTS]):
            there[BEST] = [*PLACEMENTS]
        return there

    def pooled(self, placements: Sequence[str]) -> Sample:
        """Return all replicates that have the placements, together."""
        return Sample(self.cells, self.replicates(placements), self.resamples)

    def first(self) -> Sample:
        """Return the shipped base and prior alone, with which the side questions were asked."""
        return Sample(self.cells, [("tiny", "0")], self.resamples)


# --- Words -------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 1, sign: str = "") -> str:
    """Round for a table; ties are decided in decimal, so that every machine prints the same."""
    if np.isinf(value):
        return "∞"
    return "–" if np.isnan(value) else f"{round(value, 9):{sign}.{digits}f}"


def tell_speed(found: Speed) -> str:
    """Say both numbers of steps, the ratio and its interval, bold where that leaves out 1."""
    ours, theirs = (number(n, 0).replace("∞", "never") for n in (found.ours, found.theirs))
    if np.isnan(found.value):
        return f"{ours} / {theirs}"
    low, high, ratio = (number(x, 2 if x else 0) for x in (found.low, found.high, found.value))
    ratio = f"**{ratio}**" if found.low > 1 or found.high < 1 else ratio
    return f"{ours} / {theirs}: {ratio} [{low}, {high}]" + tell_unknown(found)


def tell_ratios(found: Sequence[Speed]) -> str:
    """Say the ratio and its interval at every level."""
    ratios = ((number(x, 2) for x in (one.value, one.low, one.high)) for one in found)
    levels = (f"R-FaceSim {LEVELS[0]}", *LEVELS[1:])
    return enumerate_words(
        [f"{x} [{low}, {high}] to {level}" for (x, low, high), level in zip(ratios, levels)]
    )


def tell_points(found: Estimate) -> str:
    """Say a difference of scores and its interval in percentage points, bold where that leaves out 0."""
    value, low, high = (number(100 * x, 1, "+") for x in (found.value, found.low, found.high))
    value = f"**{value}**" if found.low > 0 or found.high < 0 else value
    return "–" if np.isnan(found.value) else f"{value} [{low}, {high}]" + tell_unknown(found)


def tell_unknown(found: Estimate) -> str:
    """Say in how many resamples there was nothing to compare, where there were any."""
    return f", {found.unknown:.1%} unknown" if found.unknown else ""


def tell_rate(lr: str) -> str:
    """Write a learning rate as in 8e-3 and 1.3e-2."""
    return f"{float(lr):.1e}".replace("e-0", "e-").replace(".0", "")


def enumerate_words(words: Iterable[str]) -> str:
    """Join words as in a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def count(n: int, noun: str) -> str:
    """Write a number of things, in the plural where it is one."""
    return f"{n} {noun}{'s' * (n != 1)}"


# --- Tables ------------------------------------------------------------------------------------------------


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
        "Steps of Meta-LoRA / of LoRA: LoRA's by Meta-LoRA's [95 %], bold where the interval leaves out 1; "
        "∞ and 0 where only one of them gets there; unknown is the share of resamples in which neither does.",
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


# --- Side questions ----------------------------------------------------------------------------------------


def aside(study: Study) -> str:
    """Put together the side questions that have scores."""
    asked = (controls, draws, ranks, attention, crops)
    return "\n\n".join(filter(None, (question(study) for question in asked)))


def controls(study: Study) -> str:
    """Compare the learned meta_down with others, and all of them with LoRA."""
    head, sample, pairs = [f"to {level}" for level in LEVELS], study.first(), {}
    lines, lora = [["placement", "control", *head]], [["placement", "meta_down", "rates", *head]]
    for targets, name in PLACEMENTS.items():
        learned = sample.curves(targets, META)
        there = {x: made for x in CONTROLS if (made := sample.curves(targets, META, prior=x)) and learned}
        for control, made in there.items():
            found = [compare_speed(learned, made, level, LIMIT) for level in LEVELS]
            lines.append([name, control, *map(tell_speed, found)])
            both = {key[1]: (learned[key], made[key]) for key in made if key in learned}
            pairs |= {(name, control, tell_rate(lr)): pair for lr, pair in both.items()}
        for lr, control in product((None, EQUAL), (None, *there) if there else ()):
            if found := speeds(sample, targets, LIMIT, lr=lr, prior=control):
                rate = f"both {tell_rate(lr)}" if lr else "own best"
                lora.append([name, control or "learned", rate, *map(tell_speed, found)])
    if not pairs:
        return ""
    return (
        "### Controls\n\nOn the shipped base and prior, each at its own best rate: steps with the learned "
        f"meta_down / with the control: the second by the first [95 %].\n\n{markdown(lines)}\n\n"
        f"Steps of Meta-LoRA with each of them / of LoRA: LoRA's by Meta-LoRA's.\n\n{markdown(lora)}\n\n"
        "<details><summary>Learned minus control at the same rate, percentage points</summary>\n\n"
        f"{differences(pairs, ['placement', 'control', 'rate'])}\n\n</details>\n\n"
        "![R-FaceSim against steps with the learned and other meta_downs](claim/controls.png)"
    )


def draws(study: Study) -> str:
    """Compare times and noise spread evenly with independent ones."""
    sample, pairs = study.first(), {}
    for targets, name in PLACEMENTS.items():
        for method, title in ((LORA, "LoRA"), (META, "Meta-LoRA")):
            spread, plain = (sample.curves(targets, method, draws=kind) for kind in ("spread", "independent"))
            both = sorted((key for key in plain if key in spread), key=lambda key: float(key[1]))
            pairs |= {(name, title, tell_rate(key[1])): (spread[key], plain[key]) for key in both}
    if not pairs:
        return ""
    return (
        "### Draws\n\nSpread minus independent draws, same rate and steps, percentage points:\n\n"
        + differences(pairs, ["placement", "method", "rate"])
    )


def ranks(study: Study) -> str:
    """Compare the methods at other ranks, at one rate."""
    sample, pairs = study.first(), {}
    there = {key[5] for key in study.cells if key[2] == "all" and key[5] != "1"}
    for rank in sorted({"1", *there} if there else (), key=int):
        ours, theirs = (sample.curves("all", method, rank=rank) for method in (META, LORA))
        pairs |= {(rank, tell_rate(key[1])): (ours[key], theirs[key]) for key in ours if key in theirs}
    if not there:
        return ""
    rates_of = {key[-1] for key in study.cells if key[5] in there}
    pairs = {label: pair for label, pair in pairs.items() if label[1] in map(tell_rate, rates_of)}
    return (
        "### Ranks\n\nMeta-LoRA minus LoRA at the same rank, rate and steps, percentage points:\n\n"
        + differences(pairs, ["rank", "rate"])
    )


def crops(study: Study) -> str:
    """Compare the methods with the paper's crops, and crops with none."""
    sample, lines = study.first(), [["compared", *(f"to {level}" for level in LEVELS)]]
    ours, theirs = (sample.curves("all", method) for method in ("meta-lora", "lora"))
    whole = [sample.curves("all", method) for method in (META, LORA)]
    if not (ours and theirs and all(whole)):
        return ""
    rows = {
        "Meta-LoRA / LoRA, both with crops": (ours, theirs),
        "Meta-LoRA without / with crops": (whole[0], ours),
        "LoRA without / with crops": (whole[1], theirs),
    }
    for name, (a, b) in rows.items():
        lines.append([name, *(tell_speed(compare_speed(a, b, level, LIMIT)) for level in LEVELS)])
    told = "### Crops\n\nSteps, all layers, each at its own best rate: the second by the first [95 %].\n\n"
    told += markdown(lines)
    if large := study.aside.get("large"):
        steps = next(iter(large.values())).steps[1:]
        gap = {WORDS[key[3]]: cell.scores[-1].mean(axis=(0, 1)) for key, cell in large.items()}
        gap = [f"{number(100 * (x[FACESIM] - x[SIMILAR]))} for {name}" for name, x in gap.items()]
        told += (
            "\n\nOn the people for choosing, with photos of 160 pixels, whose crops are no smaller than the "
            "pictures that the base knows: R-FaceSim / adherence after longer trainings, percent.\n\n"
            f"{means(large, steps, ('base', 'prior', 'rank', 'targets', 'draws'))}\n\n"
            f"FaceSim minus R-FaceSim after {steps[-1]} steps: {enumerate_words(gap)}."
        )
    return told


def attention(study: Study) -> str:
    """Compare the methods on the attention layers only."""
    sample = study.first()
    if not (found := speeds(sample, "attention", LIMIT)):
        return ""
    rates = enumerate_words([tell_rate(lr) for _, lr in sample.curves("attention", META)])
    lines = [[f"to {level}" for level in LEVELS], [*map(tell_speed, found)]]
    return (
        "### Attention only\n\nSteps of Meta-LoRA / of LoRA: LoRA's by Meta-LoRA's [95 %], each at its own "
        f"best of {rates}.\n\n{markdown(lines)}"
    )


def attempts(study: Study) -> str:
    """Compare attempts at a larger effect with LoRA and with the study's prior, on people for choosing."""
    if "attempts" not in study.aside:
        return ""
    cells = study.aside.get("looked", {}) | study.aside["attempts"]
    head = [f"to {level}" for level in LEVELS]
    lora, same, own = [["base", "prior", *head]], [["base", "prior", *head]], [["prior", *head]]
    own[0] += ["adherence at .5", "at .7"]
    for base, prior in sorted({key[:2] for key in cells if key[1]}, key=lambda one: (one[0] != "tiny", one)):
        sample = Sample(cells, [(base, prior)], study.resamples)
        for lines, lr in ((lora, None), (same, EQUAL)):
            if found := speeds(sample, "all", LIMIT, lr=lr):
                lines.append([base, prior, *map(tell_speed, found)])
        ours, before = (sample.curves("all", META, prior=x) for x in (prior, "0"))
        before = {key: curve for key, curve in before.items() if key in ours}
        if before and prior != "0":
            found = [compare_speed(ours, before, level, LIMIT) for level in LEVELS]
            more = [at_level(ours, level) - at_level(before, level) for level in (0.5, 0.7)]
            told = [tell_points(estimate(one[:, ADHERENT])) for one in more]
            own.append([prior, *map(tell_speed, found), *told])
    return (
        "Steps of Meta-LoRA / of LoRA, each at its own best of the rates that were tried: LoRA's by "
        f"Meta-LoRA's [95 %].\n\n{markdown(lora)}\n\n"
        f"The same with both at {tell_rate(EQUAL)}.\n\n{markdown(same)}\n\n"
        "Steps with the attempt / with prior 0, at the rates that both have: the second by the first; and "
        f"what the attempt has more in adherence at the same R-FaceSim, percentage points.\n\n{markdown(own)}"
    )


# --- Sentences ---------------------------------------------------------------------------------------------


def verdict(found: Sequence[Speed]) -> str:
    """Say at which levels Meta-LoRA is faster, slower, or neither can be said."""
    kinds = {"Meta-LoRA is faster to": [], "LoRA is faster to": [], "undecided to": []}
    for level, one in zip(LEVELS, found):
        kind = 0 if one.low > 1 else 1 if one.high < 1 else 2
        kinds[[*kinds][kind]].append(f"{level}")
    told = "; ".join(f"{kind} {enumerate_words(some)}" for kind, some in kinds.items() if some)
    return told[0].upper() + told[1:]


def setting(study: Study, name: str) -> str:
    """Say how many people, bases and priors a comparison is of."""
    replicates = study.replicates(study.placements()[name])
    bases = count(len({base for base, _ in replicates}), "base")
    people = next(iter(study.cells.values())).scores.shape[1]
    return f"{people} drawn people, {bases}, {count(len(replicates), 'prior')}, {name}"


def headlines(study: Study) -> dict[str, list[Speed]]:
    """Return the primary measure of every comparison by name, that of most replicates first."""
    order = sorted(study.placements().items(), key=lambda pair: -len(study.replicates(pair[1])))
    return {name: speeds(study.pooled(placements), placements, LIMIT) for name, placements in order}


def claim(study: Study) -> str:
    """Say the result in a few lines, for the README."""
    name, found = next(iter(headlines(study).items()))
    return (
        f"In the small world ({setting(study, name)}), each at its own best learning rate, LoRA's steps "
        f"by Meta-LoRA's are {tell_ratios(found)} [95 %]. More in [studies/claim](studies/claim/README.md)."
    )


def summary(study: Study) -> str:
    """Say what was shown, in the order of the plan."""
    (name, found), *others = headlines(study).items()
    lines = [
        f"**Each at its own best learning rate** ({setting(study, name)}), LoRA's steps by Meta-LoRA's: "
        f"{tell_ratios(found)}. {verdict(found)}. {tell_paper(found)}"
    ]
    placements = study.placements()[name]
    free = speeds(study.pooled(placements), placements, None)
    lines.append(f"The same without the limit on adherence: {tell_ratios(free)}. {verdict(free)}.")
    lines += [
        f"The same ({setting(study, other)}): {tell_ratios(more)}. {verdict(more)}." for other, more in others
    ]
    pool = study.pooled(["all"])
    alike = {}
    for _, lr in sorted(pool.curves("all", META), key=lambda key: float(key[1])):
        same = speeds(pool, ["all"], LIMIT, lr=lr)
        alike.setdefault(f"{verdict(same)}. {tell_paper(same)}", []).append(tell_rate(lr))
    told = " ".join(f"At {enumerate_words(some)}: {text}" for text, some in alike.items())
    lines.append(f"**Both at the same learning rate**, all layers. {told}")
    ours, theirs = (pool.curves("all", method) for method in (META, LORA))
    lost, gap = [], []
    for level in LEVELS:
        more = at_level(ours, level) - at_level(theirs, level)
        lost.append(f"{tell_points(estimate(more[:, ADHERENT]))} at {level}")
        gap.append(f"{tell_points(estimate(more[:, FACESIM] - more[:, SIMILAR]))} at {level}")
    lines.append(
        "**Adherence at the same R-FaceSim**, Meta-LoRA minus LoRA, all layers, percentage points: "
        f"{enumerate_words(lost)}."
    )
    lines.append(
        "**FaceSim minus R-FaceSim there**, which is greater when the photo is copied, the same difference: "
        f"{enumerate_words(gap)}."
    )
    tops = [
        np.max([curve[..., SIMILAR].max(axis=-1) for curve in some.values()], axis=0)
        for some in (ours, theirs)
    ]
    lines.append(
        f"**The highest R-FaceSim** at any rate and number of steps, percent: {number(100 * tops[0][0])} by "
        f"Meta-LoRA, {number(100 * tops[1][0])} by LoRA: {tell_points(estimate(tops[0] - tops[1]))}."
    )
    return "\n".join(f"- {line}" for line in lines)


def tell_paper(found: Sequence[Speed]) -> str:
    """Say where the paper's ratio lies among the intervals."""
    places = {"above the interval": [], "in the interval": [], "below the interval": []}
    for level, one in zip(LEVELS, found):
        place = 0 if one.high < PAPER else 2 if one.low > PAPER else 1
        places[[*places][place]].append(f"{level}")
    told = "; ".join(f"{place} to {enumerate_words(some)}" for place, some in places.items() if some)
    return f"The paper's {PAPER} is {told}."


def flux_cost(study: Study) -> str:
    """Lay out what a study like this takes on FLUX.1-dev, by the operations that plan.py counts."""
    priors, people, rates, steps, stops, drawn, euler = 2, 30, 4, 750, 6, 16, 30
    runs = people * rates * (priors + 1)  # LoRA has no prior, and is trained once
    pictures = runs * stops * drawn
    cards, total = ("A6000", "H100"), np.zeros(2)
    lines = [["", "steps", *(f"a step, {card}" for card in cards), *(f"days, {card}" for card in cards)]]
    for name, job, way, number_of in (
        (
            f"stage 1, {priors} priors",
            Workload("stage1", batch=4, identities=50),
            Plan("all"),
            priors * 50_000,
        ),
        (f"stage 2, {runs} trainings", Workload("stage2"), Plan("all"), runs * steps),
        (f"{pictures:,} pictures", Workload("sample"), Plan("none"), pictures * euler),
    ):
        seconds = np.array([estimate(job, way, PEAKS[card]).seconds for card in cards])
        total += (days := seconds * number_of / 86400)
        lines.append([name, f"{number_of:,}", *(f"{s:.2g} s" for s in seconds), *(f"{d:.1f}" for d in days)])
    lines.append(["together", "", "", "", *(f"{d:.1f}" for d in total)])
    return (
        f"{people} people, {rates} learning rates, a base, a placement, {priors} priors and LoRA, {steps} "
        f"steps, {drawn} pictures at each of {stops} step counts with {euler} Euler steps, 1024x1024, all "
        f"blocks run again in the backward pass, {SHARE:.0%} of a card's peak:\n\n" + markdown(lines)
    )


BLOCKS: dict[str, Callable[[Study], str]] = {
    "summary": summary,
    "looked": looked,
    "primary": primary,
    "rates": rates,
    "equal": equal,
    "aside": aside,
    "attempts": attempts,
    "cost": flux_cost,
    "claim": claim,
}


# --- Documents ---------------------------------------------------------------------------------------------


def fill(text: str, study: Study) -> str:
    """Write the blocks of BLOCKS in a document anew."""
    return documents.fill(text, {name: partial(block, study) for name, block in BLOCKS.items()})


def write_documents(study: Study) -> None:
    """Fill the documents."""
    for path in DOCUMENTS:
        documents.write(path, {name: partial(block, study) for name, block in BLOCKS.items()})
