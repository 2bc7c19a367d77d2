"""LoRA files of every origin against diffusers and PEFT, all formats to and fro, merging, broken files."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import difference, randomize
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_bases import BOTH, FLUX1, FLUX2, SmallBase
from test_metalora import META, adapted, reader_for_our_width  # noqa: F401
from test_model import DEV
from torch import Tensor

from flux.checkpoint import read_tensors
from flux.model import Flux
from lora import merging
from lora.__main__ import main
from lora.names import FORMATS, Lora
from lora.reading import read_lora, split_fused
from lora.writing import name_tensors
from metalora import (
    adapters,
    collapse,
    eject,
    export_lora,
    inject_loras,
    linear_names,
    load_lora,
    save_meta,
    split_loras,
)

OUTSIDE = ["x_embedder", "context_embedder", "proj_out", "norm_out.linear"]
OUTSIDE += [
    f"time_text_embed.{kind}_embedder.linear_{n}" for kind in ("timestep", "text", "guidance") for n in (1, 2)
]

OUTSIDE_OF_FLUX2 = ["x_embedder", "context_embedder", "proj_out", "norm_out.linear"]
OUTSIDE_OF_FLUX2 += [f"time_guidance_embed.timestep_embedder.linear_{n}" for n in (1, 2)]
OUTSIDE_OF_FLUX2 += [
    f"{name}.linear"
    for name in (
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    )
]

ROOT = Path(__file__).parents[1]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "person.safetensors"


def run(*argv: object) -> None:
    main([str(word) for word in argv])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


def updates(lora: Lora) -> dict[str, Tensor]:
    return {part: b.double() @ a.double() for part, (a, b) in lora.items()}


def assert_same_updates(ours: Lora, theirs: Lora) -> None:
    ours, theirs = updates(ours), updates(theirs)
    assert ours.keys() == theirs.keys()
    for part, update in theirs.items():
        assert update.abs().max() > 0.01
        assert difference(ours[part], update) < 1e-6 * update.abs().max(), part


# --- Our own three formats ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("r2", [1, 4])
def test_three_factors_to_diffusers_to_kohya_to_original_and_back(r2, base, path, tmp_path):
    kohya, original, back = (tmp_path / f"{name}.safetensors" for name in ("kohya", "original", "back"))
    model = adapted(r2, base=base)
    export_lora(model, path, META, slot=1)
    run("convert", path, kohya, "--format", "kohya")
    run("convert", kohya, original, "--format", "original")
    run("convert", original, back, "--format", "diffusers")
    exact = {part: (a.half(), b.half()) for part, (a, b) in collapse(model, 1).items()}
    for file in (path, kohya, original, back):
        assert_same_updates(read_lora(file)[0], exact)
    assert load_file(path).keys() == load_file(back).keys()
    export_lora(model, kohya, META, slot=1, form="kohya")
    direct = load_file(kohya)
    parts_of = dict(linear_names(model))
    assert {key.split(".")[0] for key in direct} == {f"lora_unet_{n.replace('.', '_')}" for n in parts_of}
    for name, parts in parts_of.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        assert direct[f"{key}.alpha"] == len(direct[f"{key}.lora_down.weight"]) == r2 * len(parts)
        assert direct[f"{key}.lora_up.weight"].shape[1] == r2 * len(parts)
        for half, theirs in (("A", "down"), ("B", "up")):
            key_of_half = f"diffusion_model.{name}.lora_{half}.weight"
            assert torch.equal(load_file(original)[key_of_half], direct[f"{key}.lora_{theirs}.weight"])
    assert len(load_file(original)) == 2 * len(parts_of)


@torch.no_grad()
@BOTH
def test_original_names_are_those_of_the_weights_that_change(base, path):
    """What ComfyUI does with them: B A is added to the weight of that name."""
    model, expected = base.model(), base.model()
    export_lora(adapted(r2=2, base=base), path, META, slot=1, form="original")
    tensors = load_file(path)
    for key in [key for key in tensors if "lora_A" in key]:
        layer = expected.get_submodule(key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight"))
        layer.weight += tensors[key.replace("lora_A", "lora_B")].float() @ tensors[key].float()
    load_lora(model, path)
    assert difference(model(**base.inputs), expected(**base.inputs)) < 1e-5
    assert difference(base.model()(**base.inputs), expected(**base.inputs)) > 0.01


@pytest.mark.parametrize("r2", [1, 4])
def test_diffusers_own_reader_takes_kohyas_names_at_full_width(r2, path):
    """One block of each kind with FLUX.1-dev's sizes, through diffusers' code as it is."""
    d, lora = 3072, {}
    shapes = {f"single_transformer_blocks.7.attn.to_{x}": (d, d) for x in "qkv"}
    shapes |= {f"transformer_blocks.3.attn.add_{x}_proj": (d, d) for x in "qkv"}
    shapes |= {
        "single_transformer_blocks.7.proj_mlp": (4 * d, d),
        "transformer_blocks.3.ff.net.2": (d, 4 * d),
    }
    for seed, (part, (d_out, d_in)) in enumerate(shapes.items()):
        lora[part] = noise(r2, d_in, seed=seed), noise(d_out, r2, seed=-seed - 1)
    save_file(name_tensors(lora, "kohya"), path)
    theirs = FluxPipeline.lora_state_dict(path)
    assert theirs.keys() == name_tensors(lora, "diffusers").keys()
    for part, (a, b) in lora.items():  # on inputs, for at this width the products themselves are large
        their_a, their_b = (theirs[f"transformer.{part}.lora_{x}.weight"].double() for x in "AB")
        x = noise(a.shape[1], 9).double()
        expected = b.double() @ (a.double() @ x)
        assert expected.abs().max() > 0.1
        assert difference(their_b @ (their_a @ x), expected) < 1e-6 * expected.abs().max(), part


def test_parts_left_alone_stay_alone(path):
    """Fused layers of which only some parts are adapted, with ranks of their own."""
    d, block = DEV.hidden_size, "single_transformer_blocks.2"
    lora = {
        f"{block}.attn.to_q": (noise(1, d), noise(d, 1)),
        f"{block}.attn.to_v": (noise(2, d), noise(d, 2)),
    }
    save_file(name_tensors(lora, "kohya"), path)
    assert load_file(path)["lora_unet_single_blocks_2_linear1.lora_up.weight"].shape == (7 * d, 3)
    found = updates(read_lora(path, Flux(DEV))[0])
    for part, update in updates(lora).items():
        assert difference(found.pop(part), update) < 1e-6
    assert not any(update.any() for update in found.values())


# --- LoRAs made elsewhere ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "base, special, layers",
    [
        (FLUX1, "proj_mlp", ["attn.to_k", "attn.add_v_proj", "ff.net.2", *OUTSIDE]),
        (FLUX2, "attn.to_qkv_mlp_proj", ["attn.to_k", "attn.add_v_proj", "ff.linear_out", *OUTSIDE_OF_FLUX2]),
    ],
    ids=["flux1", "flux2"],
)
@pytest.mark.parametrize("alpha, rslora", [(4, False), (2, False), (3, True)])
def test_a_lora_by_peft_saved_by_diffusers(alpha, rslora, base, special, layers, tmp_path):
    """Also layers outside the blocks, and alpha, which diffusers keeps in the header alone."""
    ours, theirs = base.both()
    without, layers = ours(**base.inputs), [special, *layers]
    config = LoraConfig(
        r=4, lora_alpha=alpha, use_rslora=rslora, target_modules=layers, alpha_pattern={special: 1}
    )
    theirs.add_adapter(config)
    for seed, (name, p) in enumerate(theirs.named_parameters()):
        if "lora_" in name:
            p.copy_(noise(*p.shape, seed=seed) / 2)
    base.pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(theirs),
        transformer_lora_adapter_metadata=json.loads(json.dumps(config.to_dict(), default=list)),
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    load_lora(ours, file)
    expected = base.their_velocity(theirs)
    assert difference(ours(**base.inputs), expected) < 1e-5
    assert difference(without, expected) > 0.01

    for form in FORMATS:  # alpha is multiplied in once and for all
        run("convert", file, tmp_path / f"{form}.safetensors", "--format", form)
        again = base.model()
        load_lora(again, tmp_path / f"{form}.safetensors")
        assert difference(again(**base.inputs), expected) < 1e-5


def test_pefts_own_folder(tmp_path):
    file, d = tmp_path / "adapter_model.safetensors", DEV.hidden_size
    part = "transformer_blocks.0.attn.to_q"
    a, b = noise(4, d), noise(d, 4)
    save_file({f"base_model.model.{part}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}, file)
    for settings, factor in (({}, 1), ({"r": 4, "lora_alpha": 2}, 0.5)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        assert difference(updates(read_lora(file)[0])[part], factor * b.double() @ a.double()) < 1e-6
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": "many"}')
    with pytest.raises(ValueError, match="PEFT's settings .* cannot be read"):
        read_lora(file)


def fused(rank: int, base: SmallBase = FLUX1) -> dict[str, tuple[Tensor, Tensor]]:
    """Return updates by our own layer names in which q, k and v share lora_A, as kohya trains them."""
    model = base.model()
    shapes = {name: model.get_submodule(name).weight.shape for name, _ in linear_names(model)}
    return {
        name: (noise(rank, d_in, seed=k), noise(d_out, rank, seed=-k - 1))
        for k, (name, (d_out, d_in)) in enumerate(shapes.items())
    }


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("alpha", [None, 1.0, 8.0])
def test_kohyas_fused_layers_as_diffusers_reads_them(alpha, base, path, tmp_path, reader_for_our_width):  # noqa: F811
    tensors = {}
    for name, (a, b) in fused(4, base).items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a / 8, f"{key}.lora_up.weight": b}
        tensors |= {f"{key}.alpha": torch.tensor(alpha)} if alpha else {}
    save_file(tensors, path)
    ours, theirs = base.both()
    without = ours(**base.inputs)
    load_lora(ours, path)
    base.pipeline_of(theirs).load_lora_weights(path)
    assert difference(ours(**base.inputs), base.their_velocity(theirs)) < 1e-5
    assert difference(ours(**base.inputs), without) > 0.01

    run("convert", path, tmp_path / "split.safetensors", "--format", "diffusers")
    assert_same_updates(read_lora(tmp_path / "split.safetensors")[0], read_lora(path)[0])


SPELLINGS = {  # of one layer's lora_A and lora_B, and its alpha
    "ai-toolkit": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", "transformer.{}.alpha"),
    "old diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", "{}.alpha"),
    "peft": (
        "base_model.model.{}.lora_A.default.weight",
        "base_model.model.{}.lora_B.default.weight",
        "{}.alpha",
    ),
    "comfyui": (
        "diffusion_model.{}.lora_A.weight",
        "diffusion_model.{}.lora_B.weight",
        "diffusion_model.{}.alpha",
    ),
    "down and up": (
        "transformer.{}.lora_down.weight",
        "transformer.{}.lora_up.weight",
        "transformer.{}.alpha",
    ),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight", "{}.alpha"),
    "flat": (
        "lora_transformer_{}.lora_down.weight",
        "lora_transformer_{}.lora_up.weight",
        "lora_transformer_{}.alpha",
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "layer, part",
    [
        ("double_blocks.1.txt_attn.proj", "transformer_blocks.1.attn.to_add_out"),
        ("final_layer.linear", "proj_out"),
        ("img_in", "x_embedder"),
    ],
)
def test_spellings(spelling, layer, part, path):
    """Whoever named the layer, with alpha and without, the weight moves by alpha / rank B A."""
    weight = Flux(DEV).get_submodule(layer).weight
    a, b = noise(4, weight.shape[1]), noise(len(weight), 4)
    for name in (layer, part):
        name = name.replace(".", "_") if spelling == "flat" else name
        for alpha in (None, 2.0):
            values = dict(zip((key.format(name) for key in SPELLINGS[spelling]), (a, b)))
            if alpha:
                values[SPELLINGS[spelling][2].format(name)] = torch.tensor(alpha)
            save_file(values, path)
            model = randomize(Flux(DEV))
            before = model.get_submodule(layer).weight.clone()
            load_lora(model, path)
            update = (alpha or 4) / 4 * b @ a
            assert difference(model.get_submodule(layer).weight - before, update) < 1e-6


def test_the_last_modulation_is_swapped_in_diffusers_alone(path):
    """Under FLUX.1's own name the rows are added as they stand."""
    d = DEV.hidden_size
    a, b = noise(2, d), noise(2 * d, 2)
    key = "lora_unet_final_layer_adaLN_modulation_1"
    save_file({f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}, path)
    model = randomize(Flux(DEV))
    weight = model.final_layer.adaLN_modulation[1].weight.clone()
    load_lora(model, path)
    assert difference(model.final_layer.adaLN_modulation[1].weight - weight, b @ a) < 1e-6
    tensors = name_tensors(read_lora(path)[0], "kohya")
    assert torch.equal(tensors[f"{key}.lora_up.weight"], b)


def test_a_fused_update_is_split_only_where_it_is_block_diagonal():
    a, b = noise(4, 6), torch.block_diag(noise(6, 2), noise(9, 2))
    for rows, ranks in ((b, [2, 2]), (b + 1, [4, 4]), (b[:, :3], [3, 3])):
        parts = split_fused(a[: rows.shape[1]], rows, [6, 9])
        assert [len(down) for down, _ in parts] == ranks
        assert difference(torch.cat([up @ down for down, up in parts]), rows @ a[: rows.shape[1]]) < 1e-6


# --- Merging into a file -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_merging_into_a_file_is_merging_into_the_model(prefix, base, path, tmp_path):
    """Several LoRAs, one of them fused and outside the blocks; what they do not name stays as it is."""
    checkpoint, other, out = (tmp_path / f"{name}.safetensors" for name in ("flux-x", "other", "out"))
    model = base.model().bfloat16()
    state = {prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    extra = {
        "vae.conv.weight": noise(3, 2, 1, 1),
        "step": torch.tensor(3),
        "none": torch.zeros(0, dtype=torch.float8_e4m3fn),
    }
    stale = {"modelspec.hash_sha256": "0x0", "sshs_model_hash": "0"}
    save_file({**state, **extra}, checkpoint, {"about": "ä base", **stale})
    export_lora(adapted(base=base), path, META)
    tensors = {"lora_unet_img_in.lora_down.weight": noise(2, DEV.in_channels)}
    save_file(tensors | {"lora_unet_img_in.lora_up.weight": noise(DEV.hidden_size, 2)}, other)
    run("merge", checkpoint, out, "--lora", path, other, "--strength", 0.8, -1)

    before, exact = checkpoint.read_bytes(), model.float()
    load_lora(exact, path, 0.8)
    load_lora(exact, other, -1)
    found, kept = load_file(out), load_file(checkpoint)
    assert list(found) == list(kept)
    for name, tensor in exact.state_dict().items():
        assert torch.equal(found[prefix + name], tensor.bfloat16()), name
    assert all(
        torch.equal(found[name].view(torch.uint8), kept[name].view(torch.uint8))
        for name in ("vae.conv.weight", "none")
    )
    assert found["step"] == 3 and found["step"].dtype == torch.int64
    assert not torch.equal(found[prefix + "img_in.weight"], kept[prefix + "img_in.weight"])
    name, lora = "single_blocks.1.linear2.weight", read_lora(path)[0]
    exact = kept[prefix + name].double() + 0.8 * updates(lora)[f"single_transformer_blocks.1.{base.last}"]
    assert (found[prefix + name] == exact.bfloat16()).float().mean() > 0.999  # what is rounded twice differs
    _, metadata = read_tensors(out)
    assert metadata == {"about": "ä base", "modelspec.merged_from": "flux-x, person, other"}
    assert checkpoint.read_bytes() == before
    with pytest.raises(FileExistsError, match="out.safetensors is there already"):
        run("merge", checkpoint, out, "--lora", path)


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(path, tmp_path):
    checkpoint, out = tmp_path / "flux1-x.safetensors", tmp_path / "out.safetensors"
    state = randomize(Flux(DEV)).half().state_dict()
    export_lora(adapted(), path, META)

    def refused(message: str, **changed: Tensor) -> None:
        save_file(
            {**state, **{name.replace("__", "."): tensor for name, tensor in changed.items()}}, checkpoint
        )
        with pytest.raises(ValueError, match=message):
            run("merge", checkpoint, out, "--lora", path)
        assert not list(tmp_path.glob("*out*"))

    refused(
        "(?s)does not fit this model.*blocks.0.norm.linear has lora_A",
        single_blocks__0__modulation__lin__weight=torch.zeros(5, 96),
    )
    refused("holds scaled 8-bit weights", single_blocks__0__linear1__scale_weight=torch.ones(()))
    huge = torch.full_like(state["single_blocks.0.linear2.weight"], 65504)
    tensors = load_file(path)
    name = "transformer.single_transformer_blocks.0.proj_out.lora_{}.weight"
    tensors |= {name.format(x): torch.ones_like(tensors[name.format(x)]) * 99 for x in "AB"}
    save_file(tensors, path)
    refused("linear2.weight has numbers too large for torch.float16", single_blocks__0__linear2__weight=huge)
    state.clear()
    refused("is no FLUX.1 or FLUX.2 file with the original names", x=torch.zeros(1))


def test_merging_into_8_bits_says_what_it_costs(path, tmp_path, recwarn):
    """Of an update of a hundredth of the weights, fp8 keeps little: few of the numbers move."""
    shape = Flux(DEV).get_submodule("double_blocks.0.img_attn.proj").weight.shape
    a, b = noise(1, shape[1]) / 8, noise(shape[0], 1) / 8
    save_file(
        {f"double_blocks.0.img_attn.proj.lora_{x}.weight": tensor for x, tensor in (("A", a), ("B", b))}, path
    )
    moved = {}
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        files = [tmp_path / f"{name}-{dtype}.safetensors" for name in ("flux1-x", "out")]
        save_file(
            {key: tensor.to(dtype) for key, tensor in randomize(Flux(DEV)).state_dict().items()}, files[0]
        )
        run("merge", *files, "--lora", path)
        before, after = (load_file(file)["double_blocks.0.img_attn.proj.weight"].float() for file in files)
        moved[dtype] = (before != after).float().mean()
        told = [warning for warning in recwarn if "is in 8 bits" in str(warning.message)]
        assert len(told) == (dtype == torch.float8_e4m3fn)
    assert moved[torch.float8_e4m3fn] < 0.2 < 0.4 < moved[torch.bfloat16]


def test_merging_needs_room_on_the_disk(path, tmp_path, monkeypatch):
    checkpoint, out = tmp_path / "flux1-x.safetensors", tmp_path / "out.safetensors"
    save_file(randomize(Flux(DEV)).half().state_dict(), checkpoint)
    export_lora(adapted(), path, META)
    room = SimpleNamespace(free=checkpoint.stat().st_size - 1)
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda folder: room)
    with pytest.raises(OSError, match="out.safetensors needs .* GiB are free there"):
        run("merge", checkpoint, out, "--lora", path)
    assert not list(tmp_path.glob("*out*"))


# --- What is wrong with a file -----------------------------------------------------------------------------

OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid.weight": "a Tucker decomposition",
    "hada_w1_a": "LoHa",
    "lokr_w2": "LoKr",
    "oft_blocks": "OFT",
    "oft_blocks.0": "OFT",
    "diff_b": "a full difference",
    "w_norm": "a trained norm",
    "lora_B.bias": "a trained bias",
    "lora_B.default.bias": "a trained bias",
    "a1.weight": "GLoRA",
}


def test_broken_files_each_get_a_clear_error(path, tmp_path):
    export_lora(adapted(), path, META)
    whole = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # else mapped to the file
    for content in (
        whole[:-1],
        whole[:99],
        whole[:4],
        b"",
        b"PK\x03\x04" + whole,
        (2**62).to_bytes(8, "little") + whole,
    ):
        path.write_bytes(content)
        for command in (["info", path], ["convert", path, tmp_path / "out.safetensors", "--format", "kohya"]):
            with pytest.raises(ValueError, match="person.safetensors is not a whole safetensors file"):
                run(*command)
    assert [file.name for file in tmp_path.iterdir()] == ["person.safetensors"]

    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"

    def refused(message: str, **changed: Tensor | None) -> None:
        new = {**tensors, **changed}
        save_file({name: tensor for name, tensor in new.items() if tensor is not None}, path)
        with pytest.raises(ValueError, match=message):
            read_lora(path)

    short = key.removesuffix(".lora_A.weight")
    for value in (torch.nan, torch.inf):
        refused("0.attn.to_q has numbers that are not finite", **{key: tensors[key] * value})
        refused("0.attn.to_q has numbers that are not finite", **{f"{short}.alpha": torch.tensor(value)})
    refused("to_q has an alpha of shape", **{f"{short}.alpha": torch.ones(2)})
    refused(
        "0.attn.to_q has lora_A .96,., must be|0.attn.to_q has lora_A .96,. and", **{key: tensors[key][0]}
    )
    refused(
        "to_q.lora_A.weight duplicates another tensor of this layer",
        **{f"{short}.lora_A.other.weight": tensors[key].clone()},
    )
    refused(
        "(?s)to_queue.lora_A.weight is for no layer.*to_q lacks lora_A",
        **{key: None, key.replace("to_q", "to_queue"): tensors[key]},
    )
    for odd, method in OTHERS.items():
        refused(f"to_q.{odd} is {method}, not LoRA", **{f"{short}.{odd}": torch.ones(1)})
    refused("to_q.dora is for no layer", **{f"{short}.dora": torch.ones(1)})
    for odd in ("double_blocks.#.img_in", "transformer_blocks.#.attn.to_q", "single_blocks.0", "", "a.b"):
        refused("is for no layer", **{f"{odd}.lora_A.weight": torch.ones(1)})
    fused = {
        f"lora_unet_double_blocks_0_img_attn_qkv.lora_{x}.weight": noise(*shape)
        for x, shape in (("down", (1, 96)), ("up", (288, 1)))
    }
    refused("0.attn.to_q is there twice, alone and fused", **fused)
    save_meta(adapted(), path, META)
    with pytest.raises(ValueError, match="is stage 1's file"):
        read_lora(path)


def test_another_method_is_named_first(path):
    lokr = {f"lycoris_{name}.{odd}": torch.ones(1) for name in fused(1) for odd in ("lokr_w1", "alpha")}
    save_file(lokr, path)
    with pytest.raises(ValueError, match=r"read as a LoRA: lycoris_double.*w1 is LoKr, not LoRA \(29 such "):
        read_lora(path)


def test_a_lora_for_another_base_is_refused(path):
    for layer, problem in (
        ("single_blocks_3_linear2", "no single_blocks.3.linear2"),
        ("guidance_in_in_layer", "must be"),
    ):
        d_in = {"g": 255, "s": 480}[layer[0]]
        halves = {"lora_down": noise(1, d_in), "lora_up": noise(96, 1)}
        save_file({f"lora_unet_{layer}.{x}.weight": half for x, half in halves.items()}, path)
        with pytest.raises(ValueError, match=f"(?s)does not fit this model.*{problem}"):
            load_lora(Flux(DEV), path)


def test_a_lora_that_does_nothing_gets_a_warning(path, recwarn):
    export_lora(adapted(), path, META)
    tensors = load_file(path)
    read_lora(path)
    assert not recwarn
    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, path)
    with pytest.warns(UserWarning, match="the LoRA is zero in every layer"):
        read_lora(path)


def test_text_encoders_are_left_out_in_one_line(path, recwarn):
    export_lora(adapted(), path, META)
    own, _ = read_lora(path)
    texts = {f"lora_te1_layers_{k}_fc1.lora_down.weight": noise(2, 2) for k in range(9)}
    save_file({**load_file(path), **texts, "text_encoder.x.lora_A.weight": noise(2)}, path)
    assert read_lora(path)[0].keys() == own.keys()
    assert ["10 tensors for text encoders are left out" in str(w.message) for w in recwarn] == [True]
    save_file(texts, path)
    with pytest.raises(ValueError, match="no tensors of the transformer"):
        read_lora(path)


@torch.no_grad()
def test_layers_outside_the_blocks_have_no_slots(path):
    export_lora(adapted(r2=2), path, META)
    values = {"transformer.x_embedder.lora_A.weight": noise(2, DEV.in_channels)}
    save_file({**load_file(path), **values, "transformer.x_embedder.lora_B.weight": noise(96, 2)}, path)
    lora, _ = read_lora(path)
    model = randomize(Flux(DEV))
    with pytest.raises(ValueError, match="have no slots: .*x_embedder"):
        inject_loras(model, [[(lora, 1.0)]])
    ((inside, strength),), ((outside, _),) = split_loras(model, [(lora, 0.5)])
    assert [*outside] == ["x_embedder"] and inside | outside == lora and strength == 0.5
    assert split_loras(model, [(outside, 1.0)]) == ([], [(outside, 1.0)])


# --- info --------------------------------------------------------------------------------------------------


@BOTH
def test_info_says_what_a_file_is(base, path, tmp_path, capsys):
    model = adapted(r2=2, base=base)
    about = {"method": "meta-lora", "base_model": "flux-x.safetensors", "steps": 375}
    count = len(collapse(model))
    for form in FORMATS:
        export_lora(model, file := tmp_path / f"{form}.safetensors", about, slot=1, form=form)
        run("info", file)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{file}: meta-lora, {form} format, one adapter of {count} projections, ")
        assert lines[1] == "rank 2; base flux-x.safetensors"
        assert "  r1: 6" in lines and "  steps: 375" in lines
        norms = {name: float(norm) for _, norm, name in map(str.split, lines[-count - 1 : -1])}
        expected = {part: update.norm().item() for part, update in updates(collapse(model, 1)).items()}
        assert norms == pytest.approx(expected, rel=1e-2)
        total = sum(norm**2 for norm in expected.values()) ** 0.5
        assert float(lines[-1].split()[0]) == pytest.approx(total, rel=1e-2)
    save_file(load_file(file), path)  # without a header
    run("info", path)
    assert f"base {base.name}\n" in capsys.readouterr().out
    save_meta(adapted(model=eject(model)), path, META)
    run("info", path)
    assert f"stage 1 of Meta-LoRA, meta_down of {len(adapters(model))} layers" in capsys.readouterr().out
    save_file({"x.meta_down": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"should be \(parts, r1, d_in\)"):
        run("info", path)


def test_nothing_from_a_file_reaches_the_terminal_raw(path, capsys):
    evil = "\x1b]0;title\x07\x1b[2J\r\n\x9b31m\u202e\u2028" + "x" * 9999
    export_lora(adapted(), path, {"caption": evil, "method": evil, "base_model": evil, evil: "ä 写真"})
    run("info", path)
    out = capsys.readouterr().out
    assert "ä 写真" in out and len(out) < 12_000
    assert all(c.isprintable() or c == "\n" for c in out)
    save_file({f"{evil}.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError) as error:
        run("info", path)
    assert all(c.isprintable() or c == "\n" for c in str(error.value)) and len(str(error.value)) < 1000


def test_python_m_lora_runs_it(path):
    """A mistake of the user ends with one line; what a whole file gives is tested above."""
    path.write_text("no LoRA")
    command = [sys.executable, "-m", "lora", "info", path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("lora: ") and "not a whole safetensors file" in done.stderr
