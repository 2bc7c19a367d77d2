"""Read LoRA files that diffusers, PEFT, kohya or ai-toolkit wrote."""

import json
import re
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.checkpoint import read_tensors
from flux.errors import UserError
from flux.formats import SWAPPED
from lora.names import FLAT, PARTS, Lora, find_name, linear_shapes, misfits, part_sizes, refuse, swap_halves

KEY = re.compile(
    r"(?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|lora_unet_|lora_transformer_|lycoris_)*"
    r"(?P<module>.+?)\."
    r"(?:(?P<A>lora_A|lora_down|lora\.down)|(?P<B>lora_B|lora_up|lora\.up)|alpha$)"
    r"(?:(?:\.[^.]+)?\.weight)?"  # PEFT's own files have the adapter's name in the middle
)
OTHER_METHODS = {  # ends of names in which there is more, or something else, than B A
    r"dora_scale|lora_magnitude_vector.*": "DoRA",
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"oft_\w+(\.weight)?": "OFT",
    r"lora_mid\.weight": "a Tucker decomposition",
    r"diff(_b)?": "a full difference",
}
TEXT_ENCODER = re.compile(r"lora_te|text_encoder")


# --- Reading -----------------------------------------------------------------------------------------------


def read_lora(path: Path, model: nn.Module | None = None) -> tuple[Lora, dict[str, str]]:
    """Read a LoRA as diffusers, PEFT, kohya or ai-toolkit write it, alpha multiplied in; and its metadata.

    Raises ValueError listing all that is wrong: names that FLUX.1 has not, halves without the other, numbers
    that are not finite and, if there is a model, what does not fit it. Warns about a LoRA that does nothing,
    and about text encoders' tensors, which are left out.
    """
    tensors, metadata = read_tensors(path := Path(path))
    if any(name.endswith(".meta_down") for name in tensors):
        raise UserError(f"{path} is stage 1's file; first python personalize.py PHOTO --meta {path}")
    found, wrong, texts = sort_tensors(tensors)
    alphas, lora, problems = Alphas(path, metadata), {}, []
    for name, halves in found.items():
        parts = read_layer(name, halves, alphas, problems)
        problems += [f"{part} is there twice, alone and fused" for part in sorted(parts.keys() & lora.keys())]
        lora |= parts
    if model is not None:
        problems += misfits(lora, linear_shapes(model))
    nothing = [] if lora else ["it holds no tensors of the transformer"]
    refuse(path, wrong + problems or nothing)  # first what it is instead of a LoRA
    if texts:
        warnings.warn(
            f"{path}: {texts} tensors for text encoders are left out; only the transformer's part is used",
            stacklevel=2,
        )
    if not any(a.any() and b.any() for a, b in lora.values()):
        warnings.warn(f"{path}: the LoRA is zero in every layer and changes nothing", stacklevel=2)
    return lora, metadata


def sort_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, dict], list[str], int]:
    """Sort a file's tensors: {layer: {"A", "B", "alpha"}}; what is wrong; the count of text encoders'."""
    found, wrong, texts = defaultdict(dict), [], 0
    for key, tensor in sorted(tensors.items()):
        if TEXT_ENCODER.match(key):
            texts += 1
            continue
        match = KEY.fullmatch(key)
        name = find_name(match["module"]) if match else None
        kind = match and next((half for half in "AB" if match[half]), "alpha")
        own = found[name[0].replace("#", name[1])] if name else {}
        if name is None:
            method = next((x for end, x in OTHER_METHODS.items() if re.search(rf"\.({end})$", key)), None)
            wrong.append(f"{key} is {method}, not LoRA" if method else f"{key} is for no layer of FLUX.1")
        elif kind in own:
            wrong.append(f"{key} is what another tensor is already, perhaps of a second adapter")
        else:
            own[kind] = tensor
    order = list(FLAT.values())
    return dict(sorted(found.items(), key=lambda item: place(item[0], order))), wrong, texts


def place(name: str, order: list[str]) -> tuple[int, int]:
    """Return what sorts layers by block, then as in `order`; those outside the blocks come first."""
    known, number = find_name(name)
    return int(number or -1), order.index(known)


class Alphas:
    """What a file's update is multiplied by: alpha / rank, with rsLoRA / its root, if it says so, else 1."""

    def __init__(self, path: Path, metadata: dict[str, str]):
        # diffusers keeps PEFT's settings in the header; PEFT in a file beside its adapter_model.safetensors.
        text, beside = metadata.get("lora_adapter_metadata", "{}"), path.with_name("adapter_config.json")
        try:
            if path.stem == "adapter_model" and beside.is_file():
                text = beside.read_text()
            settings = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
            alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
            self.alpha = None if alpha is None else float(alpha)
            self.patterns = {name: float(alpha) for name, alpha in patterns.items()}
            self.root = bool(settings.get("use_rslora"))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}: PEFT's settings that belong to it cannot be read ({error})") from error

    def factor(self, name: str, rank: int, own: Tensor | None) -> float:
        if own is not None:
            return own.item() / rank
        fits = [alpha for end, alpha in self.patterns.items() if f".{name}".endswith(f".{end}")]
        alpha = fits[0] if fits else self.alpha
        return 1.0 if alpha is None else alpha / (rank**0.5 if self.root else rank)


def read_layer(name: str, halves: dict[str, Tensor], alphas: Alphas, problems: list[str]) -> Lora:
    """Return the parts of one entry of a file; add to `problems` when it is none."""
    if lacking := [f"lora_{half}" for half in "AB" if half not in halves]:
        problems.append(f"{name} lacks {' and '.join(lacking)}")
        return {}
    a, b = halves["A"], halves["B"]
    alpha = halves.get("alpha")
    given = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
    if a.ndim != 2 or b.ndim != 2 or not 0 < len(a) == b.shape[1]:
        problems.append(f"{name} has {given}, must be (rank, inputs) and (outputs, rank)")
        return {}
    if not (a.is_floating_point() and b.is_floating_point()):
        problems.append(f"{name} is of {a.dtype} and {b.dtype}, must be floating-point numbers")
        return {}
    a, b = (half.float() if half.element_size() == 1 else half for half in (a, b))  # 8 bits: no arithmetic
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
        problems.append(f"{name} has an alpha of shape {tuple(alpha.shape)}, must be one number")
        return {}
    factor = alphas.factor(name, len(a), alpha)
    if factor != 1:
        a = a.float() * factor
    if not (a.isfinite().all() and b.isfinite().all()):
        problems.append(f"{name} has numbers that are not finite")
        return {}
    known, number = find_name(name)
    if known == SWAPPED:
        b = swap_halves(b)
    parts = [part.replace("#", number) for part in PARTS.get(known, [known])]
    sizes = part_sizes(len(parts), len(b), a.shape[1])
    if sum(sizes) != len(b) or min(sizes) < 1:
        problems.append(f"{name} has {given}, which are not {len(parts)} projections of {a.shape[1]} inputs")
        return {}
    return dict(zip(parts, split_fused(a, b, sizes)))


def split_fused(a: Tensor, b: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Split an update of fused projections: block-diagonal into the blocks, any other sharing lora_A."""
    rank, rest = divmod(len(a), len(sizes))
    if not rest:
        blocks = [rows[:, k * rank : (k + 1) * rank] for k, rows in enumerate(b.split(sizes))]
        if torch.equal(torch.block_diag(*blocks), b):
            return list(zip(a.split(rank), blocks))
    return [(a, rows) for rows in b.split(sizes)]
