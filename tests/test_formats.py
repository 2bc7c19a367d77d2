"""Other programs' names: every published header, what diffusers and transformers write, 8-bit weights."""

import re
from pathlib import Path

import pytest
import test_autoencoder
import test_model
import torch
from compare import difference, randomize, reference
from diffusers import ChromaTransformer2DModel, Flux2Transformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import flux
from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.checkpoint import Checkpoint, fit
from flux.clip import CLIPSizes, CLIPText
from flux.flux2 import Flux2
from flux.formats import Header, is_config_of, kinds_inside
from flux.model import Flux, FluxSizes
from flux.qwen3 import Qwen3
from flux.t5 import T5, T5Sizes

SIZES = {Flux: FluxSizes, AutoEncoder: AutoEncoderSizes, CLIPText: CLIPSizes, T5: T5Sizes}
PREFIX = {
    Flux: "model.diffusion_model.",
    AutoEncoder: "vae.",
    CLIPText: "text_encoders.clip_l.transformer.",
    T5: "text_encoders.t5xxl.transformer.",
}


# --- Published headers -------------------------------------------------------------------------------------


def published(name: str) -> Header:
    return {key: (tuple(shape), dtype) for key, (shape, dtype) in reference(f"{name}.keys").items()}


def cut(header: Header, double: int, single: int) -> Header:
    """Leave out the last blocks, in either naming."""

    def kept(name: str) -> bool:
        kind, _, rest = name.partition("blocks.")
        return not rest or int(rest.split(".")[0]) < (single if kind.startswith("single") else double)

    return {name: entry for name, entry in header.items() if kept(name)}


def in_dtype(header: Header, dtype: str) -> Header:
    return {name: (shape, dtype) for name, (shape, _) in header.items()}


def with_copy(header: Header) -> Header:
    return header | {"encoder.embed_tokens.weight": header["shared.weight"]}


def all_in_one() -> Header:
    """ComfyUI's flux1-dev-fp8.safetensors, with CLIP's projection and the logit scales that it has."""
    parts = {
        Flux: in_dtype(published("flux1-dev"), "F8_E4M3"),
        AutoEncoder: published("ae"),
        CLIPText: in_dtype(published("clip_l"), "F16") | {"text_projection.weight": ((768, 768), "F16")},
        T5: in_dtype(published("t5xxl"), "F8_E4M3"),
    }
    header = {PREFIX[kind] + name: entry for kind, part in parts.items() for name, entry in part.items()}
    return header | dict.fromkeys(
        ("text_encoders.clip_l.logit_scale", "text_encoders.t5xxl.logit_scale"), ((), "F32")
    )


def without_prefix(header: Header) -> Header:
    return {name.removeprefix("text_model."): entry for name, entry in header.items()}


HEADERS = {  # and how many of their tensors are not used
    "dev": (Flux, lambda: published("flux1-dev"), 0),
    "schnell": (Flux, lambda: published("flux1-schnell"), 0),
    "dev in diffusers": (Flux, lambda: published("flux1-dev-diffusers"), 0),
    "schnell in diffusers": (Flux, lambda: published("flux1-schnell-diffusers"), 0),
    "lite": (Flux, lambda: cut(published("flux1-dev"), 8, 38), 0),
    "lite in diffusers": (Flux, lambda: cut(published("flux1-dev-diffusers"), 8, 38), 0),
    "mini": (Flux, lambda: cut(published("flux1-dev"), 5, 10), 0),
    "dev in fp8": (Flux, lambda: in_dtype(published("flux1-dev"), "F8_E4M3"), 0),
    "ae": (AutoEncoder, lambda: published("ae"), 0),
    "ae in diffusers": (AutoEncoder, lambda: published("ae-diffusers"), 0),
    "clip_l": (CLIPText, lambda: published("clip_l"), 0),
    "clip_l of transformers 5": (CLIPText, lambda: without_prefix(published("clip_l")), 0),
    "t5xxl": (T5, lambda: published("t5xxl"), 0),
    "t5xxl_fp16": (T5, lambda: in_dtype(with_copy(published("t5xxl")), "F16"), 1),
    "t5xxl_fp8": (T5, lambda: in_dtype(with_copy(published("t5xxl")), "F8_E4M3"), 1),
    "t5xxl_fp8_scaled": (T5, lambda: published("t5xxl_fp8_e4m3fn_scaled"), 2),
    "all in one: FLUX": (Flux, all_in_one, 244 + 197 + 219 + 2),
    "all in one: autoencoder": (AutoEncoder, all_in_one, 780 + 197 + 219 + 2),
    "all in one: CLIP": (CLIPText, all_in_one, 780 + 244 + 219 + 3),
    "all in one: T5": (T5, all_in_one, 780 + 244 + 197 + 2),
}
SOME = ["dev", "dev in diffusers", "ae in diffusers", "clip_l", "t5xxl_fp8_scaled", "all in one: T5"]


def fitted(kind, header: Header):
    checkpoint = Checkpoint(Path("x.safetensors"), dict.fromkeys(header, Path("x.safetensors")), header)
    return fit(kind, SIZES[kind], checkpoint, torch.bfloat16)


@pytest.mark.parametrize("kind, header, unused", HEADERS.values(), ids=HEADERS)
def test_published_headers_are_whole(kind, header, unused):
    """Each parameter comes from somewhere, and each tensor of the file goes to one place or is known."""
    header = header()
    model, sources = fitted(kind, header)
    assert sources.keys() == model.state_dict().keys()
    used = [name for source in sources.values() for name in (*source.names, *filter(None, source.scales))]
    assert len(used) == len(set(used)) == len(header) - unused
    for name, tensor in model.state_dict().items():
        assert sum(torch.Size(header[x][0]).numel() for x in sources[name].names) == tensor.numel()


def test_a_checkpoint_tells_its_parts():
    assert kinds_inside(list(all_in_one())) == {*SIZES}
    for size in ("4b", "8b"):
        names = [
            "model.diffusion_model.double_stream_modulation_img.lin.weight",
            "vae.encoder.conv_in.weight",
        ]
        names += [f"text_encoders.qwen3_{size}.transformer.model.embed_tokens.weight"]
        assert kinds_inside(names) == {Flux2, AutoEncoder, Qwen3}
    assert kinds_inside(list(published("flux1-dev"))) == set()


@pytest.mark.parametrize(
    "kind, names, table",
    [(Flux, "flux1-dev-diffusers", "bfl_to_diffusers"), (AutoEncoder, "ae-diffusers", "ae_to_diffusers")],
    ids=["transformer", "autoencoder"],
)
def test_the_tables_are_the_published_ones(kind, names, table):
    _, sources = fitted(kind, published(names))
    expected = reference(table)
    changes = {"copy": "", "rows": "", "swap_halves_dim0": "swap", "squeeze conv1x1 (C,C,1,1)->(C,C)": "1x1"}
    assert sources.keys() == expected.keys()
    for name, targets in expected.items():
        targets = targets if isinstance(targets, list) else [targets]
        assert sources[name].names == tuple(target["to"] for target in targets)
        assert {sources[name].change} == {changes[target["op"]] for target in targets}


def some(header: Header, kind) -> list[str]:
    """Return tensors from all over the header, of those that are used."""
    names = [name for source in fitted(kind, header)[1].values() for name in source.names]
    return [name for name in names[:: len(names) // 12] if name != "shared.weight"]  # it has two names


@pytest.mark.parametrize("case", SOME)
def test_what_is_dropped_renamed_or_transposed_is_told(case):
    kind, header, _ = HEADERS[case]
    header = header()
    if kind is Flux:  # the whole is fitted above; two blocks of a kind have every name
        header = cut(header, 2, 2)
    model, sources = fitted(kind, header)
    ours = {name: x for x, source in sources.items() for name in source.names}
    for name in some(header, kind):
        dropped = {x: entry for x, entry in header.items() if x != name}
        with pytest.raises(ValueError, match="missing|lacks") as error:
            fitted(kind, dropped)
        assert ours[name].rpartition(".")[0] in str(error.value)
        with pytest.raises(ValueError, match="missing|lacks"):
            fitted(kind, dropped | {f"{name}_": header[name]})
        shape, dtype = header[name]
        if len(set(shape)) > 1:
            with pytest.raises(ValueError, match="must be|cannot be made|not a"):
                fitted(kind, header | {name: (shape[::-1], dtype)})
        with pytest.raises(ValueError, match=f"{ours[name]}.* I32.*must be F64, F32, F16, BF16"):
            fitted(kind, header | {name: (shape, "I32")})


def test_a_scale_that_is_missing_or_too_much():
    header = published("t5xxl_fp8_e4m3fn_scaled")
    name = "encoder.block.3.layer.1.DenseReluDense.wo"
    without = {x: entry for x, entry in header.items() if x != f"{name}.scale_weight"}
    with pytest.raises(ValueError, match=f"missing the scale of {name}.weight, which is F8_E4M3"):
        fitted(T5, without)
    with pytest.raises(ValueError, match=f"unexpected {name}_.scale_weight: it has no weight"):
        fitted(T5, header | {f"{name}_.scale_weight": ((), "F32")})
    with pytest.raises(ValueError, match=rf"{name}.scale_weight is \(4096,\), must be one number"):
        fitted(T5, header | {f"{name}.scale_weight": ((4096,), "F32")})


def test_a_tensor_under_both_names_is_refused():
    header = published("flux1-dev")
    with pytest.raises(ValueError, match="img_in.bias is there twice, as img_in.bias and as x_embedder.bias"):
        fitted(Flux, header | {"x_embedder.bias": header["img_in.bias"]})


def test_uneven_q_k_and_v_are_refused():
    """Their rows add up, so the sum alone would not tell."""
    header = published("flux1-dev-diffusers")
    q, k = (f"transformer_blocks.4.attn.to_{x}.bias" for x in "qk")
    with pytest.raises(ValueError, match=r"qkv.bias cannot be made of .*to_q.bias \(3000,\), .*\(3144,\)"):
        fitted(Flux, header | {q: ((3000,), "BF16"), k: ((3144,), "BF16")})
    with pytest.raises(ValueError, match=r"qkv.bias cannot be made of .*to_q.bias \(\),"):
        fitted(Flux, header | {q: ((), "BF16")})
    without_k = {name: entry for name, entry in header.items() if name != k}
    with pytest.raises(ValueError, match=r"(?s)missing .*to_k.bias.*cannot be made of .*to_q.bias \(\),"):
        fitted(Flux, without_k | {q: ((), "BF16")})


def test_configs_of_the_other_base_are_not_read():
    for kind, name in ((Flux, "FluxTransformer2DModel"), (Flux2, "Flux2Transformer2DModel")):
        assert {x for x in (Flux, Flux2) if is_config_of(x, {"_class_name": name})} == {kind}


def test_strange_tensors_of_a_checkpoint_are_told():
    with pytest.raises(ValueError, match="unexpected lora.up"):
        fitted(T5, all_in_one() | {"lora.up": ((2, 2), "F16")})


# --- Other models ------------------------------------------------------------------------------------------


def dev_with(**shapes: tuple[int, ...]) -> Header:
    return published("flux1-dev") | {name.replace("__", "."): (x, "BF16") for name, x in shapes.items()}


@pytest.mark.parametrize(
    "header, message",
    [
        (lambda: dev_with(img_in__weight=(3072, 384)), "FLUX.1-Fill, .*384 channels go in, 64 come out"),
        (lambda: dev_with(img_in__weight=(3072, 128)), "FLUX.1-Canny or FLUX.1-Depth.*128 channels"),
        (lambda: {"joint_blocks.0.x_block.attn.qkv.weight": ((1, 1), "F16")}, "Stable Diffusion 3"),
        (lambda: {"model.diffusion_model.input_blocks.0.0.weight": ((1, 1), "F16")}, "Stable Diffusion 1, 2"),
        (lambda: {"lora_unet_single_blocks_0_linear1.alpha": ((), "F16")}, "a LoRA"),
        (lambda: {"transformer.x_embedder.lora_A.weight": ((1, 1), "F16")}, "a LoRA"),
        (lambda: {"redux_up.weight": ((1, 1), "F16")}, "FLUX.1-Redux"),
    ],
    ids=["Fill", "Canny", "SD3", "SDXL", "kohya's LoRA", "diffusers' LoRA", "Redux"],
)
def test_other_models_are_named(header, message):
    with pytest.raises(ValueError, match=f"this is {message}(.|\n)*accepted are FLUX.1 dev, schnell"):
        fitted(Flux, header())


@pytest.mark.parametrize(
    "model, name",
    [
        (lambda: ChromaTransformer2DModel(num_layers=1, num_single_layers=1), "Chroma"),
        (lambda: Flux2Transformer2DModel(num_layers=1, num_single_layers=1), "FLUX.2"),
        (lambda: SD3Transformer2DModel(num_layers=1), "Stable Diffusion 3"),
    ],
    ids=["Chroma", "FLUX.2", "SD3"],
)
def test_what_diffusers_writes_of_other_models_is_named(model, name):
    with torch.device("meta"):
        header = {x: (tuple(tensor.shape), "BF16") for x, tensor in model().state_dict().items()}
    with pytest.raises(ValueError, match=f"this is {name}: it has"):
        fitted(Flux, header)


# --- The same results as with diffusers and transformers ---------------------------------------------------


@pytest.mark.parametrize("size", ["10GB", "100KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("sizes", [test_model.DEV, test_model.SCHNELL], ids=["dev", "schnell"])
def test_a_transformer_of_diffusers(sizes, size, tmp_path):
    _, theirs = test_model.pair(sizes)
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "100KB")
    ours = flux.load_transformer(tmp_path, dtype=torch.float32)
    assert ours.sizes == sizes
    assert test_model.error(ours, theirs) < 1e-5


@pytest.mark.parametrize("sizes", test_autoencoder.SIZES.values(), ids=test_autoencoder.SIZES)
def test_an_autoencoder_of_diffusers(sizes, tmp_path):
    _, theirs = test_autoencoder.pair(sizes)
    theirs.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    theirs.save_pretrained(tmp_path)
    ours = flux.load_autoencoder(tmp_path, dtype=torch.float32)
    assert ours.sizes == sizes
    assert max(test_autoencoder.differences(ours, theirs).values()) < 1e-5


@torch.no_grad()
def test_text_encoders_of_transformers(tmp_path):
    clip = CLIPTextConfig(
        vocab_size=60,
        max_position_embeddings=20,
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=80,
        num_hidden_layers=2,
        bos_token_id=None,
        eos_token_id=2,
    )
    t5 = T5Config(
        vocab_size=60,
        d_model=48,
        d_kv=8,
        num_heads=4,
        d_ff=80,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    clip, t5 = randomize(CLIPTextModel(clip)), randomize(T5EncoderModel(t5))
    tokens = torch.randint(1, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    clip.save_pretrained(tmp_path / "clip")
    t5.save_pretrained(tmp_path / "t5")
    ours = flux.load_clip(tmp_path / "clip", dtype=torch.float32)(tokens)
    assert difference(ours, clip(tokens).pooler_output) < 1e-5
    ours = flux.load_t5(tmp_path / "t5", dtype=torch.float32)(tokens)
    assert difference(ours, t5(tokens).last_hidden_state) < 1e-4  # of values around 1 with a bias up to 10


# --- Weights in 8 bits -------------------------------------------------------------------------------------


def decoded(stored: torch.Tensor) -> torch.Tensor:
    """Read E4M3 by its definition: a sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity."""
    bits = stored.view(torch.uint8).double()
    sign = torch.where(bits >= 128, -1.0, 1.0)
    exponent, fraction = (bits % 128) // 8, bits % 8
    value = torch.where(exponent > 0, 2 ** (exponent - 7) * (1 + fraction / 8), 2**-6 * fraction / 8)
    return (sign * value).float()


def in_fp8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["ours", "diffusers"])
def test_fp8_without_scales(name, tmp_path):
    model, theirs = test_model.pair(test_model.DEV)
    save_file(in_fp8((model if name == "ours" else theirs).state_dict()), tmp_path / "x.safetensors")
    loaded = flux.load_transformer(tmp_path / "x.safetensors", dtype=torch.float32).state_dict()
    for key, tensor in in_fp8(model.state_dict()).items():
        assert torch.equal(loaded[key], decoded(tensor))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("name", ["ours", "diffusers"])
def test_fp8_with_scales(name, scale_name, prefix, tmp_path):
    """Matrices are stored divided by a scale of their own, which differs between q, k and v."""
    model, theirs = test_model.pair(test_model.DEV)
    stored, expected = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {}
    for n, (key, tensor) in enumerate((model if name == "ours" else theirs).state_dict().items()):
        stored[key], expected[key] = tensor.half(), tensor.half().float()
        if tensor.ndim == 2:
            scale = torch.tensor(0.01 * (n + 1))
            stored[key] = (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[f"{key.removesuffix('weight')}{scale_name}"] = scale
            stored[f"{key.removesuffix('weight')}scale_input"] = torch.tensor(7.0)  # not for the weights
            expected[key] = decoded(stored[key]) * scale
    save_file({prefix + key: x for key, x in stored.items()}, tmp_path / "x.safetensors")
    ours = flux.load_transformer(tmp_path / "x.safetensors", dtype=torch.float32)
    loaded = ours.state_dict()
    if name == "diffusers":
        loaded = test_model.to_diffusers(loaded, test_model.DEV.hidden_size)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_t5_with_its_embedding_twice_or_under_the_other_name(tmp_path):
    state = randomize(T5(T5Sizes(60, 48, 8, 4, 80, 2))).state_dict()
    copy = {"encoder.embed_tokens.weight": state["shared.weight"].clone()}
    renamed = {name: tensor for name, tensor in state.items() if name != "shared.weight"} | copy
    for stored in (state | copy, renamed):
        save_file(stored, tmp_path / "t5.safetensors")
        loaded = flux.load_t5(tmp_path / "t5.safetensors", dtype=torch.float32).state_dict()
        assert loaded.keys() == load_file(tmp_path / "t5.safetensors").keys() - copy.keys() | {
            "shared.weight"
        }
        assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_t5_in_8_and_16_bits_without_a_warning(tmp_path, recwarn):
    """The four of ComfyUI's text encoders, smaller: their copy of the embedding, their scales."""
    model = randomize(T5(T5Sizes(60, 48, 8, 4, 80, 2)))
    state = model.state_dict()
    copy = {"encoder.embed_tokens.weight": state["shared.weight"].clone()}
    scaled, expected = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in (state | copy).items():
        scaled[name], expected[name] = tensor.half(), tensor.half().float()
        if re.search(r"SelfAttention\.[qkvo]\.|DenseReluDense\.", name):
            scale = tensor.abs().max() / 448
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = scale
            expected[name] = decoded(scaled[name]) * scale
    halves = {name: tensor.half() for name, tensor in (state | copy).items()}
    coarse = in_fp8(state | copy)
    variants = {
        "t5xxl_fp16": (halves, {name: tensor.float() for name, tensor in halves.items()}),
        "t5xxl_fp8_e4m3fn": (coarse, {name: decoded(tensor) for name, tensor in coarse.items()}),
        "t5xxl_fp8_e4m3fn_scaled": (scaled, expected),
    }
    for name, (stored, wanted) in variants.items():
        save_file(stored, tmp_path / f"{name}.safetensors")
        loaded = flux.load_t5(tmp_path / f"{name}.safetensors", dtype=torch.float32).state_dict()
        assert all(torch.equal(loaded[x], wanted[x]) for x in state), name
        assert flux.load_t5(tmp_path / f"{name}.safetensors").shared.weight.dtype == torch.bfloat16
    assert not recwarn.list


def test_a_tensor_with_and_without_its_prefix_is_refused():
    header = published("flux1-dev")
    with pytest.raises(ValueError, match="img_in.bias and model.diffusion_model.img_in.bias are the same"):
        fitted(Flux, header | {"model.diffusion_model.img_in.bias": header["img_in.bias"]})


# --- Quantized files, and files with more than is needed ---------------------------------------------------

QUANTIZED = {  # what is beside one of the weights, and how the file is named
    "NF4": (
        {"absmax": ((9,), "U8"), "quant_state.bitsandbytes__nf4": ((9,), "U8")},
        "4 bits by bitsandbytes",
    ),
    "int8": ({"SCB": ((9,), "F32")}, "int8 by bitsandbytes"),
    "SVDQuant": ({"wscales": ((9, 9), "BF16"), "smooth_factor": ((9,), "BF16")}, "4 bits by SVDQuant"),
    "GPTQ": ({"qweight": ((9, 9), "I32"), "qzeros": ((9, 9), "I32")}, "4 bits by SVDQuant, GPTQ or AWQ"),
    "NVFP4": (
        {"weight": ((9, 9), "U8"), "weight_scale_2": ((), "F32"), "comfy_quant": ((9,), "U8")},
        "NVFP4",
    ),
    "MXFP8": ({"weight": ((9, 9), "F8_E4M3"), "weight_scale": ((9, 9), "U8")}, "weight_scale is of U8"),
    "int8 of ComfyUI": ({"weight": ((9, 9), "I8"), "weight_scale": ((), "F32")}, "weight is of I8"),
    "quanto": ({"weight._data": ((9, 9), "I8"), "weight._scale": ((9, 1), "BF16")}, "by quanto"),
    "MLX": ({"weight": ((9, 9), "U32"), "scales": ((9, 9), "BF16")}, "by MLX"),
}


@pytest.mark.parametrize("entries, how", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize(
    "kind, name, layer",
    [
        (Flux, "flux1-dev", "double_blocks.{}.img_attn.qkv"),
        (Flux, "flux1-dev-diffusers", "transformer_blocks.{}.attn.to_q"),
        (T5, "t5xxl", "encoder.block.{}.layer.0.SelfAttention.q"),
    ],
    ids=["dev", "dev in diffusers", "T5"],
)
def test_quantized_files_are_named_in_one_line(kind, name, layer, entries, how):
    header = published(name)
    for block in range(19):
        header.pop(f"{layer.format(block)}.weight")
        header |= {f"{layer.format(block)}.{end}": entry for end, entry in entries.items()}
    with pytest.raises(
        ValueError, match=f"it is quantized.*{how}.*; take the same weights in bf16, fp16"
    ) as error:
        fitted(kind, header)
    assert "\n" not in str(error.value)


def test_a_list_of_what_is_wrong_has_twenty_lines():
    with pytest.raises(ValueError, match="... and 760 more$") as error:
        fitted(Flux, in_dtype(published("flux1-dev"), "I32"))
    assert str(error.value).count("\n") == 21


@torch.no_grad()
def test_whole_clip_and_t5_models_of_transformers(tmp_path):
    """With CLIP's half for pictures and T5's decoder, which FLUX does not use."""
    text = {"vocab_size": 60, "max_position_embeddings": 20, "hidden_size": 48, "num_attention_heads": 3}
    text |= {"intermediate_size": 80, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 2}
    vision = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 40, "num_hidden_layers": 1}
    vision |= {"image_size": 8, "patch_size": 4}
    clip = randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)))
    config = {"vocab_size": 60, "d_model": 48, "d_kv": 8, "num_heads": 4, "d_ff": 80, "num_layers": 2}
    t5 = randomize(T5ForConditionalGeneration(T5Config(**config, feed_forward_proj="gated-gelu")))
    tokens = torch.randint(1, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    clip.save_pretrained(tmp_path / "clip")
    t5.save_pretrained(tmp_path / "t5")
    stored = [load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("clip", "t5")]
    assert {"vision_model.post_layernorm.bias", "visual_projection.weight", "logit_scale"} <= stored[0].keys()
    assert "decoder.final_layer_norm.weight" in stored[1]
    stored[1]["lm_head.weight"] = torch.zeros(60, 48)  # which older versions of transformers wrote, too
    ours = flux.load_clip(tmp_path / "clip", dtype=torch.float32)(tokens)
    assert difference(ours, clip.text_model(tokens).pooler_output) < 1e-5
    ours = flux.load_t5(tmp_path / "t5", dtype=torch.float32)(tokens)
    assert difference(ours, t5.encoder(tokens).last_hidden_state) < 1e-4
    for name, state, load in zip(("clip", "t5"), stored, (flux.load_clip, flux.load_t5)):
        save_file(state, tmp_path / name / "model.safetensors")
        load(tmp_path / name)
        save_file(state | {"extra.weight": torch.zeros(2)}, tmp_path / name / "model.safetensors")
        with pytest.raises(ValueError, match="unexpected extra.weight"):
            load(tmp_path / name)


def test_an_autoencoder_with_the_prefix_of_a_whole_checkpoint():
    header = {f"first_stage_model.{name}": entry for name, entry in published("ae").items()}
    _, sources = fitted(AutoEncoder, header | {"model.diffusion_model.img_in.bias": ((2,), "F32")})
    assert sources.keys() == published("ae").keys()
    with pytest.raises(
        ValueError, match="this is another model's autoencoder: it has first_stage_model.quant"
    ):
        fitted(AutoEncoder, header | {"first_stage_model.quant_conv.weight": ((8, 8, 1, 1), "F32")})


@pytest.mark.parametrize(
    "kind, name, told",
    [
        (T5, "clip_l", "CLIP's text encoder"),
        (CLIPText, "t5xxl", "T5"),
        (AutoEncoder, "flux1-dev-diffusers", "a transformer"),
        (Flux, "ae-diffusers", "an autoencoder"),
    ],
)
def test_a_part_taken_for_another_is_told(kind, name, told):
    with pytest.raises(ValueError, match=f"is not a {kind.__name__} checkpoint: this is {told}; it begins"):
        fitted(kind, published(name))
