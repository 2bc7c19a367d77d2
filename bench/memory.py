"""Peaks of memory at full size without a GPU: two training steps, or a step of sampling, on fake tensors.

    python bench/memory.py               # the table, half a minute a row
    python bench/memory.py --random 20   # and as many other settings, to compare with the plan's formula

Counted are the storages that would be on the device: weights, adapters, gradients, AdamW's state, activations
and temporary tensors, at the peak of the second step. The GPU's context and the allocator's gaps come on top.
Each training is counted with RMSNorm as one operation, as on CUDA, and as the seven that torch has on a CPU.
"""

import argparse
import random
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from family import side_by_side
from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.model import FluxSizes
from flux.sampling import euler_step
from flux.streaming import FrozenLinear
from flux.transformer import Transformer
from metalora import inject
from people.dataset import Batch
from personalize import updates
from predictor import __main__ as predictor
from predictor.model import Predictor
from run.costs import FLUX_DEV, GIB, KLEIN_4B, Plan, Sizes, Workload, costs_of, estimate, kinds
from run.settings import Training
from train_meta import MetaLearner, update

STAGE1 = Workload("stage1", batch=4, identities=50)
STAGE2 = Workload("stage2")
FAMILY = replace(STAGE2, batch=8, identities=8)  # as many people side by side
SAMPLE = Workload("sample", identities=0)
CODES = 128  # of the predictor, whose table takes what as many identities take
PREDICTOR = Workload("stage1", batch=4, identities=4 + 1 + CODES, codes=CODES)
# The workload, its plan, and the GiB that its peak may have at most.
ROWS = [
    (STAGE1, Plan("all"), 36.7),
    (STAGE1, Plan("attention"), None),
    (STAGE1, Plan("all", fp8=True), 25.8),
    (STAGE1, Plan("attention", 57), None),
    (replace(STAGE1, resolution=768), Plan("all"), None),
    (PREDICTOR, Plan("all"), 44.0),
    (STAGE2, Plan("all"), 25.7),
    (STAGE2, Plan("none"), 59.3),
    (STAGE2, Plan("all", fp8=True), 14.8),
    (STAGE2, Plan("all", 57), 7.0),
    (STAGE2, Plan("attention", 57), 7.0),
    (STAGE2, Plan("all", 57, fp8=True), None),
    (FAMILY, Plan("all"), None),
    (replace(FAMILY, r2=4), Plan("all", 57), None),
    (SAMPLE, Plan(), None),
    (SAMPLE, Plan("none", 57), 5.0),
    (replace(STAGE1, sizes=KLEIN_4B), Plan("all"), 20.0),
    (replace(STAGE1, sizes=KLEIN_4B), Plan("all", fp8=True), None),
    (replace(PREDICTOR, sizes=KLEIN_4B), Plan("all"), None),
    (replace(STAGE2, sizes=KLEIN_4B), Plan("all"), 12.0),
    (replace(STAGE2, sizes=KLEIN_4B), Plan("none"), None),
    (replace(STAGE2, sizes=KLEIN_4B), Plan("all", 25), 5.0),
    (replace(SAMPLE, sizes=KLEIN_4B), Plan(), 10.0),
    (replace(SAMPLE, sizes=KLEIN_4B), Plan("none", 25), None),
]
# On CUDA, and as it is on a CPU; sampling takes as much either way.
ROWS += [(replace(work, fused_norm=False), *rest) for work, *rest in ROWS if work.kind != "sample"]


class Tracker(TorchDispatchMode):
    """Adds up the bytes of all storages that operations return, until they are freed."""

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
        if op is torch.ops.aten.index_put.default:  # what indexing's backward pass does elsewhere in place
            op = torch.ops.aten.index_put_.default
        result = op(*args, **kwargs or {})
        for part in tree_leaves(result):
            if isinstance(part, Tensor):
                self.add(part)
        return result


class FusedNorm(torch.autograd.Function):
    """What CUDA's RMSNorm does to memory: it keeps its input and a number for each row, and copies views."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, torch.empty(*x.shape[:-1], 1))
        return torch.empty_like(x.contiguous())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x, grad = ctx.saved_tensors[0].contiguous(), grad.contiguous()
        return torch.empty_like(x)


def simulate(work: Workload, plan: Plan) -> int:
    """Return the bytes on the device at the peak of the second training step, or of a step of sampling."""
    tracker, base = Tracker(), costs_of(work.sizes)
    rms_norm = (lambda x, *_, **__: FusedNorm.apply(x)) if work.fused_norm else F.rms_norm
    # Fake tensors have no addresses. The device is a CPU, to which streamed weights are copied as to a GPU.
    with (
        patch("flux.streaming.file_ranges", list),
        patch("flux.streaming.available_memory", lambda: float("inf")),
        patch("flux.streaming.host_slab", lambda size: torch.empty(size, dtype=torch.uint8)),
        patch("flux.streaming.Stream.COPY", True),
        patch.object(F, "rms_norm", rms_norm),
        FakeTensorMode(),
    ):
        model = pretend(base.model, work.sizes)
        model.requires_grad_(False)
        if work.kind != "sample":
            slots = work.batch if work.codes else work.identities
            inject(model, work.r1, work.r2, slots, reset=False)
        for meta_down in model.factors.meta_down if work.kind == "stage2" else ():
            meta_down.data = meta_down.data.half()  # as `metalora.assign_meta` leaves it
            meta_down.requires_grad_(False)
        autoencoder = pretend(AutoEncoder, base.autoencoder) if work.kind == "sample" else None
        with patch.object(model, "to", lambda device: model):  # fake parameters cannot be moved
            plan.apply(model, "cpu")
        with tracker:
            for tensor in on_device(model) + (on_device(autoencoder) if autoencoder else []):
                tracker.add(tensor)
            if autoencoder:
                sample(model, autoencoder, work, plan)
            else:
                train(model, work, tracker)
    return tracker.peak


def pretend(kind: type[nn.Module], sizes: Sizes | AutoEncoderSizes) -> nn.Module:
    """Return a model with fake weights in bfloat16."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = kind(sizes)
    tensors = model.state_dict(keep_vars=True).items()
    state = {name: torch.empty(tensor.shape, dtype=torch.bfloat16) for name, tensor in tensors}
    model.load_state_dict(state, assign=True)
    return model


def on_device(model: nn.Module) -> list[Tensor]:
    """Return what is on the device before anything is computed; of streamed weights, their buffers."""
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    streams = {layer.stream for layer in layers if layer.stream}
    stored = [layer.stored for layer in layers if not layer.stream]
    buffers = [buffer for stream in streams for buffer in stream.buffers]
    return [*model.parameters(), *model.buffers(), *stored, *buffers]


def inputs(work: Workload) -> dict[str, Tensor]:
    """Return latents, t and what the prompts are for the model."""
    sizes, autoencoder = work.sizes, costs_of(work.sizes).autoencoder
    side = work.resolution // autoencoder.reduction
    txt = torch.empty(work.batch, work.t5_length, sizes.txt_size, dtype=torch.bfloat16)
    given = {"latents": torch.empty(work.batch, autoencoder.latent_channels, side, side)}
    given |= {"t": torch.empty(work.batch), "txt": txt}
    if isinstance(sizes, FluxSizes):
        given["pooled"] = torch.empty(work.batch, sizes.pooled_size, dtype=torch.bfloat16)
    return given


@torch.no_grad()
def sample(model: Transformer, autoencoder: AutoEncoder, work: Workload, plan: Plan) -> None:
    """Do an Euler step and decode, as `flux.sampling.generate`."""
    given = inputs(work)
    latents, t = given.pop("latents"), given.pop("t")
    velocity = model.velocity(latents.bfloat16(), t, 3.5, **given)
    latents = euler_step(latents, velocity, 1, 0)
    del velocity
    for one in latents.split(1):
        autoencoder.decode(one, plan.tile)


def train(model: Transformer, work: Workload, tracker: Tracker) -> None:
    """Do two steps of training; the tracker's peak is then that of the second."""
    batch = inputs(work)
    batch["noise"] = torch.empty_like(batch["latents"])
    if work.codes:
        network = Predictor(512, work.codes, model.factors.personal.shape[1])
        for p in network.parameters():
            tracker.add(p)
        learner = predictor.PredictorLearner(model, network, 2, Training())
        faces = predictor.FaceBatch(batch, torch.arange(work.batch), [], torch.empty(work.batch, 512))
        steps = (predictor.update(model, learner, faces, 1e-3, Training()) for _ in range(2))
    elif work.kind == "stage1":
        learner, slots = MetaLearner(model, Training()), torch.zeros(work.batch, dtype=torch.long)
        steps = (update(model, learner, Batch(batch, slots, []), False, Training()) for _ in range(2))
    elif work.identities > 1:
        optimizer, people = side_by_side.SlotAdamW(model.factors.personal, 1e-3), range(work.identities)
        size = work.batch // work.identities
        batches = [dict(zip(batch, parts)) for parts in zip(*(part.split(size) for part in batch.values()))]
        steps = (side_by_side.update(model, optimizer, people, batches, Training()) for _ in range(2))
    else:
        steps = updates(model, model.factors.personal, [batch, batch], Training())
    for _ in steps:
        second, tracker.peak = tracker.peak, tracker.now
    tracker.peak = second


def random_setting(draw: random.Random) -> tuple[Workload, Plan]:
    """Draw a workload and a plan for it."""
    sizes = draw.choice([FLUX_DEV, KLEIN_4B])
    total = len(kinds(sizes))
    kind = draw.choice(["stage1", "stage2", "stage2", "sample"])
    work = Workload(
        kind,
        sizes,
        batch=draw.choice([1, 1, 2, 3, 4]),
        resolution=draw.randrange(256, 1281, 64),
        t5_length=draw.choice([128, 256, 512]),
        r1=draw.choice([16, 64, 128]),
        r2=draw.choice([1, 2, 4, 8, 16]),
        identities=draw.randrange(1, 60) if kind == "stage1" else 1,
        fused_norm=draw.random() < 0.7,
    )
    checkpoint = (
        draw.choice(["none", "all", "attention", draw.randrange(total + 1)]) if kind != "sample" else "none"
    )
    return work, Plan(checkpoint, draw.choice([0, 0, total, draw.randrange(total + 1)]), draw.random() < 0.4)


def describe(work: Workload, plan: Plan) -> str:
    name = costs_of(work.sizes).model.__name__
    text = f"{name}, {work.kind}, {work.batch} x {work.resolution}px + {work.t5_length}"
    if work.kind != "sample":
        who = f"a predictor of {work.codes} codes" if work.codes else f"{work.identities} people"
        text += f", r1 {work.r1}, r2 {work.r2}, {who}, checkpoint {plan.checkpoint}"
        text += ", RMSNorm " + ("fused" if work.fused_norm else "in seven operations")
    return f"{text}, stream {plan.stream}, {'fp8' if plan.fp8 else 'bf16'}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--random", type=int, default=0, metavar="N", help="random settings besides those of the table"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random settings")
    parser.add_argument("--depth", type=int, nargs=2, help="double and single blocks; default: the model's")
    args = parser.parse_args(argv)
    draw = random.Random(args.seed)
    total = sum(args.depth or ())
    rows = [row for row in ROWS if not args.depth or row[1].stream <= total]
    rows += [(*random_setting(draw), None) for _ in range(args.random)]
    print("python bench/memory.py", *(sys.argv[1:] if argv is None else argv))
    print("| case | at most, GiB | simulated | formula | formula is off by |\n|---|---|---|---|---|")
    furthest = 0.0
    for work, plan, limit in rows:
        if args.depth:
            sizes = replace(work.sizes, depth=args.depth[0], depth_single=args.depth[1])
            work, limit = replace(work, sizes=sizes), None
            count = plan.checkpoint
            count = min(count, total) if isinstance(count, int) else count
            plan = replace(plan, stream=min(plan.stream, total), checkpoint=count)
        peak, planned = simulate(work, plan), estimate(work, plan).peak
        off = planned / peak - 1
        furthest = max(furthest, abs(off))
        over = " (!)" if limit and peak / GIB > limit else ""
        numbers = f"{limit or ''} | {peak / GIB:.2f}{over} | {planned / GIB:.2f} | {off:+.1%}"
        print(f"| {describe(work, plan)} | {numbers} |", flush=True)
    print(f"The formula is off by {furthest:.1%} at most.")


if __name__ == "__main__":
    main()
