"""The plan against FLUX.1's true sizes and peaks counted operation by operation; and what it chooses."""

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import documents, plans
from flux.memory import FrozenLinear, arrange, blocks_of, checkpoint_blocks
from flux.model import Flux
from metalora import factors, inject
from run.models import files_to_plan
from run.plan import (
    FLUX_DEV,
    GIB,
    RESERVE,
    Plan,
    Workload,
    adapter_bytes,
    add_memory_arguments,
    block_bytes,
    choose,
    estimate,
    kinds,
    linear_sizes,
    make_plan,
    outer_parameters,
    step_flops,
)

SHORT = replace(FLUX_DEV, depth=2, depth_single=3)  # at full width
STAGE1 = Workload("stage1", batch=4, identities=50)
STAGE2 = Workload("stage2")
SAMPLE = Workload("sample")


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "bench" / "memory.py"
    spec = importlib.util.spec_from_file_location("bench_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sizes_are_those_of_the_model():
    with torch.device("meta"):
        model = inject(Flux(SHORT), 128, 2, 5, reset=False)
    for kind, block in (("double", model.double_blocks[0]), ("single", model.single_blocks[0])):
        own = [p for name, p in block.named_parameters() if not name.endswith(("meta_down", "mid", "up"))]
        assert sum(block_bytes(SHORT, kind, fp8=False, width=2)) == 2 * sum(p.numel() for p in own)
        layers = [layer for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
        shapes = [(layer.in_features, layer.out_features) for layer in layers]
        assert sorted(shapes) == sorted(sizes[:2] for sizes in linear_sizes(SHORT, kind))
        shared, personal = adapter_bytes(Workload("stage1", SHORT, r2=2, identities=5), kind)
        assert shared == sum(p.nbytes for name, p in block.named_parameters() if name.endswith("meta_down"))
        assert personal == sum(
            p.nbytes for name, p in block.named_parameters() if name.endswith((".mid", ".up"))
        )
    outside = [p for name, p in model.named_parameters() if "blocks" not in name]
    assert outer_parameters(SHORT) == sum(p.numel() for p in outside)
    assert factors(model, "mid")


def test_flux_dev_has_its_published_size():
    blocks = kinds(FLUX_DEV)
    parameters = sum(sum(block_bytes(FLUX_DEV, kind, fp8=False, width=1)) for kind in blocks)
    assert parameters + outer_parameters(FLUX_DEV) == 11_901_408_320


def test_8_bits_take_the_bytes_that_are_planned():
    tiny = replace(FLUX_DEV, hidden_size=128, mlp_size=512, num_heads=1, depth=1, depth_single=1)
    model = arrange(Flux(tiny).bfloat16().requires_grad_(False), "cpu", fp8=True)
    for kind, block in zip(kinds(tiny), blocks_of(model)):
        layers = [layer for layer in block.modules() if isinstance(layer, FrozenLinear)]
        weights = sum(layer.stored.nbytes for layer in layers)
        others = sum(tensor.nbytes for tensor in [*block.parameters(), *block.buffers()])
        assert block_bytes(tiny, kind, fp8=True, width=2) == (weights, others)


# At full width; each with another way, whose peak it must not be taken for.
CASES = [
    (STAGE1, Plan("all"), Plan("attention")),
    (replace(STAGE1, batch=2, r2=8), Plan("attention", 5), Plan("none", 5)),
    (replace(STAGE2, resolution=512), Plan(2, fp8=True), Plan("none", fp8=True)),
    (SAMPLE, Plan("none", 5), Plan("none", 4)),
]


@pytest.mark.parametrize("job, way, other", CASES)
def test_the_plan_predicts_the_simulated_peak(bench, job, way, other):
    job = replace(job, sizes=SHORT)
    simulated = bench.simulate(job, way)
    assert abs(estimate(job, way).peak / simulated - 1) < 0.02
    assert abs(estimate(job, other).peak / simulated - 1) > 0.03


@pytest.mark.slow
@pytest.mark.parametrize("number", range(13))
def test_whole_model(bench, number):
    job, way, limit = bench.ROWS[number]
    simulated = bench.simulate(job, way)
    assert abs(estimate(job, way).peak / simulated - 1) < 0.03
    assert limit is None or round(simulated / GIB, 1) <= limit


@pytest.mark.parametrize("what, tera", [("all", 245.5), ("none", 171.1)])
def test_flops_of_a_step_are_those_counted(what, tera):
    assert abs(step_flops(STAGE2, what) / 1e12 - tera) < 0.2
    assert abs(step_flops(SAMPLE, "none") / 1e12 - 74.4) < 0.1


def test_flops_of_a_forward_pass_are_those_counted():
    sizes = replace(FLUX_DEV, hidden_size=128, mlp_size=512, num_heads=1, depth=2, depth_single=3)
    job = Workload("sample", sizes, batch=2, resolution=128, t5_length=16)
    img, ids, txt = torch.zeros(2, 64, 64), torch.zeros(2, 64, 3), torch.zeros(2, 16, 4096)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model = Flux(sizes)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(img, ids, txt, ids[:, :16], torch.zeros(2), torch.zeros(2, 768), torch.zeros(2))
    counts = counter.get_flop_counts()
    counted = sum(
        sum(counts[f"Flux.{name}_blocks.{k}"].values())
        for name, n in (("double", 2), ("single", 3))
        for k in range(n)
    )
    assert step_flops(job, "none") == counted


@pytest.mark.parametrize("what", ["none", "all", 2])
def test_flops_of_a_training_step_of_any_shape_are_those_counted(what):
    """Input gradients alone, which is what a frozen base costs; without adapters, which are not planned."""
    sizes = replace(FLUX_DEV, hidden_size=128, mlp_size=512, num_heads=1, depth=2, depth_single=3)
    job = Workload("stage2", sizes, shape=(64, 144), t5_length=16)
    tokens, width = 4 * 9, sizes.hidden_size
    img = torch.zeros(1, tokens, 64, requires_grad=True)
    ids, txt = torch.zeros(1, tokens, 3), torch.zeros(1, 16, 4096, requires_grad=True)
    model = Flux(sizes).requires_grad_(False)
    checkpoint_blocks(model, what)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    count = lambda q, k, *_, **__: 2 * 2 * q[1] * q[2] * k[2] * q[3]  # a head's two products
    back = lambda grad, q, k, *_, **__: 5 * 2 * q[1] * q[2] * k[2] * q[3]
    known = {flash: count, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: back}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        model(
            img, ids, txt, ids[:, :16], torch.zeros(1), torch.zeros(1, 768), torch.zeros(1)
        ).sum().backward()
    # Outside of the blocks: embeddings forward, the gradients of both inputs, and the last layer.
    inputs = 2 * 2 * width * (64 * tokens + 4096 * 16)
    last = 2 * 2 * width * 64 * tokens + 2 * width * 2 * width
    vectors = 2 * width * (256 + 768 + 256) + 3 * 2 * width * width
    # A modulation's input, the vector, needs no gradient here; with adapters it does.
    modulation = sum(2 * d_in * d_out for d_in, d_out, _ in modulations(sizes))
    planned = step_flops(job, what)
    assert counter.get_total_flops() - inputs - last - vectors == planned - modulation


def modulations(sizes):
    """The modulation layers of the whole model."""
    double, single = linear_sizes(sizes, "double"), linear_sizes(sizes, "single")
    return sizes.depth * [double[0], double[5]] + sizes.depth_single * [single[0]]


# --- What is chosen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [8, 12, 16, 24, 48, 80])
def test_stage_2_is_exact_on_any_card_from_8_gb(budget):
    way, some, line = choose(STAGE2, budget)
    assert not way.fp8 and line.startswith("exact") and some.peak / GIB + RESERVE <= budget
    assert budget < 80 or way == Plan("none", 0)


def test_stage_1_fits_48_gb_without_streaming():
    way, some, line = choose(STAGE1, 48)
    assert not way.fp8 and way.stream == 0 and some.peak / GIB + RESERVE <= 48


def test_more_memory_is_never_slower():
    seconds = [choose(STAGE2, budget)[1].seconds for budget in (7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 80)]
    assert all(after <= 1.05 * before for before, after in zip(seconds, seconds[1:]))


def test_weights_are_rounded_only_if_nothing_exact_fits_or_as_asked():
    least = estimate(STAGE2, Plan("all", 57)).peak / GIB + RESERVE
    way, _, line = choose(STAGE2, least - 0.1)
    assert way.fp8 and "nothing exact fits" in line
    with pytest.raises(ValueError, match=rf"needs {least:.1f} GiB, there are {least - 0.1:.3g}"):
        choose(STAGE2, least - 0.1, base="bf16")
    way, _, line = choose(STAGE2, 80, base="fp8")
    assert way.fp8 and "as asked" in line


def test_8_bits_are_never_the_answer_to_another_option():
    """What fits exactly with blocks streamed is not rounded because they may not be."""
    with pytest.raises(ValueError, match="--base-dtype fp8"):
        choose(STAGE2, 24, stream="0")
    assert choose(STAGE2, 24, stream="0", base="fp8")[0].fp8


def test_what_is_held_beside_the_model_counts():
    """The average of meta_down; LoRAs that are kept apart, as many bytes as their layers hold."""
    extra = estimate(replace(STAGE1, average=True), Plan()).adapters - estimate(STAGE1, Plan()).adapters
    assert extra == 4 * 128 * sum(
        parts * d_in for kind in kinds(FLUX_DEV) for d_in, _, parts in linear_sizes(FLUX_DEV, kind)
    )
    with torch.device("meta"):
        model = inject(Flux(FLUX_DEV), None, 32, 1)
    apart = estimate(Workload("sample", r1=None, r2=32), Plan())
    assert apart.adapters == sum(p.nbytes for p in factors(model, "mid", "up"))
    assert apart.peak - estimate(Workload("sample", identities=0), Plan()).peak == apart.adapters


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_memory_arguments(parser)
    parser.add_argument("--t5-length", type=int)
    return parser.parse_args(argv)


def plan(*argv: str) -> Plan:
    return make_plan(parse(*argv), "stage2", "cpu", torch.bfloat16, {})


def test_flags_override_each_choice(capsys):
    assert plan("--vram", "80", "--stream", "7", "--checkpoint", "12") == Plan(12, 7, False)
    assert "the first 12 of 57 blocks" in (text := capsys.readouterr().out) and "7 of 57 blocks" in text
    assert plan("--vram", "24", "--base-dtype", "fp8").fp8
    assert "8 bits: as asked" in capsys.readouterr().out
    for wrong in (["--checkpoint", "some"], ["--stream", "-1"], ["--stream", "all"]):
        with pytest.raises(SystemExit):
            parse(*wrong)
    with pytest.raises(ValueError, match="--stream 58: from 0 to 57"):
        plan("--stream", "58")


def test_what_cannot_be_compiled_is_not_chosen():
    assert choose(STAGE1, 48)[0].checkpoint == "attention"
    assert choose(STAGE1, 48, stream="0", compiled=True)[0].checkpoint != "attention"
    assert plan("--vram", "80", "--compile") == Plan(compiled=True)
    for wrong in (["--stream", "3"], ["--checkpoint", "attention"]):
        with pytest.raises(ValueError, match="--compile: neither with --stream nor with --checkpoint att"):
            plan("--vram", "80", "--compile", *wrong)


def test_a_lora_that_is_merged_takes_no_memory():
    """Where all weights are resident it is; else its factors count, as many as are there."""
    job = Workload("sample", r1=None, r2=128, merge=True)
    without = replace(job, identities=0)
    assert estimate(job, Plan()) == estimate(without, Plan())
    assert (
        estimate(job, Plan(stream=3)).adapters
        == estimate(replace(job, merge=False), Plan(stream=3)).adapters
        > 0
    )
    tight = estimate(without, Plan()).peak / GIB + RESERVE
    assert choose(job, tight)[0] == Plan() and choose(replace(job, merge=False), tight)[0].stream > 0


def test_sizes_come_from_the_headers(capsys):
    """The small model's own: 8 pixels to a token's side, its pictures, its text length; it all fits."""
    files = files_to_plan(argparse.Namespace(model="tiny"))
    assert make_plan(parse("--plan"), "stage2", "cpu", torch.float32, files) == Plan()
    assert "64x64 pixels, 16 text tokens" in capsys.readouterr().out


def test_the_readme_shows_what_is_chosen():
    text = plans.README.read_text(encoding="utf-8")
    assert documents.fill(text, {"plans": plans.table}) == text, "run python bench/plans.py"
    assert documents.fill(text, {"plans": lambda: "| 24 GB |"}) != text
