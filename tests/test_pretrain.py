"""The script that pretrains toy models, at its smallest; and the toy model that comes with the repository."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import flux
import sample
from flux.bases import FLUX1, FLUX2
from flux.finding import find_files
from flux.loading import default_sampler
from flux.sampling import generate
from run.models import SHIPPED as SHIPPED_MODELS
from tiny import pretrain
from tiny.families import FAMILIES, THETA

SHIPPED = SHIPPED_MODELS["tiny"]


def run(monkeypatch, family: str, *options) -> None:
    arguments = [
        "pretrain.py",
        "--family",
        family,
        "--batch",
        "2",
        "--hidden-size",
        "32",
        "--save-every",
        "100",
        *map(str, options),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    toy = FAMILIES[family]
    monkeypatch.setattr(toy, "ae", replace(toy.ae, ch=32))  # a quarter of the work
    monkeypatch.setattr(pretrain, "PROMPTS", pretrain.PROMPTS[:1])  # an eighth of the samples
    monkeypatch.setattr(pretrain.layers, "attention", pretrain.layers.attention)  # it replaces this one
    pretrain.main()


def pretrain_twice(monkeypatch, folder: Path, family: str) -> Path:
    """Train on a folder of captioned pictures, be interrupted, go on; return the model's folder."""
    data, out = folder / "data", folder / "out"
    data.mkdir()
    for k in range(3):
        Image.new("RGB", (90, 70 + k), (80 * k, 0, 255)).save(data / f"{k}.jpg")
        (data / f"{k}.txt").write_text(f"picture number {k} of a blue square")
    options = ["--out", out, "--work", folder / "work", "--data", data, "--pictures", 20, "--ae-steps", 2]
    run(monkeypatch, family, *options, "--steps", 1, "--guidance-steps", 0)
    assert json.loads((out / "pretrain.jsonl").read_text().splitlines()[-1])["step"] == 1
    run(monkeypatch, family, *options, "--steps", 2, "--guidance-steps", 1)
    return out


def stages(out: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (out / "pretrain.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines]


def picture(model: Path, out: Path) -> torch.Tensor:
    """Generate a picture with the script, as with any other model of its base: (3, 64, 64) in [-1, 1]."""
    words = ["--model", model, "--prompt", "a blue square", "--steps", 2, "--device", "cpu", "--out", out]
    sample.main([str(word) for word in words])
    (file,) = out.glob("*.png")
    image = Image.open(file)
    assert image.size == (64, 64)  # `sample_size` of config.json
    return pretrain.to_tensor(image, (64, 64))


def test_a_toy_model_of_ones_own(tmp_path, monkeypatch):
    out = pretrain_twice(monkeypatch, tmp_path, "flux1")
    assert stages(out) == [("autoencoder", 2), ("transformer", 1), ("transformer", 2), ("guidance", 1)]
    assert picture(out, tmp_path / "samples").std() > 0
    files = find_files(str(out), {})
    model = flux.load_transformer(files.transformer, dtype=torch.float32)
    assert files.base is FLUX1 and model.sizes.theta == THETA and model.sizes.guidance
    assert Image.open(out / "samples.png").width == 12 * 64 * 2


def test_a_toy_klein_of_ones_own(tmp_path, monkeypatch):
    """It has no guidance to learn, and its autoencoder's file tells how its latents are normalised."""
    out = pretrain_twice(monkeypatch, tmp_path, "flux2")
    assert stages(out) == [("autoencoder", 2), ("transformer", 1), ("transformer", 2)]
    files = find_files(str(out), {})
    assert files.base is FLUX2 and default_sampler(files)["cfg"] == 4
    model = flux.load_transformer(files.transformer, dtype=torch.float32)
    conditioner = flux.load_conditioner(files, dtype=torch.float32)
    assert model.sizes.axes == (8, 8, 8, 8) and model.sizes.theta == THETA and not model.sizes.guidance
    assert conditioner.qwen3.sizes.theta == THETA and len(conditioner.qwen3.model.layers) == 27
    assert conditioner.encode(["a"])["txt"].shape == (1, FAMILIES["flux2"].txt_length, 192)
    assert Image.open(out / "samples.png").width == 12 * 64 * 2

    before = picture(out, tmp_path / "before")
    ae = flux.load_autoencoder(files.autoencoder, dtype=torch.float32)
    data = [Image.open(tmp_path / "data" / f"{k % 3}.jpg") for k in range(12)]  # the squares it has seen
    data = torch.stack([pretrain.to_tensor(image, (64, 64)) for image in data])
    assert unit_variance(ae.encode(data))
    ae.bn.reset_running_stats()
    assert not unit_variance(ae.encode(data))
    pretrain.export(ae, files.autoencoder)
    assert (picture(out, tmp_path / "after") - before).abs().max() > 0.05


def unit_variance(latents: torch.Tensor) -> bool:
    """Tell whether every channel has about mean 0 and variance 1."""
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    return bool(mean.abs().max() < 0.05 and (std - 1).abs().max() < 0.05)


def test_orthogonalise_brings_singular_values_near_one():
    for shape in ((20, 50), (50, 20)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(pretrain.orthogonalise(matrix))
        assert 0.3 < values.min() and values.max() < 1.4
        assert torch.linalg.svdvals(matrix).max() > 8


@pytest.mark.skipif(not (SHIPPED / "flux1-tiny.safetensors").exists(), reason="tiny/weights is not there")
def test_the_shipped_model_draws_what_it_is_told():
    from tiny.people import training_pictures
    from vision.small import load_judges

    ae = flux.load_autoencoder(SHIPPED / "ae.safetensors", dtype=torch.float32)
    pictures = training_pictures(16, torch.Generator().manual_seed(7))[0]
    error = (ae.decode(ae.encode(pictures)) - pictures).square().mean(dim=(1, 2, 3))
    assert (10 * (4 / error).log10()).mean() > 33  # dB

    model = flux.load_transformer(SHIPPED / "flux1-tiny.safetensors", dtype=torch.float32)
    conditioner = flux.load_conditioner(find_files(str(SHIPPED)), dtype=torch.float32)
    _, judge = load_judges(SHIPPED / "judges")
    right, wrong, other = [], [], "a sketch of a man in a studio wearing a black shirt"
    for prompt in [prompt for prompt in pretrain.PROMPTS if "photo" in prompt]:
        pictures = generate(model, ae, conditioner.encode([prompt]), [0, 1, 2], (64, 64), steps=12)
        images = torch.stack([pretrain.to_tensor(picture, (64, 64)) for picture in pictures])
        right.append(judge.adherence(images, prompt).mean())
        wrong.append(judge.adherence(images, other).mean())
    assert sum(right) / len(right) > 0.85 and sum(wrong) / len(wrong) < 0.4
