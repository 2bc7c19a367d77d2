"""Check whether a LoRA fits a model, and say in one error all that does not."""

from pathlib import Path

from torch import nn

from flux.errors import UserError, listed
from lora.names import Lora, layer_of, part_sizes
from run.terminal import printable

Shapes = dict[str, tuple[int, ...]]  # (d_out, d_in) of linear layers by name


def linear_shapes(model: nn.Module) -> Shapes:
    """Return (d_out, d_in) of every linear layer, of whatever class, by name."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "in_features")}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def misfits(lora: Lora, shapes: Shapes) -> list[str]:
    """List what of a LoRA does not fit a model with linear layers of these shapes."""
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


def refuse(path: Path, problems: list[str], fault: str = "does not fit this model") -> None:
    """Raise UserError if there are problems with a file: it says the fault and lists the first twenty."""
    if problems:
        raise UserError(f"{path} {fault}:\n  " + listed(map(clean, problems), "\n  "))


def clean(text: object, length: int = 300) -> str:
    """Make text from a file safe to print: escape what could steer a terminal, cut off a long end."""
    text = str(text)
    return printable(text if len(text) <= length else f"{text[:length]} ...")
