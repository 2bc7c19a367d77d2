"""studies/enough and studies/photos: their tables are those of the committed scores; they answer rightly."""

from pathlib import Path

import pytest

from bench.documents import fill
from studies.enough import __main__ as enough
from studies.photos import __main__ as photos
from studies.rows import mean_scores, put_rows

FINDINGS = Path(__file__).parents[1] / "docs" / "findings.md"


@pytest.mark.parametrize(
    "study, scores", [(enough, lambda: mean_scores(enough.SCORES, ["prior"])), (photos, photos.Scores)]
)
def test_the_tables_are_those_of_the_committed_scores(study, scores):
    text, found = FINDINGS.read_text(), scores()
    assert (
        fill(text, {name: lambda block=block: block(found) for name, block in study.BLOCKS.items()}) == text
    )
    assert all(f"<!-- {name} -->" in text for name in study.BLOCKS)


def put(path: Path, key: dict, similar: dict[str, float]) -> None:
    """Add a system with everybody's R-FaceSim."""
    scores = ({"r-facesim": value, "facesim": value + 0.1, "clip-t": 0.9} for value in similar.values())
    put_rows(path, [{**key, "person": name, **one} for name, one in zip(similar, scores)], [*key])


def test_the_least_that_is_not_clearly_worse_is_the_answer(tmp_path):
    """50 people are a point behind for some and ahead for others, 12 always behind."""
    path = tmp_path / "scores.csv"
    for name in enough.PRIORS:
        put(path, {"prior": name}, {"a": 0.5, "b": 0.6, "c": 0.7})
    put(path, {"prior": "50 people"}, {"a": 0.49, "b": 0.61, "c": 0.69})
    put(path, {"prior": "12 people"}, {"a": 0.4, "b": 0.5, "c": 0.6})
    means = mean_scores(path, ["prior"])
    lines = {line.split("|")[1].strip(): line for line in enough.answers(means).splitlines()}
    assert lines["How many people?"].split("|")[2].strip() == "50 people"
    assert "12 people **-10.0** [-10.0, -10.0]; 50 people -0.3" in lines["How many people?"]
    assert lines["Which r1?"].split("|")[2].strip() == "16"
    assert "| 12 people" in enough.enough(means)


def test_a_prior_takes_the_place_of_its_old_rows(tmp_path):
    path = tmp_path / "scores.csv"
    for value in (0.1, 0.2):
        put(path, {"prior": "x"}, {"a": value})
    put(path, {"prior": "y"}, {"a": 0.3})
    means = mean_scores(path, ["prior"])
    assert [means[name,][0, 0] for name in ("x", "y")] == [0.2, 0.3]


def test_the_rate_of_a_rank_is_chosen_on_other_people(tmp_path):
    path = tmp_path / "scores.csv"
    for rank in photos.RANKS:
        for lr, value in {"0.004": 0.5, "0.008": 0.4 + 0.05 * rank}.items():  # from rank 4 on the larger one
            for people, gain in (("choosing", 0), ("fresh", 0.1)):
                for count in photos.PHOTOS:
                    key = {"people": people, "photos": count, "rank": rank, "lr": lr}
                    better = gain * (lr == "0.004") * 9  # on the fresh people the smaller rate is better
                    put(path, key, {"a": value + count / 100 + better, "b": value + count / 100 + better})
    scores = photos.Scores(path)
    assert [scores.rate(rank) for rank in photos.RANKS] == ["0.004", "0.004", "0.008"]
    lines = photos.answers(scores).splitlines()
    assert "Yes" in lines[2] and "8 photos **+7.0** [+7.0, +7.0]" in lines[2]
    assert "No, less" in lines[3]  # rank 4, at its rate, is behind on the fresh people
