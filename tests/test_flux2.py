"""FLUX.2's transformer and autoencoder against diffusers, on random weights, and the published headers."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import test_autoencoder
import test_model
import torch
from compare import difference, header, randomize, reference, shapes_of
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from flux import autoencoder, flux2, layers
from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.checkpoint import Checkpoint, fit
from flux.flux2 import Flux2, Flux2Sizes, SwiGLU
from flux.formats import Source, kinds_inside, transformer_kind
from flux.layers import rope_table, timestep_embedding
from flux.loading import load_autoencoder, load_transformer
from flux.memory import arrange, checkpoint_blocks, compile_blocks
from flux.model import Flux, pack
from flux.streaming import Stream, quantize_rows

TOLERANCE = 1e-5
DEV = Flux2Sizes(
    in_channels=24,
    out_channels=16,
    txt_size=40,
    hidden_size=96,
    mlp_size=288,
    num_heads=3,
    depth=2,
    depth_single=3,
    guidance=True,
    axes=(8, 8, 8, 8),
    theta=2000,
)
KLEIN = replace(DEV, guidance=False)
MODELS = pytest.mark.parametrize("sizes", [DEV, KLEIN], ids=["dev", "klein"])
TO_DIFFUSERS = [
    (r"^(time|guidance)_in\.in_layer", r"time_guidance_embed.\1_embedder.linear_1"),
    (r"^(time|guidance)_in\.out_layer", r"time_guidance_embed.\1_embedder.linear_2"),
    (r"time_embedder", "timestep_embedder"),
    (r"^img_in", "x_embedder"),
    (r"^txt_in", "context_embedder"),
    (r"\.lin\.", ".linear."),
    (r"^final_layer\.linear", "proj_out"),
    (r"^final_layer\.adaLN_modulation\.1", "norm_out.linear"),
    (r"img_attn\.norm\.(.).*_norm\.scale", r"attn.norm_\1.weight"),
    (r"txt_attn\.norm\.(.).*_norm\.scale", r"attn.norm_added_\1.weight"),
    (r"img_attn\.proj", "attn.to_out.0"),
    (r"txt_attn\.proj", "attn.to_add_out"),
    (r"img_mlp\.0", "ff.linear_in"),
    (r"img_mlp\.2", "ff.linear_out"),
    (r"txt_mlp\.0", "ff_context.linear_in"),
    (r"txt_mlp\.2", "ff_context.linear_out"),
    (r"linear1", "attn.to_qkv_mlp_proj"),
    (r"linear2", "attn.to_out"),
    (r"\.norm\.(.).*_norm\.scale", r".attn.norm_\1.weight"),
    (r"^double_blocks", "transformer_blocks"),
    (r"^single_blocks", "single_transformer_blocks"),
]
SPLIT = {"img_attn.qkv": "attn.to_{}", "txt_attn.qkv": "attn.add_{}_proj"}


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for old, tensor in state.items():
        name = old
        for pattern, replacement in TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        if "adaLN" in old:  # shift, scale here; scale, shift there
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if fused := next((part for part in SPLIT if part in name), None):
            for x, rows in zip("qkv", tensor.chunk(3)):
                result[name.replace(fused, SPLIT[fused].format(x))] = rows
        else:
            result[name] = tensor
    return result


def pair(sizes: Flux2Sizes) -> tuple[Flux2, Flux2Transformer2DModel]:
    ours = randomize(Flux2(sizes))
    theirs = Flux2Transformer2DModel(
        in_channels=sizes.in_channels,
        out_channels=sizes.out_channels,
        num_layers=sizes.depth,
        num_single_layers=sizes.depth_single,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.num_heads,
        joint_attention_dim=sizes.txt_size,
        axes_dims_rope=sizes.axes,
        rope_theta=sizes.theta,
        guidance_embeds=sizes.guidance,
    ).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    return ours, theirs


def inputs(sizes: Flux2Sizes) -> dict[str, Tensor]:
    """Return two samples of unequal time and guidance: 3 x 5 image tokens, 7 of text."""
    generator = torch.Generator().manual_seed(1)
    img = torch.randn(2, 15, sizes.in_channels, generator=generator)
    txt = torch.randn(2, 7, sizes.txt_size, generator=generator)
    img_ids = torch.tensor([[0, row, column, 0] for row in range(3) for column in range(5)])
    txt_ids = torch.tensor([[0, 0, 0, place] for place in range(7)])
    ids = {"img_ids": img_ids.expand(2, -1, -1), "txt_ids": txt_ids.expand(2, -1, -1)}
    t, guidance = torch.tensor([0.7373, 0.11]), torch.tensor([4.0, 1.0])
    return dict(img=img, txt=txt, **ids, t=t, guidance=guidance if sizes.guidance else None)


@torch.no_grad()
def error(ours: Flux2, theirs: Flux2Transformer2DModel) -> float:
    given = inputs(ours.sizes)
    expected = theirs(
        hidden_states=given["img"],
        img_ids=given["img_ids"],
        encoder_hidden_states=given["txt"],
        txt_ids=given["txt_ids"],
        timestep=given["t"],
        guidance=given["guidance"],
    ).sample
    return difference(ours(**given), expected)


@MODELS
def test_equals_diffusers(sizes):
    assert error(*pair(sizes)) < TOLERANCE


def swap_q_and_k(ours, monkeypatch):
    linear, d = ours.single_blocks[1].linear1, ours.sizes.hidden_size
    linear.weight.data[: 2 * d] = linear.weight.data[: 2 * d].roll(d, dims=0)


def swap_q_and_k_norms(ours, monkeypatch):
    norm = ours.double_blocks[1].txt_attn.norm
    norm.query_norm, norm.key_norm = norm.key_norm, norm.query_norm


def swap_the_streams_modulations(ours, monkeypatch):
    img, txt = ours.double_stream_modulation_img, ours.double_stream_modulation_txt
    ours.double_stream_modulation_img, ours.double_stream_modulation_txt = txt, img


def swap_shifts_and_scales(ours, monkeypatch):
    linear = ours.single_stream_modulation.lin
    linear.weight.data = torch.cat([linear.weight.data.chunk(3)[i] for i in (1, 0, 2)])


def swap_final_shift_and_scale(ours, monkeypatch):
    linear = ours.final_layer.adaLN_modulation[1]
    linear.weight.data = linear.weight.data.roll(ours.sizes.hidden_size, dims=0)


def put_gates_last(ours, monkeypatch):
    monkeypatch.setattr(
        SwiGLU, "forward", lambda self, x: nn.functional.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0]
    )


def put_image_positions_first(ours, monkeypatch):
    monkeypatch.setattr(flux2, "rope_table", lambda ids, *args: rope_table(ids.roll(-7, dims=1), *args))


def forget_the_places_of_the_text(ours, monkeypatch):
    forgotten = torch.tensor([1, 1, 1, 0])
    monkeypatch.setattr(flux2, "rope_table", lambda ids, *args: rope_table(ids * forgotten, *args))


def use_theta_of_flux_1(ours, monkeypatch):
    ours.sizes = replace(ours.sizes, theta=10_000)


def put_sines_first(ours, monkeypatch):
    monkeypatch.setattr(flux2, "timestep_embedding", lambda t: timestep_embedding(t).roll(128, dims=1))


def norm_without_weights(ours, monkeypatch):
    monkeypatch.setattr(layers.RMSNorm, "forward", lambda self, x: nn.functional.rms_norm(x, x.shape[-1:]))


@pytest.mark.parametrize(
    "broken",
    [
        swap_q_and_k,
        swap_q_and_k_norms,
        swap_the_streams_modulations,
        swap_shifts_and_scales,
        swap_final_shift_and_scale,
        put_gates_last,
        put_image_positions_first,
        forget_the_places_of_the_text,
        use_theta_of_flux_1,
        put_sines_first,
        norm_without_weights,
    ],
)
def test_a_broken_model_is_noticed(broken, monkeypatch):
    ours, theirs = pair(DEV)
    broken(ours, monkeypatch)
    assert error(ours, theirs) > 20 * TOLERANCE


# --- Sizes -------------------------------------------------------------------------------------------------


@MODELS
def test_sizes_are_read_from_shapes(sizes):
    shapes = shapes_of(Flux2(sizes))
    assert Flux2Sizes.from_shapes(shapes, {}) == sizes
    config = {"axes_dims_rope": [4, 12, 12, 4], "rope_theta": 500}
    assert Flux2Sizes.from_shapes(shapes, config) == replace(sizes, axes=(4, 12, 12, 4), theta=500)


KLEIN_4B = Flux2Sizes(128, 128, 7680, 3072, 9216, 24, 5, 20, False, (32, 32, 32, 32), 2000)
KLEIN_9B = Flux2Sizes(128, 128, 12288, 4096, 12288, 32, 8, 24, False, (32, 32, 32, 32), 2000)
PUBLISHED_DEV = Flux2Sizes(128, 128, 15360, 6144, 18432, 48, 8, 48, True, (32, 32, 32, 32), 2000)


@pytest.mark.parametrize(
    "name, expected, parameters",
    [
        ("flux2-klein-base-4b", KLEIN_4B, 3_875_544_576),
        ("flux2-klein-base-9b", KLEIN_9B, 9_078_581_248),
        ("flux2-dev", PUBLISHED_DEV, 32_223_281_152),
    ],
)
def test_published_headers(name, expected, parameters):
    shapes = header(name)
    sizes = Flux2Sizes.from_shapes(shapes, {})
    assert sizes == expected
    with torch.device("meta"):
        ours = Flux2(sizes)
    assert shapes_of(ours) == shapes
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"\(8, 8, 8, 4\) add up to 28, the head size is 32"):
        Flux2(replace(DEV, axes=(8, 8, 8, 4)))
    with pytest.raises(ValueError, match="pass guidance"):
        Flux2(DEV)(**inputs(DEV) | {"guidance": None})
    with pytest.raises(ValueError, match="lacks double_stream_modulation_img.lin.weight"):
        Flux2Sizes.from_shapes(header("flux1-dev"), {})
    with pytest.raises(ValueError, match=r"axes_dims_rope \[8, 12, 12\], must be 4 whole numbers"):
        Flux2Sizes.from_shapes(shapes_of(Flux2(DEV)), {"axes_dims_rope": [8, 12, 12]})


# --- Dtypes and memory -------------------------------------------------------------------------------------


def test_bfloat16_is_near_float32():
    ours, given = randomize(Flux2(DEV)), inputs(DEV)
    expected = ours(**given)
    half = {name: given[name].bfloat16() for name in ("img", "txt")}
    result = ours.bfloat16()(**given | half)
    assert result.dtype == torch.bfloat16
    assert (result - expected).norm() < 0.05 * expected.norm()


def gradients(model: Flux2, changed: float = 1.0) -> dict[str, Tensor]:
    """Return the output and the gradients, of its weighted sum, of both inputs and all trained parameters."""
    given = inputs(model.sizes)
    leaves = {name: (changed * given[name]).requires_grad_() for name in ("img", "txt")}
    result = model(**given | leaves)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    leaves |= {name: x for name, x in model.named_parameters() if x.requires_grad}
    found = torch.autograd.grad((weights * result).sum(), leaves.values())
    return {"velocity": result.detach()} | dict(zip(leaves, found))


def relative_error(given: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert given.keys() == expected.keys()
    return max(((given[x] - value).abs().max() / value.abs().max()).item() for x, value in expected.items())


@pytest.mark.parametrize("what", ["all", "attention", 2])
def test_recomputed_blocks_have_the_same_gradients(what):
    """Of the modulation as well, which is computed outside the blocks."""
    model = randomize(Flux2(DEV))
    expected = gradients(model)
    assert len(expected) == 3 + len(list(model.parameters()))
    checkpoint_blocks(model, what)
    assert relative_error(gradients(model), expected) < 1e-6
    assert relative_error(gradients(model, changed=1.001), expected) > 1e-4


@pytest.mark.parametrize("stream", [0, 3])
@pytest.mark.parametrize("fp8", [False, True])
def test_streamed_blocks_and_blocks_in_8_bits(stream, fp8, monkeypatch):
    """As the model whose blocks' weights are rounded to 8 bits and back; they have no biases to add."""
    monkeypatch.setattr(Stream, "COPY", True)
    model = randomize(Flux2(DEV)).requires_grad_(False)
    arranged = arrange(randomize(Flux2(DEV)).requires_grad_(False), "cpu", "all", stream, fp8)
    exact = gradients(model)
    for layer in [*model.double_blocks.modules(), *model.single_blocks.modules()] if fp8 else []:
        if isinstance(layer, nn.Linear):
            stored, scale = quantize_rows(layer.weight)
            layer.weight.data = stored.float() * scale
    assert relative_error(gradients(arranged), gradients(model)) < 1e-5
    assert (relative_error(gradients(arranged), exact) > 1e-3) == fp8


def test_blocks_can_be_compiled(monkeypatch):
    graphs = []
    torch._dynamo.reset()
    compile = torch.compile
    backend = lambda graph, given: graphs.append(graph) or graph
    monkeypatch.setattr(torch, "compile", lambda forward: compile(forward, backend=backend, fullgraph=True))
    model = randomize(Flux2(DEV))
    expected = gradients(model)
    compile_blocks(model)
    assert relative_error(gradients(model), expected) < 1e-5
    assert len(graphs) == 2  # of a double and of a single block


# --- The autoencoder ---------------------------------------------------------------------------------------

AE = AutoEncoderSizes(ch=32, ch_mult=(1, 2, 2), encoder_blocks=1, decoder_blocks=2, z_channels=8, packed=True)


def ae_pair() -> tuple[AutoEncoder, AutoencoderKLFlux2]:
    ours = randomize(AutoEncoder(AE))
    generator = torch.Generator().manual_seed(1)
    ours.bn.running_mean.copy_(torch.randn(32, generator=generator))
    ours.bn.running_var.copy_(torch.rand(32, generator=generator) + 0.5)
    theirs = AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[32, 64, 64],
        layers_per_block=1,
        latent_channels=8,
    ).eval()
    state = test_autoencoder.to_diffusers(ours.state_dict(), levels=3)
    theirs.load_state_dict({re.sub(r"^(en|de)coder\.(.*quant_conv)", r"\2", x): state[x] for x in state})
    return ours, theirs


@torch.no_grad()
def ae_errors(ours: AutoEncoder, theirs: AutoencoderKLFlux2) -> dict[str, float]:
    """Return the largest difference of latents and of the image; theirs are packed by the pipeline."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, 24, 16, generator=generator) * 2 - 1
    latents = torch.randn(2, 32, 3, 2, generator=generator)
    mean, variance = (x[:, None, None] for x in (theirs.bn.running_mean, theirs.bn.running_var))
    std = torch.sqrt(variance + theirs.config.batch_norm_eps)
    z = Flux2KleinPipeline._patchify_latents(theirs.encode(image).latent_dist.mean)
    decoded = theirs.decode(Flux2KleinPipeline._unpatchify_latents(latents * std + mean)).sample
    return {
        "encode": difference(ours.encode(image), (z - mean) / std),
        "decode": difference(ours.decode(latents), decoded.clamp(-1, 1)),
    }


def test_the_autoencoder_equals_diffusers():
    found = ae_errors(*ae_pair())
    assert max(found.values()) < TOLERANCE, found


def forget_the_first_convolutions(ours, monkeypatch):
    ours.encoder.quant_conv = ours.decoder.post_quant_conv = nn.Identity()


def change_eps(ours, monkeypatch):
    ours.bn.eps = 1e-2


def change_the_mean(ours, monkeypatch):
    ours.bn.running_mean += 0.01


def pack_rows_of_columns(ours, monkeypatch):
    """Take the two neighbours of a row for those of a column."""
    unshuffle, shuffle = nn.functional.pixel_unshuffle, nn.functional.pixel_shuffle
    monkeypatch.setattr(autoencoder.F, "pixel_unshuffle", lambda z, n: unshuffle(z.mT, n).mT)
    monkeypatch.setattr(autoencoder.F, "pixel_shuffle", lambda z, n: shuffle(z.mT, n).mT)


@pytest.mark.parametrize(
    "broken", [forget_the_first_convolutions, change_eps, change_the_mean, pack_rows_of_columns]
)
def test_a_broken_autoencoder_is_noticed(broken, monkeypatch):
    ours, theirs = ae_pair()
    broken(ours, monkeypatch)
    assert min(ae_errors(ours, theirs).values()) > 20 * TOLERANCE


def test_latents_are_packed_as_tokens_are():
    z = torch.randn(2, 8, 6, 4, generator=torch.Generator().manual_seed(1))
    norm = ae_pair()[0].bn
    mean, std = norm.statistics
    tokens = norm(z).flatten(2).mT
    assert difference(tokens * std.flatten() + mean.flatten(), pack(z)) < 1e-6
    assert difference(norm.undo(norm(z)), z) < 1e-6


@torch.no_grad()
def test_latents_are_the_mean():
    ours, image = ae_pair()[0], torch.zeros(1, 3, 8, 16)
    mean, std = ours.encode_moments(image)
    assert mean.shape == std.shape == (1, AE.latent_channels, 8 // AE.reduction, 16 // AE.reduction)
    assert not std.any()
    assert torch.equal(ours.encode(image, torch.Generator().manual_seed(0)), mean)
    with pytest.raises(ValueError, match="12x16.*multiples of 8"):
        ours.encode(torch.zeros(1, 3, 12, 16))


@torch.no_grad()
def test_tiles_are_of_unpacked_latents():
    ours, latents = ae_pair()[0], torch.randn(1, 32, 4, 3, generator=torch.Generator().manual_seed(1))
    whole = ours.decode(latents)
    assert difference(ours.decode(latents, tile=8), whole) < 1e-6
    tiles = ours.decode(latents, tile=7)
    assert tiles.shape == whole.shape and difference(tiles, whole) > 1e-6


def test_the_published_autoencoder():
    shapes = header("flux2-ae")
    sizes = AutoEncoderSizes.from_shapes(shapes, {})
    assert sizes == AutoEncoderSizes(z_channels=32, packed=True)
    assert (sizes.latent_channels, sizes.reduction, sizes.token_pixels) == (128, 16, 16)
    with torch.device("meta"):
        assert shapes_of(AutoEncoder(sizes)) == shapes
    assert not AutoEncoderSizes.from_shapes(header("ae"), {}).packed


# --- Files -------------------------------------------------------------------------------------------------

SIZES = {Flux2: Flux2Sizes, AutoEncoder: AutoEncoderSizes}


def sources(kind: type[nn.Module], entries: dict) -> dict[str, Source]:
    """Return what the tensors of a model are made of; a ValueError tells which are missing or too many."""
    entries = {name: (tuple(shape), dtype) for name, (shape, dtype) in entries.items()}
    checkpoint = Checkpoint(Path("x.safetensors"), dict.fromkeys(entries, Path("x.safetensors")), entries)
    return fit(kind, SIZES[kind], checkpoint, torch.bfloat16)[1]


def of_diffusers(model: nn.Module) -> dict:
    return {name: (shape, "F32") for name, shape in shapes_of(model).items()}


def klein_of_diffusers() -> dict:
    with torch.device("meta"):
        model = Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        )
    return of_diffusers(model)


def dev_of_diffusers() -> dict:
    with torch.device("meta"):
        return of_diffusers(Flux2Transformer2DModel())


def ae_of_diffusers() -> dict:
    with torch.device("meta"):
        return of_diffusers(AutoencoderKLFlux2())


HEADERS = {  # and the published one that it is, in other names
    "klein-base-4B": (Flux2, lambda: reference("flux2-klein-base-4b.keys"), "flux2-klein-base-4b"),
    "klein-base-9B": (Flux2, lambda: reference("flux2-klein-base-9b.keys"), "flux2-klein-base-9b"),
    "dev": (Flux2, lambda: reference("flux2-dev.keys"), "flux2-dev"),
    "ae": (AutoEncoder, lambda: reference("flux2-ae.keys"), "flux2-ae"),
    "klein-base-4B in diffusers": (Flux2, klein_of_diffusers, "flux2-klein-base-4b"),
    "dev in diffusers": (Flux2, dev_of_diffusers, "flux2-dev"),
    "ae in diffusers": (AutoEncoder, ae_of_diffusers, "flux2-ae"),
}


@pytest.mark.parametrize("kind, entries, published", HEADERS.values(), ids=HEADERS)
def test_published_files_are_used_whole(kind, entries, published):
    entries = entries()
    found = sources(kind, entries)
    used = [name for source in found.values() for name in source.names]
    assert sorted(used) == sorted(entries)
    assert {name: source.shape for name, source in found.items()} == header(published)
    name = used[len(used) // 2]
    with pytest.raises(ValueError, match="missing|lacks"):
        sources(kind, {other: entry for other, entry in entries.items() if other != name})
    with pytest.raises(ValueError, match="unexpected extra.weight"):
        sources(kind, entries | {"extra.weight": ((2,), "F32")})


def test_a_part_taken_for_another_is_told():
    with pytest.raises(ValueError, match="not a Flux2 checkpoint: this is an autoencoder"):
        sources(Flux2, reference("flux2-ae.keys"))
    with pytest.raises(ValueError, match="not a AutoEncoder checkpoint: this is a transformer"):
        sources(AutoEncoder, reference("flux2-dev.keys"))
    with pytest.raises(ValueError, match="not a Flux2 checkpoint: it lacks double_stream_modulation_img"):
        sources(Flux2, reference("flux1-dev.keys"))
    unpacked = {name: x for name, x in ae_of_diffusers().items() if not name.startswith("bn.")}
    with pytest.raises(ValueError, match="another model's autoencoder: it has quant_conv.weight"):
        sources(AutoEncoder, unpacked)


@pytest.mark.parametrize("size", ["10GB", "100KB"], ids=["one file", "shards"])
@MODELS
def test_a_transformer_of_diffusers(sizes, size, tmp_path):
    sizes = replace(sizes, axes=(4, 12, 12, 4), theta=500)
    _, theirs = pair(sizes)
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    ours = load_transformer(tmp_path, dtype=torch.float32)
    assert ours.sizes == sizes
    assert error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_tells_its_family(prefix, tmp_path):
    for number, model in enumerate((randomize(Flux2(KLEIN)), randomize(Flux(test_model.DEV)))):
        state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        save_file(state, tmp_path / f"{number}.safetensors")
        loaded = load_transformer(tmp_path / f"{number}.safetensors", dtype=torch.float32)
        assert type(loaded) is type(model)
        assert transformer_kind(state) is type(model)
        assert kinds_inside(list(state)) == ({type(model)} if prefix else set())
        assert all(torch.equal(loaded.state_dict()[x], value) for x, value in model.state_dict().items())


def test_an_autoencoder_of_diffusers(tmp_path):
    _, theirs = ae_pair()
    theirs.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path, dtype=torch.float32)
    assert ours.sizes == AE
    found = ae_errors(ours, theirs)
    assert max(found.values()) < TOLERANCE, found


def test_an_autoencoder_in_its_own_names(tmp_path):
    expected, _ = ae_pair()
    save_file(expected.state_dict(), tmp_path / "ae.safetensors")
    ours = load_autoencoder(tmp_path / "ae.safetensors", dtype=torch.float32).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.state_dict().items())
