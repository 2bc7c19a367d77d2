"""Rules that end a training by what it shows without a judge, beside a fixed number of steps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from scoring.tables import markdown
from studies.claim.scores import TINY, draw_people, estimate
from studies.claim.words import number, tell_points

RESAMPLES = 10_000


@dataclass(frozen=True)
class Course:
    """What is known of some people at each state of their trainings by one method, 0 steps first."""

    steps: np.ndarray  # (states,)
    scores: np.ndarray  # (people, states, 2): R-FaceSim and adherence
    signals: dict[str, np.ndarray]  # (people, states)

    def at(self, stops: np.ndarray) -> np.ndarray:
        """Return everyone's scores (people, 2) at their own state, a number for each."""
        return self.scores[np.arange(len(stops)), stops]

    def fixed(self, state: int) -> np.ndarray:
        return np.full(len(self.scores), state)


# --- Rules: the state, (people,), at which each training ends ----------------------------------------------

Rule = Callable[[Course], np.ndarray]


def first(ended: np.ndarray) -> np.ndarray:
    """Return everyone's first state at which the rule says so (people, states), else the last."""
    ended = ended.copy()
    ended[:, 0], ended[:, -1] = False, True
    return ended.argmax(axis=1)


def no_better(name: str, by: float, states: int, course: Course) -> np.ndarray:
    """End when for so many states the loss has not fallen by a fraction of what was the lowest before."""
    ended = np.zeros(course.signals[name].shape, bool)
    for own, end in zip(course.signals[name], ended):
        lowest, waited = own[0], 0
        for k, loss in enumerate(own[1:], 1):
            lowest, waited = (loss, 0) if loss < lowest * (1 - by) else (lowest, waited + 1)
            end[k] = waited >= states
    return first(ended)


def slow_growth(below: float, course: Course) -> np.ndarray:
    """End when the norm grows by less than a fraction of itself a step."""
    norm = course.signals["norm"]
    grown = np.diff(norm, axis=1, prepend=0) / np.maximum(norm, TINY)
    return first(grown / np.diff(course.steps, prepend=-1) < below)


def small_change(below: float, course: Course) -> np.ndarray:
    """End when the change, relative to the norm, is less than a number a step."""
    return first(course.signals["change"] / np.diff(course.steps, prepend=-1) < below)


def large_update(above: float, course: Course) -> np.ndarray:
    """End when the update's norm is more than a fraction of the weight's, on average over layers."""
    return first(course.signals["ratio"] > above)


def list_rules() -> dict[str, dict[str, Rule]]:
    """Return the rules of each kind by their thresholds."""
    patience = [*product((0, 0.01, 0.02, 0.05, 0.1), (1, 2))]
    rates = (0.02, 0.015, 0.01, 0.008, 0.006, 0.005, 0.004, 0.003, 0.002, 0.0015, 0.001)
    above = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.12, 0.15, 0.2)
    rules: dict[str, dict[str, Rule]] = {
        f"loss of the {what} no longer falls": {
            f"by {by:.0%} in {states} state{'s' * (states > 1)}": partial(no_better, name, by, states)
            for by, states in patience
        }
        for name, what in {"mirror": "mirror image", "photo": "photo"}.items()
    }
    rules["norm grows slowly"] = {f"below {x:.2%} a step": partial(slow_growth, x) for x in rates}
    rules["update changes little"] = {f"below {x:.2%} a step": partial(small_change, x) for x in rates}
    rules["update is large"] = {f"above {x:.0%} of the weight": partial(large_update, x) for x in above}
    return rules


# --- Choosing and measuring --------------------------------------------------------------------------------


def worth(course: Course, stops: np.ndarray) -> float:
    """Return what is to be high: R-FaceSim + adherence, the mean over people."""
    return course.at(stops).sum(axis=1).mean()


def choose_fixed(course: Course) -> int:
    """Return the best state for all."""
    return max(range(len(course.steps)), key=lambda state: worth(course, course.fixed(state)))


def choose(rules: dict[str, Rule], course: Course) -> str:
    """Return the threshold that needs the fewest steps of those worth as much as the best fixed number.

    If none is, the one that is worth most.
    """
    least = worth(course, course.fixed(choose_fixed(course))) - TINY
    stops = {name: rule(course) for name, rule in rules.items()}
    good = [name for name in rules if worth(course, stops[name]) >= least]
    if good:
        return min(good, key=lambda name: course.steps[stops[name]].mean())
    return max(rules, key=lambda name: worth(course, stops[name]))


def best_of_each(course: Course) -> np.ndarray:
    """Return everyone's own best state, which only a judge knows: what could be gained at most."""
    return course.scores.sum(axis=2).argmax(axis=1)


def tabulate(choosing: dict[str, Course], fresh: dict[str, Course]) -> str:
    """Lay out, by method, each kind of rule as chosen on some people and measured on others.

    Differences are in percentage points with paired 95 % intervals: of R-FaceSim and adherence to those after
    the best fixed number of steps, also chosen on the former; and of their sum to that after the rule's own
    mean number of steps, the same for all, which shows what it is worth to stop people apart.
    """
    lines = [["method", "rule", "threshold", "steps", "R-FaceSim", "adherence", "sum, at as many steps"]]
    for method, course in fresh.items():
        fixed = choose_fixed(choosing[method])
        base = course.at(course.fixed(fixed))
        scores = [number(100 * score) for score in base.mean(axis=0)]
        lines.append([method, "fixed number", "", str(course.steps[fixed]), *scores, ""])
        rules = list_rules()
        chosen = {kind: choose(rules[kind], choosing[method]) for kind in rules}
        stops = {kind: rules[kind][name](course) for kind, name in chosen.items()}
        stops["each at their best, by a judge"] = best_of_each(course)
        for kind, own in stops.items():
            steps = course.steps[own].mean()
            same = [np.interp(steps, course.steps, curve) for curve in course.scores.sum(axis=2)]
            gains = [*(course.at(own) - base).T, course.at(own).sum(axis=1) - same]
            told = [
                tell_points(estimate(draw_people(len(own), 1, RESAMPLES)[..., 0] @ gain)) for gain in gains
            ]
            lines.append([method, kind, chosen.get(kind, ""), number(steps, 0), *told])
    return markdown(lines)
