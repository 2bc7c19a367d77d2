"""Add LoRAs to weights, of a model or of a checkpoint file, and to each other."""

import json
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flux.checkpoint import opened, read_header
from flux.errors import UserError
from flux.formats import FP8, SWAPPED
from flux.pages import drop_pages, file_ranges
from lora.bases import BASES
from lora.fitting import Shapes, clean, linear_shapes
from lora.names import Lora, layer_of, part_sizes, swap_halves
from lora.others import find_base
from lora.reading import read_for
from lora.writing import without_stale
from run.files import atomic

Update = tuple[slice, Tensor, Tensor, float]  # rows of a layer's weight, lora_A, lora_B, strength


def layer_updates(loras: Sequence[tuple[Lora, float]], shapes: Shapes) -> dict[str, list[Update]]:
    """Return what LoRAs, each with its strength, add to each layer; shapes: (d_out, d_in) by layer."""
    updates = defaultdict(list)
    for lora, strength in loras:
        for part, (a, b) in lora.items():
            layer, parts = layer_of(part)
            sizes = part_sizes(len(parts), *shapes[layer])
            end = list(accumulate(sizes))[parts.index(part)]
            if layer == SWAPPED:
                b = swap_halves(b)
            updates[layer].append((slice(end - len(b), end), a, b, strength))
    return updates


def merged(weight: Tensor, updates: list[Update]) -> Tensor:
    """Return W + the sum of strength B A: computed in float32, rounded once to W's dtype."""
    total = weight.to(torch.float32, copy=True)  # W itself may be mapped to the model's file
    for rows, a, b, strength in updates:
        total[rows].addmm_(b.to(total), a.to(total), alpha=strength)
    return total.to(weight.dtype)


def merge_loras(model: nn.Module, loras: Sequence[tuple[Lora, float]]) -> None:
    """Merge LoRAs that fit the model, each with its strength: in float32, rounded once for all of them."""
    for name, updates in layer_updates(loras, linear_shapes(model)).items():
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(merged(layer.weight, updates), requires_grad=False)


def add_up(loras: Sequence[tuple[Lora, float]]) -> Lora:
    """Return one LoRA that does what several do together, each with its strength; their ranks add up."""
    total = {}
    for lora, strength in loras:
        for part, (a, b) in lora.items():
            a, b = a.float(), strength * b.float()
            if part in total:
                other_a, other_b = total[part]
                a, b = torch.cat([other_a, a]), torch.cat([other_b, b], dim=1)
            total[part] = a, b
    return total


def merge_file(checkpoint: Path, loras: Sequence[tuple[Path, float]], out: Path) -> None:
    """Write a transformer's checkpoint with LoRAs merged in; one tensor at a time is in memory.

    The checkpoint has a base's original names, perhaps with the prefix of a file that holds the whole model;
    dtypes, order and all other tensors stay. Raises UserError when anything does not fit.
    """
    header, _ = read_header(checkpoint)
    metadata = header.pop("__metadata__", {})
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    weights = {re.sub(r"^(model\.)?diffusion_model\.", "", name): name for name in names}
    shapes = {
        name.removesuffix(".weight"): tuple(header[stored]["shape"])
        for name, stored in weights.items()
        if name.endswith(".weight") and len(header[stored]["shape"]) == 2
    }
    if "double_blocks.0.img_attn.qkv" not in shapes:
        names = " or ".join(base.name for base in BASES.values())
        raise UserError(f"{checkpoint} is no {names} file with the original names (double_blocks.0 ...)")
    kind, _ = find_base(shapes, {})
    contents = [(read_for(path, kind, shapes)[0], strength) for path, strength in loras]
    updates = layer_updates(contents, shapes)
    if any(f"{layer}.{scale}" in weights for layer in updates for scale in ("scale_weight", "weight_scale")):
        raise UserError(f"{checkpoint} holds scaled 8-bit weights; merge into the 16-bit file")
    updates = {weights[f"{layer}.weight"]: of_layer for layer, of_layer in updates.items()}
    if any(header[name]["dtype"] in FP8 for name in updates):
        warnings.warn(
            f"{checkpoint} is in 8 bits: much of a LoRA is lost in their rounding; the 16-bit file keeps it",
            stacklevel=2,
        )

    stems = ", ".join([checkpoint.stem, *(path.stem for path, _ in loras)])
    metadata = dict(sorted({**without_stale(metadata), "modelspec.merged_from": stems}.items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    needed, free = checkpoint.stat().st_size, shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(f"{out} needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there")
    with opened(checkpoint) as source, atomic(out) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        mapped = file_ranges()
        for name in tqdm(names, "merging", unit="tensor", dynamic_ncols=True):
            stored = source.get_tensor(name)
            tensor = merged(stored, updates[name]) if name in updates else stored
            if name in updates and not is_finite(tensor):
                raise UserError(f"{clean(name)} has numbers too large for {tensor.dtype} after merging")
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
            drop_pages(stored, mapped)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all numbers are finite, by the extremes: a mask of a large tensor would cost memory."""
    lowest, highest = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
    return bool(lowest.isfinite() and highest.isfinite())


def pair_strengths(paths: Sequence[Path], strengths: Sequence[float]) -> list[tuple[Path, float]]:
    """Give each LoRA its strength: one for all, or one for each; UserError for another count."""
    if len(strengths) == 1:
        strengths = list(strengths) * len(paths)
    if len(strengths) != len(paths):
        raise UserError(
            f"--strength has {len(strengths)} numbers for {len(paths)} LoRAs: give one, or one each"
        )
    return list(zip(paths, strengths))
