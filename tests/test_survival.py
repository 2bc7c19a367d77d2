"""Runs that are killed, stopped, starved of disk or memory, or fed with nonsense, and end as if not."""

import errno
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import conftest
import pytest
import torch
from helpers import (
    around_updates,
    assert_equals_undisturbed,
    assert_same,
    copy_cache,
    kill_at,
    log_of,
    state_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import train_meta
from flux.errors import UserError
from lora.writing import write_tensors
from people import grids
from run import checkpoints, files, log
from run.bucket_run import BucketRun
from run.checkpoints import BucketStore, Checkpoints, read_state
from run.command import STOPPED
from run.log import plot_curve
from train_meta import MetaLearner

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees")


@pytest.fixture(scope="module")
def run(train):
    return train


# --- Killed ------------------------------------------------------------------------------------------------


def child(argv: list[str]) -> None:
    """Train in a process of its own; torch is loaded once, by the fork server."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.fsync = lambda file: time.sleep(0.02)  # a slow disk: a file takes long enough to be hit
    train_meta.main(argv)


@pytest.fixture
def start(model, people, tmp_path, monkeypatch):
    """Start a child in a folder: start(out) returns the process. It saves often, to be hit at it.

    The first one, in the folder `warm`, encodes for all.
    """
    cache = tmp_path / "warm" / "cache"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_meta", "test_survival"])
    argv = ["--data", people, "--model", model, "--steps", 34, "--r1", 4, "--bucket-ids", 3, "--batch", 2]
    argv += ["--uses-per-image", 2, "--lr", 1e-2, "--save-every", 2, "--resolution", 32, "--sample-every", 0]
    argv += ["--keep-buckets"]

    def call(out: Path) -> multiprocessing.Process:
        if cache.exists():
            copy_cache(cache, out)
        process = context.Process(target=child, args=([str(word) for word in (*argv, "--out", out)],))
        process.start()
        return process

    return call


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(start, tmp_path, kills):
    """The end is bit-identical, each time; half of the kills wait until something is being written."""
    start(tmp_path / "warm").join()  # the fork server has now loaded everything
    began = time.time()
    calm = start(tmp_path / "calm")
    calm.join()
    assert calm.exitcode == 0
    duration, draw = time.time() - began, random.Random(kills)
    killed = writing = 0
    while killed < kills:
        out = tmp_path / str(killed)
        for death in range(draw.choice([1, 2, 3])):  # several deaths of one run
            process, wait = start(out), draw.uniform(0.1, 0.9) * duration
            if death == 0 or draw.random() < 0.5:
                until = time.time() + duration
                while process.is_alive() and not list(out.glob("*/.*.pt")) and time.time() < until:
                    time.sleep(0.0002)
            else:
                process.join(wait)
            process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            writing += bool(list(out.glob("*/.*.pt")))
        process = start(out)
        process.join()
        assert process.exitcode == 0
        assert_same(*(load_file(folder / "meta.safetensors") for folder in (out, tmp_path / "calm")))
        assert_same(state_of(out), state_of(tmp_path / "calm"))
        assert len(log_of(out)) == 34 and not list(out.rglob(".*.pt"))
    assert writing  # the test has hit what it aims at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [8, 19, 20])
def test_a_signal_saves_and_says_how_to_go_on(run, undisturbed, tmp_path, monkeypatch, capsys, number, after):
    before = signal.getsignal(number)

    def signalled(position, update, *arguments):
        if position.step == after:
            os.kill(os.getpid(), number)
        return update(*arguments)

    with monkeypatch.context() as patch:
        around_updates(patch, signalled)
        with pytest.raises(FileNotFoundError):  # the fixture looks for the result, which is not there yet
            run(tmp_path)
    text = capsys.readouterr().out
    assert "python train_meta.py --data" in text and f"--out {tmp_path}" in text
    assert Checkpoints(tmp_path / "checkpoints").files()[0].stem == f"{after + 1:06d}"
    assert signal.getsignal(number) == before
    assert_equals_undisturbed(run(tmp_path), tmp_path, undisturbed)


def test_a_signal_before_the_first_step_and_a_second_one(run, tmp_path, monkeypatch, capsys):
    interrupt = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr("people.dataset.encode_prompt", interrupt)
        with pytest.raises(FileNotFoundError):
            run(tmp_path, encodes=True)
    assert "stopped; this goes on:" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(train_meta, "update", lambda *_: (interrupt(), interrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)


def test_the_exit_status_of_a_script_that_is_stopped(people, model, tmp_path):
    """As a scheduler would do it; what follows by && must not start."""
    command = [sys.executable, train_meta.__file__, "--data", people, "--model", model, "--out", tmp_path]
    command += ["--steps", 100_000, "--r1", 4, "--save-every", 100_000, "--resolution", 32]
    process = subprocess.Popen(
        [str(word) for word in command], stdout=-1, stderr=subprocess.DEVNULL, text=True
    )
    log, until = tmp_path / "log.jsonl", time.time() + 60
    while not (log.exists() and log.stat().st_size) and time.time() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == STOPPED and "this goes on:" in text
    assert int(Checkpoints(tmp_path / "checkpoints").files()[0].stem) == len(log_of(tmp_path)) > 0


@pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")
def test_others_may_read_what_is_written_as_far_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors({"a": torch.zeros(1)}, tmp_path / "lora.safetensors", {})
    finally:
        os.umask(before)
    assert (tmp_path / "lora.safetensors").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_run_was_writing_is_deleted(tmp_path):
    keep = [".lock", "checkpoints/000005.pt", ".bashrc", ".a.tar.gz", "cache/.hidden", "cache/.a.77.png"]
    for name in keep:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("people.jsonl", "checkpoints/000005.pt", "cache/0af3.safetensors"):
        with (
            pytest.MonkeyPatch.context() as patch,
            suppress(FileNotFoundError),
            files.atomic(tmp_path / name) as temporary,
        ):
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # killed, it can delete nothing
            temporary.touch()
            raise FileNotFoundError
    present = lambda: {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert len(present()) == len(keep) + 3
    with files.alone(tmp_path):
        assert present() == set(keep)


def test_equal_process_numbers_share_no_temporary_name(tmp_path, monkeypatch):
    """As in two containers that write to one disk: the one that ends last has written the file, whole."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(random, "random", lambda: 0.5)
    with files.atomic(tmp_path / "a.txt") as first, files.atomic(tmp_path / "a.txt") as second:
        assert first != second
        first.write_text("first, and longer")
        second.write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "first, and longer"


def test_one_run_in_a_folder(run, tmp_path):
    with files.alone(tmp_path), pytest.raises(OSError, match="another run is writing"):
        run(tmp_path)
    assert not (tmp_path / "people.jsonl").exists()


# --- Damaged -----------------------------------------------------------------------------------------------


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_bit, lambda file: os.truncate(file, 1000)])
@pytest.mark.parametrize("save_every, step", [(5, 12), (100, 33)])
def test_the_checkpoint_before(run, undisturbed, tmp_path, monkeypatch, capsys, damage, save_every, step):
    """Going on from there finds the buckets as they were then, though newer ones have been stored."""
    kill_at(run, tmp_path, monkeypatch, step, "--save-every", save_every)
    files = Checkpoints(tmp_path / "checkpoints").files()
    assert [int(file.stem) for file in files] == ([12, 10] if save_every == 5 else [32, 20])
    damage(files[0])
    capsys.readouterr()
    ours = run(tmp_path)
    text = capsys.readouterr().out
    assert f"of step {int(files[1].stem)}" in text and files[0].name in text
    assert (files[0].with_suffix(".damaged")).exists()  # nothing is thrown away
    assert_equals_undisturbed(ours, tmp_path, undisturbed)


def test_no_whole_checkpoint_is_not_a_fresh_start(run, tmp_path, monkeypatch):
    kill_at(run, tmp_path, monkeypatch, 12)
    for file in Checkpoints(tmp_path / "checkpoints").files():
        flip_a_bit(file)
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint is whole.*000012.damaged"):
            run(tmp_path)
    assert len(log_of(tmp_path)) == 12


def test_a_damaged_bucket_is_named(run, tmp_path, monkeypatch):
    kill_at(run, tmp_path, monkeypatch, 19)
    (file,) = (tmp_path / "buckets").iterdir()
    flip_a_bit(file)
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        run(tmp_path)


def test_lost_settings(run, tmp_path):
    run(tmp_path, steps=1)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json.*cannot be read"):
        run(tmp_path, steps=2)


# --- The bucket store --------------------------------------------------------------------------------------


def test_buckets_that_do_not_come_back_are_not_stored(run, tmp_path, monkeypatch):
    words = [word for word in conftest.SETTINGS if word != "--keep-buckets"]
    monkeypatch.setattr(conftest, "SETTINGS", words)
    names = lambda out: sorted(file.name for file in (out / "buckets").iterdir())
    run(tmp_path / "once", steps=20)  # 12 of bucket 0, 8 of bucket 1
    assert names(tmp_path / "once") == []
    run(tmp_path / "first", steps=21)  # bucket 0 comes back for a step, bucket 1 does not
    assert names(tmp_path / "first") == ["bucket0000_visit000000.pt"]


def test_a_run_goes_on_after_its_end_with_buckets_that_were_not_stored(run, tmp_path, monkeypatch, capsys):
    """Bucket 1 begins anew, as in its first turn; a file that should be there is an error as before."""
    words = [word for word in conftest.SETTINGS if word != "--keep-buckets"]
    monkeypatch.setattr(conftest, "SETTINGS", words)
    opened, start, load = [], MetaLearner.start_bucket, MetaLearner.load_bucket_state
    monkeypatch.setattr(MetaLearner, "start_bucket", lambda *a: opened.append(f"new {a[1]}") or start(*a))
    monkeypatch.setattr(MetaLearner, "load_bucket_state", lambda *a: opened.append("stored") or load(*a))
    run(tmp_path / "a", steps=21)
    assert opened == ["new 0", "new 1", "stored"] and "were not stored" not in capsys.readouterr().out
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    opened.clear()
    run(tmp_path / "a", steps=22)  # it does not come back
    assert opened == ["stored"] and "were not stored" not in capsys.readouterr().out
    opened.clear()
    kill_at(run, tmp_path / "b", monkeypatch, 36, steps=53)
    assert opened == ["stored", "new 1"]
    assert "\n1 of 2 buckets were not stored, as the run was to end" in capsys.readouterr().out
    ours = run(tmp_path / "b", steps=53)
    assert [line["step"] for line in log_of(tmp_path / "b")] == list(range(1, 54))
    assert opened == ["stored", "new 1", "stored", "stored", "stored"]  # 33 to 40 from the checkpoint
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert_same(ours, run(tmp_path / "c", steps=53))  # killed or not, and stopped where it may be
    kill_at(run, tmp_path / "d", monkeypatch, 15, steps=21)
    (tmp_path / "d" / "buckets" / "bucket0000_visit000000.pt").unlink()
    with pytest.raises(ValueError, match="bucket0000_visit000000.pt does not exist, but the run needs it"):
        run(tmp_path / "d", steps=21)


def test_one_file_per_bucket_and_one_more_at_most(run, tmp_path, monkeypatch):
    counts, put = [], BucketStore.put

    def counting(self, *args):
        put(self, *args)
        counts.append(len(list(self.folder.iterdir())))

    monkeypatch.setattr(BucketStore, "put", counting)
    run(tmp_path, steps=81)
    assert len(counts) == 8 and max(counts) <= 3


def test_reading_ahead_is_what_opens_the_next_bucket(run, undisturbed, tmp_path, monkeypatch):
    """All returning buckets come from the thread, none from a second read."""
    read = []
    monkeypatch.setattr(checkpoints, "read_state", lambda file: read.append(file.name) or read_state(file))
    ours = run(tmp_path)
    assert read == ["bucket0000_visit000000.pt", "bucket0001_visit000001.pt", "bucket0000_visit000002.pt"]
    assert_equals_undisturbed(ours, tmp_path, undisturbed)


def test_one_bucket_is_never_stored(run, tmp_path, monkeypatch):
    flags = ["--bucket-ids", 5]
    whole = run(tmp_path / "a", *flags, steps=45)
    assert not list((tmp_path / "a" / "buckets").iterdir())
    kill_at(run, tmp_path / "b", monkeypatch, 42, *flags, steps=45)
    assert_same(whole, run(tmp_path / "b", *flags, steps=45))


# --- Numbers, disk, memory ---------------------------------------------------------------------------------


def break_steps(monkeypatch, broken, how: str = "loss") -> None:
    """Make the loss, or only the gradient, of some steps infinite or NaN."""
    loss, spoil = train_meta.flow_loss, Explode.apply if how == "gradient" else lambda x: x * math.nan

    def breaks(position, update, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            if position.step in broken:
                patch.setattr(train_meta, "flow_loss", lambda *a, **k: spoil(loss(*a, **k)))
            return update(*arguments)

    around_updates(monkeypatch, breaks)


class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + math.inf


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_with_broken_numbers_moves_nothing(run, tmp_path, monkeypatch, capsys, how):
    states = []

    def watched(position, update, model, learner, *rest):
        parameters = *learner.meta_down, learner.personal
        before = [p.detach().clone() for p in parameters]
        numbers = update(model, learner, *rest)
        states.append(all(map(torch.equal, before, parameters)))
        return numbers

    with monkeypatch.context() as patch:
        around_updates(patch, watched)
        break_steps(patch, {3, 8}, how)
        run(tmp_path, "--ema", 0.9, steps=12)
    assert [step for step, same in enumerate(states) if same] == [3, 8]
    broken = [line for line in log_of(tmp_path) if "photos" in line]
    assert [line["step"] for line in broken] == [4, 9]
    assert all(len(line["photos"]) == len(line["t"]) == 2 for line in broken)
    assert all((line["loss"] is None) == (how == "loss") for line in broken)
    text = capsys.readouterr().err
    assert broken[0]["photos"][0] in text and f"t = {broken[0]['t'][0]:.4f}" in text

    # Moments, counts of steps and the average are, too, as if there had been no update at all.
    left_out = lambda position, update, *arguments: (
        {"loss": torch.tensor(math.nan)} if position.step in (3, 8) else update(*arguments)
    )
    around_updates(monkeypatch, left_out)
    run(tmp_path / "left_out", "--ema", 0.9, steps=12)
    assert_same(state_of(tmp_path), state_of(tmp_path / "left_out"))


def test_numbers_are_logged_in_order(run, tmp_path, monkeypatch):
    """A step's line is written when the next step has been taken, or a checkpoint, or after a skipped one."""
    seen, write, advance = [], log.Log.write, BucketRun.advance
    monkeypatch.setattr(log.Log, "write", lambda self, line: seen.append(line["step"]) or write(self, line))
    monkeypatch.setattr(
        BucketRun, "advance", lambda self, *rest: seen.append(f"step {self.step + 1}") or advance(self, *rest)
    )
    break_steps(monkeypatch, {6, 7})
    run(tmp_path, steps=12)
    expected = "step 1, step 2, 1, step 3, 2, step 4, 3, step 5, 4, 5, step 6, step 7, 6, step 8, 7, 8, "
    expected += "step 9, 9, step 10, 10, step 11, step 12, 11, 12"
    assert ", ".join(map(str, seen)) == expected


def test_ten_in_a_row_stop_the_run(run, tmp_path, monkeypatch):
    """What is saved are the weights before them; the same command again stops at the next one."""
    run(tmp_path / "good", steps=8)
    with monkeypatch.context() as patch:
        break_steps(patch, range(8, 100))
        for steps in (18, 19):
            with pytest.raises(ValueError, match="steps in a row"):
                run(tmp_path / "bad")
            assert Checkpoints(tmp_path / "bad" / "checkpoints").files()[0].stem == f"{steps:06d}"
    ours = read_state(tmp_path / "bad" / "checkpoints" / "000018.pt")
    theirs = read_state(tmp_path / "good" / "checkpoints" / "000008.pt")
    assert_same(ours["shared"], theirs["shared"])
    stored = read_state(tmp_path / "bad" / "buckets" / "bucket0000_visit000000.pt")
    assert_same(stored, theirs["open_bucket"])
    assert ours["skipped"] == 10


@pytest.mark.parametrize("what", ["checkpoint", "bucket", "log", "curve"])
def test_a_full_disk_leaves_the_last_checkpoint(run, undisturbed, tmp_path, monkeypatch, what):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*_):
        raise full

    with monkeypatch.context() as patch:
        if what == "checkpoint":
            save = Checkpoints.save

            def save_on_a_full_disk(self, step, state):
                if step == 15:
                    patch.setattr(torch, "save", lambda state, file: file.write(b"PK half") and fails())
                save(self, step, state)

            patch.setattr(Checkpoints, "save", save_on_a_full_disk)
        elif what == "bucket":
            patch.setattr(BucketStore, "put", fails)
        elif what == "log":
            write = log.Log.write
            patch.setattr(
                log.Log, "write", lambda self, line: (fails if line["step"] == 14 else write)(self, line)
            )
        else:
            patch.setattr(log, "plot_curve", fails)
        with pytest.raises(OSError) as error:
            run(tmp_path)
    if what == "checkpoint":
        assert "step 15 cannot be saved (No space left on device)" in str(error.value)
        assert "checkpoint of step 12 is whole" in str(error.value)
    assert not list(tmp_path.rglob(".*.pt"))
    assert_equals_undisturbed(run(tmp_path), tmp_path, undisturbed)


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 1 MB, where the tests may make one: torch's writer, no stand-in."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        checkpoints = Checkpoints(disk / "checkpoints")
        checkpoints.save(1, {"a": torch.ones(100_000)})
        with pytest.raises(OSError, match=r"step 2 cannot be saved \(No space.*step 1 is whole"):
            checkpoints.save(2, {"a": torch.ones(200_000)})
        assert torch.equal(checkpoints.load()["a"], torch.ones(100_000))
        assert [file.name for file in checkpoints.folder.iterdir()] == ["000001.pt"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_gpu_memory_is_explained(run, tmp_path, monkeypatch, kind):
    def fails(*_):
        raise kind("CUDA error: CUBLAS_STATUS_ALLOC_FAILED\nand more")

    monkeypatch.setattr(train_meta, "update", fails)
    with pytest.raises(UserError) as error:
        run(tmp_path)
    text = str(error.value)
    assert "CUBLAS_STATUS_ALLOC_FAILED)" in text and "and more" not in text
    for words in ("the frozen base", "mid and up of a bucket", "--batch 1", "--resolution", "--bucket-ids"):
        assert words in text


# --- The log -----------------------------------------------------------------------------------------------


def test_the_log_holds_everything(undisturbed):
    log = log_of(undisturbed)
    for line in log:
        assert {"step", "bucket", "phase", "loss", "memory", "images_per_second", "time"} <= line.keys()
        assert line["grad_mid"] >= 0 and line["grad_up"] > 0 and 0.05 < line["memory"] < 100  # GiB
        assert ("grad_meta_down" in line) == (line["phase"] == "all")
    assert log[0]["grad_mid"] == 0 and max(line["grad_mid"] for line in log) > 0  # up is zero at first
    assert (undisturbed / "loss.png").exists()


def test_gradient_norms_are_those_of_the_parts(run, tmp_path, monkeypatch):
    """They are logged as they were before clipping; meta_down and each identity are clipped on their own."""
    norm = lambda gradients: math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    logged, most = [], 0.02

    def around(position, update, model, optimizers, *rest):
        found = {}

        def watched(clip, name, params, *limits):
            grads = lambda slot: [p.grad[slot] for p in (params if name == "meta_down" else [params])]
            parts = [slice(None)] if name == "meta_down" else range(3)
            before = [norm(grads(part)) for part in parts]
            if name == "meta_down":
                found["grad_meta_down"] = before[0]
            else:
                split = model.factors.split(params.grad)
                found["grad_mid"], found["grad_up"] = norm(split[::2]), norm(split[1::2])
            clip(params, *limits)
            assert [norm(grads(part)) for part in parts] == pytest.approx(
                [min(most, x) for x in before], rel=1e-3
            )

        with pytest.MonkeyPatch.context() as patch:
            for name, function in {"personal": "clip_slots", "meta_down": "clip_grads_with_norm_"}.items():
                patch.setattr(train_meta, function, partial(watched, getattr(train_meta, function), name))
            numbers = update(model, optimizers, *rest)
        logged.append(found)
        return numbers

    around_updates(monkeypatch, around)
    run(tmp_path, "--clip-grad", most, steps=8)
    for line, found in zip(log_of(tmp_path), logged, strict=True):
        assert {name: line[name] for name in line if name.startswith("grad_")} == pytest.approx(
            found, rel=1e-4
        )
    assert ["grad_meta_down" in found for found in logged] == [False] * 5 + [True] * 3
    assert all(max(found.values()) > most for found in logged)


def test_the_curve_survives_a_log_of_any_kind(tmp_path):
    log = tmp_path / "log.jsonl"
    for content in (
        b"",
        b"\xff\n{}\n[1]\n",
        b'{"loss": null}\n',
        b'{"loss": 1}\n',
        b'{"loss": 2.5}\n' * 50_000,
    ):
        log.write_bytes(content + b'{"lo')
        plot_curve(log, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_sample_grids_show_the_average(run, tmp_path, monkeypatch):
    seen, generate = [], grids.generate

    def watched(model, *rest, **settings):
        seen.append([p.detach().clone() for p in model.factors.meta_down])
        return generate(model, *rest, **settings)

    monkeypatch.setattr(grids, "generate", watched)
    run(tmp_path, "--ema", 0.9, "--sample-every", 8, steps=8)
    state = read_state(tmp_path / "checkpoints" / "000008.pt")
    assert_same(seen[0], state["shared"]["average"])
    assert not all(map(torch.equal, seen[0], state["shared"]["meta_down"]))  # which is back in its place


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit):
        train_meta.parse_arguments(["--help"])
    text = capsys.readouterr().out
    for group in ("people:", "model:", "method", "choices where the paper is silent:", "run:"):
        assert f"\n{group}" in text
    options = text.partition("\npeople:")[2].split("\n  --")[1:]
    assert len(options) > 35 and [option for option in options if len(option.split()) < 4] == []


# --- Anything at all ---------------------------------------------------------------------------------------


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["flip", "cut", "fill", "insert", "other"]),
    st.binary(max_size=64),
)
def test_damaged_checkpoints_fall_back(tmp_path, seed, how, junk):
    """Whatever happens to the newest file: what is loaded is one of the two that were saved."""
    folder, draw = tmp_path / str(seed) / how, random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, {"step": step, "a": [torch.full((50,), float(step))], "b": {0: None}})
    file = checkpoints.files()[0]
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    if how == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "fill":
        content[place : place + len(junk)] = junk[: len(content) - place]
    elif how == "insert":
        content[place:place] = junk
    else:
        content = junk
    file.write_bytes(content)
    state = checkpoints.load()
    assert state["step"] in (1, 2)
    assert torch.equal(state["a"][0], torch.full((50,), float(state["step"]))) and state["b"] == {0: None}
    assert sorted(path.stem for path in folder.iterdir()) == ["000001", "000002"]


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.integers(1, 9) | st.binary(max_size=20), max_size=9), st.integers(0, 5))
def test_a_damaged_log_is_cut_and_gone_on_with(tmp_path, parts, step):
    """What is left are the whole lines of steps that need not be repeated."""
    file, line = tmp_path / "log.jsonl", lambda step: b'{"step": %d, "loss": 0.5}\n' % step
    file.write_bytes(b"".join(part if isinstance(part, bytes) else line(part) for part in parts))
    whole = [text for text in io.BytesIO(file.read_bytes()) if text in map(line, range(10))]
    with log.Log(file, step, steps=9) as opened:
        opened.write({"step": step + 1, "loss": math.inf})
    *before, last = io.BytesIO(file.read_bytes())
    assert json.loads(last)["loss"] is None and last.endswith(b"\n")
    assert before == [text for text in whole if json.loads(text)["step"] <= step]
    plot_curve(file, tmp_path / "loss.png")
