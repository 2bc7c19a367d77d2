"""Functions that several test files use: to stop a run, to compare what two runs left, and unusual names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_meta
from run.bucket_run import BucketRun
from run.checkpoints import Checkpoints, read_state

# Names of people's folders: of many scripts, with characters that mean something to a shell or a terminal.
NAMES = ("アンナ", "Ольга", "أمل", "Zoë", "a..\\..", "a b'c\"d;$(rm -rf x)", "line\nbreak", "esc\x1b[31m")
NAMES += ("\udcff\udcfe",)  # bytes that are no UTF-8

# Five people of four photos in two buckets, of 3 and 2: q_bucket is 12 * 2 / 2 = 12 and 8, q_warmup 5 and 3.
SETTINGS = ["--r1", "4", "--bucket-ids", "3", "--uses-per-image", "2", "--batch", "2", "--lr", "1e-2"]
SETTINGS += ["--save-every", "5", "--sample-every", "0", "--resolution", "32", "--keep-buckets"]
STEPS = 34  # of a short run: both buckets, the first once more, and the beginning of the second


class Killed(Exception):
    pass


def around_updates(patch: pytest.MonkeyPatch, around: Callable[..., dict[str, float]]) -> None:
    """Call around(run, update, *arguments) in place of update(*arguments); run is the BucketRun."""
    runs, enter, update = [], BucketRun.__enter__, train_meta.update
    patch.setattr(BucketRun, "__enter__", lambda self: runs.append(self) or enter(self))
    patch.setattr(train_meta, "update", lambda *arguments: around(runs[-1], update, *arguments))


def kill_at(
    train: Callable, out: Path, monkeypatch: pytest.MonkeyPatch, step: int, *flags: object, steps: int = STEPS
) -> None:
    """Start a run of stage 1 that dies after so many steps."""

    def dies(run, update, *arguments):
        if run.step == step:
            raise Killed
        return update(*arguments)

    with monkeypatch.context() as patch:
        around_updates(patch, dies)
        with pytest.raises(Killed):
            train(out, *flags, steps=steps)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same(a, b) -> None:
    """Compare dictionaries and lists of tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Return the pixels of every picture of a benchmark by its place."""
    files = sorted((folder / "pictures").rglob("*.png"))
    return {str(file.relative_to(folder)): np.asarray(Image.open(file)).astype(int) for file in files}


def state_of(out: Path) -> dict:
    """Return all that a run has left to go on from: its newest checkpoint, and the buckets by file name."""
    newest = Checkpoints(out / "checkpoints").files()[0]
    return {file.name: read_state(file) for file in (newest, *sorted((out / "buckets").iterdir()))}


def assert_equals_undisturbed(ours: dict, out: Path, undisturbed: Path) -> None:
    assert_same(ours, load_file(undisturbed / "meta.safetensors"))
    states = state_of(out), state_of(undisturbed)
    assert_same(*states)
    assert len(states[0]) >= 3
    vary = ("time", "memory", "images_per_second")
    logs = [[{**line, **dict.fromkeys(vary, 0)} for line in log_of(folder)] for folder in (out, undisturbed)]
    assert logs[0] == logs[1]  # each step once


def copy_cache(cache: Path, out: Path) -> None:
    """Let a run begin with a cache, which saves it a third of its time."""
    if not (out / "cache").exists():
        shutil.copytree(cache, out / "cache")
