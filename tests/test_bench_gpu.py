"""bench/gpu.py without a GPU: it notices what is wrong, goes on when a case fails, and its tables add up."""

import json
import time
from functools import partial

import pytest
import torch

from bench import ceilings, documents, gpu, gpu_tables, parity
from bench.device import made_on, timed
from flux.errors import UserError
from flux.memory import arrange
from run.costs import Plan

CPU = torch.device("cpu")
ABOUT = {"card": "NVIDIA Some Card", "torch": "2.9"}


# --- Running cases -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs cases of the test's own, and what it wrote."""

    def call(cases: dict, only=None, seconds=100.0, smoke=True) -> dict:
        monkeypatch.setattr(gpu.Cases, "all", lambda self: cases)
        out, only = tmp_path / "gpu.json", only or [name.split()[0] for name in cases]
        result = gpu.run(out, seconds, only, smoke)
        assert json.loads(out.read_text()) == result
        return result["cases"]

    return call


def test_a_case_that_fails_takes_none_along(run, capsys):
    def fails():
        print("what it printed")
        raise RuntimeError("first line\nsecond line")

    found = run({"a one": (1, fails), "b two": (1, lambda: {"seconds": 2.0})})
    assert found["a one"]["failed"] == "RuntimeError: first line"
    assert "in fails" in found["a one"]["traceback"] and "what it printed" in found["a one"]["printed"]
    assert found["b two"]["seconds"] == 2.0
    assert "what it printed" in capsys.readouterr().out.splitlines()[0]


def test_a_missing_package_is_noted(run, monkeypatch):
    """As diffusers and peft may be."""
    monkeypatch.setitem(gpu.sys.modules, "bench.theirs", None)
    cases = gpu.Cases(CPU, gpu.TOY, 0)
    found = run({"peft 1024": (1, lambda: cases.peft(1024)), "diffusers 1024": (1, cases.diffusers)})
    assert all("bench.theirs" in case["failed"] for case in found.values())


def test_the_file_is_written_after_each_case(run, tmp_path):
    def read() -> dict:
        return {"so far": list(json.loads((tmp_path / "gpu.json").read_text())["cases"])}

    found = run({"a": (1, dict), "b": (1, read)})
    assert found["b"]["so far"] == ["a"]


def test_what_may_end_too_late_is_skipped(run, monkeypatch):
    monkeypatch.setattr(gpu, "describe", lambda device: ABOUT)
    monkeypatch.setattr(gpu, "attempt", lambda case, device, limit: case())
    found = run({"long": (60, dict), "short": (5, lambda: {"ran": True})}, seconds=30, smoke=False)
    assert found["long"]["skipped"].endswith("of 30 s were left, it may take 60")
    assert found["short"] == {"ran": True}


def test_only_some_groups(run):
    cases = {name: (1, dict) for name in ("stage2 512", "stage2 256", "stage1 512")}
    assert list(run(cases, only=["stage2"])) == ["stage2 512", "stage2 256"]


def test_a_case_that_takes_too_long_is_stopped():
    began = time.perf_counter()
    found = gpu.attempt(lambda: time.sleep(30), CPU, limit=0.2)
    assert found["failed"] == "TimeoutError: stopped after 0 s" and time.perf_counter() - began < 10
    assert gpu.attempt(dict, CPU, limit=0.2).keys() == {"case_s"}


def test_wrong_options(tmp_path, capsys):
    (tmp_path / "gpu.json").touch()
    with pytest.raises(UserError, match="is there already"):
        gpu.main(["--smoke", "--out", str(tmp_path / "gpu.json")])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA"):
            gpu.main(["--out", str(tmp_path / "new.json")])
    with pytest.raises(SystemExit):
        gpu.main(["--only", "stage3"])
    assert "stage3" in capsys.readouterr().err and not (tmp_path / "new.json").exists()


# --- Right numbers -----------------------------------------------------------------------------------------


def test_every_plan_is_right_on_the_cpu():
    found = parity.compare_plans(CPU, {"streamed": Plan("all", parity.BLOCKS)})
    assert found["wrong"] == []
    assert found["float32"]["streamed"] < 1e-6 < parity.EXACT < found["float32"]["negative control"]
    assert found["bfloat16"]["streamed"] == 1 < parity.NEAR < found["bfloat16"]["negative control"]


def test_what_is_wrong_is_listed(monkeypatch):
    """A plan that damages a weight, one that computes attention again, one that fails, a blind control."""
    apply = Plan.apply

    def damaged(plan: Plan, model, device):
        if plan == Plan(1):
            model.double_blocks[0].img_mlp[0].weight.data *= 1.5
        if plan == Plan("attention"):
            return arrange(model, device, "all")
        if plan == Plan(3):
            raise RuntimeError("out of memory")
        return apply(plan, model, device)

    monkeypatch.setattr(Plan, "apply", damaged)
    monkeypatch.setattr(parity, "CONTROLS", {torch.float32: 1.0, torch.bfloat16: 1.0})
    plans = {"good": Plan("all"), "damaged": Plan(1), "again": Plan("attention"), "failing": Plan(3)}
    wrong = parity.compare_plans(CPU, plans)["wrong"]
    exact, half = ([line for line in wrong if line.startswith(kind)] for kind in ("float32", "bfloat16"))
    for lines in (exact, half):
        damaged, again, failing, control = lines
        assert "damaged: " in damaged and "again: AssertionError: attention ran" in again
        assert "failing: RuntimeError: out of memory" in failing and "goes unnoticed" in control


def test_what_is_no_number_is_far_off():
    whole, broken = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2) / 0}
    broken["b"] -= broken["b"]
    for given in ({**broken}, dict(reversed(broken.items()))):
        assert not parity.distances(given, whole).max() <= parity.EXACT
    assert parity.distances(whole, whole).max() == 0


def test_the_encoders_are_right_on_the_cpu():
    found = parity.compare_encoders(CPU)
    assert found["wrong"] == [] and found["float32"] == 0 < parity.EXACT < found["negative control"]


# --- Time and kernels --------------------------------------------------------------------------------------


def test_only_the_steps_after_the_warm_up_are_timed():
    pauses = iter([0.3, 0.01, 0.01])
    assert timed(lambda: time.sleep(next(pauses)), CPU, warm=1, repeats=2) < 0.15


def test_modules_are_made_in_a_dtype():
    with pytest.raises(ZeroDivisionError), made_on(torch.device("meta")):
        layer = torch.nn.Linear(2, 2)
        raise ZeroDivisionError
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.is_meta
    assert torch.get_default_dtype() == torch.float32 and not torch.empty(1).is_meta


def test_kernels():
    """Both rotations are the same; what cannot run here says so."""
    found = ceilings.kernels(CPU, gpu.TOY.flux, tokens=8)
    assert float(found["rotation, real minus complex in float32"]) < 1e-6
    assert isinstance(found["attention, both ways"], float)
    assert "does not run" in found["attention, cudnn_attention"]
    x, angles = torch.randn(8, 4), torch.rand(8, 2)
    turned = ceilings.rotate_real(x, angles.cos(), angles.sin())
    assert not torch.allclose(turned, ceilings.rotate_real(x, angles.cos(), -angles.sin()), atol=1e-2)


def test_a_personalization_that_ends_early_is_called_estimated():
    found = gpu.Cases(CPU, gpu.TOY, deadline=0.0).whole_personalization()
    assert found["steps"] == 1 and found["crops"] == 19
    assert found["estimated"] == "training_s: measured on 1 steps, times 4 / 1"
    parts = [found[f"{name}_s"] for name in ("encoding_crops", "encoding_caption", "training", "writing")]
    assert found["seconds"] == pytest.approx(sum(parts), abs=0.01)


# --- Tables ------------------------------------------------------------------------------------------------


def step(seconds: float, **more: object) -> dict:
    return {"seconds": seconds, "tflop_s": 400.0, "planned_gib": 50.0, **more}


def cells(text: str, title: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {title} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_tables_of_a_card():
    cases = {
        "parity plans": {"wrong": ["float32, streamed: 0.5"]},
        "scripts": {"wrong": []},
        "stage2 1024 none": step(0.41, allocated_gib=51.0, used_gib=53.5, up_off=0.0),
        "peft 1024": {"seconds": 0.82},
        "budget 24 GB": step(0.6, budget_gib=23.5),
        "personalize": {"seconds": 123.4, "estimated": "training_s: measured on 9 steps"},
        "sampling 1024": {"failed": "OutOfMemoryError: too much"},
        "compiled stage2 1024": {"skipped": "10 of 480 s were left, it may take 100"},
    }
    text = gpu_tables.table({"about": ABOUT, "cases": cases})
    assert text.startswith("### NVIDIA Some Card\n\ntorch 2.9\n\n")
    assert cells(text, "parity plans")[0] == "float32, streamed: 0.5"
    assert cells(text, "scripts")[0] == "right"
    assert cells(text, "stage 2, batch 1, nothing recomputed") == ["0.41 s", "at most 0.46 s"]
    assert cells(text, "stage 2 relative to diffusers + peft, rank 1, checkpointed") == [
        "0.50",
        "at most 0.75",
    ]
    assert "stage 1, batch 4" not in text and "24 GB relative" not in text
    assert cells(text, "a whole personalization of 375 steps")[0] == "123 s, in part estimated"
    assert "OutOfMemoryError" in cells(text, "sampling, 30 steps")[0]
    assert cells(text, "the same, compiled")[0] == "compiled stage2 1024: not run"
    row = ["0.41", "400.0", "51.0", "50.0", "+2.0%", "53.5", "", "0.0"]
    assert cells(text, "stage2 1024 none") == row
    assert cells(text, "budget 24 GB") == ["0.6", "400.0", "", "50.0", "", "", "23.5", ""]
    assert cells(text, "peft 1024") == ["seconds", "0.82"]


def test_cards_are_not_compared(tmp_path):
    """Ours is measured on one card and theirs on another: there is no ratio."""
    ours, theirs = {"stage2 1024 none": step(0.4)}, {"peft 1024": {"seconds": 0.8}}
    for name, cases in {"one": ours, "two": theirs}.items():
        result = {"about": {"card": name}, "cases": cases}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    text = gpu_tables.tables(tmp_path.glob("*.json"))
    assert text.index("### one") < text.index("### two") and "0.50" not in text
    both = gpu_tables.table({"about": ABOUT, "cases": ours | theirs})
    assert "0.50" in both
    assert "| a step" not in gpu_tables.table({"about": ABOUT, "cases": theirs})


def test_the_document_shows_the_results():
    text = gpu_tables.DOCUMENT.read_text(encoding="utf-8")
    tables = partial(gpu_tables.tables, gpu_tables.RESULTS.glob("*.json"))
    assert documents.fill(text, {"gpu": tables}) == text, "run python bench/gpu_tables.py"
    assert documents.fill(text, {"gpu": lambda: "other"}) != text


@pytest.mark.slow
def test_everything_runs_at_toy_sizes_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    gpu.main(["--smoke", "--out", str(out)])
    cases = json.loads(out.read_text())["cases"]
    everything = gpu.Cases(CPU, gpu.TOY, 0).all()
    assert list(cases) == [name for name in everything if not name.startswith("compiled")]
    bad = {name: found for name, found in cases.items() if {"failed", "skipped"} & found.keys()}
    assert not bad and not [line for found in cases.values() for line in found.get("wrong", [])]
    plans = [found["plan"] for name, found in cases.items() if name.startswith("budget")]
    assert {plan["fp8"] for plan in plans} == {True, False} and {plan["stream"] > 0 for plan in plans} == {
        True,
        False,
    }
    exact = [found["up_off"] for found in cases.values() if "up_off" in found and not found["plan"]["fp8"]]
    assert len(exact) >= 6 and max(exact) < 1e-3
    assert "| scripts" in capsys.readouterr().out
