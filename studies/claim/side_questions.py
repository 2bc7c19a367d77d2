"""The tables of the side questions: controls, draws, ranks, crops, attention only, attempts."""

from itertools import product

from scoring.tables import markdown
from studies.claim.scores import (
    ADHERENT,
    FACESIM,
    LEVELS,
    LIMIT,
    LORA,
    META,
    SIMILAR,
    Sample,
    at_level,
    compare_speed,
    estimate,
)
from studies.claim.study import CONTROLS, PLACEMENTS, Study
from studies.claim.tables import WORDS, differences, means, speeds
from studies.claim.words import enumerate_words, number, tell_points, tell_rate, tell_speed

EQUAL = "0.008"  # a rate at which every attempt was run


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
        made_by = {control: sample.curves(targets, META, prior=control) for control in CONTROLS}
        there = {control: made for control, made in made_by.items() if made and learned}
        for control, made in there.items():
            found = [compare_speed(learned, made, level, LIMIT) for level in LEVELS]
            lines.append([name, control, *map(tell_speed, found)])
            both = {key[1]: (learned[key], made[key]) for key in made if key in learned}
            pairs |= {(name, control, tell_rate(lr)): pair for lr, pair in both.items()}
        for lr, control in product((None, EQUAL), (None, *there) if there else ()):
            found = speeds(sample, targets, LIMIT, lr=lr, prior=control)
            if found:
                rate = f"both {tell_rate(lr)}" if lr else "own best"
                lora.append([name, control or "learned", rate, *map(tell_speed, found)])
    if not pairs:
        return ""
    return (
        "### Controls\n\nOn the shipped base and prior, each at its own best rate: steps with the learned "
        f"meta_down / with the control: the second relative to the first [95 %].\n\n{markdown(lines)}\n\n"
        "Steps of Meta-LoRA with each of them / of LoRA: LoRA's relative to Meta-LoRA's.\n\n"
        f"{markdown(lora)}\n\n"
        "<details><summary>Learned minus control at the same rate, percentage points</summary>\n\n"
        f"{differences(pairs, ['placement', 'control', 'rate'])}\n\n</details>\n\n"
        "![R-FaceSim against steps with the learned and other meta_downs](controls.png)"
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
    told = (
        "### Crops\n\nSteps, all layers, each at its own best rate: the second relative to the first [95 %]."
    )
    told += f"\n\n{markdown(lines)}"
    large = study.aside.get("large")
    if large:
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
    found = speeds(sample, "attention", LIMIT)
    if not found:
        return ""
    rates = enumerate_words([tell_rate(lr) for _, lr in sample.curves("attention", META)])
    lines = [[f"to {level}" for level in LEVELS], [*map(tell_speed, found)]]
    return (
        "### Attention only\n\nSteps of Meta-LoRA / of LoRA: LoRA's relative to Meta-LoRA's [95 %], each at "
        f"its own best of {rates}.\n\n{markdown(lines)}"
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
            found = speeds(sample, "all", LIMIT, lr=lr)
            if found:
                lines.append([base, prior, *map(tell_speed, found)])
        ours, before = (sample.curves("all", META, prior=x) for x in (prior, "0"))
        before = {key: curve for key, curve in before.items() if key in ours}
        if before and prior != "0":
            found = [compare_speed(ours, before, level, LIMIT) for level in LEVELS]
            more = [at_level(ours, level) - at_level(before, level) for level in (0.5, 0.7)]
            told = [tell_points(estimate(one[:, ADHERENT])) for one in more]
            own.append([prior, *map(tell_speed, found), *told])
    return (
        "Steps of Meta-LoRA / of LoRA, each at its own best of the rates that were tried: LoRA's "
        f"relative to Meta-LoRA's [95 %].\n\n{markdown(lora)}\n\n"
        f"The same with both at {tell_rate(EQUAL)}.\n\n{markdown(same)}\n\n"
        "Steps with the attempt / with prior 0, at the rates that both have: the second relative to the "
        "first; and what the attempt has more in adherence at the same R-FaceSim, percentage points.\n\n"
        f"{markdown(own)}"
    )
