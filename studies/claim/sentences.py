"""The results in sentences: the summary of README.md, and the table of docs/findings.md."""

from collections.abc import Sequence

import numpy as np

from scoring.tables import markdown
from studies.claim.scores import (
    ADHERENT,
    FACESIM,
    LEVELS,
    LIMIT,
    LORA,
    META,
    SIMILAR,
    Estimate,
    Speed,
    at_level,
    estimate,
)
from studies.claim.study import Study
from studies.claim.tables import speeds
from studies.claim.words import count, enumerate_words, number, tell_points, tell_rate, tell_ratios

EQUAL = "0.008"  # the rate of both methods in the table of findings
MIDDLE = 0.6  # the R-FaceSim there
PAPER = 1.67  # LoRA's steps relative to Meta-LoRA's in the paper


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
    return f"{people} synthetic people, {bases}, {count(len(replicates), 'prior')}, {name}"


def headlines(study: Study) -> dict[str, list[Speed]]:
    """Return the primary measure of every comparison by name, that of most replicates first."""
    order = sorted(study.placements().items(), key=lambda pair: -len(study.replicates(pair[1])))
    return {name: speeds(study.pooled(placements), placements, LIMIT) for name, placements in order}


def claim(study: Study) -> str:
    """Lay out question, answer, figures and command, a line per question, for docs/findings.md."""
    name, best = next(iter(headlines(study).items()))
    pool = study.pooled(["all"])
    same = speeds(pool, ["all"], LIMIT, lr=EQUAL)
    ours, theirs = (pool.curves("all", method) for method in (META, LORA))
    more = at_level(ours, MIDDLE) - at_level(theirs, MIDDLE)
    adherence, copying = estimate(more[:, ADHERENT]), estimate(more[:, FACESIM] - more[:, SIMILAR])
    steps, points = "LoRA's steps relative to Meta-LoRA's", "percentage points, Meta-LoRA minus LoRA"
    at = f"at an R-FaceSim of {MIDDLE}"
    rows = {
        "Does Meta-LoRA need fewer steps than LoRA, each at its own best learning rate?": (
            verdict(best),
            f"{steps}: {tell_ratios(best)} ({setting(study, name)})",
        ),
        f"And both at one small learning rate, {tell_rate(EQUAL)}, as the paper compared?": (
            verdict(same),
            f"{steps}: {tell_ratios(same)}",
        ),
        "At the same likeness, is Meta-LoRA's adherence to the prompt higher or lower?": (
            tell_sign(adherence),
            f"adherence {at}: {tell_points(adherence)} {points}",
        ),
        "And its copying of the photo?": (
            tell_sign(copying),
            f"FaceSim minus R-FaceSim {at}: {tell_points(copying)} {points}",
        ),
    }
    lines = [["question", "answer", "figure [95 % interval]", "command"]]
    lines += [[question, *cells, "`python -m studies.claim`"] for question, cells in rows.items()]
    return markdown(lines)


def tell_sign(found: Estimate) -> str:
    """Say whether a difference is above zero, below, or neither can be said."""
    if found.low > 0:
        return "Higher"
    return "Lower" if found.high < 0 else "Undecided"


def summary(study: Study) -> str:
    """Say what was shown, in the order of the plan."""
    (name, found), *others = headlines(study).items()
    lines = [
        f"**Each at its own best learning rate** ({setting(study, name)}), LoRA's steps relative to "
        f"Meta-LoRA's: {tell_ratios(found)}. {verdict(found)}. {tell_paper(found)}"
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
