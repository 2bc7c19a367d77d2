"""Workloads and plans, and what a step costs by their sizes alone: bytes on the device, FLOPs, seconds.

The peaks are computed by a formula; bench/memory.py counts them operation by operation and compares the two.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.finding import HUB_MODELS
from flux.flux2 import Flux2, Flux2Sizes
from flux.memory import arrange, recomputed_blocks
from flux.model import Flux, FluxSizes
from flux.streaming import LINE, spread
from flux.transformer import Transformer
from run.speeds import Speeds, speeds_of

FLUX_DEV = FluxSizes(64, 64, 768, 4096, 3072, 12288, 24, 19, 38, True, (16, 56, 56), 10_000)
KLEIN_4B = Flux2Sizes(128, 128, 7680, 3072, 9216, 24, 5, 20, False, (32,) * 4, 2000)
KLEIN_9B = Flux2Sizes(128, 128, 12288, 4096, 12288, 32, 8, 24, False, (32,) * 4, 2000)
# Of repositories, for plans without files; all others are taken for FLUX.1-dev.
SIZES = {"klein-4b": KLEIN_4B, "klein-9b": KLEIN_9B}
KNOWN = {repo: SIZES.get(name.removesuffix("-distilled"), FLUX_DEV) for name, repo in HUB_MODELS.items()}
GIB = 2**30
PAPERS_CARD = speeds_of("A6000")
VISIBLE = 0.2  # fraction of the copying that computing does not hide; a cautious guess
TILE = 64  # side in latent pixels of the tiles in which a picture is decoded that does not fit whole


@dataclass(frozen=True)
class Costs:
    """What tells the costs of one kind of transformer from those of another, beside the sizes.

    Activations are counted with bench/memory.py. Their unit is one hidden state of all tokens, (b, l, d). Of
    two numbers the second is with a fused RMSNorm, which keeps its input, a part of what the layer before it
    returns; the operations on a CPU keep float32 copies of queries and keys.
    """

    model: type[Transformer]
    autoencoder: AutoEncoderSizes
    # (d_in, d_out, number of projections) of the linear layers of a block of width d and MLPs m wide; of a
    # double block those of one stream.
    layers: dict[str, Callable[[int, int], list[tuple[int, int, int]]]]
    biases: bool
    modulation: int  # of these layers the first ones, which see a vector instead of tokens
    # What a block's forward pass stores for its backward pass.
    kept: dict[str, tuple[float, float]]
    # The peak within a block's backward pass, `kept` included.
    work: dict[str, tuple[float, float]]
    # With 8-bit weights the peak may be where a whole weight is in memory as well: without that weight.
    work_fp8: dict[str, tuple[float, float]]
    whole: dict[str, int]  # the number of its layer
    # What several samples add to these three: the normalized tokens, which the modulation of a single one
    # does not keep; and copies of a double block's two streams, which are then not contiguous.
    several: dict[str, tuple[float, float, float]]
    # The peak while sampling, by the image's share of the tokens; and beside a single block's whole weight.
    work_sample: Callable[[float], float]
    work_sample_fp8: float


COSTS = {
    FluxSizes: Costs(
        Flux,
        AutoEncoderSizes(),
        layers={
            "double": lambda d, m: [(d, 6 * d, 1), (d, 3 * d, 3), (d, d, 1), (d, m, 1), (m, d, 1)],
            "single": lambda d, m: [(d, 3 * d, 1), (d, 3 * d + m, 4), (d + m, d, 1)],
        },
        biases=True,
        modulation=1,
        kept={"double": (22.05, 21.05), "single": (22.05, 18.05)},
        work={"double": (30.03, 26.03), "single": (28.36, 24.36)},
        work_fp8={"double": (30.03, 26.03), "single": (27.6, 23.5)},
        whole={"double": 4, "single": 2},
        several={"double": (3.0, 3.0, 3.0), "single": (1.0, 1.67, 0.0)},
        work_sample=lambda img: 19.4,
        work_sample_fp8=16.5,
    ),
    Flux2Sizes: Costs(
        Flux2,
        AutoEncoderSizes(z_channels=32, packed=True),
        layers={
            "double": lambda d, m: [(d, 3 * d, 3), (d, d, 1), (d, 2 * m, 1), (m, d, 1)],
            "single": lambda d, m: [(d, 3 * d + 2 * m, 1), (d + m, d, 1)],
        },
        biases=False,
        modulation=0,
        kept={"double": (24.05, 23.05), "single": (25.05, 21.05)},
        work={"double": (32.35, 28.35), "single": (34.56, 30.56)},
        work_fp8={"double": (31.5, 27.5), "single": (22.3, 22.3)},
        whole={"double": 2, "single": 0},
        several={"double": (1.0, 1.0, 1.0), "single": (0.0, 0.0, 0.0)},
        work_sample=lambda img: max(19.5, 10.7 + 13.5 * img),
        work_sample_fp8=13.0,
    ),
}
Sizes = FluxSizes | Flux2Sizes

# What attention alone stores for its backward pass: its output, and the logarithm of the softmax's sum.
KEPT_ATTENTION = 1.02
# The gradients of the products, again stacked and in float32, when they become those of the factors.
AT_THE_END = 2
# Copies of mid and up of each sample's identity, while stage 1 moves them.
MOVING = 7
# While sampling the autoencoder decodes one picture at a time, after the transformer.
DECODE = 769  # numbers for each pixel of the picture or tile, in the last convolutions
BLEND = 16  # bytes for each pixel of a picture that is decoded in tiles


@dataclass(frozen=True)
class Workload:
    """What is to run: steps of stage 1, of stage 2, or of sampling."""

    kind: str  # "stage1", "stage2" or "sample"
    sizes: Sizes = FLUX_DEV
    batch: int = 1
    resolution: int = 1024  # side of the square images in pixels
    shape: tuple[int, int] | None = None  # or their (height, width) in pixels, for FLOPs only
    t5_length: int = 512
    r1: int | None = 128  # None: plain LoRA
    r2: int = 1
    identities: int = 1  # slots of mid and up, when sampling of LoRAs
    merge: bool = False  # LoRAs are merged into the weights if the plan leaves these as they are
    average: bool = False  # an average of meta_down is held beside it
    codes: int = 0  # of a predictor in training, whose table and batch count as identities
    pixels: int = 16  # side of an image token in pixels
    width: int = 2  # bytes of the compute dtype
    fused_norm: bool = True  # RMSNorm is one kernel, as CUDA has it, or seven operations as on a CPU

    @property
    def tokens(self) -> tuple[int, int]:
        """The number of image tokens and of text tokens of a sample."""
        height, width = self.shape or (self.resolution, self.resolution)
        return (height // self.pixels) * (width // self.pixels), self.t5_length

    @property
    def state(self) -> int:
        """The bytes of one hidden state of all tokens, (b, l, d)."""
        return self.batch * sum(self.tokens) * self.sizes.hidden_size * self.width


@dataclass(frozen=True)
class Plan:
    """How a model fits: the arguments of `flux.memory.arrange`, and the tiles to decode pictures in."""

    checkpoint: str | int = "none"
    stream: int = 0
    fp8: bool = False
    compiled: bool = False
    tile: int | None = None  # side in latent pixels; None: pictures are decoded whole

    @property
    def resident(self) -> bool:
        """Whether all weights stay on the device as they are, so that they can be loaded straight to it."""
        return not (self.stream or self.fp8)

    def place(self, device: torch.device | str) -> torch.device | str:
        """Return where to load a model before `apply`: on the device, or mapped to its file."""
        return device if self.resident else "cpu"

    def apply(self, model: Transformer, device: torch.device | str) -> Transformer:
        """Move a model to the device as planned, in place, and return it.

        Load it to the plan's `place` before.
        """
        return arrange(model, device, self.checkpoint, self.stream, self.fp8, self.compiled)


@dataclass(frozen=True)
class Cost:
    """What a step takes: bytes on the device, FLOPs, and seconds."""

    resident: int  # bytes of frozen weights and of the buffers for streamed ones; sampling: autoencoder too
    adapters: int  # bytes of the factors and of AdamW's state
    peak: int  # bytes of all together
    flops: float
    seconds: float

    @property
    def activations(self) -> int:
        """The bytes of all the rest: activations, gradients, temporary tensors."""
        return self.peak - self.resident - self.adapters


def costs_of(sizes: Sizes) -> Costs:
    return COSTS[type(sizes)]


def linear_sizes(sizes: Sizes, kind: str) -> list[tuple[int, int, int]]:
    """Return (d_in, d_out, number of projections) of a block's linear layers, the image stream's first."""
    streams = 2 if kind == "double" else 1
    return streams * costs_of(sizes).layers[kind](sizes.hidden_size, sizes.mlp_size)


@cache
def kinds(sizes: Sizes) -> tuple[str, ...]:
    """Return the kind of each block, in the order in which they run."""
    return ("double",) * sizes.depth + ("single",) * sizes.depth_single


def parameters(model: type[nn.Module], sizes: Sizes | AutoEncoderSizes) -> int:
    """Return the number of a model's parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in model(sizes).parameters())


@cache
def outer_parameters(sizes: Sizes) -> int:
    """Return the number of parameters outside the blocks."""
    return parameters(costs_of(sizes).model, replace(sizes, depth=0, depth_single=0))


@cache
def autoencoder_parameters(sizes: Sizes) -> int:
    """Return the number of parameters of the autoencoder that goes with a transformer."""
    return parameters(AutoEncoder, costs_of(sizes).autoencoder)


@cache
def block_bytes(sizes: Sizes, kind: str, fp8: bool, width: int) -> tuple[int, int]:
    """Return the bytes of a block's linear weights, which can be streamed, and of everything else in it."""
    layers = linear_sizes(sizes, kind)
    weights = sum(-(-d_in * d_out * (1 if fp8 else width) // LINE) * LINE for d_in, d_out, _ in layers)
    vectors = sum(d_out for _, d_out, _ in layers) * (costs_of(sizes).biases + fp8)  # fp8: scales of rows
    norms = (4 if kind == "double" else 2) * sizes.head_dim
    return weights, (vectors + norms) * width


@cache
def adapter_bytes(work: Workload, kind: str) -> tuple[int, int]:
    """Return the bytes of a block's meta_down, and of its mid and up of all identities.

    What is trained is in float32; stage 2 keeps meta_down in half precision, and LoRAs that are not merged
    are in the compute dtype.
    """
    layers = linear_sizes(work.sizes, kind)
    width = work.width if work.kind == "sample" else 4
    frozen_width = 2 if work.kind == "stage2" else 4
    meta_down = sum(frozen_width * parts * (work.r1 or 0) * d_in for d_in, _, parts in layers)
    personal = sum(width * work.r2 * (parts * (work.r1 or d_in) + d_out) for d_in, d_out, parts in layers)
    return meta_down, personal * work.identities


@cache
def product_bytes(work: Workload, kind: str) -> int:
    """Return the bytes of a block's `down` and `up` of each identity in the batch."""
    layers = linear_sizes(work.sizes, kind)
    numbers = sum(parts * (d_in + d_out) for d_in, d_out, parts in layers)
    samples = work.batch if work.kind == "stage1" or work.identities > 1 else 1
    if work.kind == "sample" and work.identities <= 1:
        # The factors of one identity serve as they are, except `up` of fused layers.
        numbers = work.identities * sum(parts * d_out for _, d_out, parts in layers if parts > 1)
    return work.width * samples * work.r2 * numbers


def estimate(work: Workload, plan: Plan, speeds: Speeds = PAPERS_CARD) -> Cost:
    """Return what a step costs under a plan."""
    sizes, blocks = work.sizes, kinds(work.sizes)
    streamed = set(spread(plan.stream, len(blocks))) if plan.stream else set()
    weights = {kind: block_bytes(sizes, kind, plan.fp8, work.width) for kind in set(blocks)}
    resident = outer_parameters(sizes) * work.width + sum(weights[kind][1] for kind in blocks)
    resident += sum(weights[kind][0] for k, kind in enumerate(blocks) if k not in streamed)
    resident += 2 * max((weights[blocks[k]][0] for k in streamed), default=0)

    training = work.kind != "sample"
    resident += 0 if training else autoencoder_parameters(sizes) * work.width
    # How often meta_down, and mid and up, are there: themselves and AdamW's two moments, if they are trained;
    # of people side by side the rows that are in the batch, all of them, as well.
    several = work.identities > 1
    copies = {"stage1": (3 + work.average, 3), "stage2": (1, 3 + several), "sample": (0, 1)}[work.kind]
    adapters = sum(n * size for kind in blocks for n, size in zip(copies, adapter_bytes(work, kind)))
    if not training:
        adapters += sum(product_bytes(work, kind) for kind in blocks)
    if work.merge and plan.resident:
        adapters = 0
    rest = training_peak(work, plan) if training else sampling_peak(work, plan)

    flops = step_flops(work, plan.checkpoint)
    traffic = sum(weights[blocks[k]][0] for k in streamed) * (2 if training else 1)
    seconds = max(flops / speeds.flops, traffic / speeds.bus) + VISIBLE * traffic / speeds.bus
    return Cost(resident, adapters, resident + adapters + round(rest), flops, seconds)


def training_peak(work: Workload, plan: Plan) -> float:
    """Return the largest number of bytes of activations and gradients in a backward pass.

    It goes back block by block. At each block there are its activations, the products of all factors and
    their gradients so far. At its end these become the gradients of the factors, shape by shape; then the
    factors move.
    """
    blocks = kinds(work.sizes)
    products = [product_bytes(work, kind) for kind in blocks]
    peaks = activations(work, plan.checkpoint, plan.fp8)
    # In a double block the peak is at its MLPs, where its backward pass begins; in a single block at its
    # first layer, where the backward pass ends.
    later = (sum(products[k + (kind == "double") :]) for k, kind in enumerate(blocks))
    within = max(map(sum, zip(peaks, later, strict=True)))
    meta_down, personal = map(sum, zip(*(adapter_bytes(work, kind) for kind in blocks)))
    end = personal + (meta_down if work.kind == "stage1" else 0)
    moving = MOVING * work.batch * personal / work.identities if work.kind == "stage1" else 0
    return sum(products) + max(within, end + AT_THE_END * sum(products), end + moving)


@cache
def activations(work: Workload, checkpoint: str | int, fp8: bool) -> list[float]:
    """Return the bytes of activations in each block's backward pass.

    They are what the blocks up to this one keep, and what it needs itself. A recomputed block keeps its input
    only, and perhaps what attention returned.
    """
    base, blocks = costs_of(work.sizes), kinds(work.sizes)
    count = recomputed_blocks(checkpoint, len(blocks))
    attention = KEPT_ATTENTION if checkpoint == "attention" else 0.0
    before, peaks = 0.0, []
    for k, kind in enumerate(blocks):
        sizes = (table[kind][work.fused_norm] for table in (base.kept, base.work, base.work_fp8))
        kept, during, beside_weight = (n + (work.batch > 1) * m for n, m in zip(sizes, base.several[kind]))
        before += 1 + attention if k < count else kept
        rest = before - (attention if k < count else kept)  # what is counted in the other two already
        peak = (rest + during) * work.state
        if fp8:
            peak = max(peak, (rest + beside_weight) * work.state + whole_weight(work, kind))
        peaks.append(peak)
    return peaks


def whole_weight(work: Workload, kind: str) -> int:
    """Return the bytes of the weight of a block that is whole at the peak with 8-bit weights."""
    base, sizes = costs_of(work.sizes), work.sizes
    d_in, d_out, _ = base.layers[kind](sizes.hidden_size, sizes.mlp_size)[base.whole[kind]]
    return d_in * d_out * work.width


def sampling_peak(work: Workload, plan: Plan) -> float:
    """Return the largest number of bytes in a step: at a single block's MLP, or while decoding."""
    base, (img, txt) = costs_of(work.sizes), work.tokens
    forward = base.work_sample(img / (img + txt)) * work.state
    if plan.fp8:
        forward = max(forward, base.work_sample_fp8 * work.state + whole_weight(work, "single"))
    picture = work.resolution**2
    pixels = min(picture, (plan.tile * work.pixels // 2) ** 2) if plan.tile else picture
    return max(forward, DECODE * pixels * work.width + BLEND * picture * bool(plan.tile))


@cache
def step_flops(work: Workload, checkpoint: str | int) -> float:
    """Return the FLOPs of a step, without those of the adapters.

    A linear layer's backward pass costs as much as its forward pass, since the weight is frozen; attention's
    costs 2.5 times as much.
    """
    img, txt = work.tokens
    sizes, blocks = work.sizes, kinds(work.sizes)
    vectors = [1] * costs_of(sizes).modulation  # what modulation layers see instead of tokens
    total = 0.0
    attention = 4 * (img + txt) ** 2 * sizes.hidden_size
    for k, kind in enumerate(blocks):
        double = [*vectors, *[img] * 4, *vectors, *[txt] * 4]
        tokens = double if kind == "double" else [*vectors, img + txt, img + txt]
        layers = linear_sizes(sizes, kind)
        linear = sum(2 * n * d_in * d_out for n, (d_in, d_out, _) in zip(tokens, layers, strict=True))
        total += linear + attention
        if work.kind != "sample":
            total += linear + 2.5 * attention
            if k < recomputed_blocks(checkpoint, len(blocks)):
                total += linear + attention * (checkpoint != "attention")
    return work.batch * total
