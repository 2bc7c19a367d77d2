"""Peaks at full size without a GPU: two training steps, or a forward pass, on fake tensors that are counted.

    python bench/memory.py               # the table, half a minute a row
    python bench/memory.py --random 20   # and the plan's predictions in as many other settings

Counted are the storages that would be on the device: weights, adapters, gradients, AdamW, activations and all
that is temporary, at the highest of the second step. The GPU's context and the allocator's gaps come on top.
"""

import argparse
import random
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.memory import FrozenLinear
from flux.model import Flux
from flux.sampling import euler_step, flow_loss, pack, position_ids, unpack
from metalora import SlotAdamW, factors, inject, use_slots
from run.plan import FLUX_DEV, GIB, Plan, Workload, follow

STAGE1 = Workload("stage1", batch=4, identities=50)
STAGE2 = Workload("stage2")
SAMPLE = Workload("sample", identities=0)
# what it is, how, and the GiB that must not be passed
ROWS = [
    (STAGE1, Plan("all"), 36.7),
    (STAGE1, Plan("attention"), None),
    (STAGE1, Plan("all", fp8=True), 25.8),
    (STAGE1, Plan("attention", 57), None),
    (replace(STAGE1, resolution=768), Plan("all"), None),
    (STAGE2, Plan("all"), 25.7),
    (STAGE2, Plan("none"), 59.3),
    (STAGE2, Plan("all", fp8=True), 14.8),
    (STAGE2, Plan("all", 57), 7.0),
    (STAGE2, Plan("attention", 57), 7.0),
    (STAGE2, Plan("all", 57, fp8=True), None),
    (SAMPLE, Plan(), None),
    (SAMPLE, Plan("none", 57), 5.0),
]


class Tracker(TorchDispatchMode):
    """Adds up the storages that operations make, from their first sight until they are freed."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = set(), 0, 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        for part in tree_leaves(result):
            if isinstance(part, Tensor):
                self.add(part)
        return result


def simulate(job: Workload, way: Plan) -> int:
    """Return the bytes on the device at the highest of the second step, or of a forward pass."""
    tracker = Tracker()
    # Fake tensors have no addresses; the device is a CPU to which streamed weights are copied as to a GPU.
    with patch("flux.memory.file_ranges", list), patch("flux.memory.Stream.COPY", True), FakeTensorMode():
        model = pretend(Flux, job.sizes)
        model.requires_grad_(False)
        if job.kind != "sample":
            inject(model, job.r1, job.r2, job.identities, reset=False)
        autoencoder = pretend(AutoEncoder, AutoEncoderSizes()) if job.kind == "sample" else None
        with patch.object(model, "to", lambda device: model):  # it is there, and fake parameters do not move
            follow(model, way, "cpu")
        with tracker:
            for tensor in on_device(model) + (list(autoencoder.parameters()) if autoencoder else []):
                tracker.add(tensor)
            if autoencoder:
                sample(model, autoencoder, job)
            else:
                train(model, job, tracker)
    return tracker.peak


def pretend(kind: type[nn.Module], sizes) -> nn.Module:
    """Return a model with fake weights in bfloat16."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = kind(sizes)
    state = {name: torch.empty(p.shape, dtype=torch.bfloat16) for name, p in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    return model


def on_device(model: Flux) -> list[Tensor]:
    """Return what is on the device before anything is computed; of streamed weights that is the buffers."""
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    streams = {layer.stream for layer in layers if layer.stream}
    stored = [layer.stored for layer in layers if not layer.stream]
    buffers = [buffer for stream in streams for buffer in stream.buffers]
    return [*model.parameters(), *model.buffers(), *stored, *buffers]


def inputs(job: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, t, txt and pooled."""
    side, dtype = job.resolution // 8, torch.bfloat16
    txt = torch.empty(job.batch, job.t5_length, job.sizes.txt_size, dtype=dtype)
    pooled = torch.empty(job.batch, job.sizes.pooled_size, dtype=dtype)
    return torch.empty(job.batch, 16, side, side), torch.empty(job.batch), txt, pooled


@torch.no_grad()
def sample(model: Flux, autoencoder: AutoEncoder, job: Workload) -> None:
    """Do an Euler step and decode, as `flux.sampling.generate`."""
    latents, t, txt, pooled = inputs(job)
    img_ids, txt_ids = position_ids(job.batch, *latents.shape[2:], job.t5_length)
    velocity = model(pack(latents).bfloat16(), img_ids, txt, txt_ids, t, pooled, t)
    latents = unpack(euler_step(pack(latents), velocity, 1, 0), *latents.shape[2:])
    del velocity
    for one in latents.split(1):
        autoencoder.decode(one)


def train(model: Flux, job: Workload, tracker: Tracker) -> None:
    """Do two steps as the scripts do them; the tracker's peak is then the second's."""
    latents, t, txt, pooled = inputs(job)
    noise = torch.empty_like(latents)
    meta_down, personal = factors(model, "meta_down"), factors(model, "mid", "up")
    slots = torch.zeros(job.batch if job.kind == "stage1" else 1, dtype=torch.long)
    use_slots(model, slots)
    if job.kind == "stage1":
        both = SlotAdamW(personal, 1e-4), torch.optim.AdamW(meta_down, 1e-4)
    else:
        for p in meta_down:
            p.requires_grad_(False)
        both = (torch.optim.AdamW(personal, 1e-4),)
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        tracker.peak = tracker.now
        flow_loss(model, latents, noise, t, txt, pooled, guidance=1.0).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimiser in both:
            optimiser.step(slots) if isinstance(optimiser, SlotAdamW) else optimiser.step()
        for p in trained:
            p.grad = None


def random_setting(draw: random.Random) -> tuple[Workload, Plan]:
    """Draw a setting of FLUX.1-dev."""
    kind = draw.choice(["stage1", "stage2", "stage2", "sample"])
    job = Workload(
        kind,
        batch=draw.choice([1, 1, 2, 3, 4]),
        resolution=draw.randrange(256, 1281, 64),
        t5_length=draw.choice([128, 256, 512]),
        r1=draw.choice([16, 64, 128]),
        r2=draw.choice([1, 2, 4, 8, 16]),
        identities=draw.randrange(1, 60) if kind == "stage1" else 1,
    )
    checkpoint = draw.choice(["none", "all", "attention", draw.randrange(58)]) if kind != "sample" else "none"
    return job, Plan(checkpoint, draw.choice([0, 0, 57, draw.randrange(58)]), draw.random() < 0.4)


def describe(job: Workload, way: Plan) -> str:
    text = f"{job.kind}, {job.batch} x {job.resolution}px + {job.t5_length}"
    if job.kind != "sample":
        text += f", r1 {job.r1}, r2 {job.r2}, {job.identities} people, checkpoint {way.checkpoint}"
    return f"{text}, stream {way.stream}, {'fp8' if way.fp8 else 'bf16'}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--random", type=int, default=0, metavar="N", help="settings to draw, besides the rows"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawn settings")
    parser.add_argument("--depth", type=int, nargs=2, default=(19, 38), help="double and single blocks")
    args = parser.parse_args(argv)
    draw = random.Random(args.seed)
    whole = tuple(args.depth) == (FLUX_DEV.depth, FLUX_DEV.depth_single)
    total = sum(args.depth)
    rows = [row for row in ROWS if whole or row[1].stream <= total]
    rows += [(*random_setting(draw), None) for _ in range(args.random)]
    print("python bench/memory.py", *(sys.argv[1:] if argv is None else argv))
    print("| case | at most, GiB | simulated | plan | plan is off by |\n|---|---|---|---|---|")
    furthest = 0.0
    for job, way, limit in rows:
        if not whole:
            job, limit = (
                replace(job, sizes=replace(FLUX_DEV, depth=args.depth[0], depth_single=args.depth[1])),
                None,
            )
            what = min(way.checkpoint, total) if isinstance(way.checkpoint, int) else way.checkpoint
            way = replace(way, stream=min(way.stream, total), checkpoint=what)
        peak, planned = simulate(job, way), estimate(job, way).peak
        off = planned / peak - 1
        furthest = max(furthest, abs(off))
        wrong = " (!)" if limit and peak / GIB > limit else ""
        numbers = f"{limit or ''} | {peak / GIB:.2f}{wrong} | {planned / GIB:.2f} | {off:+.1%}"
        print(f"| {describe(job, way)} | {numbers} |", flush=True)
    print(f"The plan is off by {furthest:.1%} at the most.")


if __name__ == "__main__":
    main()
