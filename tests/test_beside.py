"""studies/beside: its tables are those of the committed scores, and right on known ones."""

import csv

import pytest

from bench.documents import fill
from studies.beside import __main__ as study


@pytest.fixture
def known() -> list[dict]:
    """Three people; each strength adds to the likeness, but 1.5 costs more adherence than may be lost."""
    rows = []

    def add(method: str, strength: float, stack: float, similar: float, kept: float, *others: float) -> None:
        for k, person in enumerate(("a", "b", "c")):
            values = similar + k / 100, kept + k / 100, stack * 0.9, *(others or ("", ""))
            place = {"method": method, "strength": strength, "stack": stack, "person": person}
            rows.append(place | dict(zip(study.METRICS, values)))

    add("base", 1, 0, 0, 0.9, 0, 0.95)
    add("truth", 1, 0, 0.9, 0)
    add("truth", 1, 1, 0.88, 0)
    for stack in study.STACKS:
        add("base", 1, stack, 0, 0.8)
    for method in study.METHODS:
        for x in study.STRENGTHS:
            add(method, x, 0, 0.5 * x, 0.9 if x < 1.5 else 0.8, *((0.1, 0.25) if x == 1 else ()))
        for stack in study.STACKS:
            add(method, 1, stack, 0.5 - stack / 10, 0.79)
    return rows


def test_tables_of_known_scores(known):
    scores = study.Scores(known)
    assert study.best_strength(scores, "lora-noaug") == 1.25
    lines = study.strengths(scores).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        *("LoRA", "0.5", "26.0 ± 2.5", "-25.0 ± 0.0", "91.0 ± 2.5", "+0.0 ± 0.0")
    ]
    stacked = [line for line in study.stacks(scores).splitlines() if "LoRA" in line.split("|")[1]]
    assert "-10.0 ± 0.0" in stacked[2] and "-1.0 ± 0.0" in stacked[2] and "90.0 ± 0.0" in stacked[2]
    assert "+10.0 ± 0.0 | 51.0 ± 2.5" in study.bleeding(scores) and "20%" in study.bleeding(scores)
    assert "25.0 ± 0.0" in study.bleeding(scores) and "95.0 ± 0.0" in study.bleeding(scores)
    told = study.answers(scores)
    assert "LoRA 1.25" in told and "LoRA: it loses" in told and "predicted: yes" in told
    assert "right pictures -2.0 ± 0.0" in told


def test_the_tables_are_those_of_the_committed_scores():
    with study.SCORES.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    text = study.DOCUMENT.read_text(encoding="utf-8")

    def filled(rows: list[dict]) -> str:
        scores = study.Scores(rows)
        return fill(text, {name: lambda block=block: block(scores) for name, block in study.BLOCKS.items()})

    assert filled(rows) == text
    for row in rows:
        row["r-facesim"] = float(row["r-facesim"] or 0) + 0.01 * len(row["method"])
    assert filled(rows) != text
