"""How numbers and estimates are written in the tables and sentences."""

from collections.abc import Iterable, Sequence

import numpy as np

from studies.claim.scores import LEVELS, Estimate, Speed


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
