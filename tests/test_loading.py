"""Loading: exact weights, mapped and not copied, and one clear message for every file that does not fit."""

import json
import re
import socket
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock
from zipfile import ZipFile

import huggingface_hub
import pytest
import test_autoencoder
import test_model
import test_text
import torch
from compare import randomize
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save_file
from torch import nn

import flux
from flux import T5, AutoEncoder, CLIPText, Flux, find_model, loading
from flux.loading import HUB_FILES, HUB_MODELS

SIZES = test_model.DEV
KINDS = {
    "flux": (flux.load_flux, Flux(SIZES)),
    "autoencoder": (flux.load_autoencoder, AutoEncoder(test_autoencoder.SIZES["like FLUX"])),
    "t5": (flux.load_t5, T5(test_text.T5_SIZES)),
    "clip": (flux.load_clip, CLIPText(test_text.CLIP_SIZES)),
}
REPO, TRANSFORMER = HUB_MODELS["flux-dev"]


def state_of(model: nn.Module, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in randomize(model).state_dict().items()}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return state_of(Flux(SIZES))


@pytest.fixture
def path(tmp_path, state) -> Path:
    save_file(state, tmp_path / "flux1-small.safetensors")
    return tmp_path / "flux1-small.safetensors"


def assert_holds(model: nn.Module, state: dict[str, torch.Tensor]):
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("load, model", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_weights_come_back(load, model, stored, tmp_path):
    state, file = state_of(model, stored), tmp_path / "model.safetensors"
    save_file(state, file)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 3}))  # CLIP's
    loaded = load(file)
    assert loaded.sizes == model.sizes
    assert_holds(loaded, {name: tensor.bfloat16() for name, tensor in state.items()})
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    assert_holds(load(file, device="cpu", dtype=stored), state)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("dtype, mapped", [(torch.bfloat16, True), (torch.float32, False)])
def test_weights_of_the_files_dtype_stay_in_the_file(path, dtype, mapped):
    model = flux.load_flux(path, dtype=dtype)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines if line[-1] == str(path)]
    for weight in model.parameters():
        assert any(first <= weight.data_ptr() < end for first, end in ranges) == mapped


def test_changing_a_weight_leaves_the_file_alone(path, state):
    flux.load_flux(path).img_in.weight.add_(1)
    assert_holds(flux.load_flux(path), state)


def shards(state: dict[str, torch.Tensor], folder: Path):
    names = list(state)
    for i, part in enumerate((names[:20], names[20:]), 1):
        save_file({name: state[name] for name in part}, folder / f"model-0000{i}-of-00002.safetensors")


def test_shards(tmp_path, state):
    shards(state, tmp_path)
    assert_holds(flux.load_flux(tmp_path), state)


def test_a_tensor_in_two_shards_is_refused(tmp_path, state):
    shards(state, tmp_path)
    save_file({"img_in.bias": state["img_in.bias"]}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="img_in.bias is in model-00001-of-00002.safetensors and in other"):
        flux.load_flux(tmp_path)


def test_everything_that_does_not_fit_is_in_one_message(path, state):
    del state["double_blocks.1.img_attn.proj.bias"], state["time_in.in_layer.bias"]
    state["lora_A"] = torch.zeros(2)
    state["single_blocks.0.linear1.weight"] = torch.zeros(5, 96)
    save_file(state, path)
    with pytest.raises(ValueError) as error:
        flux.load_flux(path)
    for part in [
        str(path),
        "missing double_blocks.1.img_attn.proj.bias (96,)",
        "missing time_in.in_layer.bias (96,)",
        "unexpected lora_A (2,)",
        "single_blocks.0.linear1.weight is (5, 96), must be (672, 96)",
    ]:
        assert part in str(error.value)


def truncated(path: Path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_the_header(path: Path):
    path.write_bytes(path.read_bytes()[:100])


def zipped(path: Path):
    with ZipFile(path, "w") as file:
        file.writestr("weights", "0" * 100)


def text(path: Path):
    path.write_text("<!DOCTYPE html><html>Access to model black-forest-labs/FLUX.1-dev is restricted</html>")


def empty(path: Path):
    path.write_bytes(b"")


def header_longer_than_the_file(path: Path):
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    "damage", [truncated, cut_in_the_header, zipped, text, empty, header_longer_than_the_file]
)
def test_a_damaged_file_is_named(damage, path):
    damage(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a whole safetensors file"):
        flux.load_flux(path)


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "flux1-dev.safetensors"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            flux.load_flux(path)


def test_other_models_are_refused(path, state):
    """Chroma has neither time_in nor modulation; diffusers' names and no name at all are the other cases."""
    chroma = {name: tensor for name, tensor in state.items() if "_in.in" not in name and "mod" not in name}
    chroma["distilled_guidance_layer.in_proj.weight"] = torch.zeros(2, 2)
    save_file(chroma, path)
    message = (
        "not a Flux checkpoint: it lacks vector_in.in_layer.weight; it begins with distilled_guidance_layer"
    )
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is {message}"):
        flux.load_flux(path)
    save_file(test_model.to_diffusers({name: x.clone() for name, x in state.items()}, 96), path)
    with pytest.raises(ValueError, match="lacks img_in.weight; it begins with context_embedder.bias"):
        flux.load_flux(path)
    save_file({}, path)
    with pytest.raises(ValueError, match="not a AutoEncoder checkpoint.*begins with no tensor"):
        flux.load_autoencoder(path)


def test_config_beside_the_file(path):
    config = path.with_name("config.json")
    config.write_text(json.dumps({"axes_dims_rope": [8, 12, 12], "theta": 500}))
    for place in (path, path.parent):
        sizes = flux.load_flux(place).sizes
        assert (sizes.axes, sizes.theta) == ((8, 12, 12), 500)
    config.write_text(json.dumps({"axes_dims_rope": [8, 8, 8]}))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*add up to 24, the head size is 32"):
        flux.load_flux(path)
    config.write_text("{'theta': 500}")
    with pytest.raises(ValueError, match=f"{re.escape(str(config))} is not valid JSON"):
        flux.load_flux(path)


def whole_model(folder: Path, transformer: str = "flux1-small.safetensors") -> Path:
    for file in (transformer, *HUB_FILES):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_find_model_on_disk(tmp_path, monkeypatch):
    folder = whole_model(tmp_path)
    assert find_model(str(folder)) == folder
    monkeypatch.setitem(loading.LOCAL_MODELS, "small", folder)
    assert find_model("small") == folder


def test_find_model_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="flux-dve: neither a folder nor one.*flux-dev, tiny"):
        find_model("flux-dve")
    with pytest.raises(FileNotFoundError, match="exactly one flux1-.*; found none"):
        find_model(str(tmp_path))
    (tmp_path / "flux1-a.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="lacks ae.safetensors, text_encoder, .*, tokenizer_2"):
        find_model(str(tmp_path))
    (tmp_path / "flux1-b.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="found flux1-a.safetensors, flux1-b.safetensors"):
        find_model(str(tmp_path))


@pytest.fixture
def snapshot(tmp_path, monkeypatch) -> Path:
    """Return an empty snapshot of FLUX.1-dev in an offline hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / f"models--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return repo / "snapshots" / ("0" * 40)


def test_the_hubs_cache_is_used_without_asking(snapshot, monkeypatch):
    whole_model(snapshot, TRANSFORMER)
    monkeypatch.setattr(loading, "get_hf_file_metadata", Mock(side_effect=AssertionError("asked")))
    assert find_model("flux-dev") == snapshot


def assert_refused(*parts: str):
    with pytest.raises(FileNotFoundError) as error:
        find_model("flux-dev")
    for part in (REPO, "hf auth login", "--model FOLDER", "--model tiny", *parts):
        assert part in str(error.value)


def test_offline_with_an_empty_cache(snapshot):
    assert_refused(TRANSFORMER, "offline")


def test_offline_with_half_a_cache(snapshot):
    (whole_model(snapshot, TRANSFORMER) / "ae.safetensors").unlink()
    assert_refused("ae.safetensors")


def test_a_file_the_hub_once_did_not_have_is_not_taken_for_cached(snapshot):
    (whole_model(snapshot, TRANSFORMER) / "ae.safetensors").unlink()
    mark = snapshot.parents[1] / ".no_exist" / snapshot.name / "ae.safetensors"
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert_refused("ae.safetensors")


def test_without_a_licence(snapshot, monkeypatch):
    gated = GatedRepoError("401 Client Error.\nAccess to model is restricted.", response=Mock())
    monkeypatch.setattr(loading, "get_hf_file_metadata", Mock(side_effect=gated))
    assert_refused("GatedRepoError: 401 Client Error.")


def test_what_is_missing_is_downloaded(snapshot, monkeypatch):
    download = Mock(side_effect=lambda repo, allow_patterns: str(whole_model(snapshot, TRANSFORMER)))
    monkeypatch.setattr(loading, "get_hf_file_metadata", Mock())
    monkeypatch.setattr(loading, "snapshot_download", download)
    assert find_model("flux-dev") == snapshot
    download.assert_called_once_with(REPO, allow_patterns=[TRANSFORMER, *HUB_FILES])


def test_a_silent_hub_is_given_up_soon(snapshot, monkeypatch):
    """One request, not huggingface_hub's five retries nor its download without a time limit."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            loading, "hf_hub_url", lambda *_: f"http://127.0.0.1:{server.getsockname()[1]}/file"
        )
        metadata = partial(loading.get_hf_file_metadata, timeout=0.2)  # 10 s by default
        monkeypatch.setattr(loading, "get_hf_file_metadata", metadata)
        start = time.monotonic()
        assert_refused("imeout")
        assert time.monotonic() - start < 10
