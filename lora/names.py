"""What FLUX.1's layers are called by other programs, and what fits a model."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.errors import UserError
from flux.formats import FLUX
from run.terminal import printable

Lora = dict[str, tuple[Tensor, Tensor]]
FORMATS = ("diffusers", "kohya")

# --- Names -------------------------------------------------------------------------------------------------

# Every linear layer, with # for the block's number -> its parts in diffusers, in the order of the fused rows.
# We adapt nothing outside the blocks; others do.
PARTS = {
    layer.replace("{}", "#"): [part.replace("{}", "#") for part in parts]
    for layer, parts in FLUX.items()
    if not layer.endswith(".scale")
}
LAYER_OF = {part: layer for layer, parts in PARTS.items() for part in parts}
# Kohya writes underscores for dots, which nobody can undo; so every name is looked up with underscores.
FLAT = {name.replace(".", "_"): name for name in [*PARTS, *LAYER_OF]}


def part_sizes(count: int, d_out: int, d_in: int) -> list[int]:
    """Return the output rows of each of `count` parts: q, k, v as wide as the model, then what is left."""
    return [d_out] if count == 1 else [d_in, d_in, d_in, d_out - 3 * d_in][:count]


def find_name(module: str) -> tuple[str, str] | None:
    """Return a layer or part as the tables call it, and the block's number; None for what FLUX.1 has not."""
    flat = module.replace(".", "_")
    if block := re.search(r"_(\d+)_", flat):
        flat = f"{flat[: block.start()]}_#_{flat[block.end() :]}"
    known = flat in FLAT and "#" not in module
    return (FLAT[flat], block[1] if block else "") if known else None


def layer_of(part: str) -> tuple[str, list[str]]:
    """Return the layer that a part belongs to, and all the parts of that layer."""
    name, number = find_name(part)
    layer = LAYER_OF[name]
    return layer.replace("#", number), [other.replace("#", number) for other in PARTS[layer]]


def swap_halves(b: Tensor) -> Tensor:
    """Exchange the upper and the lower half of the rows: shift and scale of SWAPPED, either way."""
    return torch.cat(b.chunk(2)[::-1])


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of every linear layer, of whatever class, by name."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "in_features")}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def misfits(lora: Lora, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """List what of a LoRA does not fit a model of linear layers with these weights, (d_out, d_in) by name."""
    problems = []
    for part, (a, b) in lora.items():
        layer, parts = layer_of(part)
        if layer not in shapes:
            problems.append(f"{part}: this model has no {layer}")
            continue
        d_out, d_in = shapes[layer]
        size = part_sizes(len(parts), d_out, d_in)[parts.index(part)]
        if a.shape[1] != d_in or len(b) != size:
            given = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
            problems.append(f"{part} has {given}, must be (rank, {d_in}) and ({size}, rank)")
    return problems


def refuse(path: Path, problems: list[str]) -> None:
    """Raise ValueError if there are problems with a file, naming the first twenty."""
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError(
            f"{path} does not fit this model:\n  " + "\n  ".join(map(clean, problems[:20] + more))
        )


def clean(text: object, length: int = 300) -> str:
    """Make text from a file safe to print: what could steer a terminal is escaped, and its end cut off."""
    text = str(text)
    return printable(text if len(text) <= length else f"{text[:length]} ...")
