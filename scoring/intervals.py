"""95 % confidence intervals of a mean over few people, by Student's t."""

import math
from collections.abc import Sequence
from statistics import stdev

import numpy as np


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t with some degrees of freedom."""
    # At t = sqrt(freedom) tan(a), a has the density cos(a) ** (freedom - 1).
    ends, step = np.linspace(0, math.pi / 2, 10**5 + 1, retstep=True)
    mass = np.cumsum(np.cos(ends[1:] - step / 2) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * mass[-1], mass, ends[1:]))


def half_interval(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of the mean of one value per person; None for one person."""
    n = len(values)
    return student(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
