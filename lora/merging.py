"""Add LoRAs to weights: of a model, or of a checkpoint file."""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flux.checkpoint import opened, read_header
from flux.errors import UserError
from flux.formats import SWAPPED
from flux.memory import drop_pages, file_ranges
from lora.names import Lora, clean, layer_of, misfits, part_sizes, refuse, swap_halves
from lora.reading import read_lora
from lora.writing import fresh
from run.files import atomic

# --- Merging -----------------------------------------------------------------------------------------------

Update = tuple[slice, Tensor, Tensor, float]  # rows of a layer's weight, lora_A, lora_B, strength


def layer_updates(
    loras: Sequence[tuple[Lora, float]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, list[Update]]:
    """Return what LoRAs, each with its strength, add to each layer; shapes: (d_out, d_in) by layer."""
    updates = defaultdict(list)
    for lora, strength in loras:
        for part, (a, b) in lora.items():
            layer, parts = layer_of(part)
            sizes = part_sizes(len(parts), *shapes[layer])
            end = list(accumulate(sizes))[parts.index(part)]
            b = swap_halves(b) if layer == SWAPPED else b
            updates[layer].append((slice(end - len(b), end), a, b, strength))
    return updates


def merged(weight: Tensor, updates: list[Update]) -> Tensor:
    """Return W + the sum of strength B A: computed in float32, rounded once to W's dtype."""
    total = weight.to(torch.float32, copy=True)  # W itself may be mapped to the model's file
    for rows, a, b, strength in updates:
        total[rows].addmm_(b.to(total), a.to(total), alpha=strength)
    return total.to(weight.dtype)


def merge_file(checkpoint: Path, loras: Sequence[tuple[Path, float]], out: Path) -> None:
    """Write a transformer's checkpoint with LoRAs merged in; one tensor at a time is in memory.

    The checkpoint has FLUX.1's original names, also with the prefix of a file that holds the whole model;
    dtypes, order and all other tensors stay. Raises ValueError when anything does not fit.
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
        raise UserError(f"{checkpoint} is no FLUX.1 file with the original names (double_blocks.0 ...)")
    read = []
    for path, strength in loras:
        lora, _ = read_lora(path)
        refuse(path, misfits(lora, shapes))
        read.append((lora, strength))
    by_layer = layer_updates(read, shapes)
    if any(f"{name}.{word}" in weights for name in by_layer for word in ("scale_weight", "weight_scale")):
        raise UserError(f"{checkpoint} holds scaled 8-bit weights; merge into the 16-bit file")
    updates = {weights[f"{name}.weight"]: own for name, own in by_layer.items()}

    stems = ", ".join(path.stem for path in (checkpoint, *(path for path, _ in loras)))
    metadata = {**fresh(metadata), "modelspec.merged_from": stems}
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    needed, free = checkpoint.stat().st_size, shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(f"{out} needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there")
    with opened(checkpoint) as source, atomic(out) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        mapped = file_ranges()
        for name in tqdm(names, "merging", unit="tensor", dynamic_ncols=True):
            tensor = stored = source.get_tensor(name)
            if name in updates:
                tensor = merged(stored, updates[name])
                ends = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
                if not all(end.isfinite() for end in ends):
                    raise UserError(f"{clean(name)} has numbers too large for {tensor.dtype} after merging")
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
            drop_pages(stored, mapped)


def pair_strengths(paths: Sequence[Path], strengths: Sequence[float]) -> list[tuple[Path, float]]:
    """Give each LoRA its strength: one for all, or one for each; ValueError for another count."""
    if len(strengths) not in (1, len(paths)):
        raise UserError(
            f"--strength has {len(strengths)} numbers for {len(paths)} LoRAs: give one, or one each"
        )
    return [(path, strengths[k % len(strengths)]) for k, path in enumerate(paths)]
