"""studies/stopping: rules by hand, thresholds from other people, the table from the committed files."""

import numpy as np
import pytest
import torch

from bench.documents import fill
from studies.stopping import __main__ as study
from studies.stopping.rules import (
    Course,
    best_of_each,
    choose,
    choose_fixed,
    large_update,
    no_better,
    slow_growth,
    small_change,
    tabulate,
)
from studies.stopping.signals import inner, sizes

STEPS = np.array([0, 10, 20, 40])


def course(scores: list[list[float]], **signals: list[list[float]]) -> Course:
    """Trainings with R-FaceSim as given, an adherence of 0, and signals of each person."""
    similar = np.array(scores)
    return Course(
        STEPS, np.stack([similar, 0 * similar], axis=2), {k: np.array(v) for k, v in signals.items()}
    )


def test_rules_by_hand():
    nan = float("nan")
    some = course(
        [[0, 0.1, 0.2, 0.3]] * 2,
        photo=[[1.0, 0.9, 0.89, 0.88], [1.0, 1.1, 0.5, 0.4]],
        norm=[[0, 10, 15, 18], [0, 10, 30, 90]],
        change=[[nan, 1, 0.5, 0.2], [nan, 1, 0.7, 0.7]],
        ratio=[[0, 0.1, 0.2, 0.3], [0, 0.01, 0.02, 0.03]],
    )
    assert [*no_better("photo", 0, 1, some)] == [3, 1]
    assert [*no_better("photo", 0.05, 1, some)] == [2, 1]
    assert [*no_better("photo", 0.05, 2, some)] == [3, 3]  # the second person's loss falls after one look
    # Relative growth a step: 5 / 15 / 10 and 3 / 18 / 20; 20 / 30 / 10 and 60 / 90 / 20.
    assert [*slow_growth(0.034, some)] == [2, 3] and [*slow_growth(0.033, some)] == [3, 3]
    assert [*small_change(0.06, some)] == [2, 3] and [*small_change(0.01, some)] == [3, 3]
    assert [*large_update(0.15, some)] == [2, 3] and [*large_update(0, some)] == [1, 1]
    assert [*best_of_each(course([[0, 0.3, 0.2, 0.1], [0, 0.1, 0.2, 0.3]]))] == [1, 3]


def test_the_fewest_steps_of_what_is_worth_as_much():
    some = course([[0, 0.1, 0.4, 0.4]] * 3)
    assert choose_fixed(some) == 2
    rules = {f"{state}": lambda one, state=state: one.fixed(state) for state in (1, 3, 2)}
    assert choose(rules, some) == "2"  # as good as 3 and shorter; 1 is shorter but worse
    assert choose({"1": rules["1"]}, some) == "1"  # nothing is as good


def test_a_gain_is_found():
    """One half is best after 10 steps, the other after 40, and the norm tells who is who."""
    scores, norm = [[0, 0.9, 0.5, 0.1], [0, 0.1, 0.5, 0.9]] * 5, [[0, 10, 11, 12], [0, 10, 20, 40]] * 5
    zero = [[0.0] * 4] * 10
    some = course(scores, norm=norm, change=zero, ratio=zero, photo=zero, mirror=zero)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in tabulate({"a": some}, {"a": some}).splitlines()
    ]
    found = {line[1]: line for line in lines[2:]}
    assert found["fixed number"][3:6] == ["10", "50.0", "0.0"]  # of three that are worth the same the first
    best, slow, never = (
        found[name] for name in ("each at their best, by a judge", "norm grows slowly", "update is large")
    )
    assert best[3] == "25" and best[4].startswith("**+40.0** [") and best[6].startswith("**+40.0** [")
    assert slow[3] == "30" and slow[4].startswith("+20.0 [") and slow[6].startswith("**+20.0** [")
    assert never[3] == "40" and never[4].startswith("+0.0 [-") and never[6] == "+0.0 [+0.0, +0.0]"


def test_sizes_are_those_of_the_products():
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {
        name: (torch.randn(2, 5, generator=generator), torch.randn(7, 2, generator=generator))
        for name in "ab"
    }
    now, before = draw(), draw()
    products, others = ([b @ a for a, b in lora.values()] for lora in (now, before))
    torch.testing.assert_close(
        inner(now, before), torch.stack([(x * y).sum() for x, y in zip(products, others)])
    )
    found = sizes(now, before, {"a": torch.tensor(2.0), "b": torch.tensor(4.0)})
    norm = torch.cat(products).norm()
    assert found["norm"] == pytest.approx(norm.item(), rel=1e-5)
    change = torch.cat([x - y for x, y in zip(products, others)]).norm() / norm
    assert found["change"] == pytest.approx(change.item(), rel=1e-4)
    assert found["ratio"] == pytest.approx(
        (products[0].norm() / 2 + products[1].norm() / 4).item() / 2, rel=1e-5
    )
    assert sizes(now, None, {"a": torch.tensor(2.0), "b": torch.tensor(4.0)})["change"] == pytest.approx(1)


def test_the_table_is_that_of_the_committed_files():
    text = study.DOCUMENT.read_text()
    assert "<!-- stopping -->" in text
    assert fill(text, {"stopping": study.table}) == text
