"""The study's arithmetic: steps by hand, a ratio that is known, controls that are what they are called."""

import csv

import numpy as np
import pytest
import torch

from bench import claim


def cell(similar: list[float], adherent: list[float], steps=(0, 10, 20, 40), people=6, seeds=2) -> claim.Cell:
    """Everybody alike: R-FaceSim and adherence at each step count, FaceSim zero."""
    rows = [[similar[k], 0.0, adherent[k]] for k in range(len(steps))]
    return claim.Cell(
        [*steps], np.broadcast_to(np.array(rows)[:, None, None], (len(steps), people, seeds, 3))
    )


def test_steps_to_a_level_by_hand():
    one = cell([0, 0.4, 0.6, 0.8], [0.9, 0.9, 0.86, 0.9])
    means = one.scores[:, 0, 0]
    assert claim.steps_to(0.5, one, means, None) == 15  # half way from 10 to 20
    assert claim.steps_to(0.5, one, means, 0.03) == 15  # .88 there
    assert claim.steps_to(0.6, one, means, 0.03) == 25  # at 20 too little adherence, .87 again at 25
    assert claim.steps_to(0.9, one, means, None) == np.inf


def test_a_learner_twice_as_fast_has_the_ratio_two():
    """The slow one passes every level at twice the steps, for each person at a speed of their own."""
    rng, steps = np.random.default_rng(0), np.arange(0, 201, 5)
    speed = rng.uniform(0.6, 1.6, size=(1, 20, 1))
    learned = lambda pace: np.tanh(steps[:, None, None] * speed * pace / 60).repeat(2, axis=2)
    make = lambda pace: claim.Cell(
        [*steps], np.stack([learned(pace), learned(pace), np.ones((41, 20, 2))], -1)
    )
    found = claim.compare([make(1), make(0.4)], [make(0.5), make(0.3)], 0.5, 0.03, 200)
    assert found["ratio"] == pytest.approx(2, rel=0.05) and found["neither"] == 0
    assert found["low"] <= 2 <= found["high"] and found["high"] - found["low"] < 0.2  # paired: speed cancels
    same = claim.compare([make(1)], [make(1)], 0.5, None, 50)
    assert (same["ratio"], same["low"], same["high"]) == (1, 1, 1)


def test_what_is_never_reached():
    low, high = cell([0, 0.1, 0.2, 0.3], [1] * 4), cell([0, 0.5, 0.6, 0.7], [1] * 4)
    assert claim.compare([high], [low], 0.5, None, 20)["ratio"] == np.inf
    assert claim.compare([low], [high], 0.5, None, 20)["ratio"] == 0
    neither = claim.compare([low], [low], 0.5, None, 20)
    assert np.isnan(neither["ratio"]) and neither["neither"] == 1


def test_controls_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    learned = torch.randn(3, 8, 40) * torch.logspace(0, 1, 8)[:, None]
    flat = claim.flatten(learned, generator)
    values = torch.linalg.svdvals(flat)
    torch.testing.assert_close(values, values[:, :1].expand(-1, 8))
    both = torch.cat([learned, flat], dim=1)  # the same row space: together still of rank 8
    assert torch.linalg.matrix_rank(both, rtol=1e-4).tolist() == [8, 8, 8]
    start = claim.random_like(learned, generator)
    assert start.abs().max() <= 40**-0.5 and flat.norm() == pytest.approx(start.norm().item(), rel=0.1)


def test_scores_come_back_from_their_file_and_gaps_are_told(tmp_path):
    head, lines = [*claim.KEY, *claim.PLACE, *claim.METRICS], []
    base, own = (
        ["tiny", "", "", "base", "", "", ""],
        ["tiny", "0", "all", "meta-lora-noaug", "spread", "1", "0.01"],
    )
    for key, steps in ((base, 0), (own, 10), (own, 20)):
        for person in ("a", "b"):
            for seed in "01":
                lines.append([*key, steps, person, seed, 0.01 * steps, 0.2, 0.9])

    def write(some: list) -> None:
        with (tmp_path / "x.csv").open("w") as file:
            csv.writer(file).writerows([head, *some])

    write(lines)
    ((key, found),) = claim.read_scores(tmp_path / "x.csv").items()
    assert key == tuple(own) and found.steps == [0, 10, 20] and found.scores.shape == (3, 2, 2, 3)
    assert found.scores[2, 1, 0].tolist() == pytest.approx([0.2, 0.2, 0.9])
    write(lines[:-1])
    with pytest.raises(ValueError, match="is not whole"):
        claim.read_scores(tmp_path / "x.csv")


def test_the_plan_does_what_matters_first_and_nothing_twice():
    groups = claim.plan(["tiny", "second"])
    assert [group.people for group in groups[:4]] == ["validation"] * 2 + ["test"] * 2
    assert len({(group.name, group.people) for group in groups}) == len(groups)
    assert {group.prior for group in groups if group.base == "second"} == {"0", "1"}
