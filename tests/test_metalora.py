"""The Meta-LoRA layer against the paper's product, its optimizer against torch's, its files in diffusers."""

import functools
import inspect
import re
from dataclasses import replace

import pytest
import torch
from compare import difference, factors, header, randomize
from diffusers import Flux2Transformer2DModel
from diffusers.loaders import lora_conversion_utils, lora_pipeline
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_bases import BOTH, FLUX1, FLUX2, SmallBase
from test_flux2 import KLEIN_4B, KLEIN_9B, PUBLISHED_DEV
from test_model import DEV, REAL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flux import load_transformer
from flux.flux2 import Flux2, Flux2Sizes
from flux.model import Flux
from lora import writing
from lora.merging import merge_loras
from lora.reading import read_lora
from lora.writing import model_spec
from metalora import (
    Factors,
    MetaLoRALinear,
    Prior,
    SlotAdamW,
    adapters,
    assign_meta,
    clip_slots,
    collapse,
    eject,
    export_lora,
    inject,
    inject_loras,
    load_lora,
    load_meta,
    save_meta,
    use_slots,
)

META = {"r1": 6, "targets": "all"}


def adapted(
    r2: int = 1,
    slots: int = 3,
    seed: int = 0,
    targets: str = "all",
    model: nn.Module | None = None,
    base: SmallBase = FLUX1,
) -> nn.Module:
    """Return a transformer with adapters that are not zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    model = inject(model or base.model(), 6, r2, slots, targets, generator)
    for up in factors(model, "up"):
        up.copy_(torch.randn(up.shape, generator=generator) / 4)
    return model


# --- The layer ---------------------------------------------------------------------------------------------


def three_steps(factors: Factors, x: Tensor, slots: list[int]) -> Tensor:
    """Multiply as the paper writes it, one matrix after the other, for each sample and part."""
    (layer,), samples = factors.layers.values(), []
    mids, ups = (factor[:, 0] for factor in factors.split(factors.personal))
    for sample, slot in zip(x, slots):
        parts = zip(factors.meta_down[0][0], mids[slot], ups[slot].split(layer.parts))
        samples.append(torch.cat([sample @ down.T @ mid.T @ up.T for down, mid, up in parts], dim=-1))
    return layer.base(x) + torch.stack(samples)


def ours(factors: Factors, x: Tensor, slots: list[int] | int) -> Tensor:
    factors.batch_slots = slots if isinstance(slots, int) else torch.tensor(slots, dtype=torch.long)
    factors.multiply(x.dtype)
    return factors.layers["layer"](x)


def results(forward, factors: Factors, x: Tensor, slots: list[int] | int) -> list[Tensor]:
    """Return the output and the gradients of meta_down, mid, up and x."""
    h = forward(factors, x, slots)
    pull = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
    wanted = [factors.meta_down[0], factors.personal, x]
    meta_down, personal, x = torch.autograd.grad((h * pull).sum(), wanted)
    return [h, meta_down, *factors.split(personal), x]


def far(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    return [difference(a, b) / b.abs().max().item() for a, b in zip(ours, theirs, strict=True)]


def layer_and_input(
    r2: int, tokens: tuple[int, ...], parts: tuple[int, ...] = (5, 5, 5, 9), bias: bool = True
) -> tuple[Factors, Tensor]:
    torch.manual_seed(0)
    layer = MetaLoRALinear(nn.Linear(7, 24, bias).requires_grad_(False), [*parts])
    factors = Factors({"layer": layer}, r1=6, r2=r2, slots=4).double()
    layer.double()
    for factor in factors.parameters():
        nn.init.normal_(factor)
    return factors, torch.randn(3, *tokens, 7, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("tokens", [(5,), ()], ids=["tokens", "modulation"])
@pytest.mark.parametrize("r2", [1, 4])
@pytest.mark.parametrize("parts, bias", [((5, 5, 5, 9), True), ((8, 8, 8), False), ((24,), False)])
def test_layer_equals_the_papers_product(parts, bias, r2, tokens):
    """The first is FLUX.1's linear1, the others are FLUX.2's qkv and linear1."""
    factors, x = layer_and_input(r2, tokens, parts, bias)
    slots = [2, 2, 0]  # one identity twice, two others absent
    given = results(ours, factors, x, slots)
    assert max(far(given, results(three_steps, factors, x, slots))) < 1e-12
    assert not given[2][[1, 3]].any() and not given[3][[1, 3]].any()

    other = results(three_steps, factors, x, [0, 2, 2])
    assert min(far(given, other)) > 0.01  # output and every gradient notice wrong slots
    if len(parts) > 1:
        factors.meta_down[0].data = factors.meta_down[0].data.roll(1, dims=1)  # k's takes q's and so on
        assert far(given, results(ours, factors, x, slots))[0] > 0.01

    for slot in (0, 1):
        expected = results(three_steps, factors, x, [slot] * 3)
        for slots in ([slot], slot):
            assert max(far(results(ours, factors, x, slots), expected)) < 1e-12


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("slots", [[2, 2, 0], [1]], ids=["each", "one"])
def test_layer_in_the_dtypes_of_training(dtype, most, slots):
    """The base and x in `dtype`, the factors in float32; the same bits every time; x is not written to."""
    factors, x = layer_and_input(2, (5,))
    expected = results(three_steps, factors, x, (3 * slots)[:3])
    factors, given = factors.float(), x.detach().to(dtype).requires_grad_()
    factors.layers["layer"].to(dtype)
    found = results(ours, factors, given, slots)
    assert [part.dtype for part in found] == [dtype, *3 * [torch.float32], dtype]
    assert max(far([part.double() for part in found], expected)) < most
    assert all(map(torch.equal, found, results(ours, factors, given, slots)))
    assert torch.equal(given, x.to(dtype))


def test_a_frozen_meta_down_in_half_precision():
    """The same as its values in float32, though these are never kept."""
    factors, x = layer_and_input(2, (5,))
    factors, x = factors.float(), x.detach().float().requires_grad_()
    factors.layers["layer"].float()
    half = factors.meta_down[0].data.half()
    given = []
    for meta_down in (half.float(), half):
        factors.meta_down[0] = nn.Parameter(meta_down, requires_grad=False)
        loss = ours(factors, x, [2, 2, 0]).square().sum()
        given.append([loss, *torch.autograd.grad(loss, [factors.personal, x])])
    assert all(map(torch.equal, *given))


@pytest.mark.parametrize("slots", [[], [0, 1], [0, 1, 2, 3]])
def test_slots_of_another_shape_are_refused(slots):
    """Two slots for six samples would be read as three samples each."""
    factors, x = layer_and_input(1, (5,))
    h = ours(factors, x, [2, 2, 0])
    for samples in (x, torch.cat([x, x]).detach()):
        with pytest.raises(ValueError, match=rf"slots are .*, must be \({len(samples)},\), or \(1,\)"):
            ours(factors, samples, slots)
    assert torch.equal(ours(factors, x, [2, 2, 0]), h)


def test_second_derivatives_raise_instead_of_being_wrong():
    factors, x = layer_and_input(2, (5,))
    slots = [2, 2, 0]
    for factor in (factors.meta_down[0], factors.personal, x):
        loss = ours(factors, x, slots).square().sum()
        (grad,) = torch.autograd.grad(loss, factor, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
        plain = three_steps(factors, x, slots).square().sum()  # with autograd alone they are there
        (expected,) = torch.autograd.grad(plain, factor, create_graph=True)
        assert difference(grad, expected) < 1e-12 * expected.abs().max()
        expected.sum().backward()


def test_fresh_factors():
    """Uniform up to 1 / sqrt(inputs), as kaiming with a = sqrt(5); up zero; the seed decides."""
    first, again, other = (
        inject(Flux(DEV), 64, 2, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    for name in ("meta_down", "mid"):
        for a, b, c in zip(*(factors(model, name) for model in (first, again, other))):
            assert a.dtype == torch.float32
            assert torch.equal(a, b) and not torch.equal(a, c)
            assert 0.97 < a.abs().max() * a.shape[-1] ** 0.5 <= 1
            assert abs(a.std() * (3 * a.shape[-1]) ** 0.5 - 1) < 0.1
    assert not any(up.any() for up in factors(first, "up"))


@BOTH
def test_injection_holds_the_base_uncopied_and_changes_nothing(base):
    model, given = base.model(), base.inputs
    expected, weights = model(**given), {p.data_ptr() for p in model.parameters()}
    assert inject(model, r1=6, r2=2, slots=2) is model
    use_slots(model, torch.tensor([1, 0]))
    assert torch.equal(model(**given), expected)
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert frozen == weights
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in model.factors.parameters()}


@pytest.mark.parametrize(
    "base, targets, double, single",
    [
        (FLUX1, "all", 10, {"modulation.lin", "linear1", "linear2"}),
        (FLUX1, "no-modulation", 8, {"linear1", "linear2"}),
        (FLUX1, "attention", 4, {"linear1", "linear2"}),
        (FLUX2, "all", 8, {"linear1", "linear2"}),  # whose modulation is outside the blocks
        (FLUX2, "no-modulation", 8, {"linear1", "linear2"}),
        (FLUX2, "attention", 4, {"linear1", "linear2"}),
    ],
)
def test_targets(base, targets, double, single):
    names = adapters(inject(base.model(), 6, 1, 1, targets)).keys()
    pattern = {"all": ".", "no-modulation": "attn|mlp", "attention": "attn"}[targets]
    assert all(re.search(pattern, name) for name in names if name.startswith("double"))
    assert sum(name.startswith("double") for name in names) == base.sizes.depth * double
    ours = [name.split(".", 2)[2] for name in names if name.startswith("single")]
    assert set(ours) == single and len(ours) == base.sizes.depth_single * len(single)


@BOTH
def test_factors_lie_beside_what_is_not_streamed(base):
    """Not beside the weights of the blocks, which streaming keeps in the host's memory."""
    with torch.device("meta"):
        model = base.kind(base.sizes)
    for block in [*model.double_blocks, *model.single_blocks]:
        block.to_empty(device="cpu")
    assert inject(model, 6, 1, 1, reset=False).factors.personal.is_meta


def real_model(kind: type[nn.Module] = Flux, sizes=REAL) -> nn.Module:
    with torch.device("meta"):
        return inject(kind(sizes), r1=128, r2=1, slots=1)


def test_counts_on_flux_dev():
    model = real_model()
    lora = collapse(model)
    assert len(lora) == 494  # 19 * 14 + 38 * 6
    assert sum(p.numel() for p in factors(model, "meta_down")) == 298_844_160
    assert sum(p.numel() for p in factors(model, "mid", "up")) == 3_098_368
    assert sum(a.numel() + b.numel() for a, b in lora.values()) == 5_369_856


def test_every_linear_layer_of_the_published_blocks_is_adapted():
    blocks = re.compile(r"(single_)?transformer_blocks\..*\.weight")
    published = {
        name: shape
        for name, shape in header("flux1-dev-diffusers").items()
        if blocks.match(name) and len(shape) == 2
    }
    lora = collapse(real_model())
    assert {f"{name}.weight": (len(b), a.shape[1]) for name, (a, b) in lora.items()} == published


@pytest.mark.parametrize(
    "sizes, layers, parts, fused, meta_down, row, exported",
    [
        (KLEIN_4B, 80, 100, 62_914_560, 70_778_880, 965_120, 1_505_280),
        (KLEIN_9B, 112, 144, 113_246_208, 130_023_424, 1_722_368, 2_719_744),
        (PUBLISHED_DEV, 160, 192, 264_241_152, 289_406_976, 4_055_040, 6_291_456),
    ],
    ids=["klein-4b", "klein-9b", "dev"],
)
def test_flux_2s_blocks_are_adapted_as_diffusers_divides_them(
    sizes, layers, parts, fused, meta_down, row, exported
):
    """With r1 128 and r2 1; fused: of meta_down, had q, k and v of the double blocks one in common."""
    model = real_model(Flux2, sizes)
    lora, d = collapse(model), sizes.hidden_size
    assert (len(adapters(model)), len(lora)) == (layers, parts)
    assert {(name, len(b), a.shape[1]) for name, (a, b) in lora.items()} == their_linears(sizes)
    assert sum(128 * layer.base.in_features for layer in adapters(model).values()) == fused
    assert sum(p.numel() for p in factors(model, "meta_down")) == meta_down
    assert meta_down == 128 * d * (sizes.depth * 2 * (3 + 1 + 1 + 3) + sizes.depth_single * (1 + 4))
    assert sum(p.numel() for p in factors(model, "mid", "up")) == row
    assert row == 128 * parts + d * (sizes.depth * 2 * (3 + 1 + 6 + 1) + sizes.depth_single * (9 + 1))
    assert sum(a.numel() + b.numel() for a, b in lora.values()) == exported


def their_linears(sizes: Flux2Sizes) -> set[tuple[str, int, int]]:
    """Return name, outputs and inputs of every linear layer in the blocks of diffusers' model."""
    with torch.device("meta"):
        theirs = Flux2Transformer2DModel(
            num_layers=sizes.depth,
            num_single_layers=sizes.depth_single,
            num_attention_heads=sizes.num_heads,
            joint_attention_dim=sizes.txt_size,
        )
    linears = {name: layer for name, layer in theirs.named_modules() if isinstance(layer, nn.Linear)}
    return {(x, y.out_features, y.in_features) for x, y in linears.items() if "transformer_blocks" in x}


@BOTH
def test_no_other_identities_between_forward_and_backward(base):
    """Recomputed blocks use the products that are there in backward: those of the last forward pass."""

    def gradients(checkpointed: bool, late_slots: list[int], again: bool = False) -> list[Tensor]:
        model = adapted(base=base)
        for block in [*model.double_blocks, *model.single_blocks] if checkpointed else []:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        use_slots(model, torch.tensor([2, 0]))
        loss = model(**base.inputs).square().mean()
        use_slots(model, torch.tensor(late_slots))
        if again:
            model(**base.inputs)
        loss.backward()
        return [p.grad for p in model.factors.parameters()]

    expected = gradients(False, [2, 0])
    assert max(far(gradients(True, [2, 0], again=True), expected)) < 1e-5
    assert max(far(gradients(True, [0, 2]), expected)) < 1e-5
    assert max(far(gradients(False, [0, 2], again=True), expected)) < 1e-5
    assert max(far(gradients(True, [0, 2], again=True), expected)) > 0.1


# --- The optimizer -----------------------------------------------------------------------------------------


def test_every_slot_has_an_adamw_of_its_own():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    personal = nn.Parameter(draw(5, 10))
    single = [nn.Parameter(row.clone()) for row in personal.detach()]
    optimizers = [torch.optim.AdamW([own], lr=0.01, weight_decay=0.01) for own in single]
    ours = SlotAdamW(personal, lr=0.01, weight_decay=0.01)
    for step in range(12):
        if step == 6:  # a bucket that comes round again goes on from its stored state
            state = ours.state_dict()
            ours = SlotAdamW(personal, lr=0.01, weight_decay=0.01)
            ours.load_state_dict(state)
        slots = torch.randint(4, (3,), generator=generator)  # repeats; the last slot never comes
        before = personal.detach().clone()
        personal.grad = draw(5, 10) * 10.0 ** torch.randint(-5, 2, (1,), generator=generator)
        for slot in slots.unique():
            single[slot].grad = personal.grad[slot].clone()
            optimizers[slot].step()
        ours.step(slots)
        absent = [slot for slot in range(5) if slot not in slots]
        assert torch.equal(personal[absent], before[absent])
    for slot in range(5):
        assert ours.count[slot] == optimizers[slot].state[single[slot]].get("step", 0)
        torch.testing.assert_close(personal[slot], single[slot], rtol=1e-6, atol=1e-7)
    assert len(ours.count.unique()) > 2 and ours.count[4] == 0


# --- Files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, architecture, version",
    [(FLUX1, "flux-1-dev/lora", "flux1"), (FLUX2, "Flux.2-klein-4b/lora", "flux2_klein_4b")],
    ids=["flux1", "flux2"],
)
def test_exported_file(base, architecture, version, tmp_path):
    path = tmp_path / "person.safetensors"
    model = adapted(r2=2, base=base)
    export_lora(model, path, {"caption": "ä photo", "steps": 375}, slot=1)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    expected = {"format": "pt", "caption": "ä photo", "steps": "375", "version": "1", "r1": "6", "r2": "2"}
    expected |= {"modelspec.architecture": architecture, "modelspec.title": "Meta-LoRA: ä photo"}
    expected |= {"ss_base_model_version": version}
    expected |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.trigger_phrase": "ä photo"}
    assert expected.items() <= metadata.items() and "modelspec.resolution" not in metadata
    assert model_spec({"resolution": 768}, model)["modelspec.resolution"] == "768x768"
    tensors = load_file(path)
    modules = {f"transformer.{name}" for name in collapse(model)}
    assert {*tensors} == {f"{name}.lora_{letter}.weight" for name in modules for letter in "AB"}
    theirs = dict(base.both()[1].named_modules())
    for name in modules:
        a, b = (tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
        linear = theirs[name.removeprefix("transformer.")]
        assert (a.shape, b.shape) == ((2, linear.in_features), (linear.out_features, 2))
        assert a.dtype == b.dtype == torch.float16
    words = ("processor", "base_model", "lora_down", "lora_mid", "alpha", "lora_unet")
    assert not [key for key in tensors for word in words if word in key]


@pytest.mark.parametrize(
    "kind, sizes, architecture, version",
    [
        (Flux, replace(REAL, guidance=False), "flux-1-schnell", "flux1"),
        (Flux2, KLEIN_4B, "Flux.2-klein-4b", "flux2_klein_4b"),
        (Flux2, KLEIN_9B, "Flux.2-klein-9b", "flux2_klein_9b"),
        (Flux2, PUBLISHED_DEV, "Flux.2-dev", "flux2"),
    ],
)
def test_the_header_says_which_base_it_is_for(kind, sizes, architecture, version):
    spec = model_spec({}, real_model(kind, sizes))
    assert spec["modelspec.architecture"] == f"{architecture}/lora"
    assert spec["ss_base_model_version"] == version
    repository = {Flux: "flux", Flux2: "flux2"}[kind]
    assert spec["modelspec.implementation"] == f"https://github.com/black-forest-labs/{repository}"


@pytest.fixture
def reader_for_our_width(monkeypatch):
    """Give diffusers' reader of kohya's names the test model's widths: it knows FLUX.1-dev's alone."""
    name = "_convert_kohya_flux_lora_to_diffusers"
    source, d = inspect.getsource(getattr(lora_conversion_utils, name)), DEV.hidden_size
    assert source.count("[3072, 3072, 3072, 12288]") == 1
    module = dict(vars(lora_conversion_utils))
    exec(source.replace("[3072, 3072, 3072, 12288]", str([d, d, d, DEV.mlp_size])), module)
    monkeypatch.setattr(lora_pipeline, name, module[name])


@torch.no_grad()
@pytest.mark.parametrize(
    "base, form, projections",
    [
        (FLUX1, "diffusers", 2 * 14 + 3 * 6),
        (FLUX1, "kohya", 2 * 14 + 3 * 6),
        (FLUX2, "diffusers", 2 * 12 + 3 * 2),
        (FLUX2, "kohya", 2 * 12 + 3 * 2),
        (FLUX2, "original", 2 * 12 + 3 * 2),
    ],
)
@pytest.mark.parametrize("r2", [1, 4])
def test_diffusers_reads_the_exported_file(r2, base, form, projections, tmp_path, reader_for_our_width):
    path = tmp_path / "person.safetensors"
    ours, theirs = base.both()
    without = ours(**base.inputs)
    export_lora(adapted(r2, base=base), path, META, slot=2, form=form)
    load_lora(ours, path)
    pipeline = base.pipeline_of(theirs)
    pipeline.load_lora_weights(path, adapter_name="her")
    layers = [layer for layer in theirs.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == projections
    ranks = {r2, 3 * r2} if form == "original" else {r2}  # there q, k and v each take all of a fused lora_A
    assert {(layer.r["her"], layer.lora_alpha["her"], layer.scaling["her"]) for layer in layers} == {
        (rank, rank, 1) for rank in ranks
    }
    if len(ranks) == 1:
        config = theirs.peft_config["her"]
        assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (r2, r2, {}, {})
    expected = base.their_velocity(theirs)
    assert difference(ours(**base.inputs), expected) < 1e-5
    assert difference(without, expected) > 0.01
    pipeline.unload_lora_weights()
    assert difference(without, base.their_velocity(theirs)) < 1e-5


@torch.no_grad()
@BOTH
def test_a_loaded_lora_equals_the_live_adapter(base, tmp_path):
    path, live = tmp_path / "person.safetensors", adapted(r2=2, base=base)
    export_lora(live, path, META, slot=2)
    lora = collapse(live, slot=2)
    use_slots(live, torch.tensor([2, 2]))
    expected, loaded = live(**base.inputs), base.model()
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}

    assert load_lora(loaded, path, strength=0)["r1"] == "6"
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    load_lora(loaded, path)
    assert difference(loaded(**base.inputs), expected) < 2e-3  # the file has 11 bits
    update = {name: tensor - before[name] for name, tensor in loaded.state_dict().items()}
    a, b = lora["transformer_blocks.1.attn.add_k_proj"]
    rows = update["double_blocks.1.txt_attn.qkv.weight"][base.sizes.hidden_size : 2 * base.sizes.hidden_size]
    assert difference(rows, b @ a) < 1e-3 * (b @ a).abs().max()
    parts = [lora[f"single_transformer_blocks.1.{part}"] for part in base.single]
    rows = torch.cat([b @ a for a, b in parts])
    assert difference(update["single_blocks.1.linear1.weight"], rows) < 1e-3 * rows.abs().max()

    doubled = base.model()
    load_lora(doubled, path, strength=2)
    for name, tensor in doubled.state_dict().items():
        torch.testing.assert_close(tensor - before[name], 2 * update[name], rtol=0, atol=1e-6)


@BOTH
def test_merging_leaves_the_models_file_and_its_map_alone(base, tmp_path):
    path, lora = tmp_path / "flux-x.safetensors", tmp_path / "person.safetensors"
    save_file(base.model().state_dict(), path)
    export_lora(adapted(base=base), lora, META)
    before, mapped = path.read_bytes(), load_transformer(path, dtype=torch.float32)
    weight = mapped.single_blocks[0].linear1.weight
    load_lora(mapped, lora)
    assert not torch.equal(mapped.single_blocks[0].linear1.weight, weight)
    assert torch.equal(weight, load_file(path)["single_blocks.0.linear1.weight"])
    assert path.read_bytes() == before


@BOTH
def test_merging_rounds_once_to_the_weights_own_dtype(base, tmp_path):
    """Also when there are several: one after the other would round as often."""
    exact, half, twice = (base.model().bfloat16() for _ in range(3))
    exact, loras = exact.float(), []
    for seed in range(2):
        path = tmp_path / f"{seed}.safetensors"
        export_lora(adapted(seed=seed, base=base), path, META)
        loras.append((read_lora(path, exact)[0], 0.7 - seed))
        load_lora(twice, path, 0.7 - seed)
    merge_loras(exact, loras)
    merge_loras(half, loras)
    for ours, expected in zip(half.parameters(), exact.parameters()):
        assert torch.equal(ours, expected.bfloat16())
    assert not all(map(torch.equal, twice.parameters(), half.parameters()))


def test_a_lora_that_does_not_fit_is_refused_in_one_error(tmp_path):
    path = tmp_path / "person.safetensors"
    export_lora(adapted(), path, META)
    tensors = load_file(path)
    first = "transformer.transformer_blocks.0."
    del tensors[first + "attn.to_q.lora_A.weight"]
    tensors[first + "attn.to_k.lora_B.weight"] = torch.zeros(95, 1)
    tensors[first + "ff.net.2.lora_A.weight"] = torch.zeros(2, 384)
    tensors[first + "ff.net.7.lora_A.weight"] = torch.zeros(1, 96)
    tensors["lora_unet_single_blocks_0_linear1.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    model = randomize(Flux(DEV))
    before = model.double_blocks[0].img_mod.lin.weight.clone()
    with pytest.raises(ValueError) as error:
        load_lora(model, path)
    assert str(error.value).splitlines() == [
        f"{path} cannot be read as a LoRA:",
        f"  {first}ff.net.7.lora_A.weight is for no layer of FLUX.1",
        "  single_blocks.0.linear1 lacks lora_A and lora_B",
        "  transformer_blocks.0.attn.to_q lacks lora_A",
        "  transformer_blocks.0.ff.net.2 has lora_A (2, 384) and lora_B (96, 1), "
        "must be (rank, inputs) and (outputs, rank)",
        "  transformer_blocks.0.attn.to_k has lora_A (1, 96) and lora_B (95, 1), "
        "must be (rank, 96) and (96, rank)",
    ]
    assert torch.equal(model.double_blocks[0].img_mod.lin.weight, before)

    export_lora(adapted(model=Flux(replace(DEV, hidden_size=64, num_heads=2))), path, META)
    with pytest.raises(ValueError, match=r"(?s)norm1.linear has lora_A \(1, 64\).*and 26 more"):
        load_lora(model, path)
    save_file({}, path)
    with pytest.raises(ValueError, match="holds no tensors"):
        load_lora(model, path)


@BOTH
def test_meta_file_round_trip(base, tmp_path):
    path, model, other = tmp_path / "meta.safetensors", adapted(base=base), adapted(seed=1, base=base)
    save_meta(model, path, META)
    prior = load_meta(path)
    assert prior.metadata == {"format": "pt", "r1": "6", "targets": "all"}
    assert (prior.path, prior.r1, prior.targets) == (path, 6, "all")
    mids = [mid.clone() for mid in factors(other, "mid")]
    assign_meta(other, prior)
    for ours, stored in zip(factors(other, "meta_down"), factors(model, "meta_down"), strict=True):
        assert torch.equal(ours, stored.half())
    assert all(map(torch.equal, mids, factors(other, "mid")))
    assert not any(p.requires_grad for p in other.factors.meta_down)


def test_a_meta_file_that_does_not_fit_is_refused(tmp_path):
    path, model = tmp_path / "meta.safetensors", adapted()
    save_meta(model, path, META)
    tensors = load_meta(path).tensors
    tensors["single_blocks.9.linear1.meta_down"] = tensors.pop("single_blocks.0.linear1.meta_down")
    tensors["single_blocks.0.linear2.meta_down"] = torch.zeros(1, 8, 480)
    with pytest.raises(ValueError) as error:
        assign_meta(model, Prior(path, tensors, {"r1": "6", "targets": "all"}))
    assert str(error.value).splitlines() == [
        f"{path} does not fit this model:",
        "  missing single_blocks.0.linear1.meta_down",
        "  single_blocks.0.linear2.meta_down is (1, 8, 480), must be (1, 6, 480)",
        "  single_blocks.9.linear1.meta_down is for no layer of this model",
    ]
    for write in (
        lambda: export_lora(model, path, META),
        lambda: save_meta(model, path, {"r1": 6}),
        lambda: save_file({}, path, metadata={"r1": "6", "targets": "all"}),
    ):
        write()
        with pytest.raises(ValueError, match="no file of stage 1"):
            load_meta(path)
    path.write_text("a text")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_meta(path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = adapted()
    meta_down, _, up = model.factors.by_layer()["single_blocks.1.linear2"]
    up[1, 3] = 1e5  # finite in float32, not in the file's float16
    meta_down[0, 2, 5] = torch.nan
    for write, name in (
        (lambda path: export_lora(model, path, META, slot=1), "1.proj_out.lora_A"),
        (lambda path: save_meta(model, path, META), "1.linear2.meta_down"),
    ):
        with pytest.raises(ValueError, match=f"is not written: . tensors are not finite, .*{name}"):
            write(tmp_path / "file.safetensors")
    meta_down[0, 2, 5] = 0
    with pytest.raises(ValueError, match="1.proj_out.lora_B"):
        export_lora(model, tmp_path / "file.safetensors", META, slot=1)
    assert not list(tmp_path.iterdir())


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "person.safetensors"
    export_lora(adapted(), path, META)
    before = path.read_bytes()

    def crash(tensors, temporary, metadata):
        temporary.write_bytes(before[:99])
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        export_lora(adapted(seed=1), path, META)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


# --- Plain LoRAs, and people side by side ------------------------------------------------------------------


def test_plain_lora_is_up_times_mid():
    layer = MetaLoRALinear(nn.Linear(7, 24).requires_grad_(False), [5, 5, 5, 9])
    plain = Factors({"layer": layer}, None, r2=2, slots=3)
    plain.reset(torch.Generator().manual_seed(0))
    meta_down, mid, up = plain.by_layer()["layer"]
    assert meta_down is None and mid.shape == (3, 4, 2, 7)
    up.normal_()
    x = torch.randn(2, 5, 7)
    parts = [[up @ a for a, up in zip(mid[slot], up[slot].split(layer.parts))] for slot in (2, 0)]
    expected = layer.base(x) + x @ torch.stack([torch.cat(rows) for rows in parts]).mT
    torch.testing.assert_close(ours(plain, x, [2, 0]), expected)


@BOTH
def test_files_in_slots_do_what_merging_does_and_leave_no_trace(base, tmp_path):
    """One picture per LoRA in a batch; the model afterwards is the one before."""
    paths, merged, given = [], [], base.inputs
    for seed, targets in ((1, "all"), (2, "attention")):  # what a file does not name stays as it is
        export_lora(adapted(seed=seed, targets=targets, base=base), tmp_path / f"{seed}.safetensors", META)
        paths.append(tmp_path / f"{seed}.safetensors")
        model = base.model()
        load_lora(model, paths[-1])
        merged.append(model(**given))
    model = base.model()
    without, modules = model(**given), [type(module) for module in model.modules()]
    inject_loras(model, [[(read_lora(path)[0], 1.0)] for path in paths])
    for slots in ([0, 1], [1, 0]):
        use_slots(model, torch.tensor(slots))
        expected = torch.stack([merged[slot][sample] for sample, slot in enumerate(slots)])
        assert difference(model(**given), expected) < 1e-5 < difference(model(**given), without)
    assert torch.equal(eject(model)(**given), without)
    assert [type(module) for module in model.modules()] == modules


@BOTH
def test_loras_of_several_ranks_and_strengths_add_up_in_a_slot(base, tmp_path):
    loras = []
    for r2, targets, strength in ((1, "all", 0.7), (3, "attention", -1.5), (2, "no-modulation", 2)):
        model = adapted(r2, seed=r2, targets=targets, base=base)
        export_lora(model, tmp_path / f"{r2}.safetensors", META)
        loras.append((read_lora(tmp_path / f"{r2}.safetensors")[0], strength))
    given, model = base.inputs, base.model()
    without, expected = model(**given), []
    for slot in (loras, loras[1:2]):
        merge_loras(merged := base.model(), slot)
        expected.append(merged(**given))
    inject_loras(model, [loras, loras[1:2]])
    use_slots(model, torch.tensor([0, 1]))
    both = torch.stack([expected[0][0], expected[1][1]])
    assert difference(model(**given), both) < 1e-5 < difference(both, without)


def test_each_slot_is_clipped_alone():
    personal, grad = nn.Parameter(torch.zeros(3, 22)), torch.randn(3, 22) * torch.tensor([[3], [0.01], [7]])
    personal.grad = grad.clone()
    clip_slots(personal, 1.0)
    for slot in range(3):
        alone = nn.Parameter(torch.zeros(22))
        alone.grad = grad[slot].clone()
        torch.nn.utils.clip_grad_norm_([alone], 1.0)
        torch.testing.assert_close(personal.grad[slot], alone.grad)
