"""The scripts with a FLUX.2: stage 1 and its resumption, stage 2, side by side, sampling, the benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same, kill_at, log_of, pictures
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import flux
import personalize
import sample
from flux.errors import UserError
from flux.finding import find_files
from flux.flux2 import Flux2
from flux.sampling import generate
from metalora import inject_loras, read_lora

LENGTH = ["--text-length", 64]  # of 512 tokens the prompts fill 60


@pytest.fixture(scope="module")
def meta(train_klein, tmp_path_factory) -> Path:
    """A stage-1 file of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("stage1")
    train_klein(out, *LENGTH)
    return out / "meta.safetensors"


@pytest.fixture(scope="module")
def lora(klein, meta, people, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stage2") / "anna.safetensors"
    learn(klein, meta, people, out)
    return out


def learn(klein: Path, meta: Path, people: Path, out: Path, *options: object) -> None:
    words = [people / "man_001" / "000.png", "--model", klein, "--meta", meta, "--no-augment", "--steps", 3]
    words += ["--lr", 1e-2, "--samples", 2, "--out", out, *LENGTH, *options]
    personalize.main([str(word) for word in words])


def test_a_killed_run_goes_on_bit_by_bit(train_klein, meta, tmp_path, monkeypatch):
    kill_at(train_klein, tmp_path, monkeypatch, 13, *LENGTH)
    assert_same(train_klein(tmp_path, *LENGTH), load_file(meta))
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 35))
    other = train_klein(tmp_path / "other", *LENGTH, "--seed", 1)
    assert not all(torch.equal(other[name], tensor) for name, tensor in load_file(meta).items())


def test_the_times_of_training_are_shifted(klein, tmp_path, train_klein):
    """A logit-normal's mean of ln 3, unless the user says otherwise: both are in the settings of the run."""
    for name, options, mean in (("a", [], np.log(3)), ("b", ["--t-mean", 0.5], 0.5)):
        train_klein(tmp_path / name, *LENGTH, *options, steps=1)
        assert json.loads((tmp_path / name / "settings.json").read_text())["t_mean"] == pytest.approx(mean)


def test_a_lora_says_its_base_and_its_samples_are_guided(lora, klein):
    with safe_open(lora, "pt") as file:
        about, names = file.metadata(), [*file.keys()]
    assert about["base_model"] == "flux-2-klein-base-random.safetensors"
    assert "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight" in names
    assert Image.open(lora.with_name("anna_samples.png")).width > 3 * 192
    files = find_files(str(klein), {})
    assert flux.default_sampler(files)["cfg"] == 4


def test_pictures_are_what_the_parts_make(lora, klein, tmp_path):
    """The LoRA merged by sample.py is as good as beside the weights; an empty prompt guides."""
    words = ["--lora", lora, "--prompt", "a photo of a man", "--model", klein, "--out", tmp_path, *LENGTH]
    sample.main([str(word) for word in [*words, "--steps", 3, "--strength", 2]])
    (file,) = tmp_path.glob("*.png")
    seen = np.asarray(Image.open(file)).astype(int)

    files = find_files(str(klein), {})
    conditioner = flux.load_conditioner(files, dtype=torch.float32, length=64)
    prompt, negative = conditioner.encode(["a photo of a man"]), conditioner.encode([""])
    autoencoder = flux.load_autoencoder(files.autoencoder, dtype=torch.float32)

    def make(strength: float, **settings: object) -> np.ndarray:
        model = flux.load_transformer(files.transformer, dtype=torch.float32)
        inject_loras(model, [[(read_lora(lora, model)[0], strength)]])
        (picture,) = generate(model, autoencoder, prompt, [0], (64, 64), steps=3, **settings)
        return np.asarray(picture).astype(int)

    assert abs(seen - make(2.0, cfg=4.0, negative=negative)).max() <= 1
    assert abs(seen - make(0.0, cfg=4.0, negative=negative)).max() > 1
    assert abs(seen - make(2.0, cfg=1.0)).max() > 1


def test_a_guidance_that_klein_does_not_have_is_refused(klein, train_klein, tmp_path):
    words = ["--prompt", "a", "--model", str(klein), "--out", str(tmp_path), "--guidance", "2"]
    with pytest.raises(UserError, match="--guidance 2: .* has no guidance input, but --cfg works"):
        sample.main(words)
    with pytest.raises(UserError, match="--train-guidance 3: .* has no guidance input$"):
        train_klein(tmp_path / "out", "--train-guidance", 3)


def test_files_of_the_other_base_are_refused(lora, klein, model, meta, people, tmp_path):
    with pytest.raises(UserError, match="FLUX.2"):
        sample.main(["--lora", str(lora), "--prompt", "a", "--model", str(model), "--out", str(tmp_path)])
    with pytest.raises(UserError, match="does not fit this model"):
        learn(model, meta, people, tmp_path / "a.safetensors")


def test_the_benchmark_goes_on_and_gives_the_same(bench, world_of_klein, tmp_path):
    options = ["--model", world_of_klein, "--batch", 1, *LENGTH]
    out = bench(*options, "--at-once", 1)
    together = bench(*options, "--at-once", 2, out="together")
    first, second = pictures(out), pictures(together)
    assert first.keys() == second.keys() and len(first) == 2 * 2 * (2 * 2 * 3 + 2)
    assert max(abs(first[name] - second[name]).max() for name in first) <= 1
    (out / "pictures" / "base" / "man" / "00" / "0.png").unlink()
    bench(*options, "--at-once", 1)
    assert_same(
        {name: torch.tensor(x) for name, x in pictures(out).items()},
        {name: torch.tensor(x) for name, x in first.items()},
    )
    assert isinstance(flux.load_transformer(find_files(str(world_of_klein), {}).transformer), Flux2)
