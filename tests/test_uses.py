"""The benchmark's uses of a LoRA, strengths and a second one on top, and its pictures of other people."""

import csv
import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux.errors import UserError
from metaphd import benchmark
from metaphd.others import read_others
from metaphd.uses import Use, name_systems, plan_uses, uses_of_base
from people.photos import read_photo
from scoring.strengths import plot_strengths

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees")  # the random model reads few tokens
NAME = "lora-noaug_r1_lr1_s1"
FEW = ("--method", "lora-noaug", "--steps", 1, "--lr", 1, "--seeds", 1)  # a rate at which the LoRA shows


def pictures(out: Path, system: str, show: str = "pictures") -> np.ndarray:
    """All pixels of a system's pictures, in the order of their names; the base's once for each person."""
    files = sorted((out / show / system).rglob("*.png"))
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


def test_strengths_and_a_second_lora_are_systems_of_one_file(bench, tmp_path):
    """Almost no strength gives the base's pictures; a second LoRA equal to the first doubles its strength."""
    out = bench(*FEW, "--strengths", 1e-6, 1, 2)
    assert [path.name for path in (out / "loras").iterdir()] == [NAME]
    for person in ("man_001", "woman_000"):
        base = pictures(out, f"base/{person.split('_')[0]}")
        assert abs(pictures(out, f"{NAME}_x1e-06/{person}") - base).max() <= 2
        assert abs(pictures(out, f"{NAME}/{person}") - base).max() > 20
    made = {path: path.stat().st_mtime_ns for path in (out / "pictures").rglob("*.png")}
    with pytest.raises(FileNotFoundError, match="none.safetensors: no such file"):
        bench(*FEW, "--stack", tmp_path / "none.safetensors")

    shutil.copy(out / "loras" / NAME / "man_001.safetensors", style := tmp_path / "style.safetensors")
    bench(*FEW, "--stack", style, "--stack-text", "a sketch", "--class-bleed")
    assert made == {path: path.stat().st_mtime_ns for path in made}  # nothing is made twice
    twice, stacked = (pictures(out, f"{name}/man_001") for name in (f"{NAME}_x2", f"{NAME}_stack1"))
    assert abs(twice - stacked).max() <= 2
    style_alone = pictures(out, "base_stack1/man")
    assert abs(style_alone - pictures(out, f"{NAME}/man_001")).max() <= 2
    scores = {path.stem: json.loads(path.read_text()) for path in (out / "scores").glob("*.json")}
    assert scores.keys() == {*("base", "base_stack1", NAME, f"{NAME}_x1e-06", f"{NAME}_x2", f"{NAME}_stack1")}
    assert scores[f"{NAME}_x2"]["system"]["strength"] == 2
    assert all(0 <= row["style"] <= 1 for row in scores[NAME]["pictures"] if row["prompt"] == "00")
    beside = {Path(row["base"]).parts[-4] for row in scores[f"{NAME}_stack1"]["pictures"]}
    assert beside == {"base_stack1"}
    assert scores["base"]["overall"]["class-bleed"]["mean"] == pytest.approx(0, abs=1e-6)
    assert abs(scores[f"{NAME}_x1e-06"]["overall"]["class-bleed"]["mean"]) < 0.02
    assert abs(scores[NAME]["overall"]["class-bleed"]["mean"]) > 1e-3

    # Of the other class: each row's prompt, and the picture's own, which says what it was made from.
    rows = [row for row in scores[NAME]["pictures"] if row["prompt"].startswith("other-class")]
    assert len(rows) == 6 and all("clip-t" not in row for row in rows)
    for row in rows:
        other = {"man": "woman", "woman": "man"}[row["class"]]
        assert f"a {other}" in row["text"] and Image.open(row["path"]).text["prompt"] == row["text"]
    with (out / "scores" / f"{NAME}.csv").open(newline="") as file:
        assert len([*csv.DictReader(file)]) == 12
    assert (out / "strengths.png").exists() and "Class bleed" in (out / "scores.md").read_text()
    with pytest.raises(UserError, match="a second LoRA: give its file again, as --stack FILE"):
        bench(*FEW)
    shutil.copy(out / "loras" / NAME / "woman_000.safetensors", style)
    with pytest.raises(UserError, match="second LoRA: "):
        bench(*FEW, "--stack", style)


def test_couples_are_scored_beside_the_base(bench, tmp_path, monkeypatch):
    """The random model cannot draw two people: every picture of its own is put beside a second one."""
    draw = benchmark.generate

    def wide(*args, **settings):
        both = []
        for picture in draw(*args, **settings):
            both.append(image := Image.new("RGB", (2 * picture.width, picture.height)))
            image.paste(picture)
            image.paste(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (picture.width, 0))
        return both

    (tmp_path / "couples.txt").write_text("a [man/woman] and a man at the beach\n")
    monkeypatch.setattr(benchmark, "generate", wide)
    out = bench(*FEW, "--couples", tmp_path / "couples.txt")
    scores = {name: json.loads((out / "scores" / f"{name}.json").read_text()) for name in ("base", NAME)}
    assert scores["base"]["overall"]["bleed"]["mean"] == pytest.approx(0, abs=1e-6)
    rows = [row for row in scores[NAME]["pictures"] if row["prompt"] == "couples 00"]
    assert len(rows) == 3 and all(row["all faces"] == row["base faces"] == 2 for row in rows)
    assert scores[NAME]["overall"]["bleed"]["mean"] == pytest.approx(np.mean([row["bleed"] for row in rows]))
    with pytest.raises(UserError, match="couples of man: "):
        (tmp_path / "couples.txt").write_text("a [man/woman] and a woman\n")
        bench(*FEW, "--couples", tmp_path / "couples.txt")


def options(**given: object) -> Namespace:
    return Namespace(**{"strengths": [1.0], "stack": None, "stack_strengths": None, "out": "out"} | given)


def test_uses_are_planned_and_named():
    assert plan_uses(options()) == [Use()] and Use().suffix == "" and Use().settings == {}
    stacked = options(strengths=[0.5, 1.0, 1.0], stack=Path("a"), stack_strengths=[0.25, 1.0])
    uses = plan_uses(stacked)
    assert [use.suffix for use in uses] == [
        *("_x0.5", "", "_x0.5_stack0.25", "_stack0.25", "_x0.5_stack1", "_stack1")
    ]
    assert [use.suffix for use in uses_of_base(uses)] == ["", "_stack0.25", "_stack1"]
    systems = name_systems({"lora": {"method": "lora"}}, uses)
    assert [Use.of(settings) for settings in systems.values()] == uses
    # What there is comes back; a stack is not added to new strengths unless asked for.
    later = plan_uses(options(stack=Path("a"), strengths=[2.0]), [{"stack": 0.25}, {}])
    assert later == [Use(), Use(2.0), Use(1.0, 0.25)]
    assert plan_uses(options(stack=Path("a")))[-1] == Use(1.0, 1.0)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--strengths", "0"], "--strengths 0.0: must be above 0"),
        (["--stack", "a", "--stack-strengths", "-1"], "--stack-strengths -1.0: must be above 0"),
        (["--stack-text", "a sketch"], "--stack-strengths and --stack-text belong to --stack FILE"),
    ],
)
def test_wrong_options_end_with_a_line(argv, said, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--people", "p", *argv])
    assert said in capsys.readouterr().err


def test_a_damaged_use_is_no_system():
    good = {"method": "lora", "rank": 1, "lr": 1.0, "steps": 5, "strength": 0.5}
    assert benchmark.is_system(good)
    for wrong in ({"strength": 0}, {"strength": "x"}, {"stack": -1}):
        assert not benchmark.is_system(good | wrong)


def test_strengths_are_plotted(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: (kept.append(self), Path(path).write_text("drawn"))
    )
    shared = {"method": "lora", "rank": 1, "lr": 0.1, "steps": 5}

    def scores(similar: float, **use: float) -> dict:
        means = {"clip-t": {"mean": 0.9}, "r-facesim": {"mean": similar}}
        return {"overall": means, "system": shared | use}

    systems = {"b": scores(0.6), "c": scores(0.8, strength=1.5), "a": scores(0.4, strength=0.5)}
    systems |= {"d": scores(0.3, stack=0.5), "base": {"overall": scores(0.1)["overall"], "system": {}}}
    assert plot_strengths(tmp_path / "s.png", systems)
    (axes,) = kept[0].axes
    alone, stacked, base = (line.get_xydata()[:, 1].tolist() for line in axes.lines)
    assert alone == pytest.approx([40, 60, 80]) and stacked == [30] and base == [10]
    assert [text.get_text() for text in axes.texts] == ["0.5", "1", "1.5", "1", "base"]
    assert not plot_strengths(tmp_path / "none.png", {"b": scores(0.6)})
    monkeypatch.undo()
    assert plot_strengths(tmp_path / "real.png", systems) and read_photo(tmp_path / "real.png").width > 500


def test_prompts_that_name_no_class_show_no_other(tmp_path):
    prompts = tmp_path / "prompts.txt"
    args = Namespace(couples=None, class_bleed=True, prompts=prompts)
    prompts.write_text("a [man/woman] at the beach\n")
    assert read_others(args, ["man"]) == {"other-class": {"man": ["a woman at the beach"]}}
    prompts.write_text("a [man/woman] at the beach\na portrait\n")
    with pytest.raises(UserError, match="'a portrait' in --prompts is the same"):
        read_others(args, ["man"])
