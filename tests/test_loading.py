"""Loading: exact weights, mapped and not copied, and one clear message for every file that does not fit."""

import argparse
import errno
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
import test_autoencoder
import test_model
import test_text
import torch
from compare import randomize
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from test_formats import published
from torch import nn

import flux
from bench import fullsize
from flux import T5, AutoEncoder, CLIPText, Flux, checkpoint, finding, loading
from flux.finding import HUB_MODELS, find_files
from flux.loading import ModelFiles
from run.models import add_model_arguments
from run.plan import FLUX_DEV

SIZES = test_model.DEV
KINDS = {
    "flux": (flux.load_flux, Flux(SIZES)),
    "autoencoder": (flux.load_autoencoder, AutoEncoder(test_autoencoder.SIZES["like FLUX"])),
    "t5": (flux.load_t5, T5(test_text.T5_SIZES)),
    "clip": (flux.load_clip, CLIPText(test_text.CLIP_SIZES)),
}
REPO = HUB_MODELS["flux-dev"]


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


def longer_than_the_header_tells(path: Path):
    path.write_bytes(path.read_bytes() + b"0")


def gguf(path: Path):
    path.write_bytes(b"GGUF" + bytes(100))


def pointer(path: Path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802932552\n")


def not_json(path: Path):
    path.write_bytes((8).to_bytes(8, "little") + b"not json")


DAMAGES = {
    truncated: r"it has (\d+) bytes, its header tells of (\d+)",
    cut_in_the_header: r"it has 100 bytes, and begins as if its header alone had \d+",
    header_longer_than_the_file: r"it has 10 bytes, and begins as if its header alone had 1000",
    longer_than_the_header_tells: r"it has (\d+) bytes, its header tells of (\d+)",
    zipped: "it is a zip",
    gguf: "it is a GGUF file",
    text: "it is a web page",
    pointer: "it only says where .* run `git lfs pull`",
    empty: "it has 0 bytes",
    not_json: ".",
}


@pytest.mark.parametrize("damage, reason", DAMAGES.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_damaged_file_is_named(damage, reason, path):
    damage(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a whole safetensors file: {reason}"):
        flux.load_flux(path)


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "flux1-dev.safetensors"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            flux.load_flux(path)


def test_files_of_other_kinds_are_refused(path, state):
    with pytest.raises(ValueError, match="not a AutoEncoder checkpoint.*begins with double_blocks"):
        flux.load_autoencoder(path)
    save_file({}, path)
    with pytest.raises(ValueError, match="not a Flux checkpoint: it lacks img_in.*begins with no tensor"):
        flux.load_flux(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_are_not_finite_are_refused(dtype, path, state):
    state["img_in.weight"][-1, -1] = torch.nan
    state["single_blocks.1.linear2.bias"][0] = torch.inf
    save_file(state, path)
    message = "is damaged: NaN or infinity in img_in.weight, single_blocks.1.linear2.bias$"
    with pytest.raises(ValueError, match=re.escape(str(path)) + " " + message):
        flux.load_flux(path, dtype=dtype)
    assert flux.load_flux(path, "meta").img_in.weight.is_meta


def test_a_wrong_dtype_is_refused(path, state):
    state["img_in.bias"] = torch.zeros(96, dtype=torch.int8)
    save_file(state, path)
    with pytest.raises(ValueError, match="img_in.bias is I8, must be F64, F32, F16, BF16, F8_E4M3, F8_E5M2"):
        flux.load_flux(path)


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


def test_the_config_of_another_model_is_not_read(tmp_path):
    """Single files lie in one folder, and FLUX's 24 heads are not CLIP's."""
    sizes = replace(test_text.CLIP_SIZES, hidden_size=128, num_heads=2)
    save_file(state_of(CLIPText(sizes)), tmp_path / "clip_l.safetensors")
    for config, number in (
        ({}, 4),
        ({"architectures": ["CLIPTextModel"]}, 4),
        ({"_class_name": "FluxTransformer2DModel"}, 2),  # heads of 64 channels
        ({"architectures": ["T5EncoderModel"]}, 2),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
        assert flux.load_clip(tmp_path / "clip_l.safetensors", "meta").sizes.num_heads == number


@pytest.mark.parametrize(
    "content", ["[1]", "null", '{"axes_dims_rope": 7}', '{"axes_dims_rope": ["a"]}', "["]
)
def test_a_strange_config_is_told(content, path):
    path.with_name("config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path.parent))}.*(JSON|not a Flux checkpoint)"):
        flux.load_flux(path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{"])
def test_a_strange_index_is_told(content, path):
    index = path.with_name("model.safetensors.index.json")
    index.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(index))):
        flux.load_flux(path.parent)


# --- What is made of the file's tensors --------------------------------------------------------------------


def mappings() -> list[tuple[int, int, str]]:
    """Return the address ranges of this process that are mapped to files, with the files' names."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(end, 16) for end in addresses.split("-"))
        found.append((start, end, name[0] if name else ""))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("kind", ["diffusers", "another dtype"])
def test_what_is_made_is_in_files_that_are_gone(kind, path, tmp_path, monkeypatch):
    """Joined and converted weights are as they should be, mapped, and leave no name behind."""
    monkeypatch.setattr(checkpoint, "LARGE", 2**12)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours, theirs = test_model.pair(SIZES)
    if kind == "diffusers":
        save_file(theirs.state_dict(), path)
    else:
        save_file({name: tensor.double() for name, tensor in ours.state_dict().items()}, path)
    loaded = flux.load_flux(path, dtype=torch.float32)
    assert_holds(loaded, ours.state_dict())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    places = mappings()
    for name, weight in loaded.named_parameters():
        where = next((n for start, end, n in places if start <= weight.data_ptr() < end), "")
        if weight.nbytes >= 2**12 and (kind != "diffusers" or "qkv" in name or "linear1" in name):
            assert where.startswith(str(tmp_path)) and where.endswith("(deleted)"), name
        elif kind == "diffusers" and "adaLN" not in name and not ("qkv" in name or "linear1" in name):
            assert where == str(path), name


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="elsewhere it is memory anyway")
def test_without_room_for_a_file_it_is_memory(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "LARGE", 2**12)
    monkeypatch.setattr(os, "posix_fallocate", full)
    ours, theirs = test_model.pair(SIZES)
    save_file(theirs.state_dict(), path)
    with pytest.warns(UserWarning, match="in memory, not in TMPDIR.*No space left on device") as warned:
        assert_holds(flux.load_flux(path, dtype=torch.float32), ours.state_dict())
    assert len({str(warning.message) for warning in warned}) == 1


def test_the_random_file_of_full_size_is_flux_dev(tmp_path):
    """bench/fullsize.py's, here small; the names and shapes of the whole are the published ones."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Flux(FLUX_DEV).state_dict().items()}
    assert shapes == {name: shape for name, (shape, _) in published("flux1-dev").items()}
    file = tmp_path / "flux1-random.safetensors"
    fullsize.write_checkpoint(file, SIZES)
    model = flux.load_flux(file)
    assert model.sizes == SIZES
    assert all(0.01 < weight.float().std() < 0.04 for weight in model.parameters() if weight.numel() > 50)


# --- Finding the parts -------------------------------------------------------------------------------------


def arguments(model, *options: str):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return parser.parse_args(["--model", str(model), *map(str, options)])


def ours(folder: Path) -> ModelFiles:
    """Where the parts lie in black-forest-labs' layout."""
    parts = "flux1-random.safetensors", "ae.safetensors", "text_encoder", "text_encoder_2", ""
    return ModelFiles(*(folder / part for part in parts))


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture
def snapshot(tmp_path, monkeypatch) -> Path:
    """Return where a snapshot of FLUX.1-dev would be in an empty hub cache; there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (*finding.VARIABLES.values(), "FLUX_DEV", "FLUX_SCHNELL", "FLUX_KREA_DEV"):
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


def test_a_folder(model, snapshot, monkeypatch):
    assert find_files(arguments(model)) == ours(model)
    assert find_files(arguments(model)).folder == model
    monkeypatch.setitem(finding.SHIPPED, "small", model)
    assert find_files(arguments("small")) == ours(model)
    assert find_files(arguments(ours(model).transformer)) == ours(model)  # the rest lies beside it


def test_a_folder_in_diffusers_layout(copy, snapshot):
    files = find_files(arguments(in_diffusers_layout(copy)))
    assert files == replace(ours(copy), transformer=copy / "transformer", autoencoder=copy / "vae")
    assert flux.load_flux(files.transformer).sizes.theta == 100  # of its config
    file = files.transformer / "diffusion_pytorch_model.safetensors"
    assert find_files(arguments(file)) == replace(files, transformer=file)
    assert find_files(arguments(file)).folder == files.folder == copy


def test_a_file_and_options(copy, model, snapshot):
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
    options = ("--ae", vae, "--clip-l", clip, "--t5", t5, "--tokenizers", copy)
    files = find_files(arguments(unet, *options))
    assert files == ModelFiles(unet, vae, clip, t5, copy)
    assert files.folder == comfy
    shutil.copy(model / "config.json", comfy / "text.json")
    prompts = ["a photo of a woman"]
    expected = flux.load_conditioner(model).encode(prompts)
    for x, y in zip(flux.load_conditioner(files).encode(prompts), expected):
        assert torch.equal(x, y)


def test_options_come_before_the_folder_and_the_folder_before_the_environment(
    model, copy, snapshot, monkeypatch
):
    monkeypatch.setenv("FLUX_AE", str(copy / "ae.safetensors"))
    assert find_files(arguments(model)).autoencoder == model / "ae.safetensors"
    given = find_files(arguments(model, "--ae", copy / "ae.safetensors", "--t5", copy / "text_encoder_2"))
    assert given == replace(ours(model), autoencoder=copy / "ae.safetensors", t5=copy / "text_encoder_2")


def test_the_environment_comes_before_the_cache(model, copy, snapshot, monkeypatch):
    shutil.copytree(model, snapshot)
    assert find_files(arguments("flux-dev")) == ours(snapshot)
    monkeypatch.setenv("FLUX_CLIP_L", str(copy / "text_encoder"))
    assert find_files(arguments("flux-dev")) == replace(ours(snapshot), clip=copy / "text_encoder")
    monkeypatch.setenv("FLUX_DEV", str(copy))
    assert find_files(arguments("flux-dev")) == ours(copy)
    monkeypatch.setenv("FLUX_DEV", "nowhere")
    with pytest.raises(FileNotFoundError, match="FLUX_DEV nowhere: no such file or folder"):
        find_files(arguments("flux-dev"))


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
        for file in checkpoint.shards(getattr(ours(model), part)):
            state |= {prefix + name: tensor for name, tensor in load_file(file).items()}
    file = tmp_path / "one" / "flux1-all.safetensors"
    file.parent.mkdir()
    save_file(state, file)
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    file.with_name("config.json").write_text(json.dumps(config | {"theta": 100}))
    return file


def test_an_all_in_one_checkpoint(all_in_one, model, snapshot):
    files = find_files(arguments(all_in_one, "--tokenizers", model))
    assert files == ModelFiles(*[all_in_one] * 4, model)
    for part, load in loading.LOADERS.items():
        assert_holds(load(all_in_one), load(getattr(ours(model), part)).state_dict())
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(model / name, all_in_one.parent / name)
    assert find_files(arguments(all_in_one.parent)) == ModelFiles(*[all_in_one] * 4, all_in_one.parent)


def test_an_all_in_one_checkpoint_of_the_hub(all_in_one, model, snapshot, capsys):
    """Its own parts come before those of FLUX.1-dev, which are cached too."""
    shutil.copytree(model, snapshot)
    folder = snapshot_of("somebody/flux", snapshot.parents[2])
    shutil.copytree(all_in_one.parent, folder)
    files = find_files(arguments("somebody/flux"))
    assert files == ModelFiles(*[folder / all_in_one.name] * 4, snapshot)
    assert "cannot ask somebody/flux for tokenizers (" in capsys.readouterr().out


def test_what_does_not_fit_together_is_refused(model, snapshot, tmp_path):
    state = load_file(model / "ae.safetensors")
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, :2].clone()
    state["encoder.conv_out.weight"] = state["encoder.conv_out.weight"][:4].clone()
    state["encoder.conv_out.bias"] = state["encoder.conv_out.bias"][:4].clone()
    save_file(state, tmp_path / "ae.safetensors")
    message = "ae.safetensors has 8 channels in 2 x 2 latents, .*flux1-random.safetensors wants 16"
    with pytest.raises(ValueError, match=message):
        find_files(arguments(model, "--ae", tmp_path / "ae.safetensors"))
    with pytest.raises(ValueError, match="text_encoder_2 is not a CLIPText checkpoint"):
        find_files(arguments(model, "--clip-l", model / "text_encoder_2"))


def test_what_is_wrong_is_said(copy, snapshot):
    def refused(match: str, *args):
        with pytest.raises(FileNotFoundError, match=match):
            find_files(arguments(*args))

    refused(
        "flux-dve: neither a folder nor a file nor .*flux-dev, flux-schnell, flux-krea-dev, tiny", "flux-dve"
    )
    refused("models/flux1.safetensors: neither a folder", "models/flux1.safetensors")
    refused("--ae nothing.safetensors: no such file or folder", copy, "--ae", "nothing.safetensors")
    refused("exactly one flux1-.*; found none", copy / "tokenizer")
    shutil.rmtree(copy / "tokenizer")
    refused("Wanted: tokenizers(.|\n)*--tokenizers", copy)
    shutil.copy(copy / "flux1-random.safetensors", copy / "flux1-b.safetensors")
    refused("found flux1-b.safetensors, flux1-random.safetensors", copy)


def test_a_missing_shard_is_told(copy, snapshot):
    folder, state = copy / "text_encoder_2", load_file(copy / "text_encoder_2" / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards(state, folder)
    assert find_files(arguments(copy)).t5 == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = "text_encoder_2 lacks model-00002-of-00002.safetensors, of 2 files that belong together"
    with pytest.raises(FileNotFoundError, match=message):
        find_files(arguments(copy))
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(FileNotFoundError, match=message):
        find_files(arguments(copy))


def test_variants_in_16_bit_are_left_alone(copy, snapshot):
    in_diffusers_layout(copy)
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, copy / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert find_files(arguments(copy)).autoencoder == copy / "vae"


# --- The hub's cache ---------------------------------------------------------------------------------------


def test_parts_come_from_any_snapshot_and_layout(model, copy, snapshot):
    """The hub renewed its read-me: the transformer is in an older snapshot than the rest."""
    shutil.copytree(copy, snapshot)
    older = snapshot.with_name("1" * 40)
    (older / "transformer").mkdir(parents=True)
    (snapshot / "flux1-random.safetensors").rename(older / "transformer" / "model.safetensors")
    shutil.copy(model / "config.json", older / "transformer")
    assert find_files(arguments("flux-dev")) == replace(ours(snapshot), transformer=older / "transformer")


@pytest.mark.parametrize("latest", ["0" * 40, "1" * 40])
def test_the_latest_snapshot_comes_first(latest, model, snapshot):
    for commit in ("0" * 40, "1" * 40):
        shutil.copytree(model, snapshot.with_name(commit))
    snapshot_of("flux-dev", snapshot.parents[2], latest)
    assert find_files(arguments("flux-dev")) == ours(snapshot.with_name(latest))


def test_what_all_models_share_is_taken_from_any_of_them(model, snapshot):
    shutil.copytree(model, snapshot)
    krea = snapshot_of("flux-krea-dev", snapshot.parents[2])
    for name in ("flux1-random.safetensors", "config.json"):
        krea.mkdir(parents=True, exist_ok=True)
        shutil.copy(model / name, krea / name)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(model / name, krea / name)
    files = find_files(arguments("flux-krea-dev"))
    assert files == replace(ours(snapshot), transformer=krea / "flux1-random.safetensors", tokenizers=krea)


def test_another_repository(model, snapshot, capsys):
    """One that holds only a transformer; the rest is FLUX.1-dev's, also without a network."""
    shutil.copytree(model, snapshot)
    mini = snapshot_of("somebody/flux-mini", snapshot.parents[2])
    mini.mkdir(parents=True)
    shutil.copy(model / "config.json", mini)
    shutil.copy(model / "flux1-random.safetensors", mini / "flux-mini.safetensors")
    files = find_files(arguments("somebody/flux-mini"))
    assert files == replace(ours(snapshot), transformer=mini / "flux-mini.safetensors")
    assert "cannot ask somebody/flux-mini for autoencoder" in capsys.readouterr().out


def test_offline_with_an_empty_or_half_a_cache(model, snapshot):
    def refused(*parts: str):
        with pytest.raises(FileNotFoundError) as error:
            find_files(arguments("flux-dev"))
        for part in (REPO, "ffline", "hf auth login", "HF_TOKEN", "--model FILE", "--model tiny", *parts):
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
        monkeypatch.setattr(loading, "HfApi", lambda: HfApi(endpoint=endpoint))
        monkeypatch.setattr(loading, "TIMEOUT", 0.2)
        start = time.monotonic()
        with pytest.raises(FileNotFoundError, match="imeout"):
            find_files(arguments("flux-dev"))
        assert time.monotonic() - start < 10
