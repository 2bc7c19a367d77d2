"""The script that pretrains toy models, at its smallest; and the toy model that comes with the repository."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import flux
from flux.finding import find_files
from run.models import SHIPPED as SHIPPED_MODELS
from tiny import pretrain

SHIPPED = SHIPPED_MODELS["tiny"]


def run(monkeypatch, *options) -> None:
    arguments = [
        "pretrain.py",
        "--batch",
        "2",
        "--hidden-size",
        "32",
        "--save-every",
        "100",
        *map(str, options),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(pretrain, "AE", replace(pretrain.AE, ch=32))  # a quarter of the work
    monkeypatch.setattr(pretrain, "PROMPTS", pretrain.PROMPTS[:1])  # an eighth of the samples
    monkeypatch.setattr(pretrain.layers, "attention", pretrain.layers.attention)  # it replaces this one
    pretrain.main()


def test_a_toy_model_of_ones_own(tmp_path, monkeypatch):
    """Train on a folder of captioned pictures, be interrupted, go on; the result loads like any FLUX.1."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for k in range(3):
        Image.new("RGB", (90, 70 + k), (80 * k, 0, 255)).save(data / f"{k}.jpg")
        (data / f"{k}.txt").write_text(f"picture number {k} of a blue square")
    options = ["--out", out, "--work", tmp_path / "work", "--data", data, "--pictures", 20, "--ae-steps", 2]
    run(monkeypatch, *options, "--steps", 1, "--guidance-steps", 0)
    assert json.loads((out / "pretrain.jsonl").read_text().splitlines()[-1])["step"] == 1
    run(monkeypatch, *options, "--steps", 2, "--guidance-steps", 1)
    stages = [json.loads(line) for line in (out / "pretrain.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in stages] == [
        ("autoencoder", 2),
        ("transformer", 1),
        ("transformer", 2),
        ("guidance", 1),
    ]
    files = find_files(str(out), {})
    assert files.folder == out
    model = flux.load_transformer(files.transformer, dtype=torch.float32)
    assert model.sizes.theta == pretrain.THETA and model.sizes.guidance
    assert Image.open(out / "samples.png").width == 12 * 64 * 2


def test_orthogonalise_brings_singular_values_near_one():
    for shape in ((20, 50), (50, 20)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(pretrain.orthogonalise(matrix))
        assert 0.3 < values.min() and values.max() < 1.4
        assert torch.linalg.svdvals(matrix).max() > 8


@pytest.mark.skipif(not (SHIPPED / "flux1-tiny.safetensors").exists(), reason="tiny/weights is not there")
def test_the_shipped_model_draws_what_it_is_told():
    from flux.sampling import generate
    from tiny.people import training_pictures
    from vision.small import load_judges

    ae = flux.load_autoencoder(SHIPPED / "ae.safetensors", dtype=torch.float32)
    pictures = training_pictures(16, torch.Generator().manual_seed(7))[0]
    error = (ae.decode(ae.encode(pictures)) - pictures).square().mean(dim=(1, 2, 3))
    assert (10 * (4 / error).log10()).mean() > 33  # dB

    model = flux.load_transformer(SHIPPED / "flux1-tiny.safetensors", dtype=torch.float32)
    conditioner = flux.load_conditioner(SHIPPED, dtype=torch.float32)
    _, judge = load_judges(SHIPPED / "judges")
    right, wrong, other = [], [], "a sketch of a man in a studio wearing a black shirt"
    for prompt in [prompt for prompt in pretrain.PROMPTS if "photo" in prompt]:
        pictures = generate(model, ae, conditioner.encode([prompt]), [0, 1, 2], (64, 64), steps=12)
        images = torch.stack([pretrain.to_tensor(picture, (64, 64)) for picture in pictures])
        right.append(judge.adherence(images, prompt).mean())
        wrong.append(judge.adherence(images, other).mean())
    assert sum(right) / len(right) > 0.85 and sum(wrong) / len(wrong) < 0.4
