"""The study's arithmetic: steps by hand, a ratio that is known, controls that are what they are called.

And its documents: the committed scores give the tables that are there.
"""

import csv
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import documents
from studies.beside import __main__ as beside
from studies.claim import __main__ as claim
from studies.claim import documents as claim_documents
from studies.claim.pictures import plot_pictures
from studies.claim.scores import (
    KEY,
    METRICS,
    PLACE,
    Cell,
    Sample,
    at_level,
    best_tradeoff,
    compare_speed,
    draw_people,
    draw_replicates,
    estimate,
    read_scores,
    steps_to,
)
from studies.claim.side_questions import aside
from studies.claim.study import Study
from studies.draws import __main__ as draws
from studies.enough import __main__ as enough
from studies.photos import __main__ as photos
from studies.predicted import __main__ as predicted


def curve(similar: list[float], adherent: list[float], steps=(0, 10, 20, 40), resamples: int = 20):
    """Everybody alike: R-FaceSim and adherence at each step count, FaceSim zero; one system by its key."""
    rows = np.array([[a, 0.0, b] for a, b in zip(similar, adherent)])
    cell = Cell([*steps], np.broadcast_to(rows[:, None, None], (len(steps), 6, 2, 3)))
    return {("all", "0.01"): Sample({}, [("tiny", "0")], resamples).curve([cell])}


def test_steps_to_a_level_by_hand():
    (one,) = curve([0, 0.4, 0.6, 0.8], [0.9, 0.9, 0.86, 0.9]).values()
    assert one.shape == (21, 41, 3)
    for level, limit, expected in (
        (0.5, None, 15),  # half way from 10 to 20
        (0.5, 0.03, 15),  # .88 there
        (0.6, 0.03, 25),  # at 20 too little adherence, .87 again at 25
        (0.9, None, np.inf),
    ):
        assert (steps_to(level, one, limit) == expected).all()


def test_a_learner_twice_as_fast_has_the_ratio_two():
    """The slow one passes every level at twice the steps, for each person at a speed of their own."""
    rng, steps = np.random.default_rng(0), np.arange(0, 201, 5)
    speed = rng.uniform(0.6, 1.6, size=(1, 20, 1))
    learned = lambda pace: np.tanh(steps[:, None, None] * speed * pace / 60).repeat(2, axis=2)

    def make(*paces: float) -> dict[tuple, np.ndarray]:
        sample = Sample({}, [("tiny", "0")], 200)
        cells = [Cell([*steps], np.stack([learned(p), learned(p), np.ones((41, 20, 2))], -1)) for p in paces]
        return {("all", str(pace)): sample.curve([cell]) for pace, cell in zip(paces, cells)}

    found = compare_speed(make(1, 0.4), make(0.5, 0.3), 0.5, 0.03)
    assert found.value == pytest.approx(2, rel=0.05) and found.unknown == 0
    assert found.low <= 2 <= found.high and found.high - found.low < 0.2  # paired: speed cancels
    same = compare_speed(make(1), make(1), 0.5, None)
    assert (same.value, same.low, same.high) == (1, 1, 1)


def test_what_is_never_reached():
    low, high = curve([0, 0.1, 0.2, 0.3], [1] * 4), curve([0, 0.5, 0.6, 0.7], [1] * 4)
    assert compare_speed(high, low, 0.5, None).value == np.inf
    assert compare_speed(low, high, 0.5, None).value == 0
    neither = compare_speed(low, low, 0.5, None)
    assert np.isnan(neither.value) and neither.unknown == 1
    assert np.isnan(at_level(low, 0.5)).all()


def test_equal_similarity_takes_the_most_adherent_rate():
    fast, slow = curve([0, 0.5, 0.6, 0.7], [1, 0.7, 0.7, 0.65]), curve([0, 0.2, 0.5, 0.6], [1, 0.9, 0.8, 0.5])
    both = {("all", "a"): fast["all", "0.01"], ("all", "b"): slow["all", "0.01"]}
    np.testing.assert_allclose(at_level(both, 0.5)[:, [0, 2]], [[0.5, 0.8]] * 21)
    np.testing.assert_allclose(at_level(both, 0.65)[:, [0, 2]], [[0.65, 0.675]] * 21)  # only the fast one
    assert best_tradeoff(both) == pytest.approx(0.7)  # .7 + .65, against .5 + .8


def test_the_bootstrap_is_the_one_by_hand():
    """The interval of a mean over people agrees with its standard error, and weights are shares."""
    weights = draw_people(40, 1, 4000)
    np.testing.assert_allclose(weights.sum(axis=(1, 2)), 1)
    values = np.random.default_rng(0).normal(size=40)
    found = estimate((weights[:, :, 0] * values).sum(axis=1))
    half = 1.96 * values.std() / 40**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    pooled = draw_replicates((("a", "0"), ("a", "1"), ("b", "0")), 4000)
    np.testing.assert_allclose(pooled.sum(axis=1), 1)
    assert pooled[0].tolist() == [0.25, 0.25, 0.5]  # bases count alike
    np.testing.assert_allclose(pooled.mean(axis=0), pooled[0], atol=0.02)
    assert (pooled[1:, 2] == 1).mean() == pytest.approx(0.25, abs=0.03)  # the second base alone


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

    even = claim.even_layers(learned, generator)
    torch.testing.assert_close(even.norm(dim=(1, 2)), start.norm(dim=(1, 2)), rtol=0.2, atol=0)
    torch.testing.assert_close(
        even * (learned.norm(dim=(1, 2)) / even.norm(dim=(1, 2)))[:, None, None], learned
    )
    root = claim.root_of_spectrum(learned, generator)
    torch.testing.assert_close(root.norm(dim=(1, 2)), learned.norm(dim=(1, 2)))
    old, new = torch.linalg.svdvals(learned), torch.linalg.svdvals(root)
    torch.testing.assert_close(old[:, :1] / old, (new[:, :1] / new) ** 2, rtol=1e-3, atol=0)
    axes = claim.principal_axes(learned, generator)
    torch.testing.assert_close(axes.mT @ axes, learned.mT @ learned, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(axes @ axes.mT, torch.diag_embed(old**2), rtol=1e-4, atol=1e-2)


def test_scores_come_back_from_their_file_and_gaps_are_told(tmp_path):
    lines = []
    base, own = (
        ["tiny", "", "", "base", "", "", ""],
        ["tiny", "0", "all", "meta-lora-noaug", "spread", "1", "0.01"],
    )
    for key, steps in ((base, 0), (own, 10), (own, 20)):
        for person, seed in product("ab", "01"):
            lines.append([*key, steps, person, seed, 0.01 * steps, 0.2, 0.9])

    write(tmp_path / "x.csv", lines)
    ((key, found),) = read_scores(tmp_path / "x.csv").items()
    assert key == tuple(own) and found.steps == [0, 10, 20] and found.scores.shape == (3, 2, 2, 3)
    assert found.scores[2, 1, 0].tolist() == pytest.approx([0.2, 0.2, 0.9])
    write(tmp_path / "x.csv", lines[:-1])
    with pytest.raises(ValueError, match="is not whole"):
        read_scores(tmp_path / "x.csv")


PERSON = len(KEY) + PLACE.index("person")


def write(path: Path, lines: list[list]) -> None:
    with path.open("w") as file:
        csv.writer(file).writerows([[*KEY, *PLACE, *METRICS], *lines])


def test_the_plan_does_what_matters_first_and_nothing_twice():
    groups = claim.plan(["tiny", "second"])
    assert [group.people for group in groups[:4]] == ["validation"] * 2 + ["test"] * 2
    assert len({(group.name, group.people) for group in groups}) == len(groups)
    assert {group.prior for group in groups if group.base == "second"} == {"0", "1"}


# --- Documents ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study() -> Study:
    return claim.load_study(claim.SCORES)


def block(text: str, name: str) -> str:
    (found,) = [found[0] for found in documents.BLOCK.finditer(text) if found["name"] == name]
    return found


@pytest.mark.parametrize("name", ["looked", "cost"])
def test_the_documents_say_what_the_scores_say(study, name):
    """The tables without intervals, which take no time; the next test reads all."""
    text = claim_documents.DOCUMENTS[0].read_text(encoding="utf-8")
    written = block(text, name)
    assert claim_documents.fill(written, study) == written, "run python -m studies.claim --figures"
    figure = re.findall(r"\d\.\d", written)[3]
    wrong = written.replace(figure, "77.7")
    assert claim_documents.fill(wrong, study) == written != wrong
    assert claim_documents.fill(f"before\n{written}\nafter 1.5", study) == f"before\n{written}\nafter 1.5"


@pytest.mark.slow
@pytest.mark.parametrize("path", claim_documents.DOCUMENTS, ids=lambda path: path.name)
def test_the_whole_documents_say_what_the_scores_say(study, path):
    text = path.read_text(encoding="utf-8")
    assert claim_documents.fill(text, study) == text, "run python -m studies.claim --figures"


@pytest.mark.parametrize("path", claim_documents.DOCUMENTS, ids=lambda path: path.name)
def test_blocks_have_writers_and_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    names = {found["name"] for found in documents.BLOCK.finditer(text)}
    small = {*predicted.BLOCKS, *beside.BLOCKS, *enough.BLOCKS, *photos.BLOCKS, "draws", "stopping"}
    assert names and names <= claim_documents.BLOCKS.keys() | small
    links = re.findall(r"\]\(([^):#]+)\)", text)
    assert links and all((path.parent / link).exists() for link in links)


def test_the_table_of_draws_says_what_the_scores_say():
    text = draws.DOCUMENT.read_text(encoding="utf-8")
    with draws.SCORES.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert draws.table(rows) in text
    for row in rows:
        row["r-facesim"] = float(row["r-facesim"]) + 0.001
    assert draws.table(rows) not in text


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Scores of six people for all that was planned, made from the committed ones of the first cells."""
    folder = tmp_path_factory.mktemp("scores")
    for name in ("primary", "looked"):
        with (claim.SCORES / f"{name}.csv").open() as file:
            rows = [[*row.values()] for row in csv.DictReader(file)]
        few = sorted({row[PERSON] for row in rows})[:6]
        rows = [row for row in rows if row[PERSON] in few]
        if name == "looked":
            looked = rows
        else:
            first = [
                row for row in rows if row[0] == "tiny" and row[1] in ("", "0") and row[2] in ("", "all")
            ]

    def alter(rows: list[list], **new: str) -> list[list]:
        """Rename what makes a cell; the base model's lines keep all but the base."""
        method = KEY.index("method")
        given = {KEY.index(name): value for name, value in new.items()}
        lora = {k: value for k, value in given.items() if k != 1}
        pick = lambda row: (
            {0: given.get(0, row[0])} if row[method] == "base" else lora if not row[1] else given
        )
        return [[pick(row).get(k, value) for k, value in enumerate(row)] for row in rows]

    base = [row for row in first if row[KEY.index("method")] == "base"]
    meta = [row for row in first if row[1]]
    few = base + [row for row in first if row[KEY.index("lr")] in ("0.008", "0.02")]
    rank = base + [row for row in first if row[KEY.index("lr")] == "0.008"]
    crops = {"lora-noaug": "lora", "meta-lora-noaug": "meta-lora", "base": "base"}
    parts = {
        "primary": [alter(first, base=b, prior=p, targets=t) for b, p, t in product(
            ("tiny", "second"), "01", ("all", "no-modulation"))],
        "controls": [base, *(alter(meta, prior=p, targets=t) for p, t in product(
            ("random", "flat"), ("all", "no-modulation"))), alter(meta, prior="even-layers")],
        "draws": [alter(few, draws="independent", targets=t) for t in ("all", "no-modulation")],
        "ranks": [alter(rank, rank=r) for r in ("2", "4", "8", "16")],
        "attention": [alter(first, targets="attention")],
        "crops": [[[*row[:3], crops[row[3]], *row[4:]] for row in first]],
        "looked": [looked],
        "large": [[[*row[:3], crops[row[3]], *row[4:]] for row in looked if row[3] in crops and not row[1]]],
        "attempts": [alter([row for row in looked if row[1] or row[3] == "base"], prior="small-buckets"),
            alter(looked, base="weak")],
    }  # fmt: skip
    for name, some in parts.items():
        write(folder / f"{name}.csv", [*map(list, dict.fromkeys(map(tuple, sum(some, []))))])
    return folder


def test_a_whole_study_leaves_nothing_out(whole):
    assert claim.missing(claim.plan(["tiny", "second"]), whole) == []
    study = Study(whole, [], resamples=20)
    text = {name: block(study) for name, block in claim_documents.BLOCKS.items()}
    assert all(text.values())
    for title in ("Controls", "Draws", "Ranks", "Crops", "Attention only"):
        assert f"### {title}\n" in text["aside"]
    assert "160 pixels" in text["aside"] and "for LoRA, crops" in text["aside"]
    assert text["attempts"].count("small-buckets") == 3 and "| weak | 0 " in text["attempts"]
    assert "2 bases, 4 priors" in text["claim"] and text["claim"].count("python -m studies.claim") == 4
    rows = [line.split(" | ") for line in text["primary"].split("\n") if line.startswith("| ")]
    ratios = {re.search(r": \**([\d.]+)", row[3])[1] for row in rows[2:] if ":" in row[3]}
    assert len(ratios) == 1  # replicates that are copies, alone and pooled
    pooled = [row for row in rows if row[0] == "| pooled"]
    assert len(pooled) == 2 * 3 and all(row[1].startswith("4 replicates") for row in pooled)
    (whole / "ranks.csv").rename(whole / "ranks.away")
    assert claim.missing(claim.plan(["tiny", "second"]), whole) == ["ranks"]
    assert "Ranks" not in aside(Study(whole, [], resamples=2))
    (whole / "ranks.away").rename(whole / "ranks.csv")


def test_pictures_are_drawn(whole):
    plot_pictures(Study(whole, [], resamples=20))
    assert {file.stem for file in whole.glob("*.png")} == {"frontier", "steps", "facesim", "controls"}
