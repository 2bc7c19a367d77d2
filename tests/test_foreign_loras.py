"""LoRAs of other programs and for other models: read as diffusers reads them, or named for what they are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compare import difference
from diffusers import FluxPipeline
from safetensors.torch import save_file
from small_bases import FLUX1
from test_lora_files import noise, run, updates
from torch import Tensor

from lora.reading import read_lora

WIDTH = 48


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "foreign.safetensors"


def theirs(path: Path) -> dict[str, Tensor]:
    """Return the updates that diffusers' own reader finds in a file, by our names of the parts."""
    state = FluxPipeline.lora_state_dict(path)
    parts = {key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")}
    pairs = {part: [state[f"{part}.lora_{half}.weight"].double() for half in "BA"] for part in parts}
    return {part.removeprefix("transformer."): b @ a for part, (b, a) in pairs.items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(difference(ours[x], theirs[x]) < 1e-6 for x in theirs)


# --- Read --------------------------------------------------------------------------------------------------

XLABS = {  # rows of lora_B relative to the inputs
    "double_blocks.0.processor.qkv_lora1": 3,
    "double_blocks.0.processor.qkv_lora2": 3,
    "double_blocks.0.processor.proj_lora1": 1,
    "double_blocks.0.processor.proj_lora2": 1,
    "single_blocks.1.processor.qkv_lora": 3,
    "single_blocks.1.processor.proj_lora": 1,
}


def xlabs(prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for seed, (name, rows) in enumerate(XLABS.items()):
        inputs = 5 * WIDTH if name.startswith("single") and rows == 1 else WIDTH
        tensors[f"{prefix}{name}.down.weight"] = noise(4, inputs, seed=seed)
        tensors[f"{prefix}{name}.up.weight"] = noise(rows * WIDTH, 4, seed=-seed - 1)
    return tensors


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_as_diffusers_reads_it(prefix, path):
    save_file(xlabs(prefix), path)
    ours = updates(read_lora(path)[0])
    assert len(ours) == 3 + 3 + 1 + 1 + 3 + 1 and same(ours, theirs(path))
    swapped = {
        key.replace("lora1", "?").replace("lora2", "lora1").replace("?", "lora2"): tensor
        for key, tensor in xlabs(prefix).items()
    }
    save_file(swapped, path)
    assert not same(ours, theirs(path))  # had we taken image for text, it would show


def kohya(rank: int = 2) -> dict[str, Tensor]:
    tensors = {}
    for seed, layer in enumerate(("double_blocks_0_img_attn_proj", "double_blocks_0_txt_attn_qkv")):
        rows = WIDTH * (3 if layer.endswith("qkv") else 1)
        tensors[f"lora_unet_{layer}.lora_down.weight"] = noise(rank, WIDTH, seed=seed)
        tensors[f"lora_unet_{layer}.lora_up.weight"] = noise(rows, rank, seed=-seed - 1)
        tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(1.0)
    return tensors


ZEROS = {  # names in ComfyUI's and in kohya's way, as LoRAs extracted from checkpoints have them
    "diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale.diff": (16,),
    "diffusion_model.double_blocks.0.img_attn.proj.diff_b": (WIDTH,),
    "lora_unet_double_blocks_0_img_attn_proj.diff_b": (WIDTH,),
}


def test_comfyuis_zeros_are_left_out_with_a_line(path):
    save_file(kohya(), path)
    expected = updates(read_lora(path)[0])
    zeros = {key: torch.zeros(shape) for key, shape in ZEROS.items()}
    zeros["transformer.transformer_blocks.0.attn.to_out.0.lora_B.bias"] = torch.zeros(WIDTH)
    save_file(kohya() | zeros, path)
    with pytest.warns(UserWarning, match="4 tensors of biases, norms and .* all zero are left out"):
        assert same(updates(read_lora(path)[0]), expected)
    save_file(kohya() | {key: tensor for key, tensor in zeros.items() if "lora_B" not in key}, path)
    with pytest.warns(UserWarning, match="3 tensors"):
        assert same(updates(read_lora(path)[0]), theirs(path))
    for key, tensor in zeros.items():
        save_file(kohya() | zeros | {key: tensor + 1e-3}, path)
        with pytest.raises(ValueError, match="(a full difference|a trained bias), not LoRA"):
            read_lora(path)


@pytest.mark.parametrize(
    "kind, key",
    [
        ("of embeddings", "bundle_emb.anna.clip_l"),
        ("of embeddings", "bundle_emb.a.t5"),
        ("for text encoders", "clip_l.text_model.encoder.layers.0.mlp.fc1.alpha"),
        ("for text encoders", "t5.encoder.block.0.layer.1.lora_up.weight"),
        ("for text encoders", "text_encoders.t5xxl.transformer.x.lora_up.weight"),
        ("for text encoders", "lora_te2_encoder_block_0_layer_0.alpha"),
    ],
)
def test_what_is_not_the_transformers_is_left_out_with_a_line(kind, key, path):
    save_file(kohya(), path)
    expected = updates(read_lora(path)[0])
    save_file(kohya() | {key: noise(2, 3)}, path)
    with pytest.warns(UserWarning, match=f"1 tensors {kind} are left out"):
        assert same(updates(read_lora(path)[0]), expected)


def test_onetrainers_numbered_parts(path):
    """Its names of today (OMI) are FLUX.1's, with the parts of fused layers counted; before, diffusers'."""
    pairs = {
        f"single_blocks.1.linear1.{k}": f"single_transformer_blocks_1_{part}"
        for k, part in enumerate(("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"))
    }
    pairs |= {
        f"double_blocks.0.txt_attn.qkv.{k}": f"transformer_blocks_0_attn_add_{x}_proj"
        for k, x in enumerate("qkv")
    }
    pairs |= {"img_in.proj": "x_embedder", "final_layer.adaLN_modulation.1": "norm_out_linear"}
    new, old = {}, {}
    for seed, (name, older) in enumerate(pairs.items()):
        rows = WIDTH * (4 if name.endswith("1.3") else 2 if "final" in name else 1)
        a, b = noise(2, WIDTH, seed=seed), noise(rows, 2, seed=-seed - 1)
        swapped = torch.cat(b.chunk(2)[::-1]) if "final" in name else b
        for tensors, key, up in (
            (new, f"transformer.{name}", b),
            (old, f"lora_transformer_{older}", swapped),
        ):
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": up.contiguous()}
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(old, path)
    expected = updates(read_lora(path)[0])
    save_file(
        {key: tensor for key, tensor in old.items() if "proj_mlp" not in key}, path
    )  # diffusers has no such
    found = theirs(path)
    assert len(expected) == 9 == len(found) + 1 and same({x: expected[x] for x in found}, found)
    save_file(new, path)
    assert same(updates(read_lora(path)[0]), expected)
    keys = (
        "transformer.single_blocks.1.linear1.0.lora_up.weight",
        "transformer.single_blocks.1.linear1.1.lora_up.weight",
    )
    save_file(new | dict(zip(keys, (new[keys[1]], new[keys[0]]))), path)
    assert not same(updates(read_lora(path)[0]), expected)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_model_diffusion_model_double_blocks_0_img_attn_proj",  # kohya's extraction
        "lora_unet_transformer_blocks_0_attn_to_out_0_",  # an underscore at the end
        "transformer.base_model.model.transformer_blocks.0.attn.to_out.0",  # SimpleTuner's first
        "base_model.model.double_blocks.0.img_attn.proj",  # fal's trainer of Kontext
        "model.diffusion_model.double_blocks.0.img_attn.proj",
        "unet.double_blocks.0.img_attn.proj",
    ],
)
def test_prefixes(name, path):
    a, b = noise(2, WIDTH), noise(WIDTH, 2)
    save_file({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}, path)
    (found,) = updates(read_lora(path)[0]).items()
    assert found[0] == "transformer_blocks.0.attn.to_out.0" and difference(found[1], (b @ a).double()) < 1e-6


def test_mflux_numbers_the_mlps_and_writes_no_suffix(path):
    pairs = {
        f"transformer_blocks.3.{ff}.linear{n}": f"transformer_blocks.3.{ff}.net.{x}"
        for ff in ("ff", "ff_context")
        for n, x in ((1, "0.proj"), (2, "2"))
    } | {"transformer_blocks.3.attn.to_out.0": "transformer_blocks.3.attn.to_out.0"}
    factors = {name: (noise(2, WIDTH, seed=k), noise(WIDTH, 2, seed=-k - 1)) for k, name in enumerate(pairs)}
    save_file(
        {
            f"transformer.{name}.lora_{half}": tensor
            for name, pair in factors.items()
            for half, tensor in zip("AB", pair)
        },
        path,
    )
    expected = {pairs[name]: (b @ a).double() for name, (a, b) in factors.items()}
    assert same(updates(read_lora(path)[0]), expected)


def test_mixed_ranks_without_alpha_each_have_strength_one(path):
    names = {"transformer_blocks.0.attn.to_out.0": 8, "transformer_blocks.0.attn.to_add_out": 2}
    pairs = {name: (noise(rank, WIDTH), noise(WIDTH, rank)) for name, rank in names.items()}
    save_file(
        {
            f"transformer.{name}.lora_{half}.weight": tensor
            for name, pair in pairs.items()
            for half, tensor in zip("AB", pair)
        },
        path,
    )
    assert same(updates(read_lora(path)[0]), {name: (b @ a).double() for name, (a, b) in pairs.items()})


# --- Named -------------------------------------------------------------------------------------------------


def lora_of(name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": noise(1, inputs), f"{name}.lora_B.weight": noise(outputs, 1)}


OTHERS = {
    "Depth": (lora_of("img_in", 128, 3072), "a LoRA for FLUX.1-Canny or FLUX.1-Depth.*img_in has 128 inputs"),
    "Fill": (
        lora_of("transformer.x_embedder", 384, 3072),
        "a LoRA for FLUX.1-Fill.*x_embedder has 384 inputs",
    ),
    "SD3": (lora_of("transformer.transformer_blocks.0.attn.to_q", 1536, 1536), "LoRA for Stable Diffusion 3"),
    "SD3 of kohya": (
        lora_of("lora_unet_joint_blocks_0_x_block_attn_qkv", 8, 24),
        "LoRA for Stable Diffusion 3",
    ),
    "SDXL": (lora_of("lora_unet_input_blocks_4_1_proj_in", 8, 8), "a LoRA for Stable Diffusion 1, 2 or XL"),
    "SDXL of diffusers": (
        lora_of("unet.down_blocks.0.attn1.to_q", 8, 8),
        "LoRA for Stable Diffusion 1, 2 or XL",
    ),
    "Qwen": (lora_of("transformer.transformer_blocks.0.img_mlp.net.2", 8, 8), "a LoRA for Qwen-Image"),
    "Wan": (lora_of("diffusion_model.blocks.0.self_attn.q", 8, 8), "a LoRA for Wan"),
    "HunyuanVideo": (lora_of("transformer.double_blocks.0.img_mlp.fc1", 8, 8), "a LoRA for HunyuanVideo"),
    "a checkpoint": (
        {"model.diffusion_model.img_in.weight": noise(4, 4)},
        "a file of whole weights, not a LoRA",
    ),
    "Redux": ({"redux_up.weight": noise(4, 4)}, "is FLUX.1-Redux, an image encoder"),
    "IP-Adapter": (
        {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": noise(4, 4)},
        "IP-Adapter",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tensors, message", OTHERS.values(), ids=OTHERS)
def test_loras_for_other_models_are_named_by_all_commands(tensors, message, path, tmp_path):
    save_file(tensors, path)
    model = tmp_path / "flux1-x.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": noise(24, 8)}, model)
    out = tmp_path / "out.safetensors"
    for words in (
        ["info", path],
        ["convert", path, out, "--format", "kohya"],
        ["merge", model, out, "--lora", path],
    ):
        with pytest.raises(
            ValueError, match=f"(?s)foreign.safetensors .*{message}.*accepted are LoRAs for FLUX.1 .*; FLUX.2"
        ):
            run(*words)


def test_a_lora_for_flux1_at_full_width_is_not_taken_for_anothers(path):
    names = {
        "img_in": (64, 3072),
        "double_blocks.0.img_attn.qkv": (3072, 9216),
        "double_blocks.0.img_mlp.0": (3072, 12288),
        "single_blocks.0.linear1": (3072, 21504),
        "txt_in": (4096, 3072),
    }
    save_file(
        {key: tensor for name, shape in names.items() for key, tensor in lora_of(name, *shape).items()}, path
    )
    assert len(read_lora(path)[0]) == 1 + 3 + 1 + 4 + 1


def test_a_header_that_names_another_base_gets_a_line(path, recwarn):
    save_file(
        kohya(), path, {"modelspec.architecture": "flux-1-dev/lora", "ss_sd_model_name": "flux1-dev.sft"}
    )
    read_lora(path)
    assert not recwarn
    for base in ("flux.1_kontext", "black-forest-labs/FLUX.1-Fill-dev", "flux2_klein_4b"):
        save_file(kohya(), path, {"ss_base_model_version": base})
        model = FLUX1.kind(replace(FLUX1.sizes, hidden_size=WIDTH, num_heads=3, axes=(4, 6, 6)))
        with pytest.warns(UserWarning, match=f"its header names another base than FLUX.1-dev: {base}"):
            read_lora(path, model)


@pytest.mark.parametrize(
    "name, shape", [("double_blocks.0.img_attn.proj", (WIDTH, WIDTH)), ("time_in.out_layer", (WIDTH, WIDTH))]
)
def test_transposed_halves_are_refused(name, shape, path, tmp_path):
    """Of a square layer, where the shapes alone would still be those of a LoRA."""
    a, b = noise(2, shape[1]), noise(shape[0], 2)
    save_file({f"{name}.lora_A.weight": a.T.contiguous(), f"{name}.lora_B.weight": b.T.contiguous()}, path)
    for words in (["info", path], ["convert", path, tmp_path / "out.safetensors", "--format", "kohya"]):
        with pytest.raises(ValueError, match="rank 48 of 2 inputs; are its halves transposed"):
            run(*words)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, path)
    run("info", path)


def test_a_rank_above_the_few_channels_of_the_first_and_last_layer_is_read(path):
    save_file(
        lora_of("img_in", 16, WIDTH)
        | {
            "final_layer.linear.lora_A.weight": noise(32, WIDTH),
            "final_layer.linear.lora_B.weight": noise(16, 32),
            "img_in.lora_A.weight": noise(32, 16),
            "img_in.lora_B.weight": noise(WIDTH, 32),
        },
        path,
    )
    assert len(read_lora(path)[0]) == 2
