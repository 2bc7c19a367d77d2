"""What fits and what it costs, computed from sizes before anything is loaded: `flux/memory.py` then does it.

The peaks are a model of what bench/memory.py counts operation by operation; it compares the two.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from flux.conditioner import load_tokenizers
from flux.errors import UserError
from flux.finding import HUB_MODELS, find_named, local_parts
from flux.loading import folder_around, load_autoencoder, load_flux, native_size
from flux.memory import LINE, arrange, blocks_run_again, device_memory, spread
from flux.model import Flux, FluxSizes

FLUX_DEV = FluxSizes(64, 64, 768, 4096, 3072, 12288, 24, 19, 38, True, (16, 56, 56), 10_000)
GIB = 2**30
RESERVE = 1.5  # GiB: the GPU's context and the allocator's gaps
BUS = 25e9  # bytes a second that reach the device over PCIe 4 x16
VISIBLE = 0.2  # of the copying that the arithmetic does not hide; a cautious guess
SHARE = 0.6  # of its peak that a GPU reaches in large matrix products
PEAKS = {"A6000": 155e12, "4090": 165e12, "A100": 312e12, "H100": 989e12}  # dense bf16 FLOP/s

# What a block keeps for its backward pass and what comes on top at the worst moment of it, in hidden states
# of all tokens (b, l, d), with mlp_size = 4 hidden_size; counted with bench/memory.py. Those of 8-bit layers
# come with one whole weight, since the worst moment may be another.
KEPT = {"double": 25.07, "single": 23.06}
KEPT_ATTENTION = 1.02  # the output and the logarithm of the softmax's sum
WORK = {"double": 33.1, "single": 32.16}  # of a checkpointed block, which is first run again
WORK_FP8 = {"double": 33.0, "single": 28.15}
WORK_SAMPLE, WORK_SAMPLE_FP8 = 19.4, 16.5
PRODUCTS = 0.8  # of the bytes of all fused products of mid, up and meta_down
# The parameters of FLUX.1's autoencoder; it is there while sampling, and decodes when the transformer rests.
AUTOENCODER = 83_819_683
DECODE = 769  # numbers for each pixel of a picture, one picture at a time, in the last convolutions
DECODE_ATTENTION = 4, 113  # numbers for each pair of latent pixels where no fused kernel is, and each pixel
SPLIT = 1.0  # with several samples the two streams of a double block are not contiguous, and are copied


@dataclass(frozen=True)
class Job:
    """What is to run: sampling, or steps of stage 1 or stage 2."""

    kind: str  # stage1, stage2, sample
    sizes: FluxSizes = FLUX_DEV
    batch: int = 1
    resolution: int = 1024  # pixels; images are of this side squared
    shape: tuple[int, int] | None = None  # or of these (height, width) in pixels, for FLOPs
    t5_length: int = 512
    r1: int | None = 128  # None: plain LoRA
    r2: int = 1
    identities: int = 1  # slots of mid and up; when sampling, of LoRAs
    merge: bool = False  # LoRAs go into the weights where those are all resident
    average: bool = False  # of meta_down, beside it
    pixels: int = 16  # per side of an image token
    width: int = 2  # bytes of the compute dtype

    @property
    def tokens(self) -> tuple[int, int]:
        """The image and the text tokens of a sample."""
        height, width = self.shape or (self.resolution, self.resolution)
        return (height // self.pixels) * (width // self.pixels), self.t5_length

    @property
    def state(self) -> int:
        """The bytes of a hidden state of all tokens."""
        return self.batch * sum(self.tokens) * self.sizes.hidden_size * self.width


@dataclass(frozen=True)
class Way:
    """How it runs: the arguments of `flux.memory.arrange`."""

    checkpoint: str | int = "none"
    stream: int = 0
    fp8: bool = False
    compiled: bool = False

    @property
    def resident(self) -> bool:
        """Whether all weights go to the device as they are, and so can be loaded straight to it."""
        return not (self.stream or self.fp8)


@dataclass(frozen=True)
class Cost:
    """Bytes on the device, and what a step takes."""

    resident: int  # frozen weights and the buffers of streamed ones; when sampling the autoencoder too
    adapters: int  # factors and their AdamW states
    peak: int
    flops: float
    seconds: float

    @property
    def activations(self) -> int:
        """The rest: activations, gradients, temporaries."""
        return self.peak - self.resident - self.adapters


def linear_sizes(sizes: FluxSizes, kind: str) -> list[tuple[int, int, int]]:
    """Return (d_in, d_out, fused projections) of a block's linear layers; of a double block, image first."""
    d, m = sizes.hidden_size, sizes.mlp_size
    if kind == "single":
        return [(d, 3 * d, 1), (d, 3 * d + m, 4), (d + m, d, 1)]
    return 2 * [(d, 6 * d, 1), (d, 3 * d, 3), (d, d, 1), (d, m, 1), (m, d, 1)]


@cache
def kinds(sizes: FluxSizes) -> tuple[str, ...]:
    """Return the kind of each block, in the order in which they run."""
    return ("double",) * sizes.depth + ("single",) * sizes.depth_single


def outer_parameters(sizes: FluxSizes) -> int:
    """Return the number of parameters outside of the blocks."""
    d = sizes.hidden_size
    embedders = [256, sizes.pooled_size] + [256] * sizes.guidance
    outer = sum((d_in + 1) * d + (d + 1) * d for d_in in embedders)
    outer += (sizes.in_channels + 1) * d + (sizes.txt_size + 1) * d
    return outer + (d + 1) * sizes.out_channels + (d + 1) * 2 * d


@cache
def block_bytes(sizes: FluxSizes, kind: str, fp8: bool, width: int) -> tuple[int, int]:
    """Return the bytes of a block's linear weights, which can be streamed, and of all else in it."""
    layers = linear_sizes(sizes, kind)
    weights = sum(-(-d_in * d_out * (1 if fp8 else width) // LINE) * LINE for d_in, d_out, _ in layers)
    vectors = sum(d_out for _, d_out, _ in layers) * (2 if fp8 else 1)  # biases; a scale for each row
    norms = (4 if kind == "double" else 2) * sizes.head_dim
    return weights, (vectors + norms) * width


@cache
def adapter_bytes(job: Job, kind: str) -> tuple[int, int]:
    """Return the bytes in a block of meta_down, and of all identities' mid and up."""
    layers = linear_sizes(job.sizes, kind)
    shared = sum(4 * parts * (job.r1 or 0) * d_in for d_in, _, parts in layers)
    own = sum(4 * job.r2 * (parts * (job.r1 or d_in) + d_out) for d_in, d_out, parts in layers)
    return shared, own * job.identities


def cost(job: Job, way: Way, peak_flops: float = PEAKS["A6000"]) -> Cost:
    """Return what a step costs; both lists of blocks go as `flux.memory.arrange` deals them."""
    sizes, blocks = job.sizes, kinds(job.sizes)
    streamed = set(spread(way.stream, len(blocks))) if way.stream else set()
    weights = {kind: block_bytes(sizes, kind, way.fp8, job.width) for kind in set(blocks)}
    resident = outer_parameters(sizes) * job.width + sum(weights[kind][1] for kind in blocks)
    resident += sum(weights[kind][0] for k, kind in enumerate(blocks) if k not in streamed)
    resident += 2 * max((weights[blocks[k]][0] for k in streamed), default=0)

    training = job.kind != "sample"
    resident += 0 if training else AUTOENCODER * job.width
    states = {"stage1": (3 + job.average, 3), "stage2": (1, 3), "sample": (0, 1)}[job.kind]
    adapters = sum(n * size for kind in blocks for n, size in zip(states, adapter_bytes(job, kind)))
    adapters = 0 if job.merge and way.resident else adapters
    activations = training_peak(job, way.checkpoint, way.fp8) if training else sampling_peak(job, way.fp8)

    flops = step_flops(job, way.checkpoint)
    traffic = sum(weights[blocks[k]][0] for k in streamed) * (2 if training else 1)
    seconds = max(flops / peak_flops / SHARE, traffic / BUS) + VISIBLE * traffic / BUS
    return Cost(resident, adapters, resident + adapters + round(activations), flops, seconds)


@cache
def training_peak(job: Job, checkpoint: str | int, fp8: bool) -> float:
    """Walk back through the blocks: what those before still keep, what this one needs, the gradients so far.

    A checkpointed block keeps its input, and perhaps the attention's output; to go back through it, all else
    is computed again.
    """
    blocks, unit = kinds(job.sizes), job.state
    count, attention = blocks_run_again(checkpoint, len(blocks)), KEPT_ATTENTION * (checkpoint == "attention")
    kept = [1 + attention if k < count else KEPT[kind] for k, kind in enumerate(blocks)]
    before, worst, gradients = sum(kept), 0.0, 0
    for k in reversed(range(len(blocks))):
        kind = blocks[k]
        shared, own = adapter_bytes(job, kind)
        new = own + shared * (job.kind == "stage1")
        # A double block's worst moment is its MLPs', which come first; a single block's is its first layer's.
        present = gradients + new * (kind == "single")
        gradients += new
        # Of what is held at the worst moment, this is kept already.
        there = (attention if k < count else KEPT[kind]) - SPLIT * (kind == "double" and job.batch > 1)
        work = (WORK[kind] - there) * unit
        if fp8:
            work = max(work, (WORK_FP8[kind] - there) * unit + last_weight(job, kind))
        worst = max(worst, before * unit + work + present)
        before -= kept[k]
    # The products of a sample's factors, in the widest layer.
    d_in, d_out, parts = linear_sizes(job.sizes, "single")[1]
    return worst + PRODUCTS * 4 * job.batch * job.r2 * parts * (d_in + d_out)


def last_weight(job: Job, kind: str) -> int:
    """Return the bytes of the whole weight of a block's last layer, in whose backward pass most is held."""
    d_in, d_out, _ = linear_sizes(job.sizes, kind)[-1]
    return d_in * d_out * job.width


def sampling_peak(job: Job, fp8: bool) -> float:
    """Return what sampling holds at the most: within a single block's MLP, or while a picture is decoded."""
    rounded = WORK_SAMPLE_FP8 * job.state + last_weight(job, "single")
    forward = max(WORK_SAMPLE * job.state, rounded if fp8 else 0)
    pixels, (pair, each) = job.resolution**2, DECODE_ATTENTION
    decode = max(DECODE * pixels, pair * (pixels / 64) ** 2 + each * pixels)
    return max(forward, decode * job.width)


@cache
def step_flops(job: Job, checkpoint: str | int) -> float:
    """Return the FLOPs of a step: backward costs a linear layer as much as forward, attention 2.5 times."""
    (img, txt), sizes, blocks, total = job.tokens, job.sizes, kinds(job.sizes), 0.0
    attention = 4 * (img + txt) ** 2 * sizes.hidden_size
    for k, kind in enumerate(blocks):
        # The modulation, the first layer of a block or of its half, sees a vector instead of tokens.
        tokens = [1, *[img] * 4, 1, *[txt] * 4] if kind == "double" else [1, img + txt, img + txt]
        layers = linear_sizes(sizes, kind)
        linear = sum(2 * n * d_in * d_out for n, (d_in, d_out, _) in zip(tokens, layers))
        total += linear + attention
        if job.kind != "sample":
            total += linear + 2.5 * attention
            if k < blocks_run_again(checkpoint, len(blocks)):
                total += linear + attention * (checkpoint != "attention")
    return job.batch * total


# --- The choice --------------------------------------------------------------------------------------------


def ways(job: Job, checkpoint: str, stream: str, fp8: bool, compiled: bool = False) -> Iterator[Way]:
    """Yield every way that the flags leave open; kept attention cannot be compiled."""
    total = len(kinds(job.sizes))
    for name, text in (("checkpoint", checkpoint), ("stream", stream)):
        if text.isdecimal() and int(text) > total:
            raise UserError(f"--{name} {text}: from 0 to {total} blocks")
    if job.kind == "sample":
        checkpoints = ["none"]
    elif checkpoint == "auto":
        checkpoints = ["none", *["attention"] * (not compiled), *range(1, total), "all"]
    else:
        checkpoints = [int(checkpoint) if checkpoint.isdecimal() else checkpoint]
    for some in checkpoints:
        for count in range(total + 1) if stream == "auto" else [int(stream)]:
            yield Way(some, count, fp8, compiled)


def choose(
    job: Job,
    budget: float,
    checkpoint: str = "auto",
    stream: str = "auto",
    base: str = "auto",
    peak_flops: float = PEAKS["A6000"],
    compiled: bool = False,
) -> tuple[Way, Cost, str]:
    """Return the fastest way that fits the budget in GiB, its cost, and a line of text that says why.

    Of ways within 3 % of that it is the one that streams least. The weights are only rounded to 8 bits when
    asked for, or when no exact way fits whatever the other options. Raises ValueError with both numbers when
    nothing fits.
    """
    least, open_way = None, checkpoint == stream == "auto"
    for fp8 in {"auto": [False, True], "bf16": [False], "fp8": [True]}[base]:
        costs = [(way, cost(job, way, peak_flops)) for way in ways(job, checkpoint, stream, fp8, compiled)]
        fitting = [(way, some) for way, some in costs if some.peak / GIB + RESERVE <= budget]
        if fitting:
            enough = 1.03 * min(some.seconds for _, some in fitting)
            fast = [(way, some) for way, some in fitting if some.seconds <= enough]
            way, some = min(fast, key=lambda pair: (pair[0].stream, pair[1].seconds, pair[1].peak))
            rounded = "weights rounded to 8 bits: " + ("as asked" if base == "fp8" else "nothing exact fits")
            return way, some, rounded if fp8 else "exact: weights as they are in the file"
        least = min([some.peak for _, some in costs] + ([least] if least else []))
        if base == "auto" and not open_way and exact_fits(job, budget):
            break
    need = least / GIB + RESERVE
    raise UserError(
        f"{job.kind} at {job.resolution} pixels, batch {job.batch}, needs {need:.1f} GiB, there are "
        f"{budget:.3g}: lower the resolution or the batch, leave --stream and --checkpoint to the plan and "
        "--compile away, or take --base-dtype fp8"
    )


def exact_fits(job: Job, budget: float) -> bool:
    """Say whether some way with the weights as they are fits the budget in GiB."""
    return any(cost(job, way).peak / GIB + RESERVE <= budget for way in ways(job, "auto", "auto", False))


def table(job: Job, way: Way, some: Cost, line: str, budget: float, card: str | None) -> str:
    """Return the plan as text; the time of a step only for a known card."""
    total = len(kinds(job.sizes))
    images = f"batch {job.batch}, {job.resolution}x{job.resolution} pixels, {job.tokens[1]} text tokens"
    again = {"none": "no block", "all": "all blocks", "attention": "all blocks but their attention"}
    gib = lambda size: f"{size / GIB:8.3f} GiB"
    time = f", {some.seconds:.2f} s at {SHARE:.0%} of an {card}'s peak" if card else ""
    rows = {
        "plan": f"{job.kind}, {images}; {budget:.4g} GiB",
        "weights": line,
        "run again": again.get(way.checkpoint, f"the first {way.checkpoint} of {total} blocks"),
        "streamed": f"{way.stream} of {total} blocks",
        "resident": gib(some.resident),
        "adapters, AdamW": gib(some.adapters),
        "activations": gib(some.activations) + ", with gradients" * (job.kind != "sample"),
        "peak": f"{gib(some.peak)}, and up to {RESERVE} for the device's own",
        "a step": f"{some.flops / 1e12:8.3g} TFLOP{time}",
    }
    hidden = ["run again"] * (job.kind == "sample") + ["adapters, AdamW"] * (not some.adapters)
    return "\n".join(f"{name:16}{text}" for name, text in rows.items() if name not in hidden)


def make_plan(
    args: argparse.Namespace,
    kind: str,
    device: torch.device | str,
    dtype: torch.dtype,
    parts: dict[str, Path],
    resolution: int | None = None,
    **settings,
) -> Way:
    """Choose as the parsed arguments and the device's memory allow, print it and return it.

    parts: the model's files, of which only headers are read; for what is not there FLUX.1-dev's sizes count.
    resolution: None for the model's own. settings: other fields of `Job`. ValueError when nothing fits.
    """
    own = {"t5_length": args.t5_length or Job.t5_length, "width": dtype.itemsize}
    if "transformer" in parts:
        own["sizes"] = load_flux(parts["transformer"], "meta").sizes
        resolution = resolution or native_size(folder_around(parts["transformer"]))
    if "autoencoder" in parts:
        own["pixels"] = 2 * load_autoencoder(parts["autoencoder"], "meta").sizes.reduction
    if "tokenizers" in parts:
        own["t5_length"] = load_tokenizers(parts["tokenizers"], args.t5_length).t5.length
    job = Job(kind, resolution=resolution or Job.resolution, **own, **settings)
    device, card = torch.device(device), "A6000" if args.plan else None  # the paper's
    budget = args.vram or device_memory(device) / GIB
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        card = next((known for known in PEAKS if known in name), card)
    stream, checkpoint = args.stream, getattr(args, "checkpoint", "none")
    if args.compile:
        if stream not in ("auto", "0") or checkpoint == "attention":
            raise UserError("--compile: neither with --stream nor with --checkpoint attention")
        stream = "0"
    peak_flops = PEAKS[card or "A6000"]
    way, some, line = choose(job, budget, checkpoint, stream, args.base_dtype, peak_flops, args.compile)
    older = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    if args.compile and way.fp8 and older:
        raise UserError("--compile: cards before Ada cannot compile 8-bit weights; leave it away")
    print(table(job, way, some, line, budget, card))
    return way


def files_to_plan(args: argparse.Namespace) -> dict[str, Path]:
    """Return those of the model's files that --model names on this disk: for --plan nothing is downloaded."""
    path, repo = find_named(args.model)
    if repo and repo not in HUB_MODELS.values():
        print(f"{args.model} is on the hub: planned as if it were of FLUX.1-dev's size")
    return local_parts(path) if path else {}


def follow(model: Flux, way: Way, device: torch.device | str) -> Flux:
    """Bring a model to the device as planned; see `flux.memory.arrange`.

    It comes from the CPU, mapped to its file, or where `way.resident` from the device itself.
    """
    return arrange(model, device, way.checkpoint, way.stream, way.fp8, way.compiled)
