"""The plan against the true sizes and peaks counted operation by operation; and what it chooses."""

import argparse
from dataclasses import replace
from itertools import count

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from bench import documents, memory, plans
from flux.errors import UserError
from flux.memory import arrange, blocks_of, checkpoint_blocks
from flux.model import Flux
from flux.streaming import FrozenLinear
from metalora import adapters, inject
from run import speeds
from run.costs import (
    FLUX_DEV,
    GIB,
    KLEIN_4B,
    TILE,
    Plan,
    Workload,
    adapter_bytes,
    block_bytes,
    costs_of,
    estimate,
    kinds,
    linear_sizes,
    outer_parameters,
    sampling_peak,
    step_flops,
)
from run.models import files_to_plan
from run.plan import RESERVE, MemoryOptions, add_memory_arguments, choose, make_plan, table

# At full width; and of one head.
SHORT, SHORT_KLEIN = (replace(sizes, depth=2, depth_single=3) for sizes in (FLUX_DEV, KLEIN_4B))
TINY = replace(SHORT, hidden_size=128, mlp_size=512, num_heads=1)
TINY_KLEIN = replace(SHORT_KLEIN, hidden_size=128, mlp_size=384, num_heads=1)
STAGE1 = Workload("stage1", batch=4, identities=50)
STAGE2 = Workload("stage2")
SAMPLE = Workload("sample")


@pytest.mark.parametrize("short", [SHORT, SHORT_KLEIN])
def test_sizes_are_those_of_the_model(short):
    with torch.device("meta"):
        model = inject(costs_of(short).model(short), 128, 2, 5, reset=False)
    for kind, block in (("double", model.double_blocks[0]), ("single", model.single_blocks[0])):
        own = list(block.parameters())
        assert sum(block_bytes(short, kind, fp8=False, width=2)) == 2 * sum(p.numel() for p in own)
        layers = [layer for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
        shapes = [(layer.in_features, layer.out_features) for layer in layers]
        assert sorted(shapes) == sorted(sizes[:2] for sizes in linear_sizes(short, kind))
        by_layer = model.factors.by_layer().items()
        factors = [layer for name, layer in by_layer if name.startswith(f"{kind}_blocks.0.")]
        sizes = (sum(layer[0].nbytes for layer in factors), sum(a.nbytes + b.nbytes for _, a, b in factors))
        assert adapter_bytes(Workload("stage1", short, r2=2, identities=5), kind) == sizes
    outside = [p for name, p in model.named_parameters() if "blocks" not in name and "factors" not in name]
    assert outer_parameters(short) == sum(p.numel() for p in outside)


@pytest.mark.parametrize("sizes, published", [(FLUX_DEV, 11_901_408_320), (KLEIN_4B, 3_875_544_576)])
def test_the_models_have_their_published_sizes(sizes, published):
    parameters = sum(sum(block_bytes(sizes, kind, fp8=False, width=1)) for kind in kinds(sizes))
    assert parameters + outer_parameters(sizes) == published


@pytest.mark.parametrize("tiny", [TINY, TINY_KLEIN])
def test_8_bits_take_the_bytes_that_are_planned(tiny):
    model = arrange(costs_of(tiny).model(tiny).bfloat16().requires_grad_(False), "cpu", fp8=True)
    for kind, block in zip(kinds(tiny), blocks_of(model)):
        layers = [layer for layer in block.modules() if isinstance(layer, FrozenLinear)]
        weights = sum(layer.stored.nbytes for layer in layers)
        others = sum(tensor.nbytes for tensor in [*block.parameters(), *block.buffers()])
        assert block_bytes(tiny, kind, fp8=True, width=2) == (weights, others)


# At full width; each with another plan, whose peak it must not be taken for.
CASES = [
    (STAGE1, Plan("all"), Plan("attention")),
    (replace(STAGE1, batch=2, r2=8), Plan("attention", 5), Plan("none", 5)),
    (replace(STAGE2, resolution=512), Plan(2, fp8=True), Plan("none", fp8=True)),
    (SAMPLE, Plan("none", 5), Plan("none", 4)),
    (replace(STAGE2, fused_norm=False), Plan("none"), Plan(1)),
    (replace(STAGE2, batch=4, identities=4, r2=8), Plan("all", 5), Plan("attention", 5)),
    (replace(STAGE1, sizes=SHORT_KLEIN), Plan("all"), Plan("attention")),
    (replace(STAGE2, sizes=SHORT_KLEIN, resolution=512), Plan(2, 5, fp8=True), Plan(2, 5)),
    (replace(SAMPLE, sizes=SHORT_KLEIN, batch=4), Plan("none", 5), Plan("none", 4)),
]


@pytest.mark.parametrize("work, chosen, other", CASES)
def test_the_plan_predicts_the_simulated_peak(work, chosen, other):
    work = work if work.sizes == SHORT_KLEIN else replace(work, sizes=SHORT)
    simulated = memory.simulate(work, chosen)
    assert abs(estimate(work, chosen).peak / simulated - 1) < (0.02 if work.sizes == SHORT else 0.01)
    assert abs(estimate(work, other).peak / simulated - 1) > 0.03
    norm = replace(work, fused_norm=not work.fused_norm)
    assert work.kind == "sample" or abs(estimate(norm, chosen).peak / simulated - 1) > 0.02


def test_at_low_resolution_the_peak_is_where_factors_move(monkeypatch):
    work = replace(STAGE1, sizes=SHORT_KLEIN, resolution=256, t5_length=128, r2=16, identities=5)
    simulated = memory.simulate(work, Plan("all"))
    assert abs(estimate(work, Plan("all")).peak / simulated - 1) < 0.01
    monkeypatch.setattr("run.costs.MOVING", 0)
    assert abs(estimate(work, Plan("all")).peak / simulated - 1) > 0.03


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(memory.ROWS)))
def test_whole_model(number):
    work, chosen, limit = memory.ROWS[number]
    simulated = memory.simulate(work, chosen)
    assert abs(estimate(work, chosen).peak / simulated - 1) < 0.03
    assert limit is None or round(simulated / GIB, 1) <= limit


@pytest.mark.parametrize("what, tera", [("all", 245.5), ("none", 171.1)])
def test_flops_of_a_step_are_those_counted(what, tera):
    assert abs(step_flops(STAGE2, what) / 1e12 - tera) < 0.2
    assert abs(step_flops(SAMPLE, "none") / 1e12 - 74.4) < 0.1


def inputs(sizes, batch: int, tokens: int, grad: bool = False) -> dict[str, torch.Tensor]:
    """Zeros for a model, with 16 text tokens."""
    ids = torch.zeros(batch, tokens, len(sizes.axes))
    given = {
        "img": torch.zeros(batch, tokens, sizes.in_channels, requires_grad=grad),
        "txt": torch.zeros(batch, 16, sizes.txt_size, requires_grad=grad),
    }
    given |= {"img_ids": ids, "txt_ids": ids[:, :16], "t": torch.zeros(batch), "guidance": torch.zeros(batch)}
    return given | ({"pooled": torch.zeros(batch, 768)} if costs_of(sizes).model is Flux else {})


@pytest.mark.parametrize("sizes", [TINY, TINY_KLEIN])
def test_flops_of_a_forward_pass_are_those_counted(sizes):
    work = Workload("sample", sizes, batch=2, resolution=128, t5_length=16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model = costs_of(sizes).model(sizes)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(**inputs(sizes, 2, 64))
    counts = counter.get_flop_counts()
    counted = sum(
        sum(counts[f"{type(model).__name__}.{name}_blocks.{k}"].values())
        for name, n in (("double", 2), ("single", 3))
        for k in range(n)
    )
    assert step_flops(work, "none") == counted


# And the rows of the matrices of 128 columns that see one vector, outside of the blocks: embedders and, of
# FLUX.2, modulation.
VECTORS = [(TINY, 256 + 768 + 256 + 3 * 128), (TINY_KLEIN, 256 + 128 + (6 + 6 + 3) * 128)]


@pytest.mark.parametrize("sizes, vectors", VECTORS)
@pytest.mark.parametrize("what", ["none", "all", 2])
def test_flops_of_a_training_step_of_any_shape_are_those_counted(sizes, vectors, what):
    """Input gradients alone, which is what a frozen base costs; without adapters, which are not planned."""
    work = Workload("stage2", sizes, shape=(64, 144), t5_length=16)
    tokens, width = 4 * 9, sizes.hidden_size
    model = costs_of(sizes).model(sizes).requires_grad_(False)
    checkpoint_blocks(model, what)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    count = lambda q, k, *_, **__: 2 * 2 * q[1] * q[2] * k[2] * q[3]  # a head's two products
    back = lambda grad, q, k, *_, **__: 5 * 2 * q[1] * q[2] * k[2] * q[3]
    known = {flash: count, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: back}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        model(**inputs(sizes, 1, tokens, grad=True)).sum().backward()
    # Outside of the blocks: embeddings forward, the gradients of both inputs, and the last layer.
    embeddings = 2 * 2 * width * (sizes.in_channels * tokens + sizes.txt_size * 16)
    last = 2 * 2 * width * sizes.out_channels * tokens + 2 * width * 2 * width
    outside = embeddings + last + 2 * width * vectors
    # A modulation's input, the vector, needs no gradient here; with adapters it does.
    modulation = sum(2 * d_in * d_out for d_in, d_out, _ in modulations(sizes))
    planned = step_flops(work, what)
    assert counter.get_total_flops() - outside == planned - modulation


def modulations(sizes):
    """The modulation layers of all blocks."""
    if costs_of(sizes).modulation == 0:
        return []
    double, single = linear_sizes(sizes, "double"), linear_sizes(sizes, "single")
    return sizes.depth * [double[0], double[5]] + sizes.depth_single * [single[0]]


# --- What is chosen ----------------------------------------------------------------------------------------


BF16, FP8 = MemoryOptions(base_dtype="bf16"), MemoryOptions(base_dtype="fp8")


@pytest.mark.parametrize("budget", [8, 12, 16, 24, 48, 80])
def test_stage_2_is_exact_on_any_card_from_8_gb(budget):
    chosen, cost = choose(STAGE2, budget)
    assert not chosen.fp8 and cost.peak / GIB + RESERVE <= budget
    assert budget < 80 or chosen == Plan("none", 0)


def test_stage_1_fits_48_gb_without_streaming():
    chosen, cost = choose(STAGE1, 48)
    assert not chosen.fp8 and chosen.stream == 0 and cost.peak / GIB + RESERVE <= 48


def test_more_memory_is_never_slower():
    seconds = [choose(STAGE2, budget)[1].seconds for budget in (7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 80)]
    assert all(after <= 1.05 * before for before, after in zip(seconds, seconds[1:]))


def test_weights_are_rounded_only_if_nothing_exact_fits_or_as_asked():
    least = estimate(STAGE2, Plan("all", 57)).peak / GIB + RESERVE
    chosen, cost = choose(STAGE2, least - 0.1)
    assert chosen.fp8 and "8 bits: nothing exact fits" in table(STAGE2, chosen, cost, least - 0.1)
    with pytest.raises(UserError, match=rf"needs {least:.1f} GiB, there are {least - 0.1:.3g}"):
        choose(STAGE2, least - 0.1, BF16)
    chosen, cost = choose(STAGE2, 80, FP8)
    assert chosen.fp8 and "8 bits: as asked" in table(STAGE2, chosen, cost, 80, fp8_asked=True)


def test_8_bits_are_never_the_answer_to_another_option():
    """What fits exactly with blocks streamed is not rounded because they may not be."""
    with pytest.raises(UserError, match="--base-dtype fp8"):
        choose(STAGE2, 24, MemoryOptions(stream="0"))
    assert choose(STAGE2, 24, replace(FP8, stream="0"))[0].fp8


def test_what_is_held_beside_the_model_counts():
    """The average of meta_down; LoRAs that are kept apart, as many bytes as their layers hold."""
    extra = estimate(replace(STAGE1, average=True), Plan()).adapters - estimate(STAGE1, Plan()).adapters
    assert extra == 4 * 128 * sum(
        parts * d_in for kind in kinds(FLUX_DEV) for d_in, _, parts in linear_sizes(FLUX_DEV, kind)
    )
    with torch.device("meta"):
        model = inject(Flux(FLUX_DEV), None, 32, 1, dtype=torch.bfloat16)
    apart = estimate(Workload("sample", r1=None, r2=32), Plan())
    model.factors.multiply(torch.bfloat16)
    products = (tensor for layer in adapters(model).values() for tensor in (layer.down, layer.up))
    wide = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in products}
    assert apart.adapters == sum(wide.values())  # the factors' own storage is among them
    assert apart.peak - estimate(Workload("sample", identities=0), Plan()).peak == apart.adapters


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_memory_arguments(parser)
    parser.add_argument("--t5-length", type=int)
    return parser.parse_args(argv)


def plan(*argv: str) -> Plan:
    options = MemoryOptions.of(parse(*argv))
    return make_plan("stage2", {}, options, torch.device("cpu"), torch.bfloat16)


def test_flags_override_each_choice(capsys):
    assert plan("--vram", "80", "--stream", "7", "--checkpoint", "12") == Plan(12, 7, False)
    assert "the first 12 of 57 blocks" in (text := capsys.readouterr().out) and "7 of 57 blocks" in text
    assert plan("--vram", "24", "--base-dtype", "fp8").fp8
    assert "8 bits: as asked" in capsys.readouterr().out
    for wrong in (["--checkpoint", "some"], ["--stream", "-1"], ["--stream", "all"]):
        with pytest.raises(SystemExit):
            parse(*wrong)
    with pytest.raises(UserError, match="--stream 58: from 0 to 57"):
        plan("--stream", "58")


def test_8_bits_are_not_compiled_on_a_gpu(monkeypatch):
    monkeypatch.setattr("run.plan.measure", lambda device: None)
    monkeypatch.setattr("run.plan.device_memory", lambda device: 48 * GIB)
    options = MemoryOptions(base_dtype="fp8", compile=True)
    words = "stage2", {}, options
    assert make_plan(*words, torch.device("cpu"), torch.bfloat16).compiled
    with pytest.raises(UserError, match="--compile with 8-bit weights"):
        make_plan(*words, torch.device("cuda"), torch.bfloat16)


def test_what_cannot_be_compiled_is_not_chosen():
    assert choose(STAGE1, 48)[0].checkpoint == "attention"
    assert choose(STAGE1, 48, MemoryOptions(stream="0", compile=True))[0].checkpoint != "attention"
    assert plan("--vram", "80", "--compile") == Plan(compiled=True)
    for wrong in (["--stream", "3"], ["--checkpoint", "attention"]):
        with pytest.raises(
            UserError, match="--compile works neither with streamed blocks nor, in training, with"
        ):
            plan("--vram", "80", "--compile", *wrong)


def test_a_lora_that_is_merged_takes_no_memory():
    """Where all weights are resident it is; else its factors count, as many as are there."""
    work = Workload("sample", r1=None, r2=128, merge=True)
    apart, without = replace(work, merge=False), replace(work, identities=0)
    assert estimate(work, Plan()) == estimate(without, Plan())
    streamed = estimate(work, Plan(stream=3))
    assert streamed.adapters == estimate(apart, Plan(stream=3)).adapters > 0
    tight = estimate(without, Plan()).peak / GIB + RESERVE
    assert choose(work, tight)[0] == Plan() and choose(apart, tight)[0].stream > 0


def test_sizes_come_from_the_headers(capsys):
    """The toy model's: 8 pixels to a token's side, its pictures, its text length; it all fits."""
    files = files_to_plan(argparse.Namespace(model="tiny"))
    options = MemoryOptions.of(parse("--plan"))
    assert make_plan("stage2", files, options, torch.device("cpu"), torch.float32) == Plan()
    assert "64x64 pixels, 16 text tokens" in capsys.readouterr().out


def test_a_file_tells_which_base_is_planned(tmp_path, monkeypatch):
    works = []
    monkeypatch.setattr("run.plan.choose", lambda work, *rest: works.append(work) or choose(work, *rest))
    for sizes in (TINY, TINY_KLEIN):
        save_file(costs_of(sizes).model(sizes).state_dict(), file := tmp_path / "model.safetensors")
        options = MemoryOptions.of(parse("--plan", "--vram", "8"))
        make_plan("stage2", {"transformer": file}, options, torch.device("cpu"), torch.bfloat16)
    assert [work.sizes for work in works] == [TINY, TINY_KLEIN]


def measured(monkeypatch, seconds_per_call: float) -> speeds.Speeds:
    """Measure the CPU by a clock that moves with the calls of the work, a tiny product and a tiny copy."""
    monkeypatch.setattr(speeds, "PRODUCT", (8, 16, 32))
    monkeypatch.setattr(speeds, "COPY", 4096)
    ticks = count()
    return speeds.measure(torch.device("cpu"), lambda: next(ticks) * seconds_per_call)


def test_speeds_are_measured(monkeypatch):
    """Between two looks at the clock there is one call, as long as its time is not up."""
    for seconds in (1e-3, 0.5):
        given = measured(monkeypatch, seconds)
        assert given.flops == pytest.approx(speeds.MEASURED_SHARE * 2 * 8 * 16 * 32 / seconds)
        assert given.bus == pytest.approx(4096 / seconds)
    assert f"{given.bus / 1e9:.3g} GB/s" in given.source
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: torch.empty(10**15))  # as if the GPU were full
        assert measured(patch, 1.0) is None
    assert speeds.measure(torch.device("cpu")).flops > 1e6  # by the real clock


def test_the_plan_takes_what_was_measured(monkeypatch, capsys):
    """On a GPU; with a slow bus less is streamed than with a fast one."""
    gpu = argparse.Namespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    options, chosen = MemoryOptions(vram=24), []
    for bus in (1e9, 100e9):
        found = speeds.Speeds(400e12, bus, "as measured")
        monkeypatch.setattr("run.plan.measure", lambda device: found)
        chosen.append(make_plan("stage2", {}, options, gpu, torch.bfloat16))
        assert " s as measured" in capsys.readouterr().out
    assert chosen[0].stream < chosen[1].stream
    monkeypatch.setattr("run.plan.measure", lambda device: None)
    make_plan("stage2", {}, replace(options, dry=True), gpu, torch.bfloat16)
    assert "at 60% of an A6000's peak" in capsys.readouterr().out


def test_the_plan_counts_the_norm_of_its_device(monkeypatch):
    """As one operation on CUDA, and for --plan --vram, which is for some GPU; as seven on a CPU."""
    works = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("run.plan.measure", lambda device: None)
    monkeypatch.setattr("run.plan.choose", lambda work, *rest: works.append(work) or choose(work, *rest))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for device, dry, vram in ((gpu, False, 80), (cpu, False, 80), (cpu, True, 80), (cpu, True, None)):
        make_plan("stage2", {}, MemoryOptions(vram=vram, dry=dry), device, torch.bfloat16)
    assert [work.fused_norm for work in works] == [True, False, True, False]
    peaks = [estimate(replace(STAGE2, fused_norm=fused), Plan()).peak / GIB for fused in (True, False)]
    assert peaks[1] - peaks[0] > 4


def test_a_picture_is_decoded_in_tiles_only_if_it_does_not_fit_whole():
    large = replace(SAMPLE, resolution=2048)
    whole = min(estimate(large, Plan(stream=n)).peak for n in range(58)) / GIB + RESERVE
    chosen, cost = choose(large, whole + 0.01)
    assert chosen.tile is None and "decoded" not in table(large, chosen, cost, whole)
    chosen, cost = choose(large, whole - 0.01)
    assert chosen.tile == TILE and not chosen.fp8 and cost.peak / GIB + RESERVE <= whole - 0.01
    assert "in tiles of 64 x 64 latent pixels" in table(large, chosen, cost, whole)
    assert choose(SAMPLE, 8)[0].tile is None and choose(STAGE2, 8)[0].tile is None
    # A tile takes as much as a picture of its size, and the picture that it is a part of.
    large = replace(large, sizes=replace(FLUX_DEV, hidden_size=24))  # so that the transformer takes nothing
    tile = sampling_peak(replace(large, resolution=512), Plan())
    assert sampling_peak(large, Plan(tile=64)) == tile + 4 * 4 * 2048**2


def test_training_has_room_to_decode():
    """So pictures are made with the plan of training, and decoded whole."""
    for resolution in (256, 512, 1024):
        work = replace(STAGE2, resolution=resolution)
        training, sampling = (estimate(x, Plan("all", 57)) for x in (work, replace(work, kind="sample")))
        assert training.peak >= sampling.peak


def test_the_document_shows_what_is_chosen():
    text = plans.DOCUMENT.read_text(encoding="utf-8")
    assert documents.fill(text, {"plans": plans.table}) == text, "run python bench/plans.py"
    assert documents.fill(text, {"plans": lambda: "| 24 GB |"}) != text
