"""A family: files are as `personalize.py` makes them alone, the base is read once for all, nothing twice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compare import randomize
from PIL import Image
from safetensors.torch import load_file
from test_memory import BLOCKS, SIZES, arranged, stream_of
from test_side_by_side import CPU, SETTINGS, TRAINING, person

import family.__main__ as family
import personalize
from family.side_by_side import personalize_together
from flux.checkpoint import read_tensors
from flux.errors import UserError
from flux.model import Flux
from flux.streaming import Stream
from metalora import collapse
from personalize import add_adapters, draw_batches

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees")  # the random model reads few tokens


@pytest.fixture
def run(world, tmp_path) -> Callable[..., Path]:
    """Call the command: a short training without samples; returns its folder."""

    def call(*argv: object, out: str = "out") -> Path:
        defaults = ["--model", world, "--out", tmp_path / out, "--samples", 0, "--at-once", 2]
        defaults += ["--steps", 3, "--lr", 0.01]
        family.main([str(word) for word in [*defaults, *argv]])
        return tmp_path / out

    return call


@pytest.fixture
def photos(three_people) -> list[Path]:
    return [folder / "000.png" for folder in sorted(three_people.iterdir())]


@pytest.fixture
def exact(monkeypatch) -> dict[Path, dict]:
    """The LoRAs that are written, by file, before they are rounded to float16."""
    seen = {}

    def watch(module) -> None:
        export = module.export_lora

        def watched(model, path, about, slot=0, form="diffusers"):
            seen[path] = {part: (a.clone(), b.clone()) for part, (a, b) in collapse(model, slot).items()}
            export(model, path, about, slot, form)

        monkeypatch.setattr(module, "export_lora", watched)

    watch(family)
    watch(personalize)
    return seen


def difference(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max((x - y).abs().max().item() for part in ours for x, y in zip(ours[part], theirs[part]))


# --- As alone ----------------------------------------------------------------------------------------------


def test_everybody_is_as_alone(run, photos, three_people, world, exact, tmp_path):
    """Two photos with captions and faces.json, and a folder of four photos, at rank 4.

    At the default rate: Adam's first steps magnify the rounding of a gradient near zero by it.
    """
    folder = three_people / "woman_000"
    with pytest.warns(UserWarning, match="captions such as .*woman_000/000.txt are not used"):
        out = run(*photos[:2], folder, "--seed", 7, "--lr", 4e-4)
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "man_001_000.safetensors", "man_002_000.safetensors", "woman_000.safetensors"]  # fmt: skip
    options = ["--model", world, "--steps", 3, "--samples", 0]
    for photo in photos[:2]:
        face = json.loads(photo.with_name("faces.json").read_text())[photo.name]
        caption = photo.with_suffix(".txt").read_text().strip()
        words = [photo, *options, "--face", ",".join(map(str, face)), "--caption", caption]
        ours = out / f"{photo.parent.name}_000.safetensors"
        for seed in (7, 8):
            alone = tmp_path / f"alone_{seed}.safetensors"
            personalize.main([str(word) for word in [*words, "--seed", seed, "--out", alone, "--force"]])
            error = difference(exact[ours], exact[alone])
            assert error < 1e-5 if seed == 7 else error > 1e-2
            ups = [(exact[ours][part][1] - b).abs().max() for part, (_, b) in exact[alone].items()]
            assert (max(ups) > 1e-4) == (seed == 8)  # which begin at zero
            (_, about), (_, expected) = read_tensors(ours), read_tensors(alone)
            assert (about == expected) == (seed == 7)
    assert {len(a) for a, _ in exact[out / "woman_000.safetensors"].values()} == {4}


def test_a_folder_of_people(run, three_people, photos, tmp_path):
    folder = tmp_path / "people"
    shutil.copytree(three_people / "man_001", folder / "anna")
    shutil.copy(photos[1], folder / "boris.png")
    (folder / "notes.txt").write_text("these are not people")
    out = run("--people", folder, "--no-augment", "--steps", 1, "--samples", 2, "--caption", "a photo")
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "anna.safetensors", "boris.safetensors", "people.png", "samples"]  # fmt: skip
    assert {len(list(folder.iterdir())) for folder in (out / "samples").iterdir()} == {2}
    width, height = Image.open(out / "people.png").size
    assert width == 132 + 3 * 260 and height // 260 == 2  # labels, a photo and two samples; two people


# --- What is there -----------------------------------------------------------------------------------------


def test_who_is_done_is_not_done_again(run, photos, capsys, monkeypatch):
    together, groups = family.personalize_together, []

    def dies_in_the_second_group(*arguments):
        groups.append(len(arguments[2]))
        if len(groups) == 2:
            raise KeyboardInterrupt
        return together(*arguments)

    monkeypatch.setattr(family, "personalize_together", dies_in_the_second_group)
    with pytest.raises(KeyboardInterrupt):
        run(*photos)
    out = run(*photos)
    assert groups == [2, 1, 1]
    assert capsys.readouterr().out.count("is there already") == 2
    files = {path: path.read_bytes() for path in out.glob("*.safetensors")}
    assert len(files) == 3 and not [*out.glob(".*.safetensors")]
    whole = run(*photos, out="whole")
    for path in files:
        theirs = load_file(whole / path.name)
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=0)

    for encoder in ("load_autoencoder", "load_conditioner"):
        monkeypatch.delattr(family.flux, encoder)  # nothing is left to do
    run(*photos)
    for words in (["--lr", 0.02], ["--caption", "a man"], ["--format", "kohya"], ["--format", "original"]):
        with pytest.raises(UserError, match=r"man_001_000.safetensors was made with other[^§]*, now"):
            run(*photos, *words)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_who_cannot_be_learned_is_named_at_the_end(run, photos, tmp_path, monkeypatch):
    """Nobody in a picture, and a loss that is not finite; all others are finished."""
    nobody = tmp_path / "nobody.png"
    Image.new("RGB", (64, 64), "grey").save(nobody)
    encode = personalize.encode_crops

    def spoilt(pictures, *rest):
        crops = encode(pictures, *rest)
        if "man_002" in str(next(iter(pictures))):
            crops[0].posterior["mean"].fill_(torch.inf)
            crops[0].mirrored["mean"].fill_(torch.inf)
        return crops

    monkeypatch.setattr(personalize, "encode_crops", spoilt)
    with pytest.raises(UserError) as error:
        run(*photos, nobody, "--steps", 8)
    problem, *lines = str(error.value).splitlines()
    assert problem == "2 of 4 people could not be learned:" and len(lines) == 2
    assert "nobody.png: no face found" in lines[0] and "faces.json" in lines[0]
    assert "man_002/000.png: the loss became infinite or NaN; a smaller --lr than 0.01" in lines[1]
    names = sorted(path.stem for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == ["man_001_000", "woman_000_000"]


def test_what_is_wrong_is_said_first(run, photos, tmp_path, monkeypatch):
    for encoder in ("load_autoencoder", "load_conditioner"):
        monkeypatch.delattr(family.flux, encoder)
    shutil.copy(photos[1], tmp_path / "MAN_001_000.png")
    (tmp_path / "notes.jpg").write_text("these are my notes\n")
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([photos[0], tmp_path / "MAN_001_000.png"], "would both become MAN_001_000.safetensors"),
        ([photos[0], tmp_path / "notes.jpg"], "notes.jpg is no photo that can be read"),
        ([photos[0], tmp_path / "empty"], "empty is a folder without photos"),
        ([photos[0], "nobody.jpg"], "nobody.jpg: no such photo"),
        (["--people", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["--people", tmp_path / "empty"], "neither photos nor folders"),
        ([], "give a photo, or a folder of photos, of each person"),
        ([photos[0], "--meta", "nowhere.safetensors"], "no stage-1 file at nowhere.safetensors"),
    ):
        with pytest.raises((UserError, FileNotFoundError), match=message):
            run(*words)
    assert not [*tmp_path.rglob("*.safetensors")]


def test_the_plan_knows_how_many_people(capsys, tmp_path, monkeypatch):
    """FLUX.1-dev: on the largest card one by one nothing is recomputed; with streaming many are cheaper."""
    monkeypatch.chdir(tmp_path)
    names = [f"{n}.jpg" for n in range(20)]
    seen = []
    for words in (["--vram", "48", "--at-once", "8"], ["--vram", "80"], ["--vram", "16"]):
        family.main([*names, "--plan", *words])
        seen.append(capsys.readouterr().out.splitlines()[0])
    assert "8 people side by side, batch 8, 1024x1024 pixels" in seen[0]
    assert "stage2, batch 1, " in seen[1]
    assert "people side by side" in seen[2]
    with pytest.raises(UserError, match="batch 16, needs .* GiB, there are 12"):
        family.main([*names, "--plan", "--vram", "12", "--at-once", "16"])
    assert not [*tmp_path.iterdir()]


# --- Reads of the base -------------------------------------------------------------------------------------


def brought(people: int, shapes_differ: bool = False) -> int:
    """Return the bytes of weights that are copied while so many people are trained side by side."""
    model, total = arranged(randomize(Flux(SIZES[Flux])), "all", BLOCKS), 0
    stream, bring = stream_of(model), Stream._bring

    def watched(self, number, beside):
        nonlocal total
        total += self.sizes[number] * (number not in self.held_blocks)
        bring(self, number, beside)

    personal = add_adapters(model, None, 1, "all", [3] * people)
    batches = []
    for slot in range(people):
        crops, prompt = person(model, slot)
        crops = crops[: 2 - slot % 2] if shapes_differ else crops
        batches.append(draw_batches(crops, prompt, SETTINGS, TRAINING, 3, CPU, torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "_bring", watched)
        ((_, slots),) = personalize_together(model, personal, batches, [SETTINGS.steps], TRAINING, CPU)
    assert len(slots) == people and stream.held_blocks.count(None) == 0
    return total


def test_the_base_is_read_once_for_all():
    """Per person it is 1/K of the bytes; with crops of other shapes more, but less than alone."""
    alone = brought(1)
    assert alone > SETTINGS.steps * sum(
        stream_of(arranged(randomize(Flux(SIZES[Flux])), "all", BLOCKS)).sizes
    )
    for people in (2, 4, 8):
        assert brought(people) / people == alone / people
    assert alone < brought(4, shapes_differ=True) < 2 * alone
