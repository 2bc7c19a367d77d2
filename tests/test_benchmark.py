"""The protocol as a whole: what is made, that a stopped run continues, that only what is missing is made."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metalora
import metrics
import personalize
from flux.checkpoint import read_tensors
from flux.errors import UserError
from metaphd import benchmark
from run.files import alone

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees")  # the random model reads few tokens
JUDGES = Path(__file__).parents[1] / "tiny" / "weights" / "judges"
SYSTEMS = [f"{method}_r1_lr0.01_s{steps}" for method in ("meta-lora", "lora-noaug") for steps in (1, 3)]


@pytest.fixture
def run(bench):
    return bench


@pytest.fixture(scope="module")
def judged_model(world):
    return world


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """The pixels of every picture by its place."""
    files = sorted((folder / "pictures").rglob("*.png"))
    return {str(file.relative_to(folder)): np.asarray(Image.open(file)).astype(int) for file in files}


def alike(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """But for rounding, which depends on how many pictures are in a batch."""
    return abs(ours - theirs).max() <= 2


def test_everything_that_is_promised_is_there(run, three_people, capsys):
    out = run()
    names = sorted(folder.name for folder in three_people.iterdir() if folder.is_dir())
    for system in SYSTEMS:
        assert sorted(path.stem for path in (out / "loras" / system).iterdir()) == names
        made = {
            str(path.relative_to(out / "pictures" / system))
            for path in (out / "pictures" / system).rglob("*.png")
        }
        assert made == {
            f"{n}/{prompt}/{seed}.png" for n in names for prompt in ("00", "01") for seed in (0, 1)
        }
        assert sorted(path.stem for path in (out / "sheets" / system).iterdir()) == names
        steps = read_tensors(out / "loras" / system / f"{names[0]}.safetensors")[1]["steps"]
        assert steps == system.rpartition("s")[2]
    assert {path.name for path in (out / "pictures" / "base").iterdir()} == {n.split("_")[0] for n in names}
    for system in ("base", *SYSTEMS):
        scores = json.loads((out / "scores" / f"{system}.json").read_text())
        assert len(scores["pictures"]) == len(names) * 4
        assert scores["overall"]["people"] == len(names)
        assert all(-1 <= row["r-facesim"] <= 1 for row in scores["pictures"])
    assert {path.name for path in out.iterdir()} >= {
        "report.html",
        "curves.png",
        "scores.md",
        "settings.json",
    }
    printed = capsys.readouterr().out
    assert all(system in printed for system in ("base", *SYSTEMS))
    picture = Image.open(out / "pictures" / SYSTEMS[0] / names[0] / "00" / "1.png")
    assert picture.text["prompt"] == f"a photo of a {names[0].split('_')[0]} at the beach"


def test_step_counts_come_from_one_training(run, monkeypatch):
    """Two methods, three people two at a time: four trainings, each to the largest count."""
    asked, train = [], benchmark.personalize_together

    def watched(model, trained, batches, steps, *rest):
        asked.append((len(batches), max(steps)))
        yield from train(model, trained, batches, steps, *rest)

    monkeypatch.setattr(benchmark, "personalize_together", watched)
    out = run("--seeds", 1)
    assert asked == [(2, 3), (1, 3)] * 2
    one, three = (
        read_tensors(next((out / "loras" / f"lora-noaug_r1_lr0.01_s{n}").iterdir()))[0] for n in (1, 3)
    )
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_side_by_side_is_as_alone(run):
    """Each person's noise, clipping and optimizer are those of a training of its own."""
    options = ["--batch", 2, "--seeds", 1]
    together, alone = run(*options, "--at-once", 3), run(*options, "--at-once", 1, out="alone")
    assert same_loras(together, alone) == 12


def same_loras(ours: Path, theirs: Path) -> int:
    """Compare all LoRAs of a run with those of another one, up to float16; return their number."""
    files = sorted((ours / "loras").rglob("*.safetensors"))
    largest = 0.0
    for file in files:
        mine, other = read_tensors(file)[0], read_tensors(theirs / file.relative_to(ours))[0]
        for name, value in mine.items():
            torch.testing.assert_close(value.float(), other[name].float(), atol=2e-4, rtol=2e-2)
            largest = max(largest, value.float().abs().max().item() if "lora_B" in name else 0)
    assert largest > 1e-2, "nothing was trained"
    return len(files)


def test_a_loss_that_is_not_finite_costs_one_person_only(run, monkeypatch):
    """NaN latents of one of two people side by side: all others' files are those of a calm run."""
    options = ["--method", "lora-noaug", "--seeds", 1]
    calm, draw, people = run(*options, out="calm"), personalize.draw_batches, []

    def spoilt(*args):
        people.append(args)
        number = len(people)
        for step, batch in enumerate(draw(*args), 1):
            if (number, step) == (1, 2):
                batch["latents"] = batch["latents"] * float("nan")
            yield batch

    monkeypatch.setattr(personalize, "draw_batches", spoilt)
    with pytest.raises(UserError, match="lr0.01_s3: the loss of man_001 became infinite or NaN"):
        run(*options)
    out = calm.with_name("out")
    assert len(people) == 3 and same_loras(out, calm) == 5
    assert not (out / "loras" / SYSTEMS[3] / "man_001.safetensors").exists()
    assert (out / "loras" / SYSTEMS[2] / "man_001.safetensors").exists()  # of the step before


def test_a_second_run_is_kept_out_of_the_folder(run, tmp_path):
    with alone(tmp_path / "out"), pytest.raises(OSError, match="another run is writing there"):
        run()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}


def test_a_stopped_run_goes_on(run, monkeypatch):
    """Killed while drawing, then started again: the same pictures as without the interruption."""
    few = ["--method", "lora-noaug", "--steps", 1]
    whole, save = pictures(run(*few, out="whole")), benchmark.save_picture
    left = iter(range(15))

    def dies(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "save_picture", dies)
        assert not (run(*few) / "report.html").exists()
    resumed = pictures(run(*few))
    assert resumed.keys() == whole.keys() and all(alike(resumed[name], whole[name]) for name in whole)
    first, other, *_ = whole.values()
    assert not alike(first, other)


def test_what_is_there_is_not_made_again(run, monkeypatch):
    few = ["--method", "lora-noaug", "--steps", 1]
    out = run(*few)
    times = {
        path: path.stat().st_mtime_ns for name in ("loras", "pictures") for path in (out / name).rglob("*.*")
    }
    lost = sorted((out / "pictures" / SYSTEMS[2]).rglob("*.png"))[0]
    before = pictures(out)
    lost.unlink()

    def train(*args):
        raise AssertionError("a person who is finished was trained again")

    monkeypatch.setattr(benchmark, "personalize_together", train)
    run(*few)
    place = str(lost.relative_to(out))
    assert alike(pictures(out)[place], before[place])
    assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == {lost}


def test_other_settings_are_refused(run):
    run("--method", "lora-noaug", "--steps", 1)
    with pytest.raises(ValueError, match=r"(?s)other settings.*guidance: 3.5 -> 5.0"):
        run("--guidance", 5)
    run("--method", "lora-noaug", "--steps", 1, 2, "--seeds", 1)  # a larger grid adds to it


def test_wrong_input_stops_before_anything_is_loaded(run, three_people, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("weights were read before all input was checked")

    monkeypatch.setattr(benchmark.flux, "load_conditioner", refuse)
    monkeypatch.setattr(benchmark.flux, "load_autoencoder", refuse)
    with pytest.raises(FileNotFoundError, match="no stage-1 file at"):
        run("--meta", tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is no file of stage 1"):
        metalora.write_tensors({"x": torch.zeros(1)}, tmp_path / "other.safetensors", {})
        run("--meta", tmp_path / "other.safetensors")
    alone = tmp_path / "alone" / "woman_1"
    alone.mkdir(parents=True)
    shutil.copy(next(three_people.glob("*/000.png")), alone)
    with pytest.raises(ValueError, match="woman_1 must have at least 2 photos"):
        run("--people", alone.parent)
    with pytest.raises(ValueError, match="has no photo 99.png"):
        names = [folder.name for folder in three_people.iterdir() if folder.is_dir()]
        (tmp_path / "refs.json").write_text(json.dumps({names[0]: "99.png"}))
        run("--references", tmp_path / "refs.json")
    with pytest.raises(SystemExit):
        run("--seeds", 0)


def test_the_command_has_three_parts(monkeypatch, capsys):
    from metaphd import __main__ as command

    called = []
    monkeypatch.setitem(command.COMMANDS, "check", called.append)
    monkeypatch.setattr("sys.argv", ["metaphd", "check", "people", "--out", "x.csv"])
    command.main()
    assert called == [["people", "--out", "x.csv"]]
    for argv, code in ((["metaphd", "--help"], None), (["metaphd"], None), (["metaphd", "chek"], 2)):
        monkeypatch.setattr("sys.argv", argv)
        if code:
            with pytest.raises(SystemExit) as stop:
                command.main()
            assert stop.value.code == code
        else:
            command.main()
        said = capsys.readouterr()
        assert "python -m metaphd run|check|study" in (said.err if code else said.out)


def test_defaults_are_the_papers():
    args = benchmark.parse_arguments(["--people", "p"])
    runs = benchmark.plan_runs(args)
    assert [(r.method, r.rank, r.lr, r.steps) for r in runs] == [
        ("meta-lora", 1, 4e-4, (375,)),
        ("lora", 1, 4e-4, (625,)),
    ]
    assert (args.seeds, args.sample_steps, args.prompts.name) == (5, None, "frontal.txt")  # as the model
    grid = benchmark.plan_runs(
        benchmark.parse_arguments(
            ["--people=p", *["--ranks", "1", "2", "--lr", "1", "2", "--steps", "9", "5"]]
        )
    )
    assert len(grid) == 8 and grid[0].steps == (5, 9)


def test_people_of_one_photo_each_as_in_ffhq(run, three_people, tmp_path):
    """A folder of man and woman: every photo is a person, scored without R-FaceSim, which is said."""
    for kind in ("man", "woman"):
        (tmp_path / "ffhq" / kind).mkdir(parents=True)
        for k, photo in enumerate(sorted(three_people.glob(f"{kind}_*/*.png"))[:2]):
            shutil.copy(photo, tmp_path / "ffhq" / kind / f"{k}.png")
    out = run("--people", tmp_path / "ffhq", "--method", "lora-noaug", "--steps", 1, "--seeds", 1)
    scores = json.loads((out / "scores" / "lora-noaug_r1_lr0.01_s1.json").read_text())
    assert scores["people"].keys() == {"man_0", "man_1", "woman_0", "woman_1"}
    assert {person["class"] for person in scores["people"].values()} == {"man", "woman"}
    assert scores["overall"]["r-facesim"]["mean"] is None and scores["overall"]["facesim"]["people"] == 4
    assert len(scores["remarks"]["no photo besides the reference, so no R-FaceSim"]) == 4


def test_everybody_learns_from_their_own_photo_and_caption(run, three_people, monkeypatch):
    """Crops and prompt that go into each training, against the photo's own, encoded here."""
    asked, draw = [], personalize.draw_batches

    def watched(crops, prompt, settings, training, seed, *rest):
        asked.append((crops, prompt, seed))
        return draw(crops, prompt, settings, training, seed, *rest)

    monkeypatch.setattr(personalize, "draw_batches", watched)
    run("--method", "lora-noaug", "--steps", 1)
    assert len({seed for *_, seed in asked}) == len(asked) == 3  # not one draw of noise for all
    latents = [crops[0].posterior["mean"] for crops, *_ in asked]
    prompts = [prompt["txt"] for _, prompt, _ in asked]
    captions = [(folder / "000.txt").read_text() for folder in sorted(three_people.iterdir())]
    for a in range(3):
        for b in range(a):
            assert not torch.equal(latents[a], latents[b])
            assert torch.equal(prompts[a], prompts[b]) == (captions[a] == captions[b])


def test_several_photos_are_learned_and_not_compared_with(run, three_people, tmp_path, monkeypatch):
    """With --photos 2 the first two are crops, under a caption of both; the others serve R-FaceSim."""
    asked, draw, judged, evaluate = [], personalize.draw_batches, [], metrics.evaluate

    def watched(crops, prompt, *rest):
        asked.append(([crop.posterior["mean"] for crop in crops], prompt["txt"]))
        return draw(crops, prompt, *rest)

    def watched_scores(rows, evaluators, photos, *rest, **about):
        judged.append(photos)
        return evaluate(rows, evaluators, photos, *rest, **about)

    monkeypatch.setattr(personalize, "draw_batches", watched)
    monkeypatch.setattr(metrics, "evaluate", watched_scores)
    options = ["--method", "lora-noaug", "--steps", 1, "--seeds", 1]
    run(*options), run(*options, "--photos", 2, out="two")
    one, two = asked[:3], asked[3:]
    for (single, _), (both, _) in zip(one, two, strict=True):
        assert len(both) == 2 and torch.equal(single[0], both[0]) and not torch.equal(both[0], both[1])
    assert torch.equal(two[0][1], two[1][1]) and not torch.equal(one[0][1], two[0][1])  # "a photo of a man"
    for name, paths in judged[-1].items():
        all_photos = sorted((three_people / name).glob("*.png"))
        assert paths == [all_photos[0], *all_photos[2:]] and judged[0][name] == all_photos
    many = len(all_photos)
    with pytest.raises(UserError, match=f"at least {many + 1} photos"):
        run(*options, "--photos", many, out="many")
    with pytest.raises(UserError, match="other settings"):
        run(*options, "--photos", 2)


def test_each_prompt_seed_and_setting_reaches_the_sampler(run, three_people, monkeypatch):
    asked, draw = [], benchmark.generate

    def watched(model, autoencoder, prompt, seeds, size, **settings):
        asked.append((len(prompt["txt"]), seeds, size, settings))
        return draw(model, autoencoder, prompt, seeds, size, **settings)

    monkeypatch.setattr(benchmark, "generate", watched)
    out = run("--method", "lora-noaug", "--steps", 1, "--guidance", 2.5, "--sample-steps", 2)
    assert all(count == len(seeds) <= 2 for count, seeds, *_ in asked)
    settings = [(size, settings["steps"], settings["guidance"]) for *_, size, settings in asked]
    assert {*settings} == {((64, 64), 2, 2.5)}
    for system in ("base", "lora-noaug_r1_lr0.01_s1"):
        for file in (out / "pictures" / system).rglob("*.png"):
            picture = Image.open(file)
            kind, texts = file.parts[-3].split("_")[0], ("a photo of a {} at the beach", "a sketch of a {}")
            assert picture.text["prompt"] == texts[int(file.parts[-2])].format(kind)
            assert picture.text["seed"] == file.stem
    made = pictures(out)
    first, second = (made[f"pictures/base/woman/0{k}/0.png"] for k in (0, 1))
    assert not alike(first, second)
    scores = json.loads((out / "scores" / "lora-noaug_r1_lr0.01_s1.json").read_text())
    for row in scores["pictures"]:
        assert (
            Path(row["base"])
            == out / "pictures" / "base" / row["class"] / row["prompt"] / f"{row['seed']}.png"
        )


def test_more_methods_and_seeds_are_added_to_what_was_there(run, capsys):
    run("--method", "lora-noaug", "--steps", 1, "--seeds", 1)
    out = run("--method", "meta-lora-noaug", "--steps", 2, "--seeds", 2)
    printed, systems = capsys.readouterr().out, {"lora-noaug_r1_lr0.01_s1", "meta-lora-noaug_r1_lr0.01_s2"}
    assert all(f"| {system} " in printed for system in systems)
    for system in systems:
        assert len(json.loads((out / "scores" / f"{system}.json").read_text())["pictures"]) == 3 * 2 * 2


def test_what_does_not_matter_may_change(run, tmp_path):
    run("--method", "lora-noaug", "--steps", 1, "--seeds", 1)
    (tmp_path / "again.txt").write_text((tmp_path / "prompts.txt").read_text())
    same = ["--method", "lora-noaug", "--steps", 1, "--seeds", 1]
    run(*same, "--prompts", tmp_path / "again.txt", "--no-face", "skip", "--dtype", "fp32")
    with pytest.raises(ValueError, match="prompts of man"):
        (tmp_path / "again.txt").write_text("a painting of a [man/woman]\n")
        run(*same, "--prompts", tmp_path / "again.txt")
    with pytest.raises(ValueError, match="dtype: torch.float32 -> torch.bfloat16"):
        run(*same, "--dtype", "bf16")
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is damaged"):
        run(*same)
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match="no settings.json"):
        run(*same)


def test_photos_and_prompts_are_judged_before_anything_is_learned(run, three_people, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr(benchmark.flux, "load_autoencoder", refuse)
    copy = tmp_path / "copy"
    shutil.copytree(three_people, copy)
    (next(copy.glob("*_*")) / "002.png").write_text("no picture")
    with pytest.raises(ValueError, match="002.png is no photo"):
        run("--people", copy)
    (tmp_path / "prompts.txt").write_text("a [man/woman]\nbeyond words\n")
    with pytest.raises(ValueError, match="'beyond words' names nothing"):
        run()


def test_with_crops_checkpointing_and_16_bit(run, three_people, tmp_path, monkeypatch):
    """The defaults of a GPU, with five crops; and s1 of a longer training is s1 of a shorter one."""
    list_all = benchmark.crop_boxes
    monkeypatch.setattr(benchmark, "crop_boxes", lambda size, face: list_all(size, face)[:5])
    for name in ("man_001", "woman_000"):
        shutil.copytree(three_people / name, tmp_path / "two" / name)
    argv = ["--method", "meta-lora", "--dtype", "bf16", "--batch", 2, "--seeds", 1]
    argv += ["--people", tmp_path / "two", "--checkpoint", "all"]
    short, long = run(*argv, "--steps", 1, out="short"), run(*argv, "--steps", 1, 3, out="long")
    files = sorted((short / "loras").rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        ours, theirs = read_tensors(file)[0], read_tensors(long / file.relative_to(short))[0]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
