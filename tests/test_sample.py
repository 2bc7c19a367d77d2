"""Prompt to picture: what is in the files, same seed same picture, and names that stay in their folder."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import factors
from PIL import Image
from safetensors.torch import load_file, save_file

import flux
import sample
from flux.errors import UserError
from flux.streaming import Stream
from metalora import export_lora, inject
from scoring.samples import written_prompt

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees")  # the random model reads few tokens
PROMPT = "a photo of a woman at the beach"


@pytest.fixture
def run(model, tmp_path):
    """Call the script with two small steps; returns the pictures by name, without the grid."""

    def call(*argv: object, out: str = "out") -> dict[str, Image.Image]:
        argv = ["--model", model, "--steps", 2, "--size", 32, "--out", tmp_path / out, *argv]
        sample.main([str(word) for word in argv])
        paths = sorted((tmp_path / out).glob("[0-9]*.png"))
        return {path.name: Image.open(path) for path in paths}

    return call


def write_lora(model: Path, path: Path, seed: int = 0) -> Path:
    """Write a LoRA with large random factors."""
    transformer = flux.load_transformer(model / "flux1-random.safetensors", dtype=torch.float32)
    inject(transformer, 4, 2, slots=1)
    generator = torch.Generator().manual_seed(seed)
    for up in factors(transformer, "up"):
        up.normal_(std=0.5, generator=generator)
    export_lora(transformer, path, {})
    return path


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and np.array_equal(np.asarray(a), np.asarray(b))


def test_settings_are_in_the_file(run, model, tmp_path):
    lora = write_lora(model, tmp_path / "someone.safetensors")
    text = 'a "photo" – ein Bild, 写真'
    flags = ["--lora", lora, "--strength", 0.5, "--cfg", 2, "--negative", "hat", "--seed", 7]
    ((name, picture),) = run("--prompt", text, *flags).items()
    expected = {"prompt": text, "seed": "7", "steps": "2", "guidance": "3.5", "cfg": "2.0", "size": "32x32"}
    expected |= {"lora": "someone.safetensors", "strength": "0.5", "negative": "hat"}
    digest = addnet_hash(lora)
    expected |= {"lora_hashes": f"someone: {digest}", "model": "flux1-random.safetensors"}
    told = picture.text.pop("parameters")
    assert picture.text == expected
    assert told.splitlines() == [
        f"{text} <lora:someone:0.5>",
        "Negative prompt: hat",
        "Steps: 2, Sampler: Euler, CFG scale: 2, Distilled CFG Scale: 3.5, Seed: 7, Size: 32x32, "
        f'Model: flux1-random, Lora hashes: "someone: {digest}"',
    ]
    assert name == "00_a-photo-ein-bild-写真_someone_7.png"
    assert "lora" not in run("--prompt", text, out="base").popitem()[1].text


def addnet_hash(path: Path) -> str:
    """Hash as AUTOMATIC1111 does: what follows the header, whose length is in the first eight bytes."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()[:12]


def settings_of(told: str) -> dict[str, str]:
    """Read the last line of AUTOMATIC1111's `parameters`; values with commas are quoted."""
    values = re.findall(r'([^:,]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)', told.splitlines()[-1])
    return {key: json.loads(value) if value.startswith('"') else value for key, value in values}


def test_other_programs_can_read_the_settings(run, model, tmp_path):
    """Also with names that need quotes; and the `prompt` that is checked stays the prompt alone."""
    loras = [write_lora(model, tmp_path / f"{name}.safetensors") for name in ('a, "b": c', "d")]
    ((_, picture),) = run("--prompt", PROMPT, "--lora", *loras, "--strength", 0.5, -0.25, "--seed", 3).items()
    told = settings_of(picture.text["parameters"])
    assert told["Lora hashes"] == ", ".join(f"{path.stem}: {addnet_hash(path)}" for path in loras)
    some = {"Seed": "3", "Size": "32x32", "Steps": "2", "Model": "flux1-random", "Distilled CFG Scale": "3.5"}
    assert some.items() <= told.items()
    assert "<lora:d:-0.25>" in picture.text["parameters"].splitlines()[0]
    assert written_prompt(Path(picture.filename)) == PROMPT


def test_several_loras_each_with_its_strength(run, model, tmp_path):
    a, b = (write_lora(model, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("ab"))
    draw = lambda out, *argv: run("--prompt", PROMPT, "--lora", *argv, out=out).popitem()[1]
    both = draw("both", a, b, "--strength", 1, 0.5)
    swapped, other = draw("swapped", b, a, "--strength", 0.5, 1), draw("other", a, b, "--strength", 0.5, 1)
    far = lambda picture: np.abs(np.asarray(both, int) - np.asarray(picture, int)).max()
    assert far(swapped) <= 1 and far(other) > 20
    assert same(draw("alone", b, "--strength", 0.5), draw("off", a, b, "--strength", 0, 0.5))
    assert same(draw("all", a, b, "--strength", 2), draw("each", a, b, "--strength", 2, 2))


def test_kept_apart_and_streamed_as_merged(run, model, tmp_path, monkeypatch):
    """Layers outside the blocks included, which cannot be kept apart; in 8 bits it is nearly the same."""
    paths = [write_lora(model, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
    width = flux.load_transformer(next(model.glob("flux1-*.safetensors")), "meta").img_in.weight
    outside = {"A.weight": torch.randn(2, width.shape[1]), "B.weight": torch.randn(width.shape[0], 2)}
    tensors = load_file(paths[0]) | {f"transformer.x_embedder.lora_{k}": v for k, v in outside.items()}
    save_file(tensors, paths[0])
    words = ["--prompt", PROMPT, "--lora", *paths, "--strength", 1, -0.5]
    draw = lambda out, *argv: np.asarray(run(*words, *argv, out=out).popitem()[1], int)
    monkeypatch.setattr(Stream, "COPY", True)
    merged, off = draw("merged"), draw("off", "--strength", 0, 0)
    assert np.abs(merged - off).max() > 20
    for words_of in (["--no-merge"], ["--stream", 2]):
        assert np.abs(draw(words_of[0][2:], *words_of) - merged).max() <= 1
    assert 0 < np.abs(draw("fp8", "--base-dtype", "fp8") - merged).mean() < 0.5 * np.abs(off - merged).mean()


def test_same_seed_same_picture(run, tmp_path):
    three = run("--prompt", PROMPT, "--n", 3, "--seed", 4)
    assert [name.rpartition("_")[2] for name in three] == ["4.png", "5.png", "6.png"]
    (alone,) = run("--prompt", PROMPT, "--seed", 5, out="alone").values()
    first, second, third = three.values()
    assert same(second, alone)
    assert not same(first, second) and not same(second, third)
    assert (tmp_path / "out" / "grid_00.png").exists() and not [*(tmp_path / "alone").glob("grid*")]


def test_no_picture_is_replaced(run, model, tmp_path):
    """The same prompt and seed, with and without a LoRA, at two strengths, and in two alphabets."""
    lora = write_lora(model, tmp_path / "someone.safetensors")
    run("--prompt", PROMPT, "写真", "صورة", "हिन्दी", "--steps", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run("--prompt", PROMPT, "--lora", lora, "--steps", 1)
    names = [*run("--prompt", PROMPT, "--lora", lora, "--strength", 0.5, "--n", 2, "--steps", 1)]
    end, at_half = "a-photo-of-a-woman-at-the-beach", "05_a-photo-of-a-woman-at-the-beach_someone"
    assert names == [f"00_{end}_0.png", "01_写真_0.png", "02_صورة_0.png", "03_हिन्दी_0.png",
                     f"04_{end}_someone_0.png", f"{at_half}_0.png", f"{at_half}_1.png"]  # fmt: skip
    assert (tmp_path / "out" / "grid_00.png").exists() and (tmp_path / "out" / "grid_05.png").exists()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_tags_in_prompts(run, model, tmp_path):
    """A prompt that is copied out of one of our own pictures does what it did; tags alone are no options."""
    loras = [
        write_lora(model, tmp_path / f"{name}.safetensors", k) for k, name in enumerate(('a, "b": c', "d"))
    ]
    flags = ["--lora", *loras, "--strength", 0.5, 1]
    ((_, picture),) = run("--prompt", PROMPT, *flags).items()
    copied = picture.text["parameters"].splitlines()[0]
    assert copied.count("<lora:") == 2
    ((_, again),) = run("--prompt", copied, *flags, out="again").items()
    assert same(picture, again) and again.text == picture.text
    for words in (
        ["--prompt", copied],
        ["--prompt", copied, "--lora", *loras],
        ["--prompt", "x <lora:e> y", *flags],
    ):
        with pytest.raises(ValueError, match="has tags without the same options: pass --lora .* --strength"):
            run(*words)
    assert sample.read_tags("a <lora:x:0.8> b<lyco:y> <c>") == ("a b <c>", [("x", 0.8), ("y", 1)])
    assert sample.read_tags("a <lora:Flux\\\\x.y.safetensors:-.5>")[1] == [("x.y", -0.5)]


def test_a_lora_is_found(run, model, tmp_path, monkeypatch):
    folder = tmp_path / "loras"
    folder.mkdir()
    path = write_lora(model, folder / "someone.safetensors")
    pictures = [run("--prompt", PROMPT, "--lora", lora, "--steps", 1, out=f"{k}").popitem()[1]
                for k, lora in enumerate((path, folder, folder / "someone"))]  # fmt: skip
    assert same(pictures[0], pictures[1]) and same(pictures[0], pictures[2])
    (folder / ".half.safetensors").write_bytes(b"")
    for name in ("some", "some.safetensors"):
        with pytest.raises(
            FileNotFoundError, match=f"{name}: no such file; in .*loras are someone.safetensors"
        ):
            run("--prompt", PROMPT, "--lora", folder / name)
    path.with_name("other.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(
        ValueError, match="loras holds several LoRAs, other.safetensors, someone.safetensors: name one"
    ):
        run("--prompt", PROMPT, "--lora", folder)


def test_several_prompts_make_rows(run, tmp_path):
    pictures = run("--prompt", PROMPT, "a man", PROMPT, "--n", 2)
    assert len(pictures) == 6  # also where prompts are equal
    first, _, other, _, again, _ = pictures.values()
    assert same(first, again) and not same(first, other)
    width, height = Image.open(tmp_path / "out" / "grid_00.png").size
    assert width > 2 * 192 and height > 3 * 192


def test_sizes(run):
    (picture,) = run("--prompt", PROMPT, "--size", "64x96").values()
    assert picture.size == (64, 96)  # width x height
    assert sample.parse_size("768") == (768, 768) and sample.parse_size("64x96") == (96, 64)
    with pytest.raises(ValueError, match="60x96: both sides must be multiples of 8, .* 64x96 is near"):
        run("--prompt", PROMPT, "--size", "60x96")
    with pytest.raises(ValueError, match="4096x4096 is near"):
        run("--prompt", PROMPT, "--size", 16384)
    with pytest.raises(ValueError, match="0x0.*8x8 is near"):
        run("--prompt", PROMPT, "--size", 0)


def test_the_default_size_is_the_models(model, tmp_path):
    sample.main(["--model", str(model), "--steps", "1", "--prompt", "a man", "--out", str(tmp_path)])
    assert Image.open(tmp_path / "00_a-man_0.png").size == (64, 64)


def test_strength(run, model, tmp_path):
    lora = write_lora(model, tmp_path / "someone.safetensors")
    (base,) = run("--prompt", PROMPT, out="base").values()
    (off,) = run("--prompt", PROMPT, "--lora", lora, "--strength", 0, out="off").values()
    (on,) = run("--prompt", PROMPT, "--lora", lora, out="on").values()
    (half,) = run("--prompt", PROMPT, "--lora", lora, "--strength", 0.5, out="half").values()
    assert same(base, off)
    assert not same(base, on) and not same(on, half) and not same(base, half)


def test_a_lora_of_another_model_is_refused_at_once(run, other_model, model, tmp_path, monkeypatch):
    lora = write_lora(other_model, tmp_path / "other.safetensors")
    monkeypatch.setattr(sample.flux, "load_conditioner", None)  # calling it would be a TypeError
    with pytest.raises(ValueError, match="other.safetensors does not fit this model(.|\n)*attn.to_q"):
        run("--prompt", PROMPT, "--lora", lora)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: no such file"):
        run("--prompt", PROMPT, "--lora", "nowhere.safetensors")
    assert not any((tmp_path / "out").iterdir())


def test_a_missing_lora_is_noticed_before_a_download(run, monkeypatch):
    monkeypatch.setattr(sample.flux, "find_files", None)  # calling it would be a TypeError
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: no such file"):
        run("--prompt", PROMPT, "--lora", "nowhere.safetensors")


def test_prompts_never_leave_the_folder(run, tmp_path):
    prompts = ["", "../../up", "/etc/passwd", "two\nlines", "写真", "a" * 300, "..", "C:\\x?*|", "ÄÖÜ\t" * 40]
    pictures = run("--prompt", *prompts, "--steps", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(pictures) == len(prompts) == len(list((tmp_path / "out").iterdir())) - 1  # and the grid
    assert [picture.text["prompt"] for picture in pictures.values()] == prompts


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--negative=hat", "--cfg=1"], "--negative does nothing at --cfg 1"),
        (["--n=0"], "--n 0"),
        (["--steps=0"], "--steps 0"),
        (["--size=big"], "'big' is not a size"),
        (["--size=-64"], "'-64' is not a size"),
    ],
)
def test_impossible_settings(flags, message, capsys):
    with pytest.raises(SystemExit):
        sample.parse_arguments(["--prompt", PROMPT, *flags])
    assert message in capsys.readouterr().err


def test_a_negative_prompt_needs_cfg_where_the_model_has_none(model, tmp_path):
    words = ["--prompt", PROMPT, "--negative", "hat", "--model", str(model), "--out", str(tmp_path)]
    with pytest.raises(UserError, match="--negative does nothing at --cfg 1"):
        sample.main(words)


def test_strengths_must_be_as_many_as_loras(capsys):
    with pytest.raises(SystemExit):
        sample.parse_arguments(["--prompt", PROMPT, "--lora", "a", "b", "c", "--strength", "1", "2"])
    assert "--strength has 2 numbers for 3 LoRAs" in capsys.readouterr().err


def test_without_weights_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("flux.hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="not whole in the hub cache(.|\n)*--model tiny"):
        sample.main(["--prompt", PROMPT, "--out", str(tmp_path / "out")])
    assert not any((tmp_path / "out").iterdir())
