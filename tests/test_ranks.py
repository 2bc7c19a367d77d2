"""Ranks train as one process with their batches as one; they die, and come back, perhaps as fewer."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import around_updates, assert_same, copy_cache, log_of, state_of

import train_meta
from flux.errors import UserError
from flux.memory import blocks_of
from people import grids, preparing
from people.dataset import Batch
from run import files, ranks
from run.checkpoints import read_state
from run.ranks import Ranks
from tiny.people import write_people

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees")

# Eight people of three photos in two buckets of 4. Two ranks have two people each: q_bucket is 6 * 2 / 2 = 6,
# that of one process with batches of 4 is 12 * 2 / 4 = 6. q_warmup is 2. Gradients are clipped.
STEPS, CLIP = 21, 0.02
WARM_UP = ([True] * 2 + [False] * 4) * 3 + [True] * 2 + [False]
SETTINGS = ["--r1", 4, "--bucket-ids", 4, "--uses-per-image", 2, "--batch", 2, "--lr", 1e-3]
SETTINGS += ["--save-every", 5, "--sample-every", 0, "--resolution", 32, "--clip-grad", CLIP]
SETTINGS += ["--keep-buckets", "--checkpoint", "none", "--stream", 0]
PATCH = pytest.MonkeyPatch()  # of a rank's own process, which ends before anything must be undone


# --- What is done to a rank before it trains ---------------------------------------------------------------


def record(folder: Path) -> None:
    """Keep of every step the batch, the gradient, and how many numbers were added up at a time."""
    sizes, gradient, all_reduce = [], [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        result = all_reduce(tensor, *args, **kwargs)
        gradient.extend([tensor.clone()] if tensor.numel() > 1 else [])
        return result

    def recorded(position, update, model, optimizers, batch, *rest):
        sizes.clear()
        gradient.clear()
        found = update(model, optimizers, batch, *rest)
        entry = {"batch": batch.inputs, "slots": batch.slots, "sizes": list(sizes)}
        entry |= {"found": numbers_of(found), "gradient": list(gradient)}
        entry |= {"meta_down": sum(p.numel() for p in optimizers.meta_down)}
        torch.save(entry, folder / f"{position.step}_{position.ranks.rank}.pt")
        return found

    dist.all_reduce = counted
    around_updates(PATCH, recorded)


def without_the_others_gradients(folder: Path) -> None:
    record(folder)
    Ranks.sum_gradients = lambda self, params: None


def clipped_before_the_sum(folder: Path) -> None:
    record(folder)
    sum_gradients = Ranks.sum_gradients

    def clipped(self, params):
        if params:
            torch.nn.utils.clip_grad_norm_(params, CLIP / 2)
        sum_gradients(self, params)

    Ranks.sum_gradients = clipped


def with_their_own_norms(folder: Path) -> None:
    record(folder)
    Ranks.norm = lambda self, norm: norm


def strike_rank_1(signal_number: int, after: int) -> None:
    def struck(position, update, *arguments):
        if position.ranks.rank == 1 and position.step == after:
            os.kill(os.getpid(), signal_number)
        return update(*arguments)

    around_updates(PATCH, struck)


def killed(folder: Path) -> None:
    strike_rank_1(signal.SIGKILL, after=13)


def terminated(folder: Path) -> None:
    strike_rank_1(signal.SIGTERM, after=8)


def broken(folder: Path) -> None:
    """Make the loss of rank 1 NaN in step 4."""
    loss = train_meta.flow_loss

    def breaks(position, update, *arguments):
        factor = math.nan if position.ranks.rank == 1 and position.step == 3 else 1.0
        train_meta.flow_loss = lambda *a, **k: factor * loss(*a, **k)
        return update(*arguments)

    around_updates(PATCH, breaks)


def failing(folder: Path) -> None:
    """Let rank 0 fail where the others wait for it."""
    preparing.scan_photos = None


def halved(folder: Path) -> None:
    """Check that a rank has only its part of the weights, before and after each step."""
    record(folder)
    PATCH.setattr(grids, "generate", partial(grids.generate, steps=2))

    def checked(position, update, model, *rest):
        def share() -> float:
            frozen = [p for p in model.parameters() if hasattr(p, "to_local")]
            assert len(frozen) > 20 and not any("MetaLoRA" in str(type(p)) for p in frozen)
            return sum(p.to_local().numel() for p in frozen) / sum(p.numel() for p in frozen)

        assert 0.4 < share() < 0.6
        found = update(model, *rest)
        for block in blocks_of(model):
            assert all(hasattr(p, "to_local") for name, p in block.named_parameters() if "base" in name)
        return found

    around_updates(PATCH, checked)


def member(rank: int, size: int, port: int, argv: list[str], act, folder: Path) -> None:
    """Train as torchrun would have it, in a process of its own."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.fsync = lambda file: None
    sys.stdout = open(folder / f"stdout{rank}", "w")  # noqa: SIM115
    sys.stderr = open(folder / f"stderr{rank}", "w")  # noqa: SIM115
    if act:
        act(folder)
    try:
        status = train_meta.main(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(status)


# --- Fixtures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eight") / "ids"
    write_people(folder, people=8, photos=3, seed=1)
    return folder


@pytest.fixture(scope="module")
def words(model, eight):
    """Return the script's arguments: words(out, flag, value, ...)."""

    def call(out: Path, *flags: object, steps: int = STEPS, data: Path = eight) -> list[str]:
        argv = ["--data", data, "--model", model, "--out", out, "--steps", steps, *SETTINGS, *flags]
        return [str(word) for word in argv]

    return call


@pytest.fixture(scope="module")
def launch(words, tmp_path_factory):
    """Run the script in several ranks: launch(out, flag, value, ...); returns their exit codes.

    What they say and record goes to the folder `<out>_said`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_meta", "test_ranks", "torch.distributed.fsdp"])
    cache = tmp_path_factory.mktemp("encoded") / "cache"  # of the first run, for those after it

    def call(out: Path, *flags: object, act=None, size: int = 2, **settings) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        said = said_in(out)
        said.mkdir(exist_ok=True)
        if cache.exists():
            copy_cache(cache, out)
        argv = words(out, *flags, **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            args = [(rank, size, port, argv, act, said) for rank in range(size)]
            ranks = [context.Process(target=member, args=given) for given in args]
            for rank in ranks:
                rank.start()
        until = time.time() + 120
        for rank in ranks:
            rank.join(max(0, until - time.time()))
        hanging = [number for number, rank in enumerate(ranks) if rank.is_alive()]
        for number in hanging:
            ranks[number].kill()
        assert not hanging, said_by(out, hanging[0])
        if not cache.exists() and (out / "meta.safetensors").exists():
            shutil.copytree(out / "cache", cache)
        return [rank.exitcode for rank in ranks]

    return call


def said_in(out: Path) -> Path:
    return out.with_name(f"{out.name}_said")


def said_by(out: Path, rank: int, stream: str = "stderr") -> str:
    return (said_in(out) / f"{stream}{rank}").read_text()


def records_of(out: Path) -> list[list[dict]]:
    """Return by step and rank what was recorded."""
    entry = lambda step, rank: torch.load(said_in(out) / f"{step}_{rank}.pt")
    return [[entry(step, rank) for rank in range(2)] for step in range(len(log_of(out)))]


@pytest.fixture(scope="module")
def pair(launch, tmp_path_factory) -> Path:
    """A whole run of two ranks, with its records beside it."""
    out = tmp_path_factory.mktemp("pair") / "out"
    assert launch(out, act=record) == [0, 0], said_by(out, 0) + said_by(out, 1)
    return out


@pytest.fixture
def as_one(words, monkeypatch):
    """Run the script in this process on the joined batches of two ranks: as_one(out, pair)."""

    def call(out: Path, pair: Path, steps: int = STEPS, same: bool = True) -> None:
        def fed(position, update, model, optimizers, batch, *rest):
            parts = [torch.load(said_in(pair) / f"{position.step}_{rank}.pt") for rank in range(2)]
            inputs = {name: torch.cat([part["batch"][name] for part in parts]) for name in batch.inputs}
            slots = torch.cat([2 * part["slots"] + rank for rank, part in enumerate(parts)])
            found = update(model, optimizers, Batch(inputs, slots, batch.photos), *rest)
            for part in parts if same else ():
                assert numbers_of(found) == pytest.approx(part["found"], rel=1e-3, abs=1e-7)
            return found

        with monkeypatch.context() as patch:
            around_updates(patch, fed)
            patch.setattr(train_meta, "MAY_CHANGE", (*train_meta.MAY_CHANGE, "batch"))
            train_meta.main(words(out, "--batch", 4, steps=steps))

    return call


def numbers_of(found: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: number.item() for name, number in found.items()}


def assert_close(a, b, atol: float = 1e-5) -> None:
    """Compare dictionaries and lists of tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = [list(x.values()) for x in (a, b)]
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_close(x, y, atol)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)
    else:
        assert a == b


def differences(a: Path, b: Path) -> list[float]:
    """Return how far apart the meta_downs of two runs are, by layer."""
    states = [next(iter(state_of(out).values()))["shared"]["meta_down"] for out in (a, b)]
    return [(x - y).abs().max().item() for x, y in zip(*states, strict=True)]


# --- As one process ----------------------------------------------------------------------------------------


def test_two_ranks_are_one_process_with_both_batches(pair, as_one, tmp_path):
    """meta_down, and all else that is written: everybody's mid, up and optimizer, and the position."""
    as_one(tmp_path / "one", pair)
    assert max(differences(pair, tmp_path / "one")) < 1e-5
    assert_close(state_of(pair), state_of(tmp_path / "one"))
    assert [line["phase"] == "warm-up" for line in log_of(pair)] == WARM_UP
    assert all(line["grad_meta_down"] > CLIP for line in log_of(pair) if line["phase"] == "all")


@pytest.mark.parametrize("act", [without_the_others_gradients, clipped_before_the_sum])
def test_another_gradient_is_noticed(launch, as_one, tmp_path, act):
    assert launch(tmp_path / "two", act=act, steps=6) == [0, 0]
    as_one(tmp_path / "one", tmp_path / "two", steps=6, same=False)
    assert min(differences(tmp_path / "two", tmp_path / "one")) > 2e-4  # 20 times what two ranks may differ


def test_other_norms_are_noticed(launch, as_one, tmp_path):
    assert launch(tmp_path / "two", act=with_their_own_norms, steps=2) == [0, 0]
    with pytest.raises(AssertionError, match="grad_up"):
        as_one(tmp_path / "one", tmp_path / "two", steps=2)


def test_the_gradient_travels_after_the_warm_up_only(pair):
    for step, warm_up in zip(records_of(pair), WARM_UP, strict=True):
        for entry in step:
            gradients = [size for size in entry["sizes"] if size > 1]
            assert gradients == ([] if warm_up else [entry["meta_down"]])


def test_long_gradients_travel_in_parts(monkeypatch):
    """All numbers are summed, wherever the parts begin and end."""
    calls = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: calls.append(len(tensor)) or tensor.mul_(2))
    monkeypatch.setattr(ranks, "CHUNK", 10)
    two = Ranks()
    two.size = 2
    params = [torch.zeros(size, 2, requires_grad=True) for size in (1, 3, 2, 9, 1, 1, 3)]
    for p in params:
        p.grad = torch.rand(p.shape)
    doubled = [2 * p.grad for p in params]
    two.sum_gradients(params)
    assert_same([p.grad for p in params], doubled)
    assert calls == [8, 4, 18, 10]


def test_ranks_draw_differently(pair):
    """Each has noise, times and people of its own."""
    for first, second in records_of(pair):
        for name in ("noise", "t", "latents"):
            assert not torch.equal(first["batch"][name], second["batch"][name])


@pytest.mark.parametrize("people, size", [(4, 2), (5, 2), (50, 8), (3, 3)])
def test_every_identity_belongs_to_one_rank(people, size):
    rows, all_ranks = torch.rand(people, 3), [Ranks() for _ in range(size)]
    for number, member in enumerate(all_ranks):
        member.rank, member.size = number, size
    mine = [member.mine(range(people)) for member in all_ranks]
    assert sorted(sum(map(list, mine), [])) == list(range(people))
    for member, pids in zip(all_ranks, mine):
        part = member.take_rows({"a": [rows]})["a"][0]
        assert len(part) == -(-people // size)
        assert torch.equal(part[: len(pids)], rows[list(pids)]) and not part[len(pids) :].any()
    with pytest.raises(UserError, match=f"{size - 1} people is too small for {size} ranks"):
        all_ranks[0].parts(range(size - 1))


def test_unequal_shares(launch, people, tmp_path):
    """Five people in buckets of 3 and 2: the rank with two of them says how long a turn takes."""
    assert launch(tmp_path / "out", "--bucket-ids", 3, steps=20, data=people) == [0, 0]
    log = log_of(tmp_path / "out")
    assert [line["bucket"] for line in log] == [0] * 8 + [1] * 4 + [0] * 8
    (file,) = (tmp_path / "out" / "buckets").glob("bucket0000*")
    counts = read_state(file)["optimizer"]["count"]
    assert len(counts) == 3 and counts.all()
    # Where there is nobody for a rank, all say so, and at once.
    assert launch(tmp_path / "few", "--bucket-ids", 1, data=people) == [1, 1]
    assert "a bucket of 1 people is too small for 2 ranks" in said_by(tmp_path / "few", 0)


# --- The run as a whole ------------------------------------------------------------------------------------


def test_rank_0_speaks_and_writes(pair):
    assert said_by(pair, 1, "stdout") == said_by(pair, 1) == ""
    assert "next, python personalize.py" in said_by(pair, 0, "stdout") and "21/21" in said_by(pair, 0)
    log = log_of(pair)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert json.loads((pair / "settings.json").read_text())["world"] == 2
    expected = [".lock", "buckets", "cache", "checkpoints", "log.jsonl", "loss.png", "meta.safetensors"]
    assert sorted(path.name for path in pair.iterdir()) == [*expected, "people.jsonl", "settings.json"]


def test_fewer_ranks_go_on(launch, pair, as_one, tmp_path):
    """Two ranks stop in the middle of a bucket, one process goes on as they would have."""
    assert launch(tmp_path / "out", steps=9) == [0, 0]
    as_one(tmp_path / "out", pair)
    assert_close(state_of(pair), state_of(tmp_path / "out"))
    assert len(log_of(tmp_path / "out")) == STEPS


def test_more_ranks_go_on(launch, pair, as_one, words, tmp_path, monkeypatch):
    as_one(tmp_path / "out", pair, steps=9)
    settings = tmp_path / "out" / "settings.json"
    settings.write_text(settings.read_text().replace('"batch": 4', '"batch": 2'))
    assert launch(tmp_path / "out") == [0, 0]
    assert_close(state_of(pair), state_of(tmp_path / "out"))
    assert len(log_of(tmp_path / "out")) == STEPS


def test_a_turn_goes_on_at_the_same_part(launch, words, tmp_path):
    """With the same --batch, one process has twice as many steps to a bucket: 3 of 6 are 6 of 12."""
    assert launch(tmp_path / "out", steps=9) == [0, 0]
    train_meta.main(words(tmp_path / "out", steps=27))
    assert [line["bucket"] for line in log_of(tmp_path / "out")] == [0] * 6 + [1] * 9 + [0] * 12
    assert launch(tmp_path / "out", steps=30) == [0, 0]
    assert [line["bucket"] for line in log_of(tmp_path / "out")][27:] == [1] * 3


# --- Ranks that end ----------------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_run_which_goes_on_bit_by_bit(launch, pair, tmp_path):
    began = time.time()
    survivor, victim = launch(tmp_path / "out", act=killed)
    assert victim == -signal.SIGKILL and survivor == 1 and time.time() - began < 60
    assert "ConnectionError: rank 0 of 2 cannot reach another rank" in said_by(tmp_path / "out", 0)
    assert not list((tmp_path / "out").rglob(".*.*"))
    assert len(log_of(tmp_path / "out")) == 12  # the numbers of step 13 were still unread
    assert launch(tmp_path / "out") == [0, 0]
    assert_same(state_of(pair), state_of(tmp_path / "out"))


def test_a_signal_to_one_stops_all_after_the_same_step(launch, pair, tmp_path):
    assert launch(tmp_path / "out", act=terminated) == [0, 0]
    assert "torchrun --nproc-per-node 2 train_meta.py --data" in said_by(tmp_path / "out", 0, "stdout")
    assert len(log_of(tmp_path / "out")) == 9
    assert next(iter(state_of(tmp_path / "out"))) == "000009.pt"
    assert launch(tmp_path / "out") == [0, 0]
    assert_same(state_of(pair), state_of(tmp_path / "out"))


def test_broken_numbers_of_one_are_skipped_by_all(launch, tmp_path):
    assert launch(tmp_path / "out", act=broken, steps=6) == [0, 0]
    skipped = [line for line in log_of(tmp_path / "out") if "photos" in line]
    assert [line["step"] for line in skipped] == [4] and len(skipped[0]["photos"]) == len(
        skipped[0]["t"]
    ) == 4
    state = next(iter(state_of(tmp_path / "out").values()))
    steps = {entry["step"].item() for entry in state["shared"]["optimizer"]["state"].values()}
    assert steps == {3}  # of the four after the warm-up


def test_the_others_end_when_rank_0_fails(launch, tmp_path):
    assert launch(tmp_path / "out", act=failing) == [1, 1]
    assert "TypeError" in said_by(tmp_path / "out", 0) and said_by(tmp_path / "out", 1) == ""


def test_torchrun(words, tmp_path, as_one):
    """As a user would call it, with a rank that is killed; then one process goes on."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [train_meta.__file__, *words(out, steps=100_000)]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    log, until = out / "log.jsonl", time.time() + 90
    while not (log.exists() and log.read_text().count("\n") > 12) and time.time() < until:
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environment = lambda pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (victim,) = [pid for pid in children if b"RANK=1" in environment(pid)]
    os.kill(int(victim), signal.SIGKILL)
    assert process.wait(timeout=90) != 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    text = (tmp_path / "said").read_text()
    assert "cannot reach another rank" in text
    with files.alone(out):  # nobody is left in it
        assert not [file for file in out.rglob(".*") if file.name != ".lock"]
    done = len(log_of(out))
    train_meta.main(words(out, steps=done + 5))
    assert [line["step"] for line in log_of(out)] == list(range(1, done + 6))


# --- Shared weights ----------------------------------------------------------------------------------------


# torch 2.6; also https://github.com/pytorch/pytorch/issues/132014
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="in this torch FSDP2 works on GPUs only"
)
@pytest.mark.parametrize("blocks", ["none", "all", "attention"])
def test_sharded_weights_train_alike(launch, pair, tmp_path, blocks):
    """Loss, gradients and all that is written are as with whole weights; pictures change nothing."""
    out, pictures = tmp_path / "out", blocks == "all"
    flags = ["--shard", "--checkpoint", blocks, "--sample-every", 10 if pictures else 0]
    assert launch(out, *flags, act=halved, steps=STEPS if pictures else 9) == [0, 0], said_by(out, 0)
    for ours, theirs in zip(records_of(out), records_of(pair)):
        for x, y in zip(ours, theirs):
            assert x["found"] == pytest.approx(y["found"], rel=1e-4, abs=1e-7)
            assert_close(x["gradient"], y["gradient"])
    if pictures:
        assert max(differences(pair, out)) < 1e-5
        assert_close(state_of(pair), state_of(out))
        assert [file.name for file in sorted((out / "samples").iterdir())] == ["000010.png", "000020.png"]


def test_a_single_process_has_nobody_to_share_with(words, tmp_path):
    with pytest.raises(ValueError, match="--shard.*torchrun"):
        train_meta.main(words(tmp_path, "--shard"))
