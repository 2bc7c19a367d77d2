"""Finding a model's parts in folders of either layout, in single files and in the hub's cache."""

import json
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import assert_same
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from test_loading import assert_holds, write_shards

import flux
from flux import bases, hub, loading
from flux.bases import FLUX1
from flux.checkpoint import shards
from flux.finding import HUB_MODELS, find_files
from flux.loading import ModelFiles


def find(model: Path | str, **given: Path) -> ModelFiles:
    return find_files(str(model), given)


def flux1(transformer: Path, autoencoder: Path, clip: Path, t5: Path, tokenizers: Path) -> ModelFiles:
    return ModelFiles(FLUX1, transformer, autoencoder, {"clip": clip, "t5": t5}, tokenizers)


def ours(folder: Path) -> ModelFiles:
    """Where the parts lie in black-forest-labs' layout."""
    parts = "flux1-random.safetensors", "ae.safetensors", "text_encoder", "text_encoder_2", ""
    return flux1(*(folder / part for part in parts))


def change(files: ModelFiles, **parts: Path) -> ModelFiles:
    encoders = {part: parts.pop(part, path) for part, path in files.encoders.items()}
    return replace(files, encoders=encoders, **parts)


def part_of(files: ModelFiles, part: str) -> Path:
    return files.encoders.get(part) or getattr(files, part)


def assert_encodes_alike(*files: ModelFiles | Path) -> None:
    one, other = (flux.load_conditioner(x).encode(["a photo of a woman"]) for x in files)
    assert_same(one, other)


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture
def snapshot(tmp_path, monkeypatch) -> Path:
    """Return where a snapshot of FLUX.1-dev would be in an empty hub cache; there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    names = [name.upper().replace("-", "_") for name in HUB_MODELS]
    for name in (*names, *(x for base in bases.BASES.values() for x in base.variables.values())):
        monkeypatch.delenv(name, raising=False)
    return snapshot_of("flux-dev", tmp_path / "hub")


def snapshot_of(name: str, hub: Path, commit: str = "0" * 40) -> Path:
    repo = hub / f"models--{HUB_MODELS.get(name, name).replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


def in_diffusers_layout(folder: Path) -> Path:
    """Rename and move; the names inside the files may be either's."""
    for file, place in (
        ("flux1-random.safetensors", "transformer/diffusion_pytorch_model.safetensors"),
        ("ae.safetensors", "vae/diffusion_pytorch_model.safetensors"),
    ):
        (folder / place).parent.mkdir()
        (folder / file).rename(folder / place)
    shutil.copy(folder / "config.json", folder / "transformer" / "config.json")
    return folder


def test_a_folder(model, snapshot):
    assert find(model) == ours(model)
    assert find(model).folder == model
    assert find(ours(model).transformer) == ours(model)  # the rest lies beside it


def test_a_folder_in_diffusers_layout(copy, snapshot):
    files = find(in_diffusers_layout(copy))
    assert files == change(ours(copy), transformer=copy / "transformer", autoencoder=copy / "vae")
    assert flux.load_flux(files.transformer).sizes.theta == 100  # of its config
    file = files.transformer / "diffusion_pytorch_model.safetensors"
    assert find(file) == change(files, transformer=file)
    assert find(file).folder == files.folder == copy


def test_a_file_and_parts_elsewhere(copy, model, snapshot):
    """A folder of single files, as ComfyUI's, and the tokenizers elsewhere."""
    comfy = copy.parent / "comfy"
    comfy.mkdir()
    for part in ("text_encoder", "text_encoder_2"):
        (copy / part / "model.safetensors").rename(comfy / f"{part}.safetensors")
    (copy / "text_encoder" / "config.json").rename(comfy / "config.json")
    (copy / "ae.safetensors").rename(comfy / "vae.safetensors")
    (copy / "flux1-random.safetensors").rename(comfy / "unet.safetensors")
    unet, vae, clip, t5 = (
        comfy / f"{name}.safetensors" for name in ("unet", "vae", "text_encoder", "text_encoder_2")
    )
    files = find(unet, autoencoder=vae, clip=clip, t5=t5, tokenizers=copy)
    assert files == flux1(unet, vae, clip, t5, copy)
    assert files.folder == comfy
    shutil.copy(model / "config.json", comfy / "text.json")
    assert_encodes_alike(files, model)


def test_given_parts_come_before_the_folder_and_the_folder_before_the_environment(
    model, copy, snapshot, monkeypatch
):
    monkeypatch.setenv("FLUX_AE", str(copy / "ae.safetensors"))
    assert find(model).autoencoder == model / "ae.safetensors"
    given = find(model, autoencoder=copy / "ae.safetensors", t5=copy / "text_encoder_2")
    assert given == change(ours(model), autoencoder=copy / "ae.safetensors", t5=copy / "text_encoder_2")


def test_the_environment_comes_before_the_cache(model, copy, snapshot, monkeypatch):
    shutil.copytree(model, snapshot)
    assert find("flux-dev") == ours(snapshot)
    monkeypatch.setenv("FLUX_CLIP_L", str(copy / "text_encoder"))
    assert find("flux-dev") == change(ours(snapshot), clip=copy / "text_encoder")
    monkeypatch.setenv("FLUX_DEV", str(copy))
    assert find("flux-dev") == ours(copy)
    monkeypatch.setenv("FLUX_DEV", "nowhere")
    with pytest.raises(FileNotFoundError, match="FLUX_DEV nowhere: no such file or folder"):
        find("flux-dev")


@pytest.fixture
def all_in_one(model, tmp_path) -> Path:
    """Write the weights of a model as one ComfyUI checkpoint."""
    prefixes = {
        "transformer": "model.diffusion_model.",
        "autoencoder": "vae.",
        "clip": "text_encoders.clip_l.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    }
    state = {}
    for part, prefix in prefixes.items():
        for file in shards(part_of(ours(model), part)):
            state |= {prefix + name: tensor for name, tensor in load_file(file).items()}
    file = tmp_path / "one" / "flux1-all.safetensors"
    file.parent.mkdir()
    save_file(state, file)
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    file.with_name("config.json").write_text(json.dumps(config | {"theta": 100}))
    return file


def test_an_all_in_one_checkpoint(all_in_one, model, snapshot):
    files = find(all_in_one, tokenizers=model)
    assert files == flux1(*[all_in_one] * 4, model)
    for part in FLUX1.places:
        load = loading.LOADERS[part]
        assert_holds(load(all_in_one), load(part_of(ours(model), part)).state_dict())
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(model / name, all_in_one.parent / name)
    assert find(all_in_one.parent) == flux1(*[all_in_one] * 4, all_in_one.parent)


def test_an_all_in_one_checkpoint_of_the_hub(all_in_one, model, snapshot, capsys):
    """Its own parts come before those of FLUX.1-dev, which are cached too."""
    shutil.copytree(model, snapshot)
    folder = snapshot_of("somebody/flux", snapshot.parents[2])
    shutil.copytree(all_in_one.parent, folder)
    files = find("somebody/flux")
    assert files == flux1(*[folder / all_in_one.name] * 4, snapshot)
    assert "cannot ask somebody/flux for tokenizers (" in capsys.readouterr().out


def test_what_does_not_fit_together_is_refused(model, snapshot, tmp_path):
    state = load_file(model / "ae.safetensors")
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, :2].clone()
    state["encoder.conv_out.weight"] = state["encoder.conv_out.weight"][:4].clone()
    state["encoder.conv_out.bias"] = state["encoder.conv_out.bias"][:4].clone()
    save_file(state, tmp_path / "ae.safetensors")
    message = "ae.safetensors has 8 channels in 2 x 2 latents, .*flux1-random.safetensors wants 16"
    with pytest.raises(ValueError, match=message):
        find(model, autoencoder=tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match="text_encoder_2 is not a CLIPText checkpoint"):
        find(model, clip=model / "text_encoder_2")


def test_what_is_wrong_is_said(copy, snapshot):
    def refused(match: str, model: Path | str):
        with pytest.raises(FileNotFoundError, match=match):
            find(model)

    refused("flux-dve: neither a folder nor a file nor .*flux-dev, flux-schnell, flux-krea-dev", "flux-dve")
    refused("models/flux1.safetensors: neither a folder", "models/flux1.safetensors")
    refused("exactly one flux1-.*; found none", copy / "tokenizer")
    shutil.rmtree(copy / "tokenizer")
    refused("Wanted: tokenizers", copy)
    shutil.copy(copy / "flux1-random.safetensors", copy / "flux1-b.safetensors")
    refused("found flux1-b.safetensors, flux1-random.safetensors", copy)


def test_a_missing_shard_is_told(copy, snapshot):
    folder, state = copy / "text_encoder_2", load_file(copy / "text_encoder_2" / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(state, folder)
    assert find(copy).encoders["t5"] == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = "text_encoder_2 lacks model-00002-of-00002.safetensors, of 2 files that belong together"
    with pytest.raises(FileNotFoundError, match=message):
        find(copy)
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(FileNotFoundError, match=message):
        find(copy)


def test_variants_in_16_bit_are_left_alone(copy, snapshot):
    in_diffusers_layout(copy)
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, copy / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert find(copy).autoencoder == copy / "vae"


# --- The hub's cache ---------------------------------------------------------------------------------------


def test_parts_come_from_any_snapshot_and_layout(model, copy, snapshot):
    """The hub renewed its read-me: the transformer is in an older snapshot than the rest."""
    shutil.copytree(copy, snapshot)
    older = snapshot.with_name("1" * 40)
    (older / "transformer").mkdir(parents=True)
    (snapshot / "flux1-random.safetensors").rename(older / "transformer" / "model.safetensors")
    shutil.copy(model / "config.json", older / "transformer")
    assert find("flux-dev") == change(ours(snapshot), transformer=older / "transformer")


@pytest.mark.parametrize("latest", ["0" * 40, "1" * 40])
def test_the_latest_snapshot_comes_first(latest, model, snapshot):
    for commit in ("0" * 40, "1" * 40):
        shutil.copytree(model, snapshot.with_name(commit))
    snapshot_of("flux-dev", snapshot.parents[2], latest)
    assert find("flux-dev") == ours(snapshot.with_name(latest))


def test_what_all_models_share_is_taken_from_any_of_them(model, snapshot):
    shutil.copytree(model, snapshot)
    krea = snapshot_of("flux-krea-dev", snapshot.parents[2])
    for name in ("flux1-random.safetensors", "config.json"):
        krea.mkdir(parents=True, exist_ok=True)
        shutil.copy(model / name, krea / name)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(model / name, krea / name)
    files = find("flux-krea-dev")
    assert files == change(ours(snapshot), transformer=krea / "flux1-random.safetensors", tokenizers=krea)


def test_another_repository(model, snapshot, capsys):
    """One that holds only a transformer; the rest is FLUX.1-dev's, also without a network."""
    shutil.copytree(model, snapshot)
    mini = snapshot_of("somebody/flux-mini", snapshot.parents[2])
    mini.mkdir(parents=True)
    shutil.copy(model / "config.json", mini)
    shutil.copy(model / "flux1-random.safetensors", mini / "flux-mini.safetensors")
    files = find("somebody/flux-mini")
    assert files == change(ours(snapshot), transformer=mini / "flux-mini.safetensors")
    assert "cannot ask somebody/flux-mini for autoencoder" in capsys.readouterr().out


def test_free_tokenizers_serve_who_has_single_files(copy, model, snapshot):
    """ComfyUI's four files, and from the hub only what is free: CLIP's and T5's own repositories."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(copy / name)
    folders = [snapshot_of(repo, snapshot.parents[2]) for repo in FLUX1.free_tokenizers]
    for folder, name in zip(folders, ("tokenizer", "tokenizer_2")):
        shutil.copytree(model / name, folder)
    (folders[1] / "tokenizer.json").unlink(missing_ok=True)  # T5's has spiece.model
    files = find(copy)
    assert files == change(ours(copy), tokenizers=tuple(folders))
    assert_encodes_alike(files, model)
    (folders[0] / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="Wanted: tokenizers"):
        find(copy)


def test_offline_with_an_empty_or_half_a_cache(model, snapshot):
    def refused(*parts: str):
        with pytest.raises(FileNotFoundError) as error:
            find("flux-dev")
        for part in (HUB_MODELS["flux-dev"], "ffline", "hf auth login", "HF_TOKEN", *parts):
            assert part in str(error.value)

    refused("Wanted: transformer, autoencoder, clip, t5, tokenizers")
    shutil.copytree(model, snapshot)
    (snapshot / "ae.safetensors").unlink()
    (snapshot / "tokenizer_2" / "spiece.model").unlink()
    refused("Wanted: autoencoder, tokenizers")


def test_a_silent_hub_is_given_up_soon(snapshot, monkeypatch):
    """One request, not huggingface_hub's five retries nor its download without a time limit."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=endpoint))
        monkeypatch.setattr(hub, "TIMEOUT", 0.2)
        start = time.monotonic()
        with pytest.raises(FileNotFoundError, match="imeout"):
            find("flux-dev")
        assert time.monotonic() - start < 10
