"""Write LoRA files in the names of diffusers or kohya."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux.errors import UserError
from flux.formats import SWAPPED
from lora.names import Lora, layer_of, swap_halves
from run.files import atomic

# Of a file's header, what is not true of it any more once it has been converted or merged.
STALE = re.compile(r"lora_adapter_metadata|modelspec\.hash_.*|sshs_.*|ss_network_(dim|alpha)")


def fresh(metadata: dict[str, str]) -> dict[str, str]:
    """Return a header's text without what no longer holds: hashes, and alpha, which is multiplied in."""
    return {key: value for key, value in metadata.items() if not STALE.fullmatch(key)}


# --- Writing -----------------------------------------------------------------------------------------------


def name_tensors(lora: Lora, form: str) -> dict[str, Tensor]:
    """Name a LoRA's tensors as diffusers or kohya does; ComfyUI reads both.

    Kohya's names are those of FLUX.1's own files, where q, k, v (and the single block's MLP) are one layer:
    their lora_A are stacked, their lora_B set block-diagonally, and alpha is the rank that results.
    """
    if form == "diffusers":
        halves = {
            f"transformer.{part}.lora_{x}.weight": t for part, ab in lora.items() for x, t in zip("AB", ab)
        }
        # Parts that were fused may share lora_A, and a file takes every tensor once.
        return {name: t.clone(memory_format=torch.contiguous_format) for name, t in halves.items()}
    d_mlp = max(
        (len(b) / a.shape[1] for part, (a, b) in lora.items() if part.endswith("proj_mlp")), default=4
    )
    tensors = {}
    for layer, parts in dict(map(layer_of, lora)).items():
        pairs = [lora.get(part) for part in parts]
        d_in, dtype = next((a.shape[1], b.dtype) for a, b in filter(None, pairs))
        sizes = [round(d_in * (d_mlp if part.endswith("proj_mlp") else 1)) for part in parts]
        a = torch.cat([pair[0] for pair in pairs if pair])
        empty = [torch.zeros(size, 0, dtype=dtype) for size in sizes]  # parts that the LoRA leaves alone
        b = torch.block_diag(*(pair[1] if pair else zeros for pair, zeros in zip(pairs, empty)))
        b = swap_halves(b) if layer == SWAPPED else b
        key = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = a.contiguous()
        tensors[f"{key}.lora_up.weight"] = b.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(len(a)), dtype=dtype)
    return tensors


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict) -> None:
    """Write finite tensors with metadata: text as it is, any other value as JSON."""
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path} is not written: {len(broken)} tensors are not finite, such as {broken[0]}")
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **text})
