"""The transformer against diffusers' FluxTransformer2DModel, on random weights, and the published headers."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compare import difference, header, randomize, reference, shapes_of
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flux import layers, model
from flux.layers import rope_table, timestep_embedding
from flux.model import Flux, FluxSizes, position_ids

TOLERANCE = 1e-5
DEV = FluxSizes(
    in_channels=24,  # not the 16 that come out, as in FLUX.1-Fill
    out_channels=16,
    pooled_size=20,
    txt_size=40,
    hidden_size=96,
    mlp_size=384,
    num_heads=3,
    depth=2,
    depth_single=3,
    guidance=True,
    axes=(4, 14, 14),
    theta=10_000,
)
SCHNELL = replace(DEV, guidance=False)
QKV = ("q", "k", "v")
TO_DIFFUSERS = [
    (r"^(time|vector|guidance)_in\.in_layer", r"time_text_embed.\1_embedder.linear_1"),
    (r"^(time|vector|guidance)_in\.out_layer", r"time_text_embed.\1_embedder.linear_2"),
    (r"time_embedder", "timestep_embedder"),
    (r"vector_embedder", "text_embedder"),
    (r"^img_in", "x_embedder"),
    (r"^txt_in", "context_embedder"),
    (r"^final_layer\.linear", "proj_out"),
    (r"^final_layer\.adaLN_modulation\.1", "norm_out.linear"),
    (r"img_mod\.lin", "norm1.linear"),
    (r"txt_mod\.lin", "norm1_context.linear"),
    (r"img_attn\.norm\.(.).*_norm\.scale", r"attn.norm_\1.weight"),
    (r"txt_attn\.norm\.(.).*_norm\.scale", r"attn.norm_added_\1.weight"),
    (r"img_attn\.proj", "attn.to_out.0"),
    (r"txt_attn\.proj", "attn.to_add_out"),
    (r"img_mlp\.0", "ff.net.0.proj"),
    (r"img_mlp\.2", "ff.net.2"),
    (r"txt_mlp\.0", "ff_context.net.0.proj"),
    (r"txt_mlp\.2", "ff_context.net.2"),
    (r"modulation\.lin", "norm.linear"),
    (r"\.norm\.(.).*_norm\.scale", r".attn.norm_\1.weight"),
    (r"linear2", "proj_out"),
    (r"^double_blocks", "transformer_blocks"),
    (r"^single_blocks", "single_transformer_blocks"),
]
SPLIT = {
    "img_attn.qkv": [f"attn.to_{x}" for x in QKV],
    "txt_attn.qkv": [f"attn.add_{x}_proj" for x in QKV],
    "linear1": [*(f"attn.to_{x}" for x in QKV), "proj_mlp"],
}


def to_diffusers(state: dict[str, Tensor], hidden_size: int) -> dict[str, Tensor]:
    result = {}
    for old, tensor in state.items():
        name = old
        for pattern, replacement in TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        if "adaLN" in old:  # shift, scale here; scale, shift there
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if fused := next((part for part in SPLIT if part in name), None):
            for target, rows in zip(SPLIT[fused], split_rows(tensor, hidden_size)):
                result[name.replace(fused, target)] = rows
        else:
            result[name] = tensor
    return result


def split_rows(tensor: Tensor, hidden_size: int) -> list[Tensor]:
    """Split q, k, v of hidden_size rows each, and what is left."""
    return tensor.tensor_split([hidden_size, 2 * hidden_size, 3 * hidden_size])


def pair(sizes: FluxSizes) -> tuple[Flux, FluxTransformer2DModel]:
    ours = randomize(Flux(sizes))
    theirs = FluxTransformer2DModel(
        in_channels=sizes.in_channels,
        out_channels=sizes.out_channels,
        num_layers=sizes.depth,
        num_single_layers=sizes.depth_single,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.num_heads,
        joint_attention_dim=sizes.txt_size,
        pooled_projection_dim=sizes.pooled_size,
        guidance_embeds=sizes.guidance,
        axes_dims_rope=sizes.axes,
    ).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), sizes.hidden_size))
    return ours, theirs


def inputs(sizes: FluxSizes) -> dict[str, Tensor]:
    """Return two samples of unequal time and guidance: 3 x 5 image tokens, 7 of text."""
    generator = torch.Generator().manual_seed(1)
    img, txt, pooled = (
        torch.randn(2, *shape, generator=generator)
        for shape in [(15, sizes.in_channels), (7, sizes.txt_size), (sizes.pooled_size,)]
    )
    img_ids, txt_ids = position_ids(batch=2, height=6, width=10, txt_length=7)
    t, guidance = torch.tensor([0.7373, 0.11]), torch.tensor([3.5, 1.0])
    return dict(img=img, img_ids=img_ids, txt=txt, txt_ids=txt_ids, t=t, pooled=pooled, guidance=guidance)


@torch.no_grad()
def error(ours: Flux, theirs: FluxTransformer2DModel) -> float:
    given = inputs(ours.sizes)
    expected = theirs(
        hidden_states=given["img"],
        img_ids=given["img_ids"][0],
        encoder_hidden_states=given["txt"],
        txt_ids=given["txt_ids"][0],
        timestep=given["t"],
        pooled_projections=given["pooled"],
        guidance=given["guidance"] if ours.sizes.guidance else None,
    ).sample
    return difference(ours(**given), expected)


@pytest.mark.parametrize("sizes", [DEV, SCHNELL], ids=["dev", "schnell"])
def test_equals_diffusers(sizes):
    assert error(*pair(sizes)) < TOLERANCE


def swap_q_and_k(ours, monkeypatch):
    linear, d = ours.single_blocks[1].linear1, ours.sizes.hidden_size
    linear.weight.data[: 2 * d] = linear.weight.data[: 2 * d].roll(d, dims=0)


def swap_q_and_k_norms(ours, monkeypatch):
    norm = ours.double_blocks[1].txt_attn.norm
    norm.query_norm, norm.key_norm = norm.key_norm, norm.query_norm


def swap_final_shift_and_scale(ours, monkeypatch):
    linear = ours.final_layer.adaLN_modulation[1]
    linear.weight.data = linear.weight.data.roll(ours.sizes.hidden_size, dims=0)


def swap_shifts_and_gates(ours, monkeypatch):
    linear = ours.double_blocks[0].img_mod.lin
    linear.weight.data = torch.cat([linear.weight.data.chunk(6)[i] for i in (2, 1, 0, 5, 4, 3)])


def put_image_positions_first(ours, monkeypatch):
    monkeypatch.setattr(model, "rope_table", lambda ids, *args: rope_table(ids.roll(-7, dims=1), *args))


def return_the_first_tokens(ours, monkeypatch):
    ours.single_blocks[-1].register_forward_hook(lambda block, args, x: x.roll(7, dims=1))


def rotate_halves(ours, monkeypatch):
    def rotate(x: Tensor, pe: Tensor) -> Tensor:
        x = torch.complex(*x.chunk(2, dim=-1)) * torch.view_as_complex(pe)
        return torch.cat([x.real, x.imag], dim=-1)

    monkeypatch.setattr(layers, "rotate", rotate)


def rotate_by_other_axes(ours, monkeypatch):
    ours.sizes = replace(ours.sizes, axes=(8, 12, 12))


def swap_rows_and_columns(ours, monkeypatch):
    monkeypatch.setattr(model, "rope_table", lambda ids, *args: rope_table(ids[..., [0, 2, 1]], *args))


def put_sines_first(ours, monkeypatch):
    monkeypatch.setattr(model, "timestep_embedding", lambda t: timestep_embedding(t).roll(128, dims=1))


def use_exact_gelu(ours, monkeypatch):
    ours.double_blocks[0].img_mlp[1] = nn.GELU()


@pytest.mark.parametrize(
    "broken",
    [
        swap_q_and_k,
        swap_q_and_k_norms,
        swap_final_shift_and_scale,
        swap_shifts_and_gates,
        put_image_positions_first,
        return_the_first_tokens,
        rotate_halves,
        rotate_by_other_axes,
        swap_rows_and_columns,
        put_sines_first,
        use_exact_gelu,
    ],
)
def test_a_broken_model_is_noticed(broken, monkeypatch):
    ours, theirs = pair(DEV)
    broken(ours, monkeypatch)
    assert error(ours, theirs) > 20 * TOLERANCE


@pytest.mark.parametrize("sizes", [DEV, SCHNELL], ids=["dev", "schnell"])
def test_sizes_are_read_from_shapes(sizes):
    shapes = shapes_of(Flux(sizes))
    assert FluxSizes.from_shapes(shapes, {}) == sizes
    config = {"axes_dims_rope": [8, 12, 12], "theta": 500}
    assert FluxSizes.from_shapes(shapes, config) == replace(sizes, axes=(8, 12, 12), theta=500)


REAL = FluxSizes(64, 64, 768, 4096, 3072, 12288, 24, 19, 38, True, (16, 56, 56), 10_000)


def shortened(depth: int, depth_single: int) -> dict[str, tuple[int, ...]]:
    """Return dev's header without its last blocks."""

    def index(name: str, kind: str) -> int:
        return int(name.split(".")[1]) if name.startswith(kind) else -1

    return {
        name: shape
        for name, shape in header("flux1-dev").items()
        if index(name, "double_blocks") < depth and index(name, "single_blocks") < depth_single
    }


@pytest.mark.parametrize(
    "shapes, expected, parameters",
    [
        (lambda: header("flux1-dev"), REAL, 11_901_408_320),
        (lambda: header("flux1-schnell"), replace(REAL, guidance=False), 11_891_178_560),
        (lambda: shortened(8, 38), replace(REAL, depth=8), 8_163_264_064),
        (lambda: shortened(5, 10), replace(REAL, depth=5, depth_single=10), 3_179_199_552),
    ],
    ids=["dev", "schnell", "lite", "mini"],
)
def test_published_headers(shapes, expected, parameters):
    shapes = shapes()
    sizes = FluxSizes.from_shapes(shapes, {})
    assert sizes == expected
    with torch.device("meta"):
        ours = Flux(sizes)
    assert shapes_of(ours) == shapes
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters


def test_the_map_to_diffusers_is_the_published_one():
    """Rows that count themselves show where each one goes."""
    shapes = header("flux1-dev")
    rows = {name: torch.arange(shape[0]) for name, shape in shapes.items()}
    expected = {}
    for name, targets in reference("bfl_to_diffusers").items():
        for target in targets:
            first, end = target.get("rows", (0, len(rows[name])))
            shift = len(rows[name]) // 2 if target["op"] == "swap_halves_dim0" else 0
            expected[target["to"]] = rows[name].roll(shift)[first:end]
    mapped = to_diffusers(rows, hidden_size=3072)
    assert mapped.keys() == expected.keys() == header("flux1-dev-diffusers").keys()
    assert all(torch.equal(mapped[name], expected[name]) for name in expected)


def test_bfloat16_is_near_float32():
    ours, given = randomize(Flux(DEV)), inputs(DEV)
    expected = ours(**given)
    half = {name: given[name].bfloat16() for name in ("img", "txt", "pooled")}
    result = ours.bfloat16()(**given | half)
    assert result.dtype == torch.bfloat16
    assert (result - expected).norm() < 0.05 * expected.norm()


def test_rotation_is_a_complex_product():
    """In eager and compiled code; the latter has no complex numbers, which inductor does not fuse."""
    x = torch.rand(2, 5, 3, 32, generator=torch.Generator().manual_seed(1))
    ids = 100 * torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(2)).double()
    omega = torch.cat([10_000 ** -(torch.arange(0, n, 2).double() / n) for n in DEV.axes])
    angles = ids.repeat_interleave(torch.tensor(DEV.axes) // 2, dim=-1)[:, :, None] * omega
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))

    def expected(angles: Tensor) -> Tensor:
        return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)

    graphs = []
    compiled = torch.compile(layers.rotate, backend=lambda graph, _: graphs.append(graph) or graph)
    pe = rope_table(ids, DEV.axes, DEV.theta)
    for rotate in (layers.rotate, compiled):
        assert difference(rotate(x, pe), expected(angles)) < 1e-6
        assert difference(rotate(x, pe), expected(angles + 1e-5)) > 1e-6
    assert "complex" not in graphs[0].code and "stack" in graphs[0].code


def copies(model: Flux, given: dict[str, Tensor]) -> int:
    """Return how many tensors are only moved in memory in a forward pass."""
    copied = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            copied.extend([op] * (op.name() == "aten::clone"))
            return op(*args, **kwargs or {})

    with Watch():
        model(**given)
    return len(copied)


def test_heads_are_laid_out_as_attention_returns_them(monkeypatch):
    """Fused kernels take any order of heads and tokens, and return their result in that of q."""
    given = {name: value[:1] for name, value in inputs(DEV).items()}
    attend = F.scaled_dot_product_attention
    like_q = lambda q, k, v: torch.empty_like(q).copy_(attend(q, k, v))
    monkeypatch.setattr(F, "scaled_dot_product_attention", like_q)
    assert copies(Flux(DEV), given) == 0
    heads_first = lambda q, k, v: like_q(q, k, v).contiguous()
    monkeypatch.setattr(F, "scaled_dot_product_attention", heads_first)
    assert copies(Flux(DEV), given) == 2 * (DEV.depth + DEV.depth_single)  # there, and back


@torch.no_grad()
def test_samples_may_have_guidance_of_their_own():
    ours, given = randomize(Flux(replace(DEV, in_channels=16))), inputs(DEV)
    latents = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(2))
    velocity = lambda guidance: ours.velocity(
        latents, given["t"], guidance, txt=given["txt"], pooled=given["pooled"]
    )
    first, second = (velocity(guidance.item()) for guidance in given["guidance"])
    assert difference(velocity(given["guidance"]), torch.stack([first[0], second[1]])) < 1e-6
    assert difference(first, second) > 0.01


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"\(8, 8, 8\) add up to 24, the head size is 32"):
        Flux(replace(DEV, axes=(8, 8, 8)))
    with pytest.raises(ValueError, match=r"\(6, 13, 13\) must be even"):
        Flux(replace(DEV, axes=(6, 13, 13)))
    with pytest.raises(ValueError, match="pass guidance"):
        Flux(DEV)(**inputs(DEV) | {"guidance": None})
