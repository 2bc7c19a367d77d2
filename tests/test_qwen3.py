"""Qwen3 against transformers, on random weights and with padding, and its loader."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compare import difference, randomize, shapes_of
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from flux import qwen3
from flux.errors import UserError
from flux.layers import rope_table, rotate
from flux.loading import load_qwen3, load_t5
from flux.qwen3 import LAYERS, Qwen3, Qwen3Sizes

TOLERANCE = 1e-4
# The heads' 4 x 16 channels are not the hidden 48; base and eps are nobody's default.
SIZES = Qwen3Sizes(60, 48, head_dim=16, num_heads=4, num_kv_heads=2, mlp_size=80, theta=5000.0, eps=1e-4)
LENGTH, LENGTHS = 40, (40, 23, 1)


def transformers_model(sizes: Qwen3Sizes, depth: int = 30) -> Qwen3ForCausalLM:
    """Return a whole model of transformers, with layers above those that ours has, random weights."""
    config = Qwen3Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        head_dim=sizes.head_dim,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        intermediate_size=sizes.mlp_size,
        num_hidden_layers=depth,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.theta},
        rms_norm_eps=sizes.eps,
        attn_implementation="eager",  # written out, not the fused kernel that ours calls
    )
    return Qwen3ForCausalLM(config)


def prompts() -> tuple[Tensor, Tensor]:
    """Return tokens and mask of three prompts of different lengths."""
    tokens = torch.randint(1, 60, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask, tokens, 0), mask


@torch.no_grad()
def case(layers: tuple[int, ...] = LAYERS) -> tuple[Qwen3, Tensor]:
    """Return our model, and what transformers makes of the prompts with the same weights."""
    theirs = randomize(transformers_model(SIZES))
    ours = Qwen3(replace(SIZES, layers=layers)).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    above = tuple(f"model.layers.{number}." for number in range(layers[-1], 30))
    assert not missing
    assert all(
        name.startswith(above) or name in ("model.norm.weight", "lm_head.weight") for name in unexpected
    )
    tokens, mask = prompts()
    states = theirs(tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    return ours, torch.cat([states[layer] for layer in layers], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("layers", [LAYERS, (2, 3)], ids=["klein", "fewer"])
def test_equals_transformers(layers):
    """At padding as well, which FLUX.2 does not mask. With fewer layers, as the deep model's early ones."""
    ours, expected = case(layers)
    assert len(ours.model.layers) == layers[-1]
    result = ours(*prompts())
    assert result.shape == (3, LENGTH, len(layers) * SIZES.hidden_size)
    assert difference(result, expected) < TOLERANCE


def leave_out_the_padding_mask(ours, monkeypatch):
    forward = ours.forward
    monkeypatch.setattr(ours, "forward", lambda tokens, mask: forward(tokens, torch.ones_like(mask)))


def see_the_future(ours, monkeypatch):
    attend = F.scaled_dot_product_attention
    name = "scaled_dot_product_attention"
    monkeypatch.setattr(
        F, name, lambda q, k, v, attn_mask, enable_gqa: attend(q, k, v, attn_mask[:, :, -1:], enable_gqa=True)
    )


def change_a_weight(ours, monkeypatch):
    ours.model.layers[26].mlp.up_proj.weight.data[0, 0] += 1


def swap_the_gate(ours, monkeypatch):
    mlp = ours.model.layers[5].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def swap_the_norms_of_q_and_k(ours, monkeypatch):
    attention = ours.model.layers[0].self_attn
    attention.q_norm, attention.k_norm = attention.k_norm, attention.q_norm


def pair_other_heads(ours, monkeypatch):
    attend = F.scaled_dot_product_attention
    name = "scaled_dot_product_attention"
    monkeypatch.setattr(F, name, lambda q, k, v, **kw: attend(q, k.flip(1), v.flip(1), **kw))


def rotate_neighbours(ours, monkeypatch):
    monkeypatch.setattr(qwen3, "rotate_halves", rotate)


def take_another_base(ours, monkeypatch):
    monkeypatch.setattr(qwen3, "rope_table", lambda ids, axes, theta: rope_table(ids, axes, 10_000))


def take_another_eps(ours, monkeypatch):
    for module in ours.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-6


def take_the_layers_below(ours, monkeypatch):
    monkeypatch.setattr(ours, "sizes", replace(ours.sizes, layers=(8, 17, 26)))


BROKEN = [
    leave_out_the_padding_mask,
    see_the_future,
    change_a_weight,
    swap_the_gate,
    swap_the_norms_of_q_and_k,
    pair_other_heads,
    rotate_neighbours,
    take_another_base,
    take_another_eps,
    take_the_layers_below,
]


@torch.no_grad()
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_qwen3_is_noticed(broken, monkeypatch):
    ours, expected = case()
    broken(ours, monkeypatch)
    assert difference(ours(*prompts()), expected) > 20 * TOLERANCE


@torch.no_grad()
def test_a_prompt_does_not_depend_on_its_batch():
    """Nor on what its padding is, or how much of it there is; the mask may be of numbers."""
    ours, _ = case((2, 3))
    tokens, mask = prompts()
    batch = ours(tokens, mask.long())
    assert difference(batch[1:2, :23], ours(tokens[1:2, :23], mask[1:2, :23])) < TOLERANCE
    assert difference(batch[mask], ours(torch.where(mask, tokens, 7), mask)[mask]) < TOLERANCE
    assert difference(batch[~mask], ours(torch.where(mask, tokens, 7), mask)[~mask]) > 0.1  # padding itself


def test_bfloat16_is_near_float32():
    ours, expected = case((2, 3))
    with torch.no_grad():
        result = ours.bfloat16()(*prompts())
    assert result.dtype == torch.bfloat16
    assert (result - expected).norm() < 0.05 * expected.norm()


def save(model: Qwen3ForCausalLM, folder, config: dict, shards: int = 2) -> None:
    """Write a model as the hub has it, in shards and with an index."""
    names = list(model.state_dict())
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        tensors = {name: model.state_dict()[name].clone() for name in names if weight_map[name] == file}
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


CONFIGS = {
    "as published": {"rope_theta": SIZES.theta, "rms_norm_eps": SIZES.eps},
    "as transformers 5 writes it": {
        "rope_parameters": {"rope_theta": SIZES.theta, "rope_type": "default"},
        "rms_norm_eps": SIZES.eps,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loading_leaves_out_what_is_above(config, tmp_path):
    theirs = randomize(transformers_model(SIZES))
    save(theirs, tmp_path, {"architectures": ["Qwen3ForCausalLM"], **config})
    ours = load_qwen3(tmp_path, dtype=torch.float32)
    assert ours.sizes == SIZES and len(ours.model.layers) == 27
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    _, expected = case()
    assert difference(ours(*prompts()), expected) < TOLERANCE


def test_a_model_with_too_few_layers_is_refused(tmp_path):
    save(transformers_model(SIZES, depth=26), tmp_path, CONFIGS["as published"])
    with pytest.raises(UserError, match=r"missing model\.layers\.26\."):
        load_qwen3(tmp_path)


def test_scales_of_layers_above_are_left_out_too(tmp_path):
    """Of a file in scaled fp8."""
    state = transformers_model(SIZES).state_dict()
    for name in [name for name in state if name.endswith("_proj.weight")]:
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[name.replace(".weight", ".weight_scale")] = torch.tensor(0.5)
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "qwen_3_small.safetensors")
    loaded = load_qwen3(tmp_path / "qwen_3_small.safetensors", dtype=torch.float32)
    name = "model.layers.26.mlp.up_proj.weight"
    assert torch.equal(loaded.state_dict()[name], 0.5 * state[name].float())


def test_other_text_encoders_are_named(tmp_path):
    save(transformers_model(SIZES), tmp_path, {})
    with pytest.raises(UserError, match="this is Qwen3"):
        load_t5(tmp_path)


def test_a_damaged_config_is_named(tmp_path):
    for config, said in [
        ({"rope_parameters": 5}, "rope_parameters 5, must be an object"),
        ({"rope_theta": "1e6"}, "rope_theta '1e6', must be a number"),
    ]:
        save(transformers_model(SIZES), tmp_path, config)
        with pytest.raises(UserError, match=said):
            load_qwen3(tmp_path)


# As in the config.json of the two repositories.
PUBLISHED = {
    "4B": Qwen3Sizes(151936, 2560, 128, num_heads=32, num_kv_heads=8, mlp_size=9728, theta=1e6, eps=1e-6),
    "8B": Qwen3Sizes(151936, 4096, 128, num_heads=32, num_kv_heads=8, mlp_size=12288, theta=1e6, eps=1e-6),
}


@pytest.mark.parametrize("name, text_width", [("4B", 7680), ("8B", 12288)])
def test_published_sizes(name, text_width):
    """Names and shapes are those of transformers' model of these sizes; the text is as wide as klein's."""
    sizes = PUBLISHED[name]
    with torch.device("meta"):
        theirs, ours = transformers_model(sizes, depth=36), Qwen3(sizes)
    shapes = shapes_of(theirs)
    assert Qwen3Sizes.from_shapes(shapes, {}) == sizes
    above = ("lm_head", "model.norm", *(f"model.layers.{number}." for number in range(27, 36)))
    assert shapes_of(ours) == {key: shape for key, shape in shapes.items() if not key.startswith(above)}
    assert len(sizes.layers) * sizes.hidden_size == text_width
