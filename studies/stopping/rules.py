"""Rules that end a training by its signals, and how each does beside a fixed number of steps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from scoring.tables import markdown
from studies.claim.scores import draw_people, estimate
from studies.claim.words import number, tell_points

RESAMPLES = 10_000


@dataclass(frozen=True)
class Course:
    """The trainings of some people by one method."""

    steps: np.ndarray  # (states,) at which pictures were scored, from 0 on
    scores: np.ndarray  # (people, states, 2): R-FaceSim and adherence
    looks: np.ndarray  # (looks,) steps of the signals, from 0 on
    signals: dict[str, np.ndarray]  # (people, looks)


def tabulate(choosing, fresh):
    return ""
