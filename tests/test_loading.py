"""Loading: exact weights, mapped and not copied, and one clear message for every file that does not fit."""

import errno
import json
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
import test_autoencoder
import test_model
import test_text
import torch
from compare import randomize
from helpers import assert_same
from safetensors.torch import save_file
from test_formats import published
from torch import nn

import flux
from bench import fullsize
from flux import T5, AutoEncoder, CLIPText, Flux, checkpoint
from flux.checkpoint import Checkpoint, fit
from flux.errors import UserError
from flux.finding import find_files
from flux.streaming import FrozenLinear
from run.costs import FLUX_DEV

SIZES = test_model.DEV
KINDS = {
    "flux": (flux.load_transformer, Flux(SIZES)),
    "autoencoder": (flux.load_autoencoder, AutoEncoder(test_autoencoder.SIZES["like FLUX"])),
    "t5": (flux.load_t5, T5(test_text.T5_SIZES)),
    "clip": (flux.load_clip, CLIPText(test_text.CLIP_SIZES)),
}


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
    model = flux.load_transformer(path, dtype=dtype)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines if line[-1] == str(path)]
    for weight in model.parameters():
        assert any(first <= weight.data_ptr() < end for first, end in ranges) == mapped


def test_changing_a_weight_leaves_the_file_alone(path, state):
    flux.load_transformer(path).img_in.weight.add_(1)
    assert_holds(flux.load_transformer(path), state)


def write_shards(state: dict[str, torch.Tensor], folder: Path):
    names = list(state)
    for i, part in enumerate((names[:20], names[20:]), 1):
        save_file({name: state[name] for name in part}, folder / f"model-0000{i}-of-00002.safetensors")


def test_shards(tmp_path, state):
    write_shards(state, tmp_path)
    assert_holds(flux.load_transformer(tmp_path), state)


def test_a_tensor_in_two_shards_is_refused(tmp_path, state):
    write_shards(state, tmp_path)
    save_file({"img_in.bias": state["img_in.bias"]}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="img_in.bias is in model-00001-of-00002.safetensors and in other"):
        flux.load_transformer(tmp_path)


def test_everything_that_does_not_fit_is_in_one_message(path, state):
    del state["double_blocks.1.img_attn.proj.bias"], state["time_in.in_layer.bias"]
    state["lora_A"] = torch.zeros(2)
    state["single_blocks.0.linear1.weight"] = torch.zeros(5, 96)
    save_file(state, path)
    with pytest.raises(ValueError) as error:
        flux.load_transformer(path)
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
    truncated: r"it has (\d+) bytes, its header describes (\d+) bytes",
    cut_in_the_header: r"it has 100 bytes, and begins as if its header alone had \d+",
    header_longer_than_the_file: r"it has 10 bytes, and begins as if its header alone had 1000",
    longer_than_the_header_tells: r"it has (\d+) bytes, its header describes (\d+) bytes",
    zipped: "it is a zip",
    gguf: "it is a GGUF file",
    text: "it is a web page",
    pointer: "it is a git-lfs pointer, not the file: run `git lfs pull`",
    empty: "it has 0 bytes",
    not_json: ".",
}


@pytest.mark.parametrize("damage, reason", DAMAGES.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_damaged_file_is_named(damage, reason, path):
    damage(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a whole safetensors file: {reason}"):
        flux.load_transformer(path)


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "flux1-dev.safetensors"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            flux.load_transformer(path)


def test_files_of_other_kinds_are_refused(path, state):
    with pytest.raises(ValueError, match="not a AutoEncoder checkpoint.*begins with double_blocks"):
        flux.load_autoencoder(path)
    save_file({}, path)
    with pytest.raises(ValueError, match="not a Flux checkpoint: it lacks img_in.*begins with no tensor"):
        flux.load_transformer(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_are_not_finite_are_refused(dtype, path, state):
    state["img_in.weight"][-1, -1] = torch.nan
    state["single_blocks.1.linear2.bias"][0] = torch.inf
    save_file(state, path)
    message = "is damaged: NaN or infinity in img_in.weight, single_blocks.1.linear2.bias$"
    with pytest.raises(ValueError, match=re.escape(str(path)) + " " + message):
        flux.load_transformer(path, dtype=dtype)
    assert flux.load_transformer(path, "meta").img_in.weight.is_meta


def test_a_wrong_dtype_is_refused(path, state):
    state["img_in.bias"] = torch.zeros(96, dtype=torch.int8)
    save_file(state, path)
    with pytest.raises(ValueError, match="img_in.bias is I8, must be F64, F32, F16, BF16, F8_E4M3, F8_E5M2"):
        flux.load_transformer(path)


def test_config_beside_the_file(path):
    config = path.with_name("config.json")
    config.write_text(json.dumps({"axes_dims_rope": [8, 12, 12], "theta": 500}))
    for place in (path, path.parent):
        sizes = flux.load_transformer(place).sizes
        assert (sizes.axes, sizes.theta) == ((8, 12, 12), 500)
    config.write_text(json.dumps({"axes_dims_rope": [8, 8, 8]}))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*add up to 24, the head size is 32"):
        flux.load_transformer(path)
    config.write_text("{'theta': 500}")
    with pytest.raises(ValueError, match=f"{re.escape(str(config))} is not valid JSON"):
        flux.load_transformer(path)


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
    "content",
    [
        "[1]",
        "null",
        "[",
        '{"axes_dims_rope": 7}',
        '{"axes_dims_rope": ["a"]}',
        '{"axes_dims_rope": [32]}',
        '{"theta": "a"}',
        '{"theta": NaN}',
    ],
)
def test_a_strange_config_is_told(content, path):
    path.with_name("config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path.parent))}.*(JSON|not a Flux checkpoint)"):
        flux.load_transformer(path)


@pytest.mark.parametrize("config", [{"num_attention_heads": x} for x in ("3", 0, -3, 5, None, 3.0, True)])
@pytest.mark.parametrize("nested", [False, True])
def test_heads_that_cannot_be_are_told(nested, config, tmp_path):
    save_file(state_of(KINDS["clip"][1]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    with pytest.raises(UserError, match="not a CLIPText checkpoint: .*heads"):
        flux.load_clip(tmp_path / "model.safetensors", "meta")


class Record(dict):
    """A header that notes which shapes are read."""

    def __init__(self, shapes):
        super().__init__(shapes)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [None, (), (0,), (5,), (0, 5), (5, 0), (5, 7), (5, 7, 9), (5, 0, 1, 1)])
def test_sizes_of_any_shape_are_a_users_error(kind, shape, tmp_path):
    """Whichever tensor tells a size, and also when it is missing: no error of another type, no model."""
    model = KINDS[kind][1]
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 3}))
    header = {name: (tuple(tensor.shape), "F32") for name, tensor in model.state_dict().items()}
    fit(type(model), type(model.sizes), Checkpoint(file, {}, header), torch.float32)
    record = Record({name: shape for name, (shape, _) in header.items()})
    type(model.sizes).from_shapes(record, {})
    assert len(record.read) >= 3
    for name in record.read:
        changed = {**header, name: (shape, "F32")}
        if shape is None:
            del changed[name]
        with pytest.raises(UserError, match="model.safetensors"):
            fit(type(model), type(model.sizes), Checkpoint(file, {}, changed), torch.float32)


@pytest.mark.parametrize("error", [TypeError, AttributeError, ValueError, IndexError])
def test_an_error_of_our_own_keeps_its_type(error, path):
    """What is wrong with the code is not to be taken for a wrong file."""

    class Broken(Flux):
        def __init__(self, sizes):
            raise error("a bug")

    with pytest.raises(error, match="^a bug$"):
        checkpoint.load(Broken, type(SIZES), path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{"])
def test_a_strange_index_is_told(content, path):
    index = path.with_name("model.safetensors.index.json")
    index.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(index))):
        flux.load_transformer(path.parent)


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
    loaded = flux.load_transformer(path, dtype=torch.float32)
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
        assert_holds(flux.load_transformer(path, dtype=torch.float32), ours.state_dict())
    assert len({str(warning.message) for warning in warned}) == 1


def test_the_random_file_of_full_size_is_flux_dev(tmp_path):
    """bench/fullsize.py's, here small; the names and shapes of the whole are the published ones."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Flux(FLUX_DEV).state_dict().items()}
    assert shapes == {name: shape for name, (shape, _) in published("flux1-dev").items()}
    file = tmp_path / "flux1-random.safetensors"
    fullsize.write_checkpoint(file, SIZES)
    model = flux.load_transformer(file)
    assert model.sizes == SIZES
    assert all(0.01 < weight.float().std() < 0.04 for weight in model.parameters() if weight.numel() > 50)


# --- Text encoders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder, part", [("model", "t5"), ("klein", "qwen3")])
def test_a_text_encoder_without_room_is_streamed(folder, part, request):
    files = find_files(str(request.getfixturevalue(folder)))
    resident, streamed = flux.load_conditioner(files, length=40), flux.load_conditioner(files, vram=1e-6)
    layers = {type(layer) for layer in getattr(streamed, part).modules()}
    assert FrozenLinear in layers and nn.Linear not in layers
    assert not any(isinstance(layer, FrozenLinear) for layer in resident.modules())
    streamed.tokenizers = resident.tokenizers
    prompts = ["a photo of a woman", ""]
    with torch.no_grad():
        one, other = resident.encode(prompts), streamed.encode(prompts)
    assert_same(one, other)
    assert one["txt"].shape[:2] == (2, 40) and not torch.equal(one["txt"][0], one["txt"][1])


@pytest.mark.parametrize("folder, usual", [("model", 16), ("klein", 512)])
def test_the_length_of_the_text(folder, usual, request):
    """As `encode` makes it, known without the weights."""
    files = find_files(str(request.getfixturevalue(folder)))
    for length in (None, 20):
        told = flux.text_length(files.transformer, files.tokenizers, length)
        assert told == (length or usual)
        with torch.no_grad():
            prompt = flux.load_conditioner(files, length=length).encode(["a"])
        assert prompt["txt"].shape[1] == told
        assert [*prompt] == (["txt", "pooled"] if usual == 16 else ["txt"])
