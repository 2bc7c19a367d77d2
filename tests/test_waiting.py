"""Training never waits for the device, except for the numbers of the step before.

The device is "meta", which knows shapes only: whatever wants to see a number there fails.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import log_of
from test_personalize import some_crops, some_prompt
from torch.utils._python_dispatch import TorchDispatchMode

import family.side_by_side
import flux
import personalize
import train_meta
from family.side_by_side import personalize_together
from metalora import eject, inject
from people.dataset import Batch, BucketData, LatentDataset
from personalize import Personalization, add_adapters, draw_batches
from run import bucket_run, late
from run.bucket_run import BucketRun
from run.command import Stop
from run.ranks import Ranks
from run.seeds import generator_for
from run.settings import Training

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts the copies from the host to the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        copies = op in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        devices = {tensor.device.type for tensor in (*args, result) if isinstance(tensor, torch.Tensor)}
        self.count += copies and devices == {"cpu", "meta"}
        return result


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What the host does: "queued" when it has queued a step, "read" when it looks at the numbers of one."""
    events = []

    class Late:
        def __init__(self, numbers: torch.Tensor):
            assert numbers.device == META
            self.numbers = torch.ones(numbers.shape)
            events.append("queued")

        def read(self) -> float | list[float]:
            events.append("read")
            return self.numbers.tolist()

    for module in (late, family.side_by_side, bucket_run):
        monkeypatch.setattr(module, "Late", Late)
    # Another optimizer, because PyTorch has a fused AdamW only for devices that are there.
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, lr, **_: torch.optim.RMSprop(params, lr))
    return events


@pytest.fixture
def transformer(model) -> flux.Flux:
    return flux.load_transformer(model / "flux1-random.safetensors", META, torch.float32)


def personalize_on_meta(transformer: flux.Flux, steps: int, **settings: object) -> int:
    """Return the number of copies to the device."""
    crops, training = some_crops([(16, 24), (24, 16)]), Training(latents=settings.pop("latents", "sample"))
    settings = Personalization(method="lora", steps=steps, batch=2, **settings)
    with Copies() as copies:
        personalize.personalize(
            transformer, None, crops, some_prompt(), settings, training, 0, META, torch.float32
        )
    eject(transformer)
    return copies.count


@pytest.mark.parametrize("settings", [{}, {"draws": "spread"}, {"latents": "mean"}])
def test_a_personalization(transformer, events, settings):
    """Crops and prompt are copied to the device once, then one piece of random numbers for each step."""
    few = personalize_on_meta(transformer, 3, **settings)
    assert events == ["queued", *["queued", "read"] * 2, "read"]
    assert personalize_on_meta(transformer, 7, **settings) == few + 4


def test_people_side_by_side(transformer, events):
    """Each person's random numbers, and for each shape whose they are; a look at the loss where it is due."""
    settings, training, copies = Personalization(method="lora", batch=2), Training(), []
    for steps in ([1, 4], [1, 4, 6]):
        personal = add_adapters(transformer, None, 1, "all", [0, 1])
        batches = [
            draw_batches(some_crops([(16, 16)]), some_prompt(), settings, training, seed, META, torch.float32)
            for seed in (0, 1)
        ]
        events.clear()
        with Copies() as counted:
            list(personalize_together(transformer, personal, batches, steps, training, META))
        eject(transformer)
        copies.append(counted.count)
    assert " ".join(events) == "queued read queued queued read queued read read queued queued read read"
    assert copies[1] - copies[0] == 2 * 3


def test_meta_training(transformer, events, tmp_path):
    """Posteriors, prompts, random numbers, and whose photos they are; all is read before a checkpoint."""
    model = inject(transformer, 4, 1, 3)
    learner, crops, stop = train_meta.MetaLearner(model, Training()), some_crops([(16, 24)] * 3), Stop()
    data = BucketData(
        [Path("a"), Path("b"), Path("c")],
        [0, 1, 2],
        [(16, 24)] * 3,
        [(crop.posterior, some_prompt()) for crop in crops],
    )
    dataset = SimpleNamespace(device=META, dtype=torch.float32)
    copies = Copies()

    def dataloader(bucket: list[int]) -> Iterator[Batch]:
        for step in range(6):
            before = copies.count
            batch = LatentDataset.batch(
                dataset, data, [step % 3, 0], generator_for("noise", 0, step), Training()
            )
            yield batch
            if step != 2:  # a checkpoint
                assert copies.count - before == 4

    run = BucketRun(
        tmp_path,
        learner,
        q_buckets=[6],
        q_total=6,
        bucket_warmup=0.3,
        seed=0,
        ranks=Ranks(),
        stop=stop,
        device=META,
        save_every=3,
    )
    with copies, run:
        train_meta.meta_train(model, learner, [[0, 1, 2]], dataloader, run, Training())
    eject(model)
    assert " ".join(events) == "queued queued read queued read read queued queued read queued read read"
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_waiting_is_noticed(transformer, events, monkeypatch):
    """A look at the loss in each step; a prompt that is copied in each step."""
    with Copies() as copies:
        torch.ones(2).to(META)
        torch.empty(2, device=META).copy_(torch.ones(2))
    assert copies.count == 2
    loss = personalize.flow_loss
    monkeypatch.setattr(personalize, "flow_loss", lambda *a, **k: loss(*a, **k) * loss(*a, **k).item())
    with pytest.raises(RuntimeError, match="meta"):
        personalize_on_meta(transformer, 1)


def test_late_numbers_are_those_of_their_step():
    """Each is read when the next step is queued; the last one at the end."""
    seen = []

    def steps():
        for step in range(3):
            seen.append(f"step {step}")
            yield torch.tensor(float(step))

    for number in late.read_late(steps()):
        seen.append(number)
    assert seen == ["step 0", "step 1", 0.0, "step 2", 1.0, 2.0]
    assert list(late.read_late([])) == []
