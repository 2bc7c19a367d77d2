"""Fixtures that several test files share: whole models with random weights, people, photos, tokenizers."""

import gc
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
from chat_tokenizer import write_tokenizer
from compare import DATA, randomize
from helpers import SETTINGS, STEPS, copy_cache
from safetensors.torch import load_file, save_file
from torch import nn

import metalora
import train_meta
from flux import T5, AutoEncoder, CLIPText, Flux, Flux2, Qwen3, load_tokenizers, load_transformer
from flux.autoencoder import AutoEncoderSizes
from flux.clip import CLIPSizes
from flux.flux2 import Flux2Sizes
from flux.model import FluxSizes
from flux.qwen3 import Qwen3Sizes
from flux.t5 import T5Sizes
from metaphd import benchmark
from run.models import SHIPPED
from tiny.people import training_pictures, write_people
from tiny.pretrain import make_tokenizers
from vision.detector import load_detector

PHOTOS = ("studio_portrait", "studio_posture", "amateur_selfie", "amateur_posture")


def write_model(folder: Path, hidden_size: int = 32) -> Path:
    """Write a FLUX.1 of one double and one single block with random weights, in the layout of the real one.

    Four pixels a latent and eight an image token, as many as the toy model's, so sides are multiples of 8.
    """
    make_tokenizers(training_pictures(1000, torch.Generator().manual_seed(0), size=8)[1], folder)
    clip = load_tokenizers(folder).clip
    parts = {
        "flux1-random.safetensors": Flux(
            FluxSizes(
                in_channels=16,
                out_channels=16,
                pooled_size=32,
                txt_size=32,
                hidden_size=hidden_size,
                mlp_size=2 * hidden_size,
                num_heads=hidden_size // 32,
                depth=1,
                depth_single=1,
                guidance=True,
                axes=(4, 14, 14),
                theta=100,
            )
        ),
        "ae.safetensors": AutoEncoder(
            AutoEncoderSizes(ch=32, ch_mult=(1, 1, 1), encoder_blocks=0, decoder_blocks=1, z_channels=4)
        ),
        "text_encoder/model.safetensors": CLIPText(
            CLIPSizes(clip.pad + 1, clip.length, 32, num_heads=2, mlp_size=64, depth=1)
        ),
        "text_encoder_2/model.safetensors": T5(
            T5Sizes(vocab_size=400, hidden_size=32, head_dim=16, num_heads=2, mlp_size=64, depth=1)
        ),
    }
    write_parts(folder, parts)
    (folder / "config.json").write_text(json.dumps({"sample_size": 64, "theta": 100}))
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    return folder


def write_klein(folder: Path) -> Path:
    """Write a FLUX.2 klein of the same kind: two blocks, eight pixels a token, a Qwen3 of 27 layers."""
    (folder / "tokenizer").mkdir()
    vocab_size = write_tokenizer(folder / "tokenizer", "a photo of a woman, a man or a person at the beach")
    parts = {
        "flux-2-klein-base-random.safetensors": Flux2(
            Flux2Sizes(
                in_channels=16,
                out_channels=16,
                txt_size=96,
                hidden_size=32,
                mlp_size=64,
                num_heads=1,
                depth=1,
                depth_single=1,
                guidance=False,
                axes=(8, 8, 8, 8),
                theta=2000,
            )
        ),
        "ae.safetensors": AutoEncoder(
            AutoEncoderSizes(3, 32, (1, 1, 1), encoder_blocks=0, decoder_blocks=1, z_channels=4, packed=True)
        ),
        "text_encoder/model.safetensors": Qwen3(
            Qwen3Sizes(
                vocab_size, 32, head_dim=16, num_heads=2, num_kv_heads=1, mlp_size=64, theta=1e6, eps=1e-6
            )
        ),
    }
    write_parts(folder, parts)
    (folder / "config.json").write_text(json.dumps({"sample_size": 64}))
    return folder


def write_parts(folder: Path, parts: dict[str, nn.Module]) -> None:
    """Write modules with random weights in bf16."""
    for name, module in parts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        state = randomize(module).bfloat16().state_dict()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name)


@pytest.fixture(scope="session", autouse=True)
def no_waiting():
    """Leave out what only costs time here: forcing files to the disk, searching pytest for garbage."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def nondeterministic(monkeypatch):
    """Undo --deterministic afterwards, which is for the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for name in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def klein(tmp_path_factory) -> Path:
    return write_klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """The same with a wider transformer, to which no file of the first one fits."""
    return write_model(tmp_path_factory.mktemp("other"), hidden_size=64)


@pytest.fixture(scope="session")
def people(tmp_path_factory) -> Path:
    """Five synthetic people with four captioned pictures each."""
    folder = tmp_path_factory.mktemp("people") / "ids"
    write_people(folder, people=5, photos=4, seed=0)
    return folder


@pytest.fixture(scope="session")
def portraits() -> list[Path]:
    """Photos of 1.5 to 2.8 thousand pixels from the package openpeople: four of each of ten synthetic people.

    One face in each, between 175 and 920 pixels wide; a stranger's, 35 pixels wide, behind the last selfie.
    """
    people = Path(str(resources.files("openpeople"))) / "data" / "curated"
    return [folder / "assets" / f"{name}.jpg" for folder in sorted(people.iterdir()) for name in PHOTOS]


@pytest.fixture(scope="session")
def detector():
    return load_detector()


@pytest.fixture(scope="session")
def recognizer_file() -> Path:
    """A trained face recogniser; tests that need it are slow ones."""
    file = os.environ.get("FACE_RECOGNIZER")
    return Path(file) if file else pytest.skip("needs real weights: FACE_RECOGNIZER=FILE")


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory) -> Path:
    """FLUX.1's tokenizer files in clip/ and t5/, and golden_260.json, which was recorded with them."""
    folder = tmp_path_factory.mktemp("tokenizers")
    with zipfile.ZipFile(DATA / "tokenizers.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def train(model, people, tmp_path_factory) -> Callable[..., dict]:
    return stage_1(model, people, tmp_path_factory.mktemp("encoded") / "cache")


@pytest.fixture(scope="session")
def train_klein(klein, people, tmp_path_factory) -> Callable[..., dict]:
    return stage_1(klein, people, tmp_path_factory.mktemp("encoded") / "cache")


def stage_1(model: Path, people: Path, cache: Path) -> Callable[..., dict]:
    """Return a function that calls train_meta.py: (out, flag, value, ...) -> tensors of meta.safetensors.

    encodes: whether it has to encode the photos and captions itself, as the first run has.
    """

    def call(
        out: Path, *flags: object, steps: int = STEPS, data: Path = people, encodes: bool = False
    ) -> dict:
        if cache.exists() and not encodes:
            copy_cache(cache, out)
        argv = ["--data", data, "--model", model, "--out", out, "--steps", steps, *SETTINGS, *flags]
        train_meta.main([str(word) for word in argv])
        if not cache.exists():
            shutil.copytree(out / "cache", cache)
        return load_file(out / "meta.safetensors")

    return call


@pytest.fixture(scope="session")
def undisturbed(train, tmp_path_factory) -> Path:
    """The folder of a run of stage 1 that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(out)
    return out


@pytest.fixture(scope="session")
def world(model, tmp_path_factory) -> Path:
    return with_judges_and_prior(model, tmp_path_factory.mktemp("world") / "model")


@pytest.fixture(scope="session")
def world_of_klein(klein, tmp_path_factory) -> Path:
    return with_judges_and_prior(klein, tmp_path_factory.mktemp("world") / "klein")


def with_judges_and_prior(model: Path, folder: Path) -> Path:
    """Copy a random model to the folder, with the toy model's evaluators and a stage-1 file."""
    shutil.copytree(model, folder)
    shutil.copytree(SHIPPED["tiny"] / "judges", folder / "judges")
    (file,) = folder.glob("flux*.safetensors")
    transformer = load_transformer(file)
    metalora.inject(transformer, 4, 1, 1, "all", torch.Generator().manual_seed(0))
    metalora.save_meta(transformer, folder / "meta.safetensors", {"r1": 4, "targets": "all"})
    return folder


@pytest.fixture(scope="session")
def three_people(people, tmp_path_factory) -> Path:
    """Two men and a woman: enough for two groups of --at-once 2."""
    folder = tmp_path_factory.mktemp("three")
    for name in ("man_001", "man_002", "woman_000"):
        shutil.copytree(people / name, folder / name)
    return folder


@pytest.fixture
def bench(world, three_people, tmp_path) -> Callable[..., Path]:
    """Call the benchmark with two systems, two step counts, two prompts and two seeds; returns its folder."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a [man/woman] at the beach\na sketch of a [man/woman]\n")

    def call(*argv: object, out: str = "out") -> Path:
        defaults = ["--model", world, "--people", three_people, "--prompts", prompts, "--out", tmp_path / out]
        defaults += ["--method", "meta-lora", "lora-noaug", "--steps", 1, 3, "--lr", 0.01]
        defaults += ["--seeds", 2, "--sample-steps", 1, "--at-once", 2]
        benchmark.main([str(word) for word in [*defaults, *argv]])
        return tmp_path / out

    return call
