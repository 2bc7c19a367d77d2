"""Stage 1: Algorithm 1 step by step, and runs that are stopped anywhere and go on as if they had not been."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import factors, randomize
from helpers import (
    STEPS,
    Killed,
    around_updates,
    assert_equals_undisturbed,
    assert_same,
    kill_at,
    log_of,
    state_of,
)
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import metalora
import train_meta
from flux.checkpoint import read_tensors
from flux.model import Flux, FluxSizes, pack, position_ids
from flux.streaming import Stream
from people import dataset, grids
from people.buckets import deal_batches
from people.dataset import Batch
from run.bucket_run import BucketRun
from run.costs import Plan
from run.seeds import generator_for
from run.settings import Training

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees")  # the random model reads few tokens

# Of the SETTINGS.
BUCKETS = [0] * 12 + [1] * 8 + [0] * 12 + [1] * 2
WARM_UP = [True] * 5 + [False] * 7 + [True] * 3 + [False] * 5 + [True] * 5 + [False] * 7 + [True] * 2


@pytest.fixture(scope="module")
def run(train):
    return train


# --- The algorithm -----------------------------------------------------------------------------------------


def test_counts_of_the_paper():
    """50 people, 20 photos, 10 uses and batches of 4: q_bucket 2,500, q_warmup 1,000; the defaults say so."""
    args = train_meta.parse_arguments(["--data", "ids"])
    assert (args.r1, args.r2, args.steps, args.bucket_ids) == (128, 1, 50_000, 50)
    assert (args.uses_per_image, args.bucket_warmup, args.batch, args.lr) == (10, 0.4, 4, 4e-4)
    assert (args.save_every, args.sample_every, args.seed, args.latents) == (500, 1000, 0, "sample")
    shapes = [(1024, 1024)] * args.bucket_ids * 20
    q_bucket = len(deal_batches(shapes, args.uses_per_image, args.batch, torch.Generator()))
    assert (q_bucket, args.bucket_warmup * q_bucket) == (2500, 1000)


def test_warm_up_and_order_of_the_buckets(undisturbed):
    log = log_of(undisturbed)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert [line["bucket"] for line in log] == BUCKETS
    assert [line["phase"] == "warm-up" for line in log] == WARM_UP
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in log)


def test_what_moves_in_a_step(run, tmp_path, monkeypatch):
    """In a warm-up meta_down rests, then it moves; mid and up move for the people in the batch alone."""
    moves = []

    def watched(position, update, model, learner, batch, *rest):
        meta_down = [p.detach().clone() for p in learner.meta_down]
        personal = learner.personal.detach().clone()
        numbers = update(model, learner, batch, *rest)
        moved = {not torch.equal(old, new) for old, new in zip(meta_down, learner.meta_down)}
        people = [not torch.equal(old, new) for old, new in zip(personal, learner.personal, strict=True)]
        moves.append((moved, people, [slot in batch.slots for slot in range(3)]))
        return numbers

    around_updates(monkeypatch, watched)
    run(tmp_path)
    assert [moved for moved, *_ in moves] == [{not warm_up} for warm_up in WARM_UP]  # all layers alike
    assert all(people == present for _, people, present in moves)
    assert any(not all(present) for *_, present in moves)


def test_a_bucket_goes_on_where_it_was(run, tmp_path, monkeypatch):
    states, turns, close, open_bucket = {}, [], BucketRun.close_bucket, BucketRun.open_bucket

    def closed(self):
        personal, count = self.state.personal, self.state.slot_optimizer.count
        states[self.bucket] = personal.detach().clone(), count.clone()
        close(self)

    def opened(self):
        bucket = open_bucket(self)
        personal, count = self.state.personal, self.state.slot_optimizer.count
        if bucket in states:
            turns.append(bucket)
            assert torch.equal(states[bucket][0], personal)
            assert torch.equal(states[bucket][1], count) and count.sum() > 0
        else:
            _, mids, ups = zip(*self.state.factors.by_layer().values())
            assert not any(up.any() for up in ups) and all(mid.any() for mid in mids) and not count.any()
        return bucket

    monkeypatch.setattr(BucketRun, "close_bucket", closed)
    monkeypatch.setattr(BucketRun, "open_bucket", opened)
    run(tmp_path, steps=41)
    assert turns == [0, 1, 0]


@pytest.mark.parametrize("words", ["--checkpoint all", "--checkpoint attention", "--checkpoint 1 --stream 1"])
def test_any_plan_trains_alike(run, undisturbed, tmp_path, monkeypatch, words):
    """Blocks that are recomputed in the backward pass, or streamed, see the same identities."""
    plans, apply = [], Plan.apply
    monkeypatch.setattr(Plan, "apply", lambda plan, *args: plans.append(plan) or apply(plan, *args))
    monkeypatch.setattr(Stream, "COPY", True)
    ours, theirs = run(tmp_path / "a", *words.split()), load_file(undisturbed / "meta.safetensors")
    word = words.split()[1]
    assert plans == [Plan(int(word) if word.isdecimal() else word, int("stream" in words))]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=0)
    start = run(tmp_path / "b", steps=1)  # in a warm-up: meta_down as it was drawn
    assert all((start[name] - ours[name]).abs().max() > 0.02 for name in ours)


def test_8_bits_train_and_the_file_says_what_changed(run, undisturbed, tmp_path):
    """Rounded weights train something else, and a run does not go on with the others."""
    ours, theirs = run(tmp_path, "--base-dtype", "fp8"), load_file(undisturbed / "meta.safetensors")
    assert all(0 < (ours[name] - theirs[name]).abs().max() for name in ours)
    with pytest.raises(ValueError, match="fp8: True -> False"):
        run(tmp_path, steps=STEPS + 1)


def test_the_plan_alone_needs_nothing(tmp_path, capsys):
    train_meta.main(["--data", str(tmp_path / "nowhere"), "--plan", "--vram", "48"])
    assert "stage1, batch 4, 1024x1024 pixels" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


# --- A step against plain PyTorch --------------------------------------------------------------------------

SIZES = FluxSizes(
    in_channels=16,
    out_channels=16,
    pooled_size=8,
    txt_size=12,
    hidden_size=32,
    mlp_size=64,
    num_heads=1,
    depth=1,
    depth_single=1,
    guidance=True,
    axes=(4, 14, 14),
    theta=100,
)
TRAINING = Training(lr=1e-2, weight_decay=0.1, clip_grad=0.02)
# The identities of each batch, of three, who come and go, one of them twice at once; the first three warm up.
SLOTS = [[0, 1], [1, 2], [0, 0], [1, 2], [2, 0], [1, 1], [2, 1], [0, 2]]
WARM_UP_STEPS = 3


class LiteralLinear(nn.Module):
    """Eq. 1 as it is written, sample by sample and factor by factor, with parameters for each identity."""

    def __init__(self, layer: metalora.MetaLoRALinear, factors: tuple[torch.Tensor, ...]):
        super().__init__()
        self.base, self.identities = layer.base, []
        meta_down, mids, ups = (factor.clone() for factor in factors)
        self.meta_down = nn.ParameterList([*meta_down])
        self.mids = nn.ModuleList(nn.ParameterList([*mid]) for mid in mids)
        ups = [up.split(layer.parts) for up in ups]
        self.ups = nn.ModuleList(map(nn.ParameterList, ups))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        updates = []
        for sample, i in zip(x, self.identities, strict=True):
            factors = zip(self.meta_down, self.mids[i], self.ups[i], strict=True)
            parts = [sample @ meta_down.mT @ mid.mT @ up.mT for meta_down, mid, up in factors]
            updates.append(torch.cat(parts, dim=-1))
        return self.base(x) + torch.stack(updates)


def double_model() -> Flux:
    """Return a random model in float64 with the adapters of three identities; up is zero."""
    model = metalora.inject(randomize(Flux(SIZES)), 4, 2, 3, generator=torch.Generator().manual_seed(1))
    return model.double()


def double_batches(identities: list[list[int]] = SLOTS, spike: float = 0.0) -> list[Batch]:
    """Return a batch for each list of identities; spike: by what identity 1's target is off, later."""
    generator, batches = torch.Generator().manual_seed(2), []
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    for step, slots in enumerate(identities):
        b = len(slots)
        latents, noise, t = draw(b, 4, 4, 4), draw(b, 4, 4, 4), draw(b).sigmoid()
        far = spike * (torch.tensor(slots) == 1).double().view(-1, 1, 1, 1) * (step > 0)
        latents -= t.view(-1, 1, 1, 1) * far  # what the model sees, x_t, stays as it is
        noise += (1 - t).view(-1, 1, 1, 1) * far
        inputs = {"latents": latents, "noise": noise, "t": t}
        inputs |= {"txt": draw(b, 3, SIZES.txt_size), "pooled": draw(b, SIZES.pooled_size)}
        batches.append(Batch(inputs, torch.tensor(slots), []))
    return batches


def train_ours(batches: list[Batch]) -> dict[str, list[torch.Tensor]]:
    """Return meta_down, mid and up of all layers after a step with each batch."""
    model = double_model()
    learner = train_meta.MetaLearner(model, TRAINING)
    for step, batch in enumerate(batches):
        train_meta.update(model, learner, batch, step < WARM_UP_STEPS, TRAINING)
    return {name: factors(model, name) for name in ("meta_down", "mid", "up")}


def train_literally(batches: list[Batch], wrong: str = "") -> dict[str, list[torch.Tensor]]:
    """Do the same with autograd, an AdamW for each identity and one for meta_down, each clipped alone."""
    model, layers = double_model(), []
    for name, tensors in model.factors.by_layer().items():
        layers.append(LiteralLinear(metalora.adapters(model)[name], tensors))
        model.set_submodule(name, layers[-1])
    own = [[p for layer in layers for p in (*layer.mids[i], *layer.ups[i])] for i in range(3)]
    shared = [p for layer in layers for p in layer.meta_down]
    adamw = lambda params: torch.optim.AdamW(params, TRAINING.lr, weight_decay=TRAINING.weight_decay)
    optimizers, shared_optimizer = [adamw(params) for params in own], adamw(shared)

    for step, batch in enumerate(batches):
        present = sorted(set(batch.slots.tolist()))
        if wrong == "everybody":
            present = range(3)
        for layer in layers:
            layer.identities = batch.slots.tolist()
        for p in (*shared, *chain(*own)):
            p.grad = torch.zeros_like(p)
        latents, noise, t = (batch.inputs[name] for name in ("latents", "noise", "t"))
        txt, pooled = batch.inputs["txt"], batch.inputs["pooled"]
        img_ids, txt_ids = position_ids(len(t), 4, 4, txt.shape[1])
        times = t.view(-1, 1, 1, 1)
        x_t = (1 - times) * latents + times * noise
        guidance = torch.full_like(t, TRAINING.train_guidance)
        velocity = model(pack(x_t), img_ids, txt, txt_ids, t, pooled, guidance)
        ((velocity - pack(noise - latents)) ** 2).mean().backward()

        moves_meta_down = step >= WARM_UP_STEPS or wrong == "no warm-up"
        clip = partial(torch.nn.utils.clip_grad_norm_, max_norm=TRAINING.clip_grad)
        if wrong == "clipped together":
            clip([*shared * moves_meta_down, *chain(*own)])
        else:
            for i in present:
                clip(own[i])
            clip(shared)
        for i in present:
            optimizers[i].step()
        if moves_meta_down:
            shared_optimizer.step()
    stacked = {"meta_down": [torch.stack([*layer.meta_down]) for layer in layers]}
    stacked["mid"] = [torch.stack([torch.stack([*mid]) for mid in layer.mids]) for layer in layers]
    stacked["up"] = [torch.stack([torch.cat([*up]) for up in layer.ups]) for layer in layers]
    return {name: [tensor.detach() for tensor in tensors] for name, tensors in stacked.items()}


def furthest(ours: dict[str, list[torch.Tensor]], theirs: dict[str, list[torch.Tensor]], name: str) -> float:
    """Return the largest difference of a factor."""
    return max((a - b).abs().max().item() for a, b in zip(ours[name], theirs[name], strict=True))


def test_steps_are_those_of_an_adamw_for_each_identity():
    start = train_ours([])
    ours, theirs = train_ours(double_batches()), train_literally(double_batches())
    for name in ("meta_down", "mid", "up"):
        assert furthest(ours, theirs, name) < 1e-6
        assert furthest(ours, start, name) > 1e-2


@pytest.mark.parametrize(
    "wrong, names",
    [
        ("everybody", ["mid", "up"]),
        ("clipped together", ["meta_down", "mid", "up"]),
        ("no warm-up", ["meta_down"]),
    ],
)
def test_the_comparison_notices_another_algorithm(wrong, names):
    ours, theirs = train_ours(double_batches()), train_literally(double_batches(), wrong)
    for name in names:
        assert furthest(ours, theirs, name) > 1e-3


def test_a_spike_of_one_identity_does_not_brake_another(monkeypatch):
    """Identity 1 meets huge gradients; those that share its batches move as if it had not."""
    bystander = lambda spike: [p[0] for p in train_ours(double_batches([[0, 1]] * 3, spike))["up"]]
    furthest = lambda a, b: max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
    assert furthest(bystander(0.0), bystander(1e3)) < 1e-6

    def clip_together(personal: nn.Parameter, most: float) -> None:
        nn.utils.clip_grad_norm_([personal], most)

    monkeypatch.setattr(train_meta, "clip_slots", clip_together)
    assert furthest(bystander(0.0), bystander(1e3)) > 5e-3


def test_a_second_deal_has_another_order():
    """A rank with fewer photos deals them again, until it has as many batches as the others."""
    position = SimpleNamespace(q_bucket=9, bucket_step=0, steps_left=9, step=0, visit=0)
    position.generator = lambda purpose, number: generator_for(purpose, 0, number)
    deal = lambda data: [*train_meta.batches([0], data, position, 2, 3, TRAINING)]

    def data(photos: int) -> SimpleNamespace:
        bucket = SimpleNamespace(shapes=[(8, 8)] * photos)
        return SimpleNamespace(load=lambda pids: bucket, batch=lambda bucket, chosen, *rest: chosen)

    assert deal(data(6)) == deal_batches([(8, 8)] * 6, 3, 2, generator_for("order", 0, 0))
    fewer = deal(data(4))
    assert len(fewer) == 9 and all(sum(batch.count(k) for batch in fewer) >= 3 for k in range(4))
    assert fewer[6:] != fewer[:3]


# --- Stopping and going on ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(3, id="before the first checkpoint"),
        pytest.param(5, id="right after a checkpoint"),
        pytest.param(8, id="in the middle of a bucket"),
        pytest.param(12, id="between two buckets"),
        pytest.param(14, id="in a warm-up"),
        pytest.param(24, id="in a bucket's second turn"),
    ],
)
def test_a_killed_run_goes_on_bit_by_bit(run, undisturbed, tmp_path, monkeypatch, after):
    kill_at(run, tmp_path, monkeypatch, after)
    assert not (tmp_path / "meta.safetensors").exists()
    assert_equals_undisturbed(run(tmp_path), tmp_path, undisturbed)


def test_the_rest_of_a_run_may_be_deterministic(run, undisturbed, tmp_path, monkeypatch, nondeterministic):
    kill_at(run, tmp_path, monkeypatch, 8)
    assert_equals_undisturbed(run(tmp_path, "--deterministic"), tmp_path, undisturbed)
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("save_every", [5, 100])
def test_killed_while_a_bucket_is_stored(run, undisturbed, tmp_path, monkeypatch, stored, save_every):
    """Checkpoint and bucket are two files: a stop between writing them may not train a bucket twice.

    It is the bucket's second turn, in which it would otherwise start from what it stored a moment ago.
    """
    close = BucketRun.close_bucket

    def dies(self):
        second_turn = self.visit == 2
        if stored or not second_turn:
            close(self)
        if second_turn:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(BucketRun, "close_bucket", dies)
        with pytest.raises(Killed):
            run(tmp_path, "--save-every", save_every)
    assert_equals_undisturbed(run(tmp_path), tmp_path, undisturbed)


@pytest.mark.parametrize("first", [7, 12, 20])
def test_more_steps_later(run, undisturbed, tmp_path, first):
    run(tmp_path, steps=first)
    assert len(log_of(tmp_path)) == first
    assert read_tensors(tmp_path / "meta.safetensors")[1]["steps"] == str(first)
    assert_equals_undisturbed(run(tmp_path), tmp_path, undisturbed)


def test_a_finished_run_changes_nothing(run, undisturbed):
    before, tensors = state_of(undisturbed), load_file(undisturbed / "meta.safetensors")
    times = [file.stat().st_mtime_ns for file in (undisturbed / "checkpoints").iterdir()]
    assert_same(tensors, run(undisturbed))
    assert_same(before, state_of(undisturbed))
    assert times == [file.stat().st_mtime_ns for file in (undisturbed / "checkpoints").iterdir()]


def test_what_is_left_without_a_checkpoint_is_not_used(run, undisturbed, tmp_path):
    run(tmp_path, "--seed", 1)
    shutil.rmtree(tmp_path / "checkpoints")
    assert_equals_undisturbed(run(tmp_path), tmp_path, undisturbed)


def test_other_settings_are_refused(run, undisturbed, people, tmp_path):
    with pytest.raises(ValueError, match="other settings") as error:
        run(undisturbed, "--r1", 8, "--lr", 1e-3)
    assert "  r1: 4 -> 8\n  lr: 0.01 -> 0.001" in str(error.value)
    assert str(error.value).count("->") == 2
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for person in sorted(people.glob("*_*"))[:4]:
        (fewer / person.name).symlink_to(person)
    with pytest.raises(ValueError, match=r"photos of \w+_\d+: 4 \(\w+\) -> None$"):
        run(undisturbed, data=fewer)
    run(undisturbed, "--save-every", 7, "--sample-every", 50)  # these are free


def test_another_run_goes_on_where_one_ended(run, undisturbed, model, tmp_path):
    """With --from, meta_down begins as it was saved; the first bucket's warm-up leaves it so."""
    saved = load_file(undisturbed / "meta.safetensors")
    flags = ["--from", undisturbed / "meta.safetensors"]
    start = run(tmp_path / "a", *flags, "--seed", 3, steps=5)
    assert_same(start, saved)
    assert not all(torch.equal(saved[name], tensor) for name, tensor in run(tmp_path / "b", steps=5).items())
    moved = run(tmp_path / "a", *flags, "--seed", 3, steps=7)
    assert all(0 < (moved[name] - saved[name]).abs().max() < 0.1 for name in saved)
    shutil.copy(undisturbed / "meta.safetensors", tmp_path / "copy.safetensors")
    assert_same(run(tmp_path / "a", "--from", tmp_path / "copy.safetensors", "--seed", 3, steps=7), moved)
    with pytest.raises(ValueError, match="other settings(.|\n)*prior: .* -> None"):
        run(tmp_path / "a", "--seed", 3, steps=8)


def test_only_a_file_that_fits_can_be_a_start(run, undisturbed, other_model, tmp_path):
    flags = ["--from", undisturbed / "meta.safetensors"]
    message = "has --r1 4 and --targets all; this run has --r1 8 and --targets all"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *flags, "--r1", 8, steps=1)
    with pytest.raises(ValueError, match="this run has --r1 4 and --targets no-modulation"):
        run(tmp_path, *flags, "--targets", "no-modulation", steps=1)
    with pytest.raises(ValueError, match="must be .*, 64"):
        run(tmp_path / "other", *flags, "--model", other_model, steps=1, encodes=True)
    with pytest.raises(ValueError, match="is no file of stage 1"):
        run(tmp_path, "--from", other_model / "ae.safetensors", steps=1)


# --- The people --------------------------------------------------------------------------------------------


def test_a_list_trains_as_the_folders_do(run, undisturbed, people, tmp_path):
    """Begun with the folders, and gone on with a list of the same photos, each with its caption."""
    photos = sorted(people.glob("*/*.png"))
    lines = [f"{path}\t{path.parent.name}\t{path.with_suffix('.txt').read_text()}\n" for path in photos]
    (tmp_path / "list.tsv").write_text("path\tperson\tcaption\n" + "".join(lines))
    run(tmp_path / "out", steps=7)
    ours = run(tmp_path / "out", data=tmp_path / "list.tsv")
    assert_equals_undisturbed(ours, tmp_path / "out", undisturbed)
    (tmp_path / "list.tsv").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=r"other settings.*\n  photos of \w+: 4 \(\w+\) -> 3 \(\w+\)$"):
        run(tmp_path / "out", data=tmp_path / "list.tsv")
    (tmp_path / "list.tsv").write_text("".join(lines) + "no photo\n")
    with pytest.raises(ValueError, match="list.tsv, line 21: 'no photo'; must be path"):
        run(tmp_path / "out", data=tmp_path / "list.tsv")


def test_a_few_people_and_photos(run, people, tmp_path, capsys):
    run(tmp_path, "--max-people", 2, "--max-photos", 3, steps=1)
    said = capsys.readouterr().out
    assert "2 people, 6 photos" in said and "the last 3 of 5 people by name are left out" in said
    first = sorted(path.name for path in people.glob("*_*"))[:2]
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert [key for key in settings if key.startswith("photos of")] == [f"photos of {name}" for name in first]
    with pytest.raises(ValueError, match="max_people: 2 -> None"):
        run(tmp_path, "--max-photos", 3, steps=2)


# --- Settings and files ------------------------------------------------------------------------------------


def test_metadata_and_settings(undisturbed, model):
    prior = metalora.load_meta(undisturbed / "meta.safetensors")
    assert {tensor.shape[-2] for tensor in prior.tensors.values()} == {4}
    assert {tensor.dtype for tensor in prior.tensors.values()} == {torch.float16}
    expected = {"method": "meta-lora stage 1", "base_model": "flux1-random.safetensors", "class": "person"}
    expected |= {"r1": "4", "r2": "1", "targets": "all", "steps": str(STEPS), "lr": "0.01", "seed": "0"}
    assert expected.items() <= prior.metadata.items()
    settings = json.loads((undisturbed / "settings.json").read_text())
    assert settings["model"] == str(model) and settings["resolution"] == 32
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        ".lock",
        "buckets",
        "cache",
        "checkpoints",
        "log.jsonl",
        "loss.png",
        "meta.safetensors",
        "people.jsonl",
        "settings.json",
    ]


def test_seeds_and_latents(run, undisturbed, tmp_path):
    same = load_file(undisturbed / "meta.safetensors")
    for name, flags in {"seed": ("--seed", 1), "latents": ("--latents", "mean")}.items():
        other = run(tmp_path / name, *flags, steps=8)
        assert other.keys() == same.keys()
        assert log_of(tmp_path / name)[0]["loss"] != log_of(undisturbed)[0]["loss"]


def test_average(run, tmp_path):
    """With decay 0.5 the saved meta_down is the running mean of those after each step that moved it."""
    live = [run(tmp_path / str(steps), steps=steps) for steps in (5, 6, 7)]  # 5: still as it was at the start
    for steps in (6, 7):  # in two runs: the average is part of the checkpoint
        averaged = run(tmp_path / "average", "--ema", 0.5, steps=steps)
    for name, tensor in averaged.items():
        start, first, second = (tensors[name].float() for tensors in live)
        expected = 0.5 * (0.5 * start + 0.5 * first) + 0.5 * second
        torch.testing.assert_close(tensor.float(), expected, atol=1e-3, rtol=0)
        assert not torch.equal(tensor, live[-1][name])


def test_captions_come_from_text_files(run, people, tmp_path, monkeypatch):
    prompts, encode = [], dataset.encode_prompt
    monkeypatch.setattr(
        dataset, "encode_prompt", lambda text, *rest: prompts.append(text) or encode(text, *rest)
    )
    run(tmp_path / "out", "--class", "woman", steps=1, encodes=True)
    texts = {path.read_text() for path in people.glob("*/*.txt")}
    assert set(prompts) - texts <= {"a photo of a woman", "a photo of a woman smiling at the beach"}
    assert texts < set(prompts) and len(texts) > 5
    prompts.clear()

    bare = tmp_path / "ids" / "someone"
    bare.mkdir(parents=True)
    for picture in sorted(people.glob("*_000/*.png")):
        (bare / picture.name).write_bytes(picture.read_bytes())
    run(tmp_path / "bare", "--class", "man", data=tmp_path / "ids", steps=1, encodes=True)
    assert set(prompts) == {"a photo of a man", "a photo of a man smiling at the beach"}


def test_sample_grids(run, tmp_path, monkeypatch):
    """The pictures change nothing in the training; an odd resolution gives the nearest size that works."""
    monkeypatch.setattr(grids, "generate", partial(grids.generate, steps=2))
    run(tmp_path / "a", "--sample-every", 4, steps=7)
    assert_same(load_file(tmp_path / "a" / "meta.safetensors"), run(tmp_path / "b", steps=7))
    (grid,) = (tmp_path / "a" / "samples").iterdir()
    assert grid.name == "000004.png"
    width, height = Image.open(grid).size
    assert width > 5 * 256 and height > 2 * 256  # a photo and four pictures; two people
    run(tmp_path / "c", "--sample-every", 1, "--resolution", 35, steps=1)


def test_nothing_is_lost_when_a_sample_grid_fails(run, tmp_path, monkeypatch):
    def fails(*args):
        raise Killed

    monkeypatch.setattr(train_meta, "sample_grid", fails)
    with pytest.raises(Killed):
        run(tmp_path, "--sample-every", 5, steps=7)
    assert [file.name for file in (tmp_path / "checkpoints").glob("*.pt")] == ["000005.pt"]


def test_broken_weights_are_not_saved(run, tmp_path, monkeypatch):
    def breaks(position, update, model, optimizers, *rest):
        optimizers.meta_down[0].data[0, 0, 0, 0] = math.nan
        return update(model, optimizers, *rest)

    around_updates(monkeypatch, breaks)
    with pytest.raises(ValueError, match="not finite"):
        run(tmp_path, steps=1)
    assert not (tmp_path / "meta.safetensors").exists()


def test_nothing_is_looked_at_or_encoded_twice(run, undisturbed, tmp_path, monkeypatch):
    """A cache of other settings is not used: every part of the recipe changes the keys it matters to."""
    shutil.copytree(undisturbed, tmp_path / "out")
    for name in ("load_conditioner", "load_autoencoder"):
        loader = getattr(dataset.flux, name)
        refuse = lambda *args, loader=loader: (
            loader(*args) if "meta" in args else pytest.fail(loader.__name__)
        )
        monkeypatch.setattr(dataset.flux, name, refuse)
    monkeypatch.setattr("people.manifest.examine", lambda path: pytest.fail(f"{path} is read again"))
    assert_same(run(tmp_path / "out", steps=STEPS + 1), run(tmp_path / "out", steps=STEPS + 1))
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    for flag, value in {"--resolution": 40, "--dtype": "bf16", "--t5-length": 9}.items():
        with pytest.raises(pytest.fail.Exception, match="load_"):
            run(tmp_path / "out", flag, value, steps=1)


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch", "0"],
        ["--bucket-warmup", "1"],
        ["--r1", "-1"],
        ["--steps", "0"],
        ["--max-people", "0"],
        ["--max-photos", "0"],
    ],
)
def test_impossible_settings(flags, capsys):
    with pytest.raises(SystemExit):
        train_meta.parse_arguments(["--data", "ids", *flags])
    assert flags[0] in capsys.readouterr().err


def test_without_weights_the_script_says_what_to_do(people, tmp_path):
    """As a user would call it, without network and with an empty hub cache: one paragraph, no traceback."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    script = Path(train_meta.__file__)
    command = [sys.executable, script, "--model", "flux-dev", "--data", people, "--out", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("train_meta.py: black-forest-labs/FLUX.1-dev is not whole")
    assert "--model tiny" in done.stderr and "hf auth login" in done.stderr
    assert not (tmp_path / "out").exists()
