"""studies/predicted: its tables are those of the committed scores, its measures right on known ones."""

import numpy as np
import pytest

from bench.documents import fill
from studies.predicted import __main__ as study
from studies.rows import put_rows, read_rows


@pytest.fixture
def scores(tmp_path, monkeypatch):
    """Two people: R-FaceSim of LoRA grows by a point a step, after the prediction by two from .4 on."""
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "STEPS", {"lora-noaug": (50, 100), "refined-noaug": (10, 20)})
    rows = []

    def add(method: str, lr: str, steps: int, similar: float, adherence: float, strength: str = "1") -> None:
        for person, seed in (("a", 0), ("a", 1), ("b", 0), ("b", 1)):
            key = ("fresh", "shipped", method, lr, strength, steps, person, seed)
            values = (similar, similar + 0.01, adherence)
            rows.append(dict(zip((*study.KEY, *study.PLACE, *study.METRICS), (*key, *values))))

    add("base", "", 0, 0.0, 0.9)
    add("predicted", "", 0, 0.4, 0.89)
    add("predicted", "", 0, 0.6, 0.8, "1.25")  # more alike, but it forgets the prompt
    for steps in (50, 100):
        add("lora-noaug", "0.02", steps, steps / 100, 0.9)
        add("lora-noaug", "0.008", steps, 2 * steps / 100, 0.8)  # faster, but it forgets the prompt
    for steps in (10, 20):
        add("refined-noaug", "0.008", steps, 0.4 + 2 * steps / 100, 0.9)
        add("refined-noaug", "0.008", steps, 0.3, 0.9, "1.25")
    put_rows(tmp_path / "scores.csv", rows, study.KEY[:2])
    return study.Scores("fresh", resamples=20)


def test_steps_are_interpolated_and_adherence_is_kept(scores):
    # To .25 the rate is faster that has lost too much adherence by .5.
    assert [scores.steps_to("lora-noaug", level)[0] for level in (0.25, 0.5, 0.7)] == [13, 50, 70]
    assert [scores.steps_to("refined-noaug", level)[0] for level in (0.3, 0.5, 0.7)] == [0, 5, 15]
    assert np.isinf(scores.steps_to("refined-noaug", 0.9)[0])
    starts = {strength: curve[0, 0, 0] for (_, strength), curve in scores.trained("refined-noaug").items()}
    assert starts == pytest.approx({"1": 0.4, "1.25": 0.6})


def test_the_tables_say_so(scores):
    lines = {line.split("|")[1].strip(): line for line in study.speed(scores).splitlines()}
    assert "| 50 [50, 50]" in lines["0.5"] and "| 10.00 [10.00, 10.00]" in lines["0.5"]
    assert "40.0 [40.0, 40.0]" in study.predicted(scores) and "-1.0" in study.predicted(scores)
    assert "80.0 [80.0, 80.0] after the prediction, 200.0" in study.ends(scores)
    end = study.ends(scores).split("same R-FaceSim")[1]
    assert (
        end
        == ", in points: **-1.0** [-1.0, -1.0] at strength 1 and **-10.0** [-10.0, -10.0] at strength 1.25."
    )
    assert "60.0 [60.0, 60.0]" in next(x for x in study.predicted(scores).splitlines() if " 1.25 " in x)


def test_rows_of_a_predictor_replace_its_old_ones(scores):
    path = study.FOLDER / "scores.csv"
    fewer = [row for row in read_rows(path) if row["method"] != "refined-noaug"]
    put_rows(path, fewer, study.KEY[:2])
    assert read_rows(path) == fewer


def test_the_tables_are_those_of_the_committed_scores():
    scores = study.Scores("fresh")
    text = (study.FOLDER / "README.md").read_text()
    assert (
        fill(text, {name: lambda block=block: block(scores) for name, block in study.BLOCKS.items()}) == text
    )
    assert all(f"<!-- {name} -->" in text for name in study.BLOCKS)
