"""Write LoRA files with the names of diffusers, kohya or the base, and the header that programs show."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux.errors import UserError
from flux.formats import SWAPPED
from flux.transformer import Transformer
from lora.bases import BASES
from lora.names import Lora, layer_of, swap_halves
from run.files import atomic, sort_header

# Entries of a header that are no longer true once the file has been converted or merged.
STALE = re.compile(r"lora_adapter_metadata|modelspec\.hash_.*|sshs_.*|ss_network_(dim|alpha)")


def name_tensors(lora: Lora, form: str) -> dict[str, Tensor]:
    """Name a LoRA's tensors in one of the three forms; ComfyUI reads all of them."""
    name = {"diffusers": in_diffusers_names, "kohya": in_kohya_names, "original": in_original_names}[form]
    return name(lora)


def format_of(names: Iterable[str]) -> str:
    """Return whose names a file's tensors have, one of FORMATS or "another"."""
    names = [*names]
    if any(name.startswith("lora_unet_") for name in names):
        return "kohya"
    if all(re.match(r"transformer\..*\.lora_[AB]\.weight$", name) for name in names):
        return "diffusers"
    if all(re.match(r"diffusion_model\.(?!.*transformer_).*\.lora_[AB]\.weight$", name) for name in names):
        return "original"
    return "another"


def in_diffusers_names(lora: Lora) -> dict[str, Tensor]:
    """Name every projection's lora_A and lora_B as diffusers does."""
    tensors = {}
    for part, (a, b) in lora.items():
        # Copies: parts of a fused layer may share one lora_A, and safetensors does not save shared memory.
        tensors[f"transformer.{part}.lora_A.weight"] = a.clone(memory_format=torch.contiguous_format)
        tensors[f"transformer.{part}.lora_B.weight"] = b.clone(memory_format=torch.contiguous_format)
    return tensors


def in_kohya_names(lora: Lora) -> dict[str, Tensor]:
    """Name the layers of `fuse` as kohya does; alpha is their rank."""
    tensors = {}
    for layer, (a, b) in fuse(lora).items():
        key = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = a
        tensors[f"{key}.lora_up.weight"] = b
        tensors[f"{key}.alpha"] = torch.tensor(float(len(a)), dtype=b.dtype)
    return tensors


def in_original_names(lora: Lora) -> dict[str, Tensor]:
    """Name the layers of `fuse` as ComfyUI does, and ai-toolkit for FLUX.2; there is no alpha."""
    pairs = {f"diffusion_model.{layer}": pair for layer, pair in fuse(lora).items()}
    return {f"{key}.lora_{half}.weight": x for key, pair in pairs.items() for half, x in zip("AB", pair)}


def fuse(lora: Lora) -> Lora:
    """Return a LoRA of the layers that a base's own files have, by their names.

    There q, k, v (and the MLP of FLUX.1's single blocks) are one layer: their lora_A are stacked, their
    lora_B set block-diagonally.
    """
    mlps = [len(b) / a.shape[1] for part, (a, b) in lora.items() if part.endswith("proj_mlp")]
    mlp_ratio = max(mlps, default=4)  # rows of the single block's MLP relative to its inputs
    parts_of = dict(layer_of(part) for part in lora)
    fused = {}
    for layer, parts in parts_of.items():
        adapted = [lora[part] for part in parts if part in lora]
        d_in, dtype = adapted[0][0].shape[1], adapted[0][1].dtype
        blocks = []
        for part in parts:
            d_out = round(d_in * mlp_ratio) if part.endswith("proj_mlp") else d_in
            # Zero columns for a part that the LoRA leaves alone.
            blocks.append(lora[part][1] if part in lora else torch.zeros(d_out, 0, dtype=dtype))
        a, b = torch.cat([pair[0] for pair in adapted]), torch.block_diag(*blocks)
        fused[layer] = a.contiguous(), (swap_halves(b) if layer == SWAPPED else b).contiguous()
    return fused


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict) -> None:
    """Write finite tensors with metadata: text as it is, any other value as JSON; UserError for NaN."""
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path} is not written: {len(broken)} tensors are not finite, such as {broken[0]}")
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **text})
        sort_header(temporary)


def model_spec(about: dict, model: Transformer) -> dict[str, str]:
    """Return the header's entries that other programs show: Stability AI's ModelSpec 1.0.0, kohya's base.

    Its date is left out, so that the same command writes the same bytes.

    about: the file's own entries; `resolution` is the side of the training pictures in pixels, or missing.
    """
    base = BASES[model.kind]
    architecture, version = base.version(model.sizes)
    caption = about.get("caption", "")
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/lora",
        "implementation": base.implementation,
        "title": f"{'Meta-LoRA' if 'r1' in about else 'LoRA'}: {caption}".rstrip(": "),
        "trigger_phrase": caption,
    }
    if about.get("resolution"):
        spec["resolution"] = f"{about['resolution']}x{about['resolution']}"
    return {"ss_base_model_version": version, **{f"modelspec.{key}": value for key, value in spec.items()}}


def without_stale(metadata: dict[str, str]) -> dict[str, str]:
    """Return a header's entries without those that a conversion makes untrue: hashes, PEFT's alpha."""
    return {key: value for key, value in metadata.items() if not STALE.fullmatch(key)}
