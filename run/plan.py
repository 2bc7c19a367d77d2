"""The memory plan: how the transformer is made to fit a device, chosen from sizes before anything is loaded.

`run/costs.py` says what a step costs under each plan; `flux/memory.py` carries out the one that is chosen.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Self

import torch

from flux.errors import UserError
from flux.finding import HUB_MODELS
from flux.loading import folder_around, load_autoencoder, load_transformer, native_size, text_length
from flux.memory import device_memory
from run.costs import FLUX_DEV, GIB, KNOWN, PAPERS_CARD, TILE, Cost, Plan, Workload, estimate, kinds
from run.speeds import Speeds, measure

RESERVE = 1.5  # GiB for the GPU's context and the allocator's gaps


@dataclass(frozen=True)
class MemoryOptions:
    """What the user has decided; `add_memory_arguments` explains the options."""

    vram: float | None = None
    checkpoint: str = "auto"
    stream: str = "auto"
    base_dtype: str = "auto"
    compile: bool = False
    model: str = ""  # as it was named
    dry: bool = False  # --plan: nothing will run here, so the plan may be for another GPU

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Take the options from parsed arguments; not every command has all of them."""
        names = ("vram", "checkpoint", "stream", "base_dtype", "compile", "model")
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)}, dry=args.plan)


# --- The choice --------------------------------------------------------------------------------------------


def plans(work: Workload, options: MemoryOptions, fp8: bool) -> Iterator[Plan]:
    """Yield every plan that the options allow; UserError when they name more blocks than there are."""
    total, checkpoint, stream = len(kinds(work.sizes)), options.checkpoint, options.stream
    for name, text in (("checkpoint", checkpoint), ("stream", stream)):
        if text.isdecimal() and int(text) > total:
            raise UserError(f"--{name} {text}: from 0 to {total} blocks")
    if work.kind == "sample":
        checkpoints = ["none"]
    elif checkpoint == "auto":
        checkpoints = ["none", "attention", *range(1, total), "all"]
        if options.compile:  # see `flux.memory.compile_blocks`
            checkpoints.remove("attention")
    else:
        checkpoints = [int(checkpoint) if checkpoint.isdecimal() else checkpoint]
    if options.compile:  # streamed blocks cannot be compiled
        stream = "0"
    counts = range(total + 1) if stream == "auto" else [int(stream)]
    tiles = [None, TILE] if work.kind == "sample" else [None]  # training takes more than decoding
    for recomputed, count, tile in product(checkpoints, counts, tiles):
        yield Plan(recomputed, count, fp8, options.compile, tile)


def choose(
    work: Workload,
    budget: float,
    options: MemoryOptions = MemoryOptions(),
    speeds: Speeds = PAPERS_CARD,
) -> tuple[Plan, Cost]:
    """Return the fastest plan that fits the budget in GiB, and its cost.

    Of the plans that are at most 3 % slower it is the one that streams least. Weights are rounded to 8 bits
    only if the user asks for it, or if no plan with exact weights fits, not even with all other options on
    auto; pictures are decoded in tiles only if no plan fits otherwise. Raises UserError with both numbers
    when nothing fits.
    """

    def fits(cost: Cost) -> bool:
        return cost.peak / GIB + RESERVE <= budget

    def preference(pair: tuple[Plan, Cost]) -> tuple[int, float, int]:
        plan, cost = pair
        return plan.stream, cost.seconds, cost.peak

    peaks = []
    for fp8 in {"auto": [False, True], "bf16": [False], "fp8": [True]}[options.base_dtype]:
        costs = {plan: estimate(work, plan, speeds) for plan in plans(work, options, fp8)}
        fitting = {plan: cost for plan, cost in costs.items() if fits(cost)}
        fitting = {plan: cost for plan, cost in fitting.items() if plan.tile is None} or fitting
        if fitting:
            enough = 1.03 * min(cost.seconds for cost in fitting.values())
            fast = [(plan, cost) for plan, cost in fitting.items() if cost.seconds <= enough]
            return min(fast, key=preference)
        peaks += [cost.peak for cost in costs.values()]
        exact = (estimate(work, plan) for plan in plans(work, MemoryOptions(), fp8=False))
        if options.base_dtype == "auto" and any(map(fits, exact)):
            break  # an exact plan fits without the user's other options: do not round because of these
    raise UserError(
        f"{work.kind} at {work.resolution} pixels, batch {work.batch}, needs "
        f"{min(peaks) / GIB + RESERVE:.1f} GiB, there are {budget:.3g}: lower the resolution or the batch, "
        "leave out --stream, --checkpoint and --compile, or take --base-dtype fp8"
    )


def table(
    work: Workload, plan: Plan, cost: Cost, budget: float, fp8_asked: bool = False, source: str = ""
) -> str:
    """Return the plan as text; source: how the speeds are known, without which the time is left out."""
    total = len(kinds(work.sizes))
    images = f"batch {work.batch}, {work.resolution}x{work.resolution} pixels, {work.tokens[1]} text tokens"
    if work.kind == "stage2" and work.identities > 1:
        images = f"{work.identities} people side by side, {images}"
    recomputed = {"none": "no block", "all": "all blocks", "attention": "all blocks but their attention"}
    rounded = f"rounded to 8 bits: {'as asked' if fp8_asked else 'nothing exact fits'}"
    time = f", {cost.seconds:.2f} s {source}" if source else ""
    rows = {
        "plan": f"{work.kind}, {images}; {budget:.4g} GiB",
        "weights": rounded if plan.fp8 else "exact, as they are in the file",
        "recomputed": recomputed.get(plan.checkpoint, f"the first {plan.checkpoint} of {total} blocks"),
        "streamed": f"{plan.stream} of {total} blocks",
        "decoded": f"in tiles of {plan.tile} x {plan.tile} latent pixels",
        "resident": _gib(cost.resident),
        "adapters, AdamW": _gib(cost.adapters),
        "activations": _gib(cost.activations) + ", with gradients" * (work.kind != "sample"),
        "peak": f"{_gib(cost.peak)}, and up to {RESERVE} for the device's own",
        "a step": f"{cost.flops / 1e12:8.3g} TFLOP{time}",
    }
    hidden = ["recomputed"] * (work.kind == "sample") + ["adapters, AdamW"] * (not cost.adapters)
    hidden += ["decoded"] * (plan.tile is None)
    return "\n".join(f"{name:16}{text}" for name, text in rows.items() if name not in hidden)


def _gib(size: int) -> str:
    return f"{size / GIB:8.3f} GiB"


def make_plan(
    kind: str,
    parts: dict[str, Path],
    options: MemoryOptions,
    device: torch.device,
    dtype: torch.dtype,
    t5_length: int | None = None,
    resolution: int | None = None,
    **settings: object,
) -> Plan:
    """Choose a plan within the options and the device's memory, print it and return it.

    kind, settings: fields of `Workload`. parts: the model's files, of which only the headers are read; for
    missing ones those of a `KNOWN` model are assumed. resolution: None for the model's own. Raises UserError
    when nothing fits.
    """
    work = workload_for(kind, parts, options, device, dtype, t5_length, resolution, **settings)
    return plan_one_of([work], options, device)[1]


def workload_for(
    kind: str,
    parts: dict[str, Path],
    options: MemoryOptions,
    device: torch.device,
    dtype: torch.dtype,
    t5_length: int | None = None,
    resolution: int | None = None,
    **settings: object,
) -> Workload:
    """Return the workload of `make_plan`, which has the same arguments."""
    sizes = {"t5_length": t5_length or Workload.t5_length, "width": dtype.itemsize}
    sizes["sizes"] = KNOWN.get(HUB_MODELS.get(options.model, options.model), FLUX_DEV)
    if "transformer" in parts:
        sizes["sizes"] = load_transformer(parts["transformer"], "meta").sizes
        resolution = resolution or native_size(folder_around(parts["transformer"]))
    if "autoencoder" in parts:
        sizes["pixels"] = load_autoencoder(parts["autoencoder"], "meta").sizes.token_pixels
    if {"transformer", "tokenizers"} <= parts.keys():
        sizes["t5_length"] = text_length(parts["transformer"], parts["tokenizers"], t5_length)
    sizes["fused_norm"] = norm_is_fused(device) or (options.dry and options.vram is not None)
    return Workload(kind, resolution=resolution or Workload.resolution, **sizes | settings)


def plan_one_of(
    works: Sequence[Workload], options: MemoryOptions, device: torch.device
) -> tuple[Workload, Plan]:
    """Choose among workloads that differ in their batch; print the plan and return it with its workload.

    It is the largest batch of those that take at most 3 % longer for a sample than the fastest one, and keep
    exact weights if one of them does. Raises UserError when nothing fits.
    """
    if options.compile and (options.stream not in ("auto", "0") or options.checkpoint == "attention"):
        raise UserError(
            "--compile works neither with streamed blocks nor, in training, with --checkpoint attention"
        )
    measured = measure(device) if device.type == "cuda" else None
    speeds = measured or PAPERS_CARD
    budget = options.vram or device_memory(device) / GIB
    found = []
    for work in sorted(works, key=lambda work: work.batch):
        try:
            found.append((work, *choose(work, budget, options, speeds)))
        except UserError:
            if not found:  # nor will larger ones fit
                raise
    found = [row for row in found if row[1].fp8 == min(plan.fp8 for _, plan, _ in found)]
    enough = 1.03 * min(cost.seconds / work.batch for work, _, cost in found)
    work, plan, cost = [row for row in found if row[2].seconds / row[0].batch <= enough][-1]
    if plan.compiled and plan.fp8 and device.type == "cuda":
        raise UserError(
            "--compile with 8-bit weights gave wrong numbers on a GPU (docs/gpu.md): leave it out"
        )
    source = speeds.source if measured or options.dry else ""
    print(table(work, plan, cost, budget, options.base_dtype == "fp8", source))
    return work, plan


def norm_is_fused(device: torch.device) -> bool:
    """Say whether RMSNorm is one operation on a device, also backward: on CUDA, from torch 2.9 on."""
    return device.type == "cuda" and hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def add_memory_arguments(parser: argparse.ArgumentParser, training: bool = True) -> argparse._ArgumentGroup:
    """Add the options that say how the transformer fits the device; return their group."""
    group = parser.add_argument_group("memory")
    group.add_argument("--vram", type=float, help="GiB to stay within; default: the GPU's memory")
    if training:
        group.add_argument(
            "--checkpoint",
            type=_count_or("auto", "none", "all", "attention"),
            default="auto",
            help="blocks to recompute in the backward pass: auto, none, all, attention (all, but keep what "
            "attention returns), or how many from the first on",
        )
    group.add_argument(
        "--stream",
        type=_count_or("auto"),
        default="auto",
        help="blocks kept in host memory: auto, or how many",
    )
    group.add_argument(
        "--base-dtype",
        choices=["auto", "bf16", "fp8"],
        default="auto",
        help="bf16: exact weights; fp8: rounded to 8 bits; auto: rounded only if nothing else fits",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the blocks; not with streamed ones, nor in training with --checkpoint attention",
    )
    group.add_argument("--plan", action="store_true", help="print the memory plan and stop")
    return group


def _count_or(*words: str) -> Callable[[str], str]:
    """Return an argparse type: one of the words, or a number from 0 on."""

    def parse(text: str) -> str:
        if text not in words and not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is neither {', '.join(words)} nor a number")
        return text

    return parse
