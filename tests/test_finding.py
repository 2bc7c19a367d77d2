"""Finding a model's parts in folders of either layout, in single files and in the hub's cache."""

import json
import re
import shutil
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import test_autoencoder
import test_flux2
import test_qwen3
import torch
from compare import difference, randomize
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from helpers import assert_same
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from test_loading import assert_holds, write_shards
from transformers import AutoTokenizer

import flux
from flux import bases, hub, loading
from flux.autoencoder import AutoEncoderSizes
from flux.bases import FLUX1, FLUX2
from flux.checkpoint import shards
from flux.errors import UserError
from flux.finding import HUB_MODELS, find_files, hub_names
from flux.flux2 import Flux2
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


def assert_encodes_alike(*files: ModelFiles) -> None:
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
    assert flux.load_transformer(files.transformer).sizes.theta == 100  # of its config
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
    assert_encodes_alike(files, find_files(str(model)))


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
    refused("holds no transformer, which would be one of flux1-", copy / "tokenizer")
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
    assert_encodes_alike(files, find_files(str(model)))
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


# --- FLUX.2 klein ------------------------------------------------------------------------------------------


def klein_in(folder: Path, transformer: str = "flux-2-klein-base-random.safetensors") -> ModelFiles:
    qwen3 = {"qwen3": folder / "text_encoder"}
    return ModelFiles(FLUX2, folder / transformer, folder / "ae.safetensors", qwen3, folder)


@pytest.fixture
def klein_snapshot(klein, snapshot) -> Path:
    """Put klein-base-4B into the hub's cache, after FLUX.1-dev and klein-base-9B, which serve no klein-4B."""
    for name in ("flux-dev", "klein-9b", "klein-4b"):
        folder = snapshot_of(name, snapshot.parents[2])
        shutil.copytree(klein, folder)
    return folder


def test_a_klein(klein, snapshot):
    files = find(klein)
    assert files == klein_in(klein) and files.folder == klein
    assert find(files.transformer) == files
    assert isinstance(flux.load_transformer(files.transformer), Flux2)
    assert [len(find_files(str(klein)).base.encoders), files.base.name] == [1, "FLUX.2"]


@torch.no_grad()
def test_a_vae_is_no_transformer(klein, tmp_path):
    folder = tmp_path / "klein"
    shutil.copytree(klein, folder)
    (folder / "ae.safetensors").rename(folder / "flux2-vae.safetensors")
    (folder / "flux-2-klein-base-random.safetensors").rename(folder / "flux2_klein.safetensors")
    files = find(folder)
    assert files.transformer.name == "flux2_klein.safetensors"
    assert files.autoencoder.name == "flux2-vae.safetensors"
    files.transformer.unlink()
    with pytest.raises(FileNotFoundError, match="holds no transformer, which would be one of flux1-"):
        find(folder)


def test_a_klein_of_diffusers_and_transformers(klein, snapshot, tmp_path):
    """The same tensors, whoever named them, and the text that diffusers' pipeline makes."""
    files = find(klein)
    modules = {
        part: loading.LOADERS[part](part_of(files, part), dtype=torch.float32) for part in FLUX2.places
    }
    transformer, autoencoder, qwen3 = modules.values()
    sizes = transformer.sizes
    theirs = Flux2Transformer2DModel(
        in_channels=sizes.in_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=1,
        joint_attention_dim=sizes.txt_size,
        axes_dims_rope=sizes.axes,
        mlp_ratio=2,
        guidance_embeds=False,
    )
    theirs.load_state_dict(test_flux2.to_diffusers(transformer.state_dict()))
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="50KB")
    text_encoder = test_qwen3.transformers_model(qwen3.sizes)
    text_encoder.load_state_dict(qwen3.state_dict(), strict=False)
    text_encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size="200KB")
    state = test_autoencoder.to_diffusers(autoencoder.state_dict(), levels=3)
    state = {re.sub(r"^(en|de)coder\.(.*quant_conv)", r"\2", x): state[x].contiguous() for x in state}
    (tmp_path / "vae").mkdir()
    save_file(state, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    shutil.copytree(klein / "tokenizer", tmp_path / "tokenizer")
    found = find(tmp_path)
    assert found == replace(
        klein_in(tmp_path), transformer=tmp_path / "transformer", autoencoder=tmp_path / "vae"
    )
    assert len(shards(found.transformer)) > 1 and len(shards(found.encoders["qwen3"])) > 1
    for part, module in modules.items():
        loaded = loading.LOADERS[part](part_of(found, part), dtype=torch.float32)
        assert loaded.sizes == module.sizes
        assert_holds(loaded, module.state_dict())

    prompts = ["a photo of a woman", ""]
    prompt = flux.load_conditioner(found, dtype=torch.float32, length=40).encode(prompts)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    embed = partial(
        Flux2KleinPipeline._get_qwen3_prompt_embeds, text_encoder, tokenizer, max_sequence_length=40
    )
    assert [*prompt] == ["txt"] and prompt["txt"].shape == (2, 40, sizes.txt_size)
    assert difference(prompt["txt"], embed(prompts, max_sequence_length=40)) < 1e-4
    assert difference(prompt["txt"], embed(["a photo of a man", ""], max_sequence_length=40)) > 0.1


def test_separate_files_of_a_klein(klein, snapshot, tmp_path):
    """ComfyUI's, with its prefixes and without; flux2-vae.safetensors is no transformer."""
    parts = {
        "flux-2-klein-base-4b": ("model.diffusion_model.", "flux-2-klein-base-random.safetensors"),
        "flux2-vae": ("", "ae.safetensors"),
        "qwen_3_4b": ("", "text_encoder/model.safetensors"),
    }
    for name, (prefix, place) in parts.items():
        state = {prefix + x: tensor for x, tensor in load_file(klein / place).items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    transformer, vae, qwen3 = (tmp_path / f"{name}.safetensors" for name in parts)
    files = find(transformer, qwen3=qwen3, tokenizers=klein)
    assert files == ModelFiles(FLUX2, transformer, vae, {"qwen3": qwen3}, klein)
    assert_encodes_alike(files, find_files(str(klein)))
    state = {x.removeprefix("model."): tensor for x, tensor in load_file(qwen3).items()}
    save_file(state, qwen3)  # as Qwen3Model writes it
    assert_encodes_alike(files, find_files(str(klein)))


def test_an_all_in_one_klein(klein, snapshot, tmp_path):
    prefixes = "model.diffusion_model.", "vae.", "text_encoders.qwen3_4b.transformer."
    parts = "flux-2-klein-base-random.safetensors", "ae.safetensors", "text_encoder/model.safetensors"
    state = {
        prefix + name: tensor
        for prefix, part in zip(prefixes, parts)
        for name, tensor in load_file(klein / part).items()
    }
    file = tmp_path / "flux-2-klein-base-all.safetensors"
    save_file(state, file)
    files = find(file, tokenizers=klein)
    assert files == ModelFiles(FLUX2, file, file, {"qwen3": file}, klein)
    assert_encodes_alike(files, find_files(str(klein)))
    for part in FLUX2.places:
        load = loading.LOADERS[part]
        assert_holds(load(file), load(part_of(klein_in(klein), part)).state_dict())


def test_the_variables_of_a_klein(klein, copy, klein_snapshot, monkeypatch):
    """FLUX.1's are left alone, which someone may have set who has both."""
    for part, variable in FLUX1.variables.items():
        monkeypatch.setenv(variable, str(copy / {"autoencoder": "ae.safetensors"}.get(part, "")))
    assert find("klein-4b") == klein_in(klein_snapshot)
    monkeypatch.setenv("FLUX2_AE", str(klein / "ae.safetensors"))
    monkeypatch.setenv("FLUX_QWEN3", str(klein / "text_encoder"))
    monkeypatch.setenv("FLUX2_TOKENIZERS", str(klein))
    assert find("klein-4b") == replace(
        klein_in(klein), transformer=klein_snapshot / "flux-2-klein-base-random.safetensors"
    )
    monkeypatch.setenv("KLEIN_4B", str(klein))
    assert find("klein-4b") == klein_in(klein)


def test_what_a_klein_lacks_is_of_the_same_base_and_size(klein, klein_snapshot, monkeypatch):
    """The distilled one has the text encoder of klein-4b, not klein-9b's; a file by itself likewise."""
    distilled = snapshot_of("klein-4b-distilled", klein_snapshot.parents[2])
    distilled.mkdir(parents=True)
    name = "flux-2-klein-4b.safetensors"
    shutil.copy(klein / "flux-2-klein-base-random.safetensors", distilled / name)
    shutil.copytree(klein / "tokenizer", distilled / "tokenizer")
    expected = replace(klein_in(klein_snapshot), transformer=distilled / name)
    assert find("klein-4b-distilled") == replace(expected, tokenizers=distilled)
    with pytest.raises(FileNotFoundError, match="lacks autoencoder, qwen3, .*no known FLUX.2 has the same"):
        find(distilled / name)  # 96 channels are neither 4B's nor 9B's
    shutil.rmtree(distilled / "tokenizer")
    monkeypatch.setitem(FLUX2.models, 96, FLUX2.models[7680])
    assert find(distilled / name) == expected
    somebody = snapshot_of("somebody/klein", klein_snapshot.parents[2])
    shutil.copytree(distilled, somebody)
    assert find("somebody/klein") == replace(expected, transformer=somebody / name)


def test_the_free_tokenizer_of_a_klein(klein, snapshot, tmp_path):
    folder = Path(shutil.copytree(klein, tmp_path / "single"))
    free = snapshot_of("Qwen/Qwen3-4B", snapshot.parents[2])
    free.parent.mkdir(exist_ok=True)
    shutil.move(folder / "tokenizer", free)
    files = find(folder)
    assert files == replace(klein_in(folder), tokenizers=(free,))
    assert_encodes_alike(files, find_files(str(klein)))
    (free / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks tokenizers"):
        find(folder)


def test_parts_of_other_bases_and_sizes_are_refused(klein, model, snapshot, tmp_path):
    wide = replace(flux.load_qwen3(klein / "text_encoder", "meta").sizes, hidden_size=40)
    save_file(randomize(flux.Qwen3(wide)).state_dict(), tmp_path / "qwen_3_8b.safetensors")
    z8 = AutoEncoderSizes(3, 32, (1, 1, 1), encoder_blocks=0, decoder_blocks=1, z_channels=8, packed=True)
    save_file(randomize(flux.AutoEncoder(z8)).state_dict(), tmp_path / "flux2-vae.safetensors")
    for given, message in (
        ({"qwen3": tmp_path / "qwen_3_8b.safetensors"}, "qwen_3_8b.* 120 channels of text, .* wants 96 ch"),
        (
            {"autoencoder": tmp_path / "flux2-vae.safetensors"},
            "has 32 channels in packed latents",
        ),
        (
            {"autoencoder": model / "ae.safetensors"},
            "16 channels in 2 x 2 latents, .* wants 16 channels in packed latents",
        ),
        ({"qwen3": model / "text_encoder_2"}, "not a Qwen3 checkpoint: this is T5"),
        ({"t5": model / "text_encoder_2"}, "is FLUX.2, which has no t5 but qwen3"),
    ):
        with pytest.raises(UserError, match=message):
            find(klein, **given)
    with pytest.raises(UserError, match="packed latents, .*flux1-random.* wants 16 .* 2 x 2 latents"):
        find(model, autoencoder=klein / "ae.safetensors")
    with pytest.raises(UserError, match="is FLUX.1, which has no qwen3 but clip and t5"):
        find(model, qwen3=klein / "text_encoder")


def test_the_files_of_a_repository():
    """Of BFL's, which have a single file beside diffusers' folders."""
    names = ["flux-2-klein-base-4b.safetensors", "README.md", "model_index.json"]
    names += [f"tokenizer/{x}" for x in ("tokenizer.json", "vocab.json", "merges.txt")]
    index = "model.safetensors.index.json"
    text = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", index]
    names += [f"text_encoder/{x}" for x in [*text, "generation_config.json"]]
    weights = ["config.json", "diffusion_pytorch_model.safetensors"]
    names += [f"{folder}/{x}" for folder in ("transformer", "vae") for x in weights]
    chosen = {part: hub_names(FLUX2, "repo", names, part) for part in FLUX2.parts}
    assert chosen == {
        "transformer": names[:1],
        "autoencoder": [f"vae/{x}" for x in weights],
        "qwen3": [f"text_encoder/{x}" for x in text],
        "tokenizers": ["tokenizer/tokenizer.json"],
    }


@pytest.mark.parametrize(
    "place, index, distilled",
    [
        ("flux-2-klein-4b.safetensors", None, True),
        ("flux2_klein_4b.safetensors", None, True),
        ("flux2_klein_base_4b.safetensors", None, False),
        ("flux-2-klein-9b-fp8.safetensors", None, True),
        ("flux-2-klein-base-4b.safetensors", None, False),
        ("klein-4b/flux-2-klein-base-4b.safetensors", None, False),
        ("klein-4b/mine.safetensors", None, True),
        ("models--black-forest-labs--FLUX.2-klein-9B/snapshots/0/transformer", None, True),
        ("models--black-forest-labs--FLUX.2-klein-base-9B/snapshots/0/transformer", None, False),
        ("mine.safetensors", None, False),
        ("mine.safetensors", {"is_distilled": True}, True),
        ("klein-4b/transformer", {"is_distilled": False}, False),
        ("klein-4b/transformer", {"_class_name": "Flux2KleinPipeline"}, True),
    ],
)
def test_a_distilled_klein_is_told(place, index, distilled, tmp_path):
    files = replace(klein_in(tmp_path), transformer=tmp_path / place)
    if index is not None:
        files.folder.mkdir(parents=True, exist_ok=True)
        (files.folder / "model_index.json").write_text(json.dumps(index))
    few = {"steps": 4, "cfg": 1.0}
    assert flux.default_sampler(files) == Flux2.SAMPLER | (few if distilled else {})
    assert flux.default_sampler(replace(files, base=FLUX1)) == flux.Flux.SAMPLER
