"""Stage 2: what is trained, what is written, and that what can be wrong is said before the work begins."""

import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import load_file

import flux
import personalize
import train_meta
from flux.checkpoint import read_tensors
from flux.sampling import flow_loss
from flux.streaming import Stream
from lora.reading import read_lora
from lora.writing import write_tensors
from metalora import load_meta
from run.settings import Training
from vision.detector import find_faces

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees")  # the random model reads few tokens
FACE = ["--face", "20,16,44,48"]


@pytest.fixture(scope="module")
def meta(model, people, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stage1")
    words = ["--data", people, "--model", model, "--out", out, "--r1", 4, "--steps", 2, "--batch", 1]
    words += ["--bucket-warmup", 0, "--sample-every", 0]
    train_meta.main([str(word) for word in words])
    return out / "meta.safetensors"


@pytest.fixture
def photo(people, tmp_path, monkeypatch) -> Path:
    """A synthetic portrait of 64 x 64 pixels, ref.png, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ref.png").write_bytes(next(people.glob("*_000/000.png")).read_bytes())
    return Path("ref.png")


@pytest.fixture
def run(model, meta):
    """Call the script: a short training, no samples, and the stage-1 file where the method needs one."""

    def call(*argv: object) -> None:
        defaults = ["--model", model, "--steps", 3, "--lr", 1e-2, "--samples", 0]
        defaults += [] if "lora" in argv or "--meta" in argv else ["--meta", meta]
        personalize.main([str(word) for word in [*defaults, *argv]])

    return call


@pytest.fixture
def nothing_expensive(monkeypatch):
    """Fail when a text encoder or the autoencoder is loaded."""

    def refuse(*_):
        raise AssertionError("an encoder was loaded before all input was checked")

    monkeypatch.setattr(personalize.flux, "load_conditioner", refuse)
    monkeypatch.setattr(personalize.flux, "load_autoencoder", refuse)


def spy_on_training(monkeypatch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Record every weight and factor of the transformer, by name, before and after the training."""
    seen, add, train = {}, personalize.add_adapters, personalize.personalize
    names = ("meta_down", "mid", "up")

    def state(model) -> dict[str, torch.Tensor]:
        tensors = {name: p for name, p in model.named_parameters() if not name.startswith("factors.")}
        for layer, factors in model.factors.by_layer().items():
            tensors |= {f"{layer}.{name}": factor for name, factor in zip(names, factors)}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    before = {}

    def started(model, *rest):
        trained = add(model, *rest)
        before.update(state(model))
        return trained

    def watched(model, *rest):
        train(model, *rest)
        seen.update({name: (before[name], after) for name, after in state(model).items()})

    monkeypatch.setattr(personalize, "add_adapters", started)
    monkeypatch.setattr(personalize, "personalize", watched)
    return seen


# --- What is trained and written ---------------------------------------------------------------------------


def test_writes_beside_nothing_but_here(run, photo):
    """The LoRA is named after the photo and lies in the current folder; ref.png, the photo itself, stays."""
    before = photo.read_bytes()
    elsewhere = Path("photos")
    elsewhere.mkdir()
    photo.rename(elsewhere / "ref.png")
    run(elsewhere / "ref.png", *FACE, "--samples", 2, "--class", "woman")
    assert sorted(path.name for path in Path().iterdir()) == ["photos", "ref.safetensors", "ref_samples.png"]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["ref.png"]
    assert Image.open("ref_samples.png").size[0] > 3 * 256

    (elsewhere / "ref.png").rename(photo)
    run(photo, *FACE, "--samples", 1, "--force")
    assert photo.read_bytes() == before

    tensors, metadata = read_tensors(Path("ref.safetensors"))
    assert all(name.startswith("transformer.") for name in tensors)
    assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B"}
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in tensors
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight" in tensors
    assert len(tensors) == 2 * (14 + 6)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    expected = {"base_model": "flux1-random.safetensors", "method": "meta-lora", "rank": "1", "steps": "3"}
    expected |= {"lr": "0.01", "caption": "a photo of a person", "seed": "0"}
    expected["photos"] = f'["{hashlib.sha256(before).hexdigest()}"]'
    assert expected.items() <= metadata.items()
    assert "ref" not in str(metadata)


def test_meta_lora_keeps_meta_down(run, photo, meta, monkeypatch):
    seen, stage_1 = spy_on_training(monkeypatch), load_file(meta)
    run(photo, *FACE, "--steps", 5)
    assert sum(name in stage_1 for name in seen) == len(stage_1)
    for name, (before, after) in seen.items():
        assert torch.equal(before, after) == (not name.endswith((".mid", ".up"))), name
        if name in stage_1:
            assert torch.equal(after, stage_1[name])


def test_lora_trains_its_own_down(run, photo, monkeypatch):
    """Plain LoRA is the same code without meta_down: mid is its lora_A; it needs no stage-1 file."""
    seen = spy_on_training(monkeypatch)
    run(photo, *FACE, "--method", "lora", "--rank", 2, "--targets", "attention")
    for name, (before, after) in seen.items():
        assert torch.equal(before, after) == (not name.endswith((".mid", ".up"))), name
        assert "meta_down" not in name
    tensors, metadata = read_tensors(Path("ref.safetensors"))
    assert metadata["method"] == "lora"
    assert not any("norm" in name or ".ff" in name for name in tensors)
    down = seen["double_blocks.0.img_attn.proj.mid"][1][0, 0]
    written = tensors["transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight"]
    torch.testing.assert_close(written.float(), down, atol=1e-3, rtol=0)


def test_defaults_are_the_papers():
    one, plain = (personalize.parse_arguments(["a/ref.jpg", *more]) for more in ([], ["--method", "lora"]))
    several = personalize.parse_arguments(["a.jpg", "b.jpg", "--caption", "a man at night"])
    assert (one.steps, one.rank, one.batch, one.lr, one.draws) == (375, 1, 1, 4e-4, "independent")
    assert (plain.steps, several.rank) == (625, 4)
    assert (one.out, several.out) == (Path("ref.safetensors"), Path("a.safetensors"))
    assert (one.caption, several.caption) == ("a photo of a person", "a man at night")


def test_same_seed_same_file(run, photo):
    files = {}
    for name, more in {"a": [], "b": [], "c": ["--seed", 1], "d": ["--no-augment"]}.items():
        run(photo, *FACE, "--out", f"{name}.safetensors", *more)
        files[name] = load_file(f"{name}.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert all(torch.equal(tensor, files["b"][name]) for name, tensor in files["a"].items())
    for other in "cd":
        assert any(not torch.equal(tensor, files[other][name]) for name, tensor in files["a"].items())


def test_nothing_is_replaced_without_force(run, photo, nothing_expensive):
    for name, more in (("ref.safetensors", []), ("ref_samples.png", ["--samples", 1])):
        Path(name).write_text("another's")
        with pytest.raises(FileExistsError, match=f"{name} is there already; --out .*--force replaces it"):
            run(photo, *FACE, *more)
        assert Path(name).read_text() == "another's"
        Path(name).unlink()
    with pytest.raises(AssertionError, match="an encoder was loaded"):  # so far it goes without them
        run(photo, *FACE)


def test_names_carry_what_differs():
    """The README's people have photos called 000.png each."""
    name = lambda *photos: personalize.parse_arguments([*photos]).out.name
    assert name("people/anna/001.png") == "anna_001.safetensors" != name("people/Ольга/001.png")
    assert name("people/anna/001.png", "people/anna/002.png") == "anna_001.safetensors"
    assert name("a/ref.jpg") == "ref.safetensors" and name("写真.jpg") == "写真.safetensors"


def test_show_crops_says_that_it_replaces_a_sheet(photo, capsys):
    for expected in ("crops\n", "crops, replacing an earlier sheet\n"):
        personalize.main(["ref.png", *FACE, "--show-crops", "--model", "nowhere"])
        assert capsys.readouterr().out.endswith(expected)


def test_both_formats_hold_the_same(run, photo):
    run(photo, *FACE)
    run(photo, *FACE, "--out", "b.safetensors", "--format", "kohya")
    (ours, about), (kohya, _) = (read_lora(Path(f"{name}.safetensors")) for name in ("ref", "b"))
    assert all(name.startswith("lora_unet_") for name in load_file("b.safetensors"))
    assert about["modelspec.resolution"] == "64x64" and ours.keys() == kohya.keys()
    for part, (a, b) in ours.items():
        x, y = kohya[part]
        torch.testing.assert_close(b.float() @ a.float(), y.float() @ x.float())


@pytest.mark.parametrize("words", ["--checkpoint all", "--checkpoint attention", "--stream 2"])
def test_any_plan_trains_alike(run, photo, monkeypatch, words):
    monkeypatch.setattr(Stream, "COPY", True)
    run(photo, *FACE)
    run(photo, *FACE, "--out", "b.safetensors", "--samples", 1, *words.split())
    a, b = load_file("ref.safetensors"), load_file("b.safetensors")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-3, rtol=0)


def test_8_bits_are_chosen_only_when_asked_for(run, photo, capsys):
    """The file is another one, and the plan says why."""
    run(photo, *FACE)
    assert "exact, as they are in the file" in capsys.readouterr().out
    run(photo, *FACE, "--out", "b.safetensors", "--base-dtype", "fp8")
    assert "rounded to 8 bits: as asked" in capsys.readouterr().out
    a, b = load_file("ref.safetensors"), load_file("b.safetensors")
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_the_plan_alone_needs_neither_photo_nor_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    personalize.main(["nobody.jpg", "--plan", "--vram", "8"])
    said = capsys.readouterr().out
    assert "stage2, batch 1, 1024x1024 pixels, 512 text tokens; 8 GiB" in said and "of 57 blocks" in said
    with pytest.raises(ValueError, match="needs .* GiB, there are 2"):
        personalize.main(["nobody.jpg", "--plan", "--vram", "2"])
    assert not [*tmp_path.iterdir()]


def test_what_is_encoded(run, photo, monkeypatch):
    """With crops: up to 25 and their mirror images. Without: the whole photo. Captions: given or by class."""
    crops, encoded, texts = [], [], []
    encode_crops, encode_prompt = personalize.encode_crops, personalize.encode_prompt

    def watched(photos, boxes, *rest):
        crops.append(boxes)
        encoded.append(encode_crops(photos, boxes, *rest))
        return encoded[-1]

    monkeypatch.setattr(personalize, "encode_crops", watched)
    monkeypatch.setattr(
        personalize, "encode_prompt", lambda text, *rest: texts.append(text) or encode_prompt(text, *rest)
    )
    run(photo, *FACE, "--class", "woman", "--samples", 2)
    assert 5 <= len(crops[0]) == len(set(crops[0])) == len(encoded[0]) <= 25
    assert all(crop.posterior["mean"].shape == crop.mirrored["mean"].shape for crop in encoded[0])
    assert not any(torch.equal(crop.posterior["mean"], crop.mirrored["mean"]) for crop in encoded[0])
    assert texts == ["a photo of a woman", "a photo of a woman at the beach"]

    texts.clear()
    run(photo, "--no-augment", "--caption", "a sketch of a man at night", "--force")
    assert crops[1] == [(photo, (0, 0, 64, 64))]
    (whole,) = encoded[1]
    assert whole.shape == (64, 64) and whole.mirrored is whole.posterior
    assert texts == ["a sketch of a man at night"]


def test_a_mirrored_crop_is_the_crop_of_the_mirrored_photo(model, photo):
    autoencoder = flux.load_autoencoder(model / "ae.safetensors", dtype=torch.float32)
    picture, box = Image.open(photo).convert("RGB"), (8, 0, 56, 64)
    encode = lambda picture, box: personalize.encode_crops(
        {photo: picture}, [(photo, box)], autoencoder, 64, True
    )[0]
    crop, other = encode(picture, box), encode(ImageOps.mirror(picture), (64 - 56, 0, 64 - 8, 64))
    for name in ("mean", "std"):
        torch.testing.assert_close(crop.mirrored[name], other.posterior[name])
        torch.testing.assert_close(crop.posterior[name], other.mirrored[name])


def test_several_photos(run, photo, people):
    Path("second.png").write_bytes(next(people.glob("*_000/001.png")).read_bytes())
    run(photo, "second.png", "--no-augment", "--batch", 2)
    tensors, metadata = read_tensors(Path("ref.safetensors"))
    assert tensors["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape[0] == 4
    assert len(metadata["photos"].split(",")) == 2


def test_show_crops_needs_no_model(photo):
    personalize.main(["ref.png", *FACE, "--show-crops", "--model", "nowhere"])
    assert sorted(path.name for path in Path().iterdir()) == ["ref.png", "ref_crops.png"]
    assert Image.open("ref_crops.png").size[0] > 5 * 256


# --- What is wrong is said first ---------------------------------------------------------------------------


def test_no_stage_1_file(run, photo, nothing_expensive, model):
    with pytest.raises(FileNotFoundError, match="train_meta.py(.|\n)*--method lora"):
        run(photo, *FACE, "--meta", "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=f"no stage-1 file at {model}/meta.safetensors"):
        personalize.main(["ref.png", *FACE, "--model", str(model)])


def test_stage_1_file_beside_the_weights(photo, meta, model):
    beside = model / "meta.safetensors"
    beside.write_bytes(meta.read_bytes())
    try:
        personalize.main(["ref.png", *FACE, "--model", str(model), "--steps", "1", "--samples", "0"])
    finally:
        beside.unlink()
    assert Path("ref.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.* was trained with")
def test_stage_1_file_of_another_model(run, photo, nothing_expensive, other_model, model):
    with pytest.raises(ValueError, match="does not fit this model"):
        run(photo, *FACE, "--model", other_model)
    with pytest.raises(ValueError, match="no file of stage 1"):
        run(photo, *FACE, "--meta", model / "ae.safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        run(photo, *FACE, "--meta", photo)


def test_stage_1_file_of_another_base(run, photo, meta, tmp_path):
    """It fits, so it is not refused."""
    tensors, metadata = read_tensors(Path(meta))
    other = tmp_path / "krea.safetensors"
    write_tensors(tensors, other, metadata | {"base_fingerprint": "1", "base_model": "K"})
    with pytest.warns(UserWarning, match="krea.safetensors was trained with K, not with"):
        run(photo, *FACE, "--meta", other)


def test_what_is_noticed_before_a_download(run, photo, monkeypatch):
    monkeypatch.setattr(personalize, "find_model", None)  # calling it would be a TypeError
    with pytest.raises(FileNotFoundError, match="no stage-1 file at nowhere.safetensors"):
        run(photo, *FACE, "--meta", "nowhere.safetensors")
    with pytest.raises(ValueError, match="not inside the photo"):
        run(photo, "--face", "500,500,600,600")


@pytest.mark.parametrize("step", [2, 3])
def test_a_loss_that_is_not_finite_ends_the_training(run, photo, monkeypatch, step):
    """Of the last step, too, though losses are read a step late."""
    losses = [math.nan if number == step else 1.0 for number in (1, 2, 3)]
    monkeypatch.setattr(
        personalize, "flow_loss", lambda *_, **__: torch.tensor(losses.pop(0), requires_grad=True)
    )
    monkeypatch.setattr(personalize, "clip_slots", lambda *_: None)
    with pytest.raises(ValueError, match=f"step {step}: the loss is nan; a smaller --lr than 0.01"):
        run(photo, *FACE)
    assert not Path("ref.safetensors").exists()


def test_a_photo_may_go_while_it_is_learned(run, photo, monkeypatch):
    train = personalize.personalize

    def watched(*args):
        photo.unlink()
        train(*args)

    monkeypatch.setattr(personalize, "personalize", watched)
    run(photo, *FACE)
    assert Path("ref.safetensors").exists()


def test_no_place_for_the_result(run, photo, nothing_expensive):
    Path("file").write_text("not a folder")
    with pytest.raises(OSError):
        run(photo, *FACE, "--out", "file/ref.safetensors")
    if os.geteuid():  # root may write everywhere
        Path("sealed").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            run(photo, *FACE, "--out", "sealed/ref.safetensors")
    elif Path("/proc/self").exists():
        with pytest.raises(OSError):
            run(photo, *FACE, "--out", "/proc/ref.safetensors")


def test_a_missing_folder_is_made(run, photo):
    run(photo, *FACE, "--out", "new/folder/of.safetensors")
    assert Path("new/folder/of.safetensors").exists()


def test_no_photo(run, photo, nothing_expensive):
    with pytest.raises(FileNotFoundError, match="nobody.jpg: no such photo"):
        run("nobody.jpg")
    Path("notes.jpg").write_text("these are my notes\n")
    with pytest.raises(ValueError, match="notes.jpg is no photo that can be read: text"):
        run("notes.jpg")
    with pytest.raises(ValueError, match="ref.png: the face box .* is not inside the photo of 64 x 64"):
        run(photo, "--face", "20,64,44,99")
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="empty is a folder without photos"):
        run("empty")


def test_a_face_that_the_photo_cuts_off(run, photo, monkeypatch):
    seen = {}
    monkeypatch.setattr(personalize, "show_crops", lambda photos, crops, out: seen.update(crops=crops))
    with pytest.warns(UserWarning, match="ref.png: the face box .*cut to .0, 10, 50, 64"):
        run(photo, "--face", "-2,10,50,70", "--show-crops")
    cut = seen["crops"]
    run(photo, "--face", "0,10,50,64", "--show-crops")
    assert seen["crops"] == cut


def test_a_folder_stands_for_the_photos_in_it(run, photo, people, monkeypatch):
    folder = next(path for path in sorted(people.iterdir()) if path.is_dir())
    shutil.copytree(folder, "anna")
    for litter in ("._000.png", ".DS_Store", "notes.md"):
        Path("anna", litter).write_bytes(b"0")
    Path("anna", "2019").mkdir()
    with pytest.warns(UserWarning) as warned:
        args = personalize.parse_arguments(["anna/"])
    assert [str(warning.message) for warning in warned] == [
        "anna: left out are 1 files that are no photos (notes.md); 1 folders below it (2019)",
        "captions such as anna/000.txt are not used: --caption gives one",
    ]
    assert args.photos == sorted(Path("anna").glob("[!.]*.png")) and len(args.photos) == 4
    assert args.out == Path("anna.safetensors") and args.rank == 4
    monkeypatch.chdir("anna")
    Path("notes.md").unlink()
    Path("2019").rmdir()
    args = personalize.parse_arguments([".", "000.png", "--caption", "a woman"])
    assert len(args.photos) == 4 and args.out == Path("anna.safetensors")


@pytest.mark.parametrize(
    "flags",
    [
        ["--face", "1,2,3"],
        ["--steps", "0"],
        ["--rank", "0"],
        ["--batch", "-1"],
        ["--out", "ref.png"],
        ["second.png", "--face", "1,2,3,4"],
    ],
)
def test_impossible_settings(flags, capsys):
    with pytest.raises(SystemExit):
        personalize.parse_arguments(["ref.png", *flags])
    assert flags[-2] in capsys.readouterr().err


def test_without_weights_it_says_what_to_do(photo, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("flux.hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="not whole in the hub cache(.|\n)*--model tiny"):
        personalize.main(["ref.png", *FACE])


# --- Photos of faces, with YuNet ---------------------------------------------------------------------------


def test_a_portrait(run, portraits, tmp_path, monkeypatch):
    """The face is found by the detector that comes with the code."""
    monkeypatch.chdir(tmp_path)
    run(portraits[0], "--samples", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "studio_portrait.safetensors", "studio_portrait_samples.png"]  # fmt: skip


def test_a_stranger_far_behind_does_not_matter(portraits, detector):
    selfie = portraits[-2]
    photo = personalize.read_photo(selfie)
    assert len(find_faces(photo, detector)) == 2
    crops = personalize.list_crops({selfie: photo}, augment=True)
    assert len(crops) == 8  # a face that fills a third of the photo leaves no room for more
    assert all(x0 < 560 and x1 > 1120 for _, (x0, _, x1, _) in crops)  # where the face in front is


def test_a_group_photo_asks_which_face(run, portraits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group = Image.new("RGB", (500, 250))
    for k, path in enumerate((portraits[0], portraits[-4])):
        group.paste(Image.open(path).resize((250, 250)), (250 * k, 0))
    group.save("group.png")
    with pytest.raises(ValueError, match="2 faces found") as error:
        run("group.png")
    *_, first, second = str(error.value).splitlines()
    boxes = [[int(number) for number in line.split(",")] for line in (first, second)]
    assert sorted(box[0] // 250 for box in boxes) == [0, 1]  # one in each half
    run("group.png", "--face", second.strip())
    assert Path("group.safetensors").exists()


def test_a_landscape_has_no_face(run, tmp_path, monkeypatch, nothing_expensive):
    monkeypatch.chdir(tmp_path)
    noise = torch.randint(256, (20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    hills = Image.fromarray(noise.numpy()).resize((900, 600)).filter(ImageFilter.GaussianBlur(5))
    hills.save("hills.jpg")
    with pytest.raises(ValueError, match="no face found in 900x600(.|\n)*--face(.|\n)*--no-augment"):
        run("hills.jpg")


def test_a_portrait_of_20_megapixels_takes_seconds(portraits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.open(portraits[0]).resize((4500, 4500)).save("large.jpg", quality=80)
    began = time.process_time()
    personalize.main(["large.jpg", "--show-crops"])
    assert time.process_time() - began < 5


# --- The loop -----------------------------------------------------------------------------------------------


CPU = torch.device("cpu")


def some_crops(shapes: list[tuple[int, int]], seed: int = 0) -> list[personalize.EncodedCrop]:
    """Crops with random posteriors; a latent is four pixels wide."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda h, w: torch.randn((4, h // 4, w // 4), generator=generator)
    posterior = lambda shape: {"mean": draw(*shape), "std": draw(*shape).abs()}
    return [personalize.EncodedCrop(shape, posterior(shape), posterior(shape)) for shape in shapes]


def some_batches(crops: list[personalize.EncodedCrop], seed: int = 3, **settings: object) -> Iterator[dict]:
    settings = personalize.Personalization(**settings)
    return personalize.draw_batches(crops, some_prompt(), settings, Training(), seed, CPU, torch.float32)


def some_prompt() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "txt": torch.randn((7, 32), generator=generator),
        "pooled": torch.randn(32, generator=generator),
    }


def test_the_loop_equals_autograd_and_adamw_written_out(model, meta):
    crops, prior = some_crops([(16, 24), (24, 16), (16, 16)]), load_meta(meta)
    load = lambda: flux.load_transformer(model / "flux1-random.safetensors", dtype=torch.float32)
    settings, training = personalize.Personalization(steps=3, batch=2), Training(lr=1e-2)

    transformer = load()
    personalize.personalize(
        transformer, prior, crops, some_prompt(), settings, training, 3, CPU, torch.float32
    )
    ours = transformer.factors.personal
    transformer = load()
    theirs = personalize.add_adapters(transformer, prior, 1, "all", [3])
    optimizer = torch.optim.AdamW([theirs], 1e-2, weight_decay=0.01)
    for batch in some_batches(crops, steps=3, batch=2):
        loss = flow_loss(transformer, **batch, guidance=1.0)
        (theirs.grad,) = torch.autograd.grad(loss, theirs)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_longer_training_begins_as_a_shorter_one():
    crops = some_crops([(16 + 8 * k, 16) for k in range(7)])
    for draws in ("independent", "spread"):
        short, long = ([*some_batches(crops, steps=steps, draws=draws)] for steps in (5, 40))
        assert (len(short), len(long)) == (5, 40)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(short, long) for name in a)


# --- Draws -------------------------------------------------------------------------------------------------


def test_spread_draws_pair_the_noise_and_spread_the_times(run, photo, monkeypatch):
    seen, loss = [], personalize.flow_loss

    def watched(model, **batch):
        seen.append((batch["t"], batch["noise"]))
        return loss(model, **batch)

    monkeypatch.setattr(personalize, "flow_loss", watched)
    run(photo, *FACE, "--no-augment", "--steps", 5, "--draws", "spread")
    times, noises = map(torch.cat, zip(*seen))
    torch.testing.assert_close(noises[1::2], -noises[:4:2])
    assert not torch.equal(noises[2], noises[0])
    quantiles = torch.special.ndtr(times.logit())
    torch.testing.assert_close(quantiles.diff() % 1, torch.full((4,), 0.618034), atol=1e-4, rtol=0)
    seen.clear()
    run(photo, *FACE, "--no-augment", "--steps", 2, "--force")
    assert not torch.equal(seen[1][1], -seen[0][1])


def antithetic(batches: list[dict], shapes: set[tuple[int, ...]]) -> list[bool]:
    """Say of each second batch of a shape whether its noise is the negative of that of the one before."""
    found = []
    for shape in shapes:
        noises = [batch["noise"] for batch in batches if batch["noise"].shape[2:] == shape]
        found += [torch.equal(second, -first) for first, second in zip(noises[::2], noises[1::2])]
    return found


@pytest.mark.parametrize("batch", [1, 2])
def test_noise_is_antithetic_among_crops_of_many_shapes(batch):
    """In the order of training two neighbours seldom have the same shape."""
    crops = some_crops([(16, 16), (16, 24), (24, 16), (16, 24), (32, 16), (16, 16), (24, 16)])
    shapes = {(crop.shape[0] // 4, crop.shape[1] // 4) for crop in crops}
    spread = [*some_batches(crops, steps=60, batch=batch, draws="spread")]
    pairs = antithetic(spread, shapes)
    assert len(pairs) >= 26 and all(pairs)
    neighbours = [a["noise"].shape == b["noise"].shape for a, b in zip(spread[::2], spread[1::2])]
    assert sum(neighbours) < len(neighbours) / 2
    noises = torch.cat([batch["noise"].flatten()[:16].abs()[None] for batch in spread])
    assert len(noises.unique(dim=0)) == len(spread) - len(pairs)  # a pair shares its noise, and no others do
    assert not any(antithetic([*some_batches(crops, steps=60, batch=batch, draws="independent")], shapes))


def test_a_broken_pairing_is_noticed():
    """As it was once: the negative is kept for the very next update only, whatever its shape."""
    crops = some_crops([(16, 16), (16, 24), (24, 16)])
    batches = [*some_batches(crops, steps=60, draws="independent")]
    for first, second in zip(batches[::2], batches[1::2]):
        if first["noise"].shape == second["noise"].shape:
            second["noise"] = -first["noise"]
    assert not all(antithetic(batches, {(4, 4), (4, 6), (6, 4)}))
