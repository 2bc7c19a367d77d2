"""The options that name a model, and what is said when they name nothing; --deterministic."""

import argparse
import os
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import personalize
import sample
import train_meta
from flux import ModelFiles
from flux.errors import UserError
from metaphd import benchmark
from run import models
from run.models import add_model_arguments, choose_device, find_model


def find(model: Path | str, *options: object):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return find_model(parser.parse_args(["--model", str(model), *map(str, options)]))


def places(files: ModelFiles) -> dict[str, Path]:
    return {x: y for x, y in vars(files).items() if x not in ("base", "encoders")} | files.encoders


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("FLUX_DEV", "FLUX_AE", "FLUX_CLIP_L", "FLUX_T5", "FLUX_QWEN3", "FLUX_TOKENIZERS"):
        monkeypatch.delenv(name, raising=False)


def test_a_folder_a_shipped_model_and_parts_elsewhere(model, other_model, monkeypatch):
    files = find(model)
    assert files.folder == model and files.encoders["t5"] == model / "text_encoder_2"
    monkeypatch.setitem(models.SHIPPED, "small", model)
    assert find("small") == files
    for part, option, place in (
        ("autoencoder", "--ae", "ae.safetensors"),
        ("clip", "--clip-l", "text_encoder"),
        ("t5", "--t5", "text_encoder_2"),
        ("tokenizers", "--tokenizers", ""),
    ):
        given = places(find(model, option, other_model / place))
        assert given == places(files) | {part: other_model / place}


@pytest.mark.parametrize(
    "name, blocks, said",
    [
        ("flux-dev", 57, False),
        ("klein-4b", 25, False),
        ("black-forest-labs/FLUX.2-klein-base-4B", 25, False),
        ("klein-9b-distilled", 32, False),
        ("somebody/else", 57, True),
    ],
)
def test_a_plan_without_files_knows_the_sizes(name, blocks, said, capsys):
    sample.main(["--prompt", "a", "--model", name, "--plan", "--vram", "80"])
    out = capsys.readouterr().out
    assert f"of {blocks} blocks" in out
    assert ("the plan assumes that it has FLUX.1-dev's size" in out) == said


def test_each_base_has_its_options(model, klein):
    files = find(klein, "--qwen3", klein / "text_encoder", "--tokenizers", klein)
    assert files == find(klein) and files.encoders == {"qwen3": klein / "text_encoder"}
    for folder, option, message in (
        (klein, "--t5", "is FLUX.2, which has no t5 but qwen3"),
        (klein, "--clip-l", "is FLUX.2, which has no clip but qwen3"),
        (model, "--qwen3", "is FLUX.1, which has no qwen3 but clip and t5"),
    ):
        with pytest.raises(UserError, match=f"^{option} .*text_encoder: .*{folder.name} {message}$"):
            find(folder, option, model / "text_encoder")


def test_the_length_of_the_text_has_two_names():
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    for option in ("--text-length", "--t5-length"):
        assert parser.parse_args([option, "9"]).t5_length == 9
    assert parser.parse_args([]).t5_length is None


def test_what_is_wrong_is_said(model):
    with pytest.raises(FileNotFoundError, match="--ae nothing.safetensors: no such file or folder"):
        find(model, "--ae", "nothing.safetensors")
    with pytest.raises(FileNotFoundError) as error:
        find("flux-dev")
    for part in (
        "--model FILE or FOLDER, --ae, --clip-l, --t5, --qwen3, --tokenizers",
        "--model tiny",
        "HF_TOKEN",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "parse, words",
    [
        (train_meta.parse_arguments, ["--data", "ids"]),
        (personalize.parse_arguments, ["ref.jpg"]),
        (sample.parse_arguments, ["--prompt", "a"]),
        (benchmark.parse_arguments, ["--people", "ids"]),
    ],
)
def test_deterministic(parse, words, nondeterministic):
    """An operation that has no deterministic kernel is refused, and only when that was asked for."""

    def unrepeatable():
        torch.ones(4, 4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))  # which of the two stays?

    choose_device(parse([*words, "--device", "cpu"]))
    unrepeatable()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    choose_device(parse([*words, "--device", "cpu", "--deterministic"]))
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        unrepeatable()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("recent", [True, False])
@pytest.mark.parametrize(
    "platform, cuda, variable",
    [("linux", "12.8", None), ("linux", None, None)]
    + [
        ("win32", "12.8", None),
        ("linux", "12.8", "PYTORCH_CUDA_ALLOC_CONF"),
        ("linux", "12.8", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_the_allocator_of_a_gpu_is_set_up_unless_the_user_has(monkeypatch, platform, cuda, variable, recent):
    told = []
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "")
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings", raising=False)
    place = torch._C if recent else torch.cuda.memory
    name = "_accelerator_setAllocatorSettings" if recent else "_set_allocator_settings"
    monkeypatch.setattr(place, name, told.append, raising=False)
    choose_device(argparse.Namespace(device="cpu", dtype=None))
    assert told == ["expandable_segments:True"] * ((platform, cuda, variable) == ("linux", "12.8", None))
