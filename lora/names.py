"""What other programs call FLUX's linear layers, and how the rows of fused layers are split."""

import re

import torch
from torch import Tensor, nn

from flux.formats import TABLES
from flux.model import Flux
from lora.bases import BASES

Lora = dict[str, tuple[Tensor, Tensor]]  # lora_A (rank, d_in) and lora_B (d_out, rank) by diffusers' name
FORMATS = ("diffusers", "kohya", "original")

# Every linear layer of a base, with # for the block's number -> its parts in diffusers, in the order of the
# fused rows. We adapt nothing outside the blocks; others do.
PARTS = {
    kind: {
        layer.replace("{}", "#"): [part.replace("{}", "#") for part in parts]
        for layer, parts in TABLES[kind].items()
        if not layer.endswith(".scale")
    }
    for kind in BASES
}
# A part that several bases have is of the same layer in all of them.
LAYER_OF = {part: (layer, parts) for t in PARTS.values() for layer, parts in t.items() for part in parts}
# Other programs' names, with the same parts. OneTrainer's (OMI): it counts the parts of fused layers.
ALIASES = {
    kind: {f"{layer}.{k}": [x] for layer, parts in table.items() if parts[1:] for k, x in enumerate(parts)}
    for kind, table in PARTS.items()
}
# XLabs': 1 is the image, 2 the text; in single blocks it leaves out the MLP. mflux' numbers the MLPs' layers.
ALIASES[Flux] = {
    "double_blocks.#.processor.qkv_lora1": PARTS[Flux]["double_blocks.#.img_attn.qkv"],
    "double_blocks.#.processor.qkv_lora2": PARTS[Flux]["double_blocks.#.txt_attn.qkv"],
    "double_blocks.#.processor.proj_lora1": PARTS[Flux]["double_blocks.#.img_attn.proj"],
    "double_blocks.#.processor.proj_lora2": PARTS[Flux]["double_blocks.#.txt_attn.proj"],
    "single_blocks.#.processor.qkv_lora": PARTS[Flux]["single_blocks.#.linear1"][:3],
    "single_blocks.#.processor.proj_lora": PARTS[Flux]["single_blocks.#.linear2"],
    **ALIASES[Flux],
    "img_in.proj": PARTS[Flux]["img_in"],
    **{
        f"transformer_blocks.#.{ff}.linear{number}": [f"transformer_blocks.#.{ff}.net.{theirs}"]
        for ff in ("ff", "ff_context")
        for number, theirs in ((1, "0.proj"), (2, "2"))
    },
}
# Every name of a layer or part of a base -> the parts that it stands for.
NAMES = {
    kind: {**table, **{part: [part] for parts in table.values() for part in parts}, **ALIASES[kind]}
    for kind, table in PARTS.items()
}
# Kohya writes underscores for dots, which cannot be undone; so every name is looked up with underscores.
FLAT = {kind: {name.replace(".", "_"): name for name in names} for kind, names in NAMES.items()}


def flatten(module: str) -> str:
    """Write a module's name with underscores; some programs leave one at the end."""
    return module.replace(".", "_").rstrip("_")


def find_name(module: str, kind: type[nn.Module]) -> tuple[str, str] | None:
    """Return a layer's or part's name with # for its block, and the block's number; None if there is none.

    kind: the base's class. Outside the blocks the number is "".
    """
    flat, number = flatten(module), ""
    block = re.search(r"_(\d{1,4})_", flat)
    if block:
        number = block[1]
        flat = f"{flat[: block.start()]}_#_{flat[block.end() :]}"
    if "#" in module or flat not in FLAT[kind]:
        return None
    return FLAT[kind][flat], number


def kinds_with(module: str) -> list[type[nn.Module]]:
    """Return the bases that have a layer or part of this name, of whatever program."""
    return [kind for kind in BASES if find_name(module, kind)]


def layer_of(part: str) -> tuple[str, list[str]]:
    """Return the layer that a part belongs to, and all the parts of that layer."""
    name, number = find_name(part, kinds_with(part)[0])
    layer, parts = LAYER_OF[name]
    return layer.replace("#", number), [other.replace("#", number) for other in parts]


def part_sizes(count: int, d_out: int, d_in: int) -> list[int]:
    """Return the output rows of each of `count` parts: q, k, v as wide as the model, then what is left."""
    return [d_out] if count == 1 else [d_in, d_in, d_in, d_out - 3 * d_in][:count]


def swap_halves(b: Tensor) -> Tensor:
    """Exchange upper and lower half of the rows, the shift and scale of `flux.formats.SWAPPED`."""
    return torch.cat(b.chunk(2)[::-1])
