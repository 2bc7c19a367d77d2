"""LoRAs of other programs for FLUX.2, and which of the bases a LoRA is for."""

from pathlib import Path

import pytest
import torch
from compare import difference
from diffusers import Flux2KleinPipeline
from safetensors.torch import save_file
from small_bases import BOTH, FLUX1, FLUX2, SmallBase
from test_flux2 import KLEIN_4B, KLEIN_9B, PUBLISHED_DEV
from test_foreign_loras import lora_of, same
from test_lora_files import noise, run, updates
from test_metalora import META, adapted
from test_model import REAL
from torch import Tensor, nn

from flux.flux2 import Flux2
from flux.memory import arrange
from flux.model import Flux
from flux.streaming import Stream
from lora.names import FORMATS
from lora.reading import read_lora
from metalora import adapters, eject, export_lora, load_lora, use_slots


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "foreign.safetensors"


# --- Other programs ----------------------------------------------------------------------------------------

KLEIN = Flux2(FLUX2.sizes)
BLOCKS = ["img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj"]
BLOCKS += ["img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2"]
TRAINED = [f"double_blocks.{k}.{layer}" for k in range(2) for layer in BLOCKS]
TRAINED += [f"single_blocks.{k}.{layer}" for k in range(3) for layer in ("linear1", "linear2")]
OUTSIDE = ["img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "final_layer.linear"]
OUTSIDE += ["double_stream_modulation_img.lin", "double_stream_modulation_txt.lin"]
OUTSIDE += ["single_stream_modulation.lin"]


def pairs(layers: list[str], rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    """Return lora_A and lora_B of our layers, whose q, k and v share lora_A."""
    shapes = {layer: KLEIN.get_submodule(layer).weight.shape for layer in layers}
    return {
        layer: (noise(rank, d_in, seed=k) / 8, noise(d_out, rank, seed=-k - 1))
        for k, (layer, (d_out, d_in)) in enumerate(shapes.items())
    }


def ai_toolkits(layers: list[str]) -> dict[str, Tensor]:
    names = {f"diffusion_model.{layer}": pair for layer, pair in pairs(layers).items()}
    return {f"{name}.lora_{half}.weight": x for name, pair in names.items() for half, x in zip("AB", pair)}


def musubi_tuners(layers: list[str]) -> dict[str, Tensor]:
    tensors = {}
    for layer, (a, b) in pairs(layers).items():
        key = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return tensors


@torch.no_grad()
@pytest.mark.parametrize("tensors", [ai_toolkits(TRAINED + OUTSIDE), musubi_tuners(TRAINED)])
def test_as_diffusers_reads_them(tensors, path):
    """Left out is final_layer.adaLN_modulation.1, whose halves diffusers does not exchange."""
    save_file(tensors, path)
    ours, theirs = FLUX2.both()
    without = ours(**FLUX2.inputs)
    load_lora(ours, path)
    FLUX2.pipeline_of(theirs).load_lora_weights(path)
    expected = FLUX2.their_velocity(theirs)
    assert difference(ours(**FLUX2.inputs), expected) < 1e-5
    assert difference(without, expected) > 0.01


def test_parts_are_what_diffusers_finds(path):
    """Each alone, so that an exchange of two of them would show."""
    save_file(ai_toolkits(TRAINED), path)
    state = Flux2KleinPipeline.lora_state_dict(path)
    keys = [key for key in state if "lora_A" in key]
    theirs = {key: state[key.replace("lora_A", "lora_B")].double() @ state[key].double() for key in keys}
    theirs = {key.removeprefix("transformer.").removesuffix(".lora_A.weight"): x for key, x in theirs.items()}
    ours = updates(read_lora(path)[0])
    assert len(ours) == 2 * 12 + 3 * 2 and same(ours, theirs)
    q, k = (f"transformer_blocks.1.attn.to_{x}" for x in "qk")
    assert not same(ours | {q: ours[k], k: ours[q]}, theirs)


def test_the_last_modulation_is_added_as_it_stands_under_the_bases_name(path):
    d = FLUX2.sizes.hidden_size
    a, b = noise(2, d), noise(2 * d, 2)
    key = "diffusion_model.final_layer.adaLN_modulation.1"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, path)
    model = FLUX2.model()
    weight = model.final_layer.adaLN_modulation[1].weight.clone()
    load_lora(model, path)
    assert difference(model.final_layer.adaLN_modulation[1].weight - weight, b @ a) < 1e-6


# --- Which base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("base, other", [(FLUX1, FLUX2), (FLUX2, FLUX1)], ids=["flux1", "flux2"])
def test_a_lora_for_the_other_base_is_refused(base, other, form, path, tmp_path):
    """Also of no modulation, whose original names are the same in both; and what is refused does nothing."""
    checkpoint, out = tmp_path / "checkpoint.safetensors", tmp_path / "out.safetensors"
    save_file(other.model().state_dict(), checkpoint)
    for targets in ("all", "no-modulation", "attention"):
        export_lora(adapted(targets=targets, base=base), path, META, form=form)
        message = f"foreign.safetensors is a LoRA for {base.name}: its? .*; this model is {other.name}$"
        model = other.model()
        with pytest.raises(ValueError, match=message):
            load_lora(model, path)
        assert all(map(torch.equal, model.parameters(), other.model().parameters()))
        with pytest.raises(ValueError, match=message):
            run("merge", checkpoint, out, "--lora", path)
        assert not out.exists()
        load_lora(base.model(), path)


def full_size(kind: type[nn.Module], sizes) -> nn.Module:
    with torch.device("meta"):
        return kind(sizes)


WIDE = {  # a layer's inputs and outputs at full size, and the models that it fits
    ("diffusion_model.single_blocks.0.linear1", 3072, 27648): ["klein-4b"],
    ("lora_unet_double_blocks_0_img_mlp_0", 3072, 18432): ["klein-4b"],
    ("double_blocks.0.txt_mlp.2", 9216, 3072): ["klein-4b"],
    ("single_blocks.0.linear2", 12288, 3072): ["klein-4b"],
    ("transformer.transformer_blocks.0.ff.linear_in", 3072, 18432): ["klein-4b"],
    ("diffusion_model.double_blocks.0.img_attn.qkv", 4096, 12288): ["klein-9b"],
    ("transformer.transformer_blocks.0.attn.add_k_proj", 6144, 6144): ["dev"],
    ("diffusion_model.double_stream_modulation_img.lin", 6144, 36864): ["dev"],
    ("diffusion_model.double_blocks.0.img_attn.qkv", 3072, 9216): ["flux1", "klein-4b"],
    ("transformer.transformer_blocks.0.attn.to_q", 3072, 3072): ["flux1", "klein-4b"],
    ("lora_unet_double_blocks_0_img_mlp_0", 3072, 12288): ["flux1"],
    ("single_blocks.0.linear1", 3072, 21504): ["flux1"],
    ("double_blocks.0.txt_mlp.2", 12288, 3072): ["flux1"],
    ("single_blocks.0.linear2", 15360, 3072): ["flux1"],
}
MODELS = {
    "flux1": full_size(Flux, REAL),
    "klein-4b": full_size(Flux2, KLEIN_4B),
    "klein-9b": full_size(Flux2, KLEIN_9B),
    "dev": full_size(Flux2, PUBLISHED_DEV),
}


@pytest.mark.parametrize("layer, fitting", WIDE.items(), ids=[f"{x[0]} {x[2]}" for x in WIDE])
def test_a_single_layer_at_full_size_shows_its_base(layer, fitting, path, capsys):
    """Where names and widths are alike in both bases, it fits both."""
    save_file(lora_of(*layer), path)
    run("info", path)
    names = {"FLUX.1" if name == "flux1" else "FLUX.2" for name in fitting}
    shown = names.pop() if len(names) == 1 else "unknown"
    assert f"base {shown}\n" in capsys.readouterr().out
    for name, model in MODELS.items():
        if name in fitting:
            read_lora(path, model)
        else:
            alike = shown == "unknown" or (shown == "FLUX.1") == (name == "flux1")
            message = "does not fit this model" if alike else f"is a LoRA for {shown}: its? .*; this model is"
            with pytest.raises(ValueError, match=message):
                read_lora(path, model)


def test_a_header_decides_where_names_are_alike_and_shapes_say_nothing(path):
    tensors = lora_of("diffusion_model.time_in.out_layer", 3072, 3072)
    save_file(tensors, path, {"ss_base_model_version": "flux2_klein_4b"})
    assert [*read_lora(path)[0]] == ["time_guidance_embed.timestep_embedder.linear_2"]
    save_file(tensors, path)
    assert [*read_lora(path)[0]] == ["time_text_embed.timestep_embedder.linear_2"]
    assert [*read_lora(path, MODELS["klein-4b"])[0]] == ["time_guidance_embed.timestep_embedder.linear_2"]


def test_a_header_that_names_the_other_base_gets_a_line(path, recwarn):
    tensors = lora_of("diffusion_model.double_blocks.0.img_attn.proj", 3072, 3072)
    for header, name in (("flux1", "klein-4b"), ("flux2_klein_4b", "flux1"), ("Flux.2-dev/lora", "flux1")):
        save_file(tensors, path, {"ss_base_model_version": header})
        with pytest.warns(UserWarning, match=f"its header names another base than FLUX.*: {header}"):
            read_lora(path, MODELS[name])
    for header, name in (("flux1", "flux1"), ("flux2_klein_4b", "klein-4b"), ("FLUX.2-klein", "klein-4b")):
        save_file(tensors, path, {"ss_base_model_version": header})
        read_lora(path, MODELS[name])
    assert not recwarn


def test_an_input_as_wide_as_that_of_flux1_depth_is_flux2s_where_the_rest_is(path):
    save_file(lora_of("img_in", 128, 3072), path)
    with pytest.raises(ValueError, match="a LoRA for FLUX.1-Canny or FLUX.1-Depth"):
        read_lora(path)
    read_lora(path, MODELS["klein-4b"])
    save_file(lora_of("img_in", 128, 3072) | lora_of("single_blocks.0.linear1", 3072, 27648), path)
    assert len(read_lora(path)[0]) == 2


def test_what_is_for_no_layer_names_the_base(path):
    name = "transformer.single_transformer_blocks.0.attn.to_{}"
    save_file(lora_of(name.format("qkv_mlp_proj"), 96, 864) | lora_of(name.format("queue"), 96, 96), path)
    with pytest.raises(ValueError, match=r"0.attn.to_queue.lora_B.weight is for no layer of FLUX.2"):
        read_lora(path, KLEIN)


# --- Streamed and in 8 bits --------------------------------------------------------------------------------


def gradients(model: nn.Module, base: SmallBase) -> list[Tensor]:
    use_slots(model, torch.tensor([2, 0]))
    velocity = model(**base.inputs)
    (velocity * torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).sum().backward()
    return [velocity.detach(), *(p.grad for p in model.factors.parameters())]


@BOTH
def test_adapters_around_streamed_weights(base, monkeypatch):
    """Put there before and after; the benchmark puts new ones into a model that is streamed already."""
    monkeypatch.setattr(Stream, "COPY", True)
    expected = gradients(adapted(r2=2, base=base), base)
    model = arrange(adapted(r2=2, base=base), "cpu", "all", stream=base.sizes.depth + base.sizes.depth_single)
    again = adapted(r2=2, model=eject(arrange(adapted(base=base), "cpu", "all", stream=4)))
    assert len(adapters(again)) == len(adapters(model))
    for given in (gradients(model, base), gradients(again, base)):
        far = [difference(a, b) / b.abs().max().item() for a, b in zip(given, expected, strict=True)]
        assert max(far) < 1e-5
    other = gradients(adapted(r2=2, seed=1, base=base), base)
    assert min(difference(a, b) / b.abs().max().item() for a, b in zip(other, expected)) > 0.01
