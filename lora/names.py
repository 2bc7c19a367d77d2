"""What other programs call FLUX.1's linear layers, and how the rows of fused layers are split."""

import re

import torch
from torch import Tensor

from flux.formats import FLUX

Lora = dict[str, tuple[Tensor, Tensor]]  # lora_A (rank, d_in) and lora_B (d_out, rank) by diffusers' name
FORMATS = ("diffusers", "kohya")

# Every linear layer, with # for the block's number -> its parts in diffusers, in the order of the fused rows.
# We adapt nothing outside the blocks; others do.
PARTS = {
    layer.replace("{}", "#"): [part.replace("{}", "#") for part in parts]
    for layer, parts in FLUX.items()
    if not layer.endswith(".scale")
}
LAYER_OF = {part: layer for layer, parts in PARTS.items() for part in parts}
# Other programs' names, with the same parts. XLabs': 1 is the image, 2 the text; in single blocks it leaves
# out the MLP. OneTrainer's (OMI): it counts the parts of fused layers. mflux': it numbers the MLPs' layers.
ALIASES = {
    "double_blocks.#.processor.qkv_lora1": PARTS["double_blocks.#.img_attn.qkv"],
    "double_blocks.#.processor.qkv_lora2": PARTS["double_blocks.#.txt_attn.qkv"],
    "double_blocks.#.processor.proj_lora1": PARTS["double_blocks.#.img_attn.proj"],
    "double_blocks.#.processor.proj_lora2": PARTS["double_blocks.#.txt_attn.proj"],
    "single_blocks.#.processor.qkv_lora": PARTS["single_blocks.#.linear1"][:3],
    "single_blocks.#.processor.proj_lora": PARTS["single_blocks.#.linear2"],
    **{f"{layer}.{k}": [x] for layer, parts in PARTS.items() if parts[1:] for k, x in enumerate(parts)},
    "img_in.proj": PARTS["img_in"],
    **{
        f"transformer_blocks.#.{ff}.linear{number}": [f"transformer_blocks.#.{ff}.net.{theirs}"]
        for ff in ("ff", "ff_context")
        for number, theirs in ((1, "0.proj"), (2, "2"))
    },
}
# Kohya writes underscores for dots, which cannot be undone; so every name is looked up with underscores.
FLAT = {name.replace(".", "_"): name for name in [*PARTS, *LAYER_OF, *ALIASES]}


def flatten(module: str) -> str:
    """Write a module's name with underscores; some programs leave one at the end."""
    return module.replace(".", "_").rstrip("_")


def find_name(module: str) -> tuple[str, str] | None:
    """Return a layer's or part's name with # for its block, and the block's number; None if FLUX.1 has none.

    Outside the blocks the number is "".
    """
    flat, number = flatten(module), ""
    block = re.search(r"_(\d{1,4})_", flat)
    if block:
        number = block[1]
        flat = f"{flat[: block.start()]}_#_{flat[block.end() :]}"
    if "#" in module or flat not in FLAT:
        return None
    return FLAT[flat], number


def parts_of(name: str) -> list[str]:
    """Return the parts that a layer's name, or a part's, of whatever program stands for; # for the block."""
    return PARTS.get(name) or ALIASES.get(name) or [name]


def layer_of(part: str) -> tuple[str, list[str]]:
    """Return the layer that a part belongs to, and all the parts of that layer."""
    name, number = find_name(part)
    layer = LAYER_OF[name]
    return layer.replace("#", number), [other.replace("#", number) for other in PARTS[layer]]


def part_sizes(count: int, d_out: int, d_in: int) -> list[int]:
    """Return the output rows of each of `count` parts: q, k, v as wide as the model, then what is left."""
    return [d_out] if count == 1 else [d_in, d_in, d_in, d_out - 3 * d_in][:count]


def swap_halves(b: Tensor) -> Tensor:
    """Exchange upper and lower half of the rows, the shift and scale of `flux.formats.SWAPPED`."""
    return torch.cat(b.chunk(2)[::-1])
