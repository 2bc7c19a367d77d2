"""--watch: it does not change the training, keeps what a shorter one gives, and scores as the judges do."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import personalize
import watching.watch
from flux.hashes import fingerprint
from flux.streaming import Stream
from run.late import read_late
from scoring import evaluators
from scoring.evaluators import PaperEvaluators
from tiny.people import to_pil
from vision import clip_vit, inception_resnet
from vision.small import load_judges
from watching import judge as judging
from watching.judge import Judge
from watching.sheet import CELL, COLUMNS, State, lay_out_sheet, plot_curves
from watching.watch import Watch, list_files, watched_steps

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees")  # the random model reads few tokens


@pytest.fixture
def run(world, people, tmp_path, monkeypatch):
    """Call the script on ref.png in an empty folder: four updates, and pictures of few Euler steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watching.watch, "EULER_STEPS", 2)
    (tmp_path / "ref.png").write_bytes(next(people.glob("*_000/000.png")).read_bytes())

    def call(*argv: object) -> None:
        words = ["ref.png", "--model", world, "--no-augment", "--steps", 4, "--lr", 1e-2, "--samples", 0]
        personalize.main([str(word) for word in [*words, *argv]])

    return call


def read_table() -> list[dict]:
    with Path("ref_watch.csv").open() as file:
        return [*csv.DictReader(file)]


@pytest.mark.parametrize("words", ["", "--stream 2 --draws spread", "--checkpoint all", "--base-dtype fp8"])
def test_the_training_is_bit_for_bit_the_same(run, monkeypatch, words):
    monkeypatch.setattr(Stream, "COPY", True)
    run("--out", "without.safetensors", *words.split())
    run("--watch", 2, *words.split())
    assert Path("ref.safetensors").read_bytes() == Path("without.safetensors").read_bytes()


def test_flux2_is_watched_with_its_negative_prompt(run, world_of_klein):
    run("--model", world_of_klein, "--watch", 4, "--samples", 0)
    assert [row["step"] for row in read_table()] == ["0", "4"]
    assert Image.open("ref_watch.png").width > 3 * CELL


def test_a_watch_that_disturbs_the_training_is_noticed(run, monkeypatch):
    generate = Watch.generate

    def disturbing(self):
        self.model.factors.personal.data.mul_(1.01)
        return generate(self)

    monkeypatch.setattr(Watch, "generate", disturbing)
    run("--out", "without.safetensors")
    run("--watch", 1)
    assert Path("ref.safetensors").read_bytes() != Path("without.safetensors").read_bytes()


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_what_is_kept_is_what_a_shorter_training_gives(run, form):
    run("--watch", 3, "--keep", "--format", form)
    assert sorted(path.name for path in Path().glob("*.safetensors")) == [
        "ref.safetensors", "ref_3.safetensors", "ref_4.safetensors"]  # fmt: skip
    run("--steps", 3, "--format", form, "--out", "short.safetensors")
    assert Path("ref_3.safetensors").read_bytes() == Path("short.safetensors").read_bytes()
    assert Path("ref_4.safetensors").read_bytes() == Path("ref.safetensors").read_bytes()
    assert Path("ref_3.safetensors").read_bytes() != Path("ref_4.safetensors").read_bytes()


def test_the_scores_are_those_of_the_pictures(run, world, monkeypatch, capsys):
    """Computed with the networks themselves. The second prompt names two scenes and has no CLIP-T."""
    made, generate = [], Watch.generate
    monkeypatch.setattr(Watch, "generate", lambda self: made.append(generate(self)) or made[-1])
    monkeypatch.setattr(personalize, "SCENES", ("in the city at night",))
    monkeypatch.setattr(personalize, "generate", lambda *_, **__: [])  # the grid at the end
    run("--watch", 2, "--samples", 2)
    identity, prompt = load_judges(world / "judges")
    reference = identity(identity.look(Image.open("ref.png")))
    rows = read_table()
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    for row, pictures in zip(rows, made):
        likeness = [(identity(identity.look(picture)) @ reference.mT).item() for picture in pictures]
        assert float(row["facesim"]) == pytest.approx(np.mean(likeness), abs=1e-4)
        adherence = prompt.adherence(prompt.look(pictures[0]), "a photo of a person").item()
        assert float(row["clip-t"]) == pytest.approx(adherence, abs=1e-4)
    assert len({row["facesim"] for row in rows}) > 1
    said = capsys.readouterr().out
    assert f"--watch: FaceSim and CLIP-T by {world / 'judges'}" in said
    assert "no CLIP-T: the prompt 'a photo of a person in the city at night' names" in said
    told = re.search(r"^step 4: FaceSim (\S+), CLIP-T", said, re.MULTILINE)[1]
    assert float(told) == pytest.approx(float(rows[2]["facesim"]), abs=6e-4)


def test_the_sheet_grows_as_it_goes(run, monkeypatch):
    widths, call = [], Watch.__call__

    def watched(self, step):
        call(self, step)
        widths.append(Image.open("ref_watch.png").width)

    monkeypatch.setattr(Watch, "__call__", watched)
    run("--watch", 2)
    assert (
        widths[0] == widths[1] < widths[2] == widths[3] < widths[4]
    )  # steps 0 to 4; 1 and 3 are not watched


def test_nothing_is_downloaded(run, world, monkeypatch, capsys, tmp_path):
    """A model without evaluators of its own, and an empty cache: pictures only."""
    nowhere = tmp_path / "hub"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(nowhere))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # calling it would be a TypeError
    monkeypatch.setattr(clip_vit, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(clip_vit, "hub_file", None)
    monkeypatch.setattr(judging, "load_evaluators", lambda _, cache, **__: PaperEvaluators(cache))
    run("--watch", 4)
    said = capsys.readouterr().out
    assert "--watch: pictures only\n" in said
    assert "no FaceSim: the face recogniser is not on this disk (python metrics.py facesim downloads" in said
    assert "no CLIP-T: CLIP ViT-B/32 is not on this disk" in said
    assert read_table() == [{"step": step, "facesim": "", "clip-t": ""} for step in ("0", "4")]
    assert Image.open("ref_watch.png").height < 2 * CELL


def test_evaluators_on_the_disk_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cached = {"model.safetensors"}
    monkeypatch.setattr(
        clip_vit, "try_to_load_from_cache", lambda _, file, **__: file if file in cached else None
    )
    found = evaluators.PaperEvaluators(None)
    assert found.at_hand() == {"facesim": False, "clip-t": False}  # of CLIP the tokenizer is missing
    cached.update(clip_vit.BESIDE)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / inception_resnet.FILE).write_text("")
    assert found.at_hand() == {"facesim": True, "clip-t": True}


class NoFaces:
    """Evaluators that find a face in a photo, if any, and in no picture."""

    name = "nobody"

    def __init__(self, reference):
        self.reference = reference

    def at_hand(self):
        return {"facesim": True, "clip-t": False}

    def embed_reference(self, path, face):
        return self.reference

    def embed_faces(self, paths):
        return torch.zeros(len(paths), 1), [0] * len(paths)


def test_without_a_face(monkeypatch, capsys):
    """None in the pictures: FaceSim is 0. None in the photo: there is no FaceSim, and that is said."""
    pictures = [Image.new("RGB", (64, 64))] * 2
    for reference, expected in ((torch.ones(512), {"facesim": [0, 0]}), (None, {})):
        monkeypatch.setattr(judging, "load_evaluators", lambda *_, **__: NoFaces(reference))
        assert Judge("tiny", Path("ref.png"), None, ["a", "b"]).score(pictures) == expected
        said = "no FaceSim: no face found in ref.png, --face gives its box" in capsys.readouterr().out
        assert said == (reference is None)


def test_the_face_that_the_user_names_is_the_reference(portraits, tmp_path, monkeypatch):
    """Of two in one photo; else it would be the largest."""
    found = PaperEvaluators(None)
    monkeypatch.setattr(PaperEvaluators, "recognizer", inception_resnet.InceptionResnet(
        inception_resnet.InceptionResnetSizes(512)).eval())  # fmt: skip
    photo = Image.open(portraits[0]).resize((250, 250))
    photo.save(tmp_path / "photo.png")
    box = (60, 40, 180, 200)
    seen = found.embed_reference(tmp_path / "photo.png", box)
    torch.testing.assert_close(seen, found.recognizer.embed_faces([photo], [box])[0])
    other = found.embed_reference(tmp_path / "photo.png", (0, 0, 60, 60))
    assert not torch.allclose(seen, other)


# --- What is wrong is said first ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ref_watch.png", "ref_watch.csv", "ref_2.safetensors", "ref_4.safetensors"])
def test_nothing_is_replaced_without_force(run, monkeypatch, name):
    def refuse(*_):
        raise AssertionError("an encoder was loaded before all input was checked")

    monkeypatch.setattr(personalize.flux, "load_autoencoder", refuse)
    Path(name).write_text("another's")
    with pytest.raises(FileExistsError, match=f"{name} is there already; --out .*--force replaces it"):
        run("--watch", 2, "--keep")
    assert Path(name).read_text() == "another's"
    with pytest.raises(AssertionError, match="an encoder was loaded"):
        run("--watch", 2, "--keep", "--force")


@pytest.mark.parametrize(
    "words, said",
    [
        ("--watch 0", "--watch 0: must be at least 1"),
        ("--keep", "--keep belongs to --watch N"),
        ("--start predicted --watch 5", "--steps 0, the default of --start predicted, has none"),
    ],
)
def test_impossible_settings(words, said, capsys):
    with pytest.raises(SystemExit):
        personalize.parse_arguments(["ref.png", *words.split()])
    assert said in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_said_and_not_watched(run, monkeypatch):
    """The second update makes the adapter infinite, and the third loss is the first that shows it."""
    update, count = torch.optim.AdamW.step, []

    def breaking(self, *rest):
        update(self, *rest)
        count.append(1)
        if len(count) == 2:
            self.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    with pytest.raises(ValueError, match="step 3: the loss is nan"):
        run("--watch", 1, "--keep")
    assert [row["step"] for row in read_table()] == ["0", "1"]
    assert Path("ref_1.safetensors").exists() and not Path("ref_2.safetensors").exists()


# --- Parts -------------------------------------------------------------------------------------------------


def test_it_is_called_between_the_steps():
    """After each step and before the next, though the losses are read a step late."""
    order = []

    def steps():
        for k in (1, 2, 3):
            order.append(f"update {k}")
            yield torch.tensor(float(k))

    losses = []
    for loss in read_late(steps(), lambda done: order.append(f"watch {done}")):
        losses.append(loss)
        order.append(f"loss {loss:g}")
    assert losses == [1, 2, 3] == [*read_late(steps())]
    expected = "watch 0, update 1, watch 1, update 2, loss 1, watch 2, update 3, loss 2, watch 3, loss 3"
    assert ", ".join(order[:10]) == expected


def test_watched_steps():
    assert watched_steps(25, 60) == [0, 25, 50, 60]
    assert watched_steps(30, 60) == [0, 30, 60]
    assert watched_steps(100, 60) == [0, 60]
    names = [path.name for path in list_files(Path("a/ref.safetensors"), 30, 60, keep=True)]
    assert names == ["ref_watch.png", "ref_watch.csv", "ref_30.safetensors", "ref_60.safetensors"]
    assert len(list_files(Path("ref.safetensors"), 30, 60, keep=False)) == 2


def some_states(count: int) -> list[State]:
    """States whose pictures get brighter; two prompts, of which one has no CLIP-T."""
    states = []
    for k in range(count):
        picture = to_pil(torch.full((3, 64, 64), 2 * k / max(1, count - 1) - 1))
        scores = {"facesim": [k / count, k / count / 2], "clip-t": [0.9, float("nan")]}
        states.append(State(10 * k, [picture, picture], scores))
    return states


def test_many_states_share_the_columns_and_the_last_is_shown():
    photo = Image.new("RGB", (64, 64), "red")
    sheets = {
        count: lay_out_sheet(photo, some_states(count), ["a", "b"]) for count in (1, 2, COLUMNS, 40, 41)
    }
    assert sheets[1].width < sheets[2].width < sheets[COLUMNS].width
    for count in (COLUMNS, 40, 41):
        sheet = sheets[count]
        assert sheet.width <= sheets[COLUMNS].width
        assert sheet.getpixel((sheet.width - CELL // 2, sheet.height - CELL // 2)) == (255, 255, 255)
        # From left to right they get brighter: one of each column.
        row = [
            sheet.getpixel((sheet.width - CELL // 2 - 148 * k, sheet.height - CELL // 2))[0] for k in range(9)
        ]
        assert row == sorted(row, reverse=True) and len({*row}) == 9


def test_a_point_stands_over_its_column():
    """The line begins and ends with a marker in the middle of the first and of the last column."""
    states, middles = some_states(3), np.array([300.0, 400.0, 500.0])
    picture = np.asarray(plot_curves(states, [0, 10, 20], middles, 250, 550)).astype(int)
    blue = (picture[:, :, 2] - picture[:, :, 0] > 150).any(axis=0)
    assert blue[298:303].all() and blue[498:503].all()
    assert not blue[:294].any() and not blue[507:].any()


def test_an_eye_that_also_scores_is_noticed(world, run, recwarn):
    judge = Judge(str(world), Path("ref.png"), None, ["a photo"])
    judge.warn_of_eye("another")
    assert not [warning for warning in recwarn if "flatters" in str(warning.message)]
    with pytest.warns(UserWarning, match="the predictor sees with the network that scores FaceSim"):
        judge.warn_of_eye(fingerprint(world / "judges" / "identity.safetensors"))
