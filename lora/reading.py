"""Read LoRA files that diffusers, PEFT, kohya or ai-toolkit wrote."""

import hashlib
import json
import re
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.checkpoint import read_header, read_tensors
from flux.errors import UserError
from flux.formats import SWAPPED
from lora.fitting import linear_shapes, misfits, refuse
from lora.names import FLAT, PARTS, Lora, find_name, part_sizes, swap_halves

KEY = re.compile(
    r"(?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|lora_unet_|lora_transformer_|lycoris_)*"
    r"(?P<module>.+?)\."
    r"(?:(?P<A>lora_A|lora_down|lora\.down)|(?P<B>lora_B|lora_up|lora\.up)|(?P<alpha>alpha)$)"
    r"(?:(?:\.[^.]+)?\.weight)?"  # PEFT's own files have the adapter's name in the middle
)
OTHER_METHODS = {  # ends of names that belong to more, or to something else, than B A
    r"dora_scale|lora_magnitude_vector.*": "DoRA",
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"oft_\w+(\.weight)?": "OFT",
    r"lora_mid\.weight": "a Tucker decomposition",
    r"diff(_b)?": "a full difference",
}
TEXT_ENCODER = re.compile(r"lora_te|text_encoder")

Entries = dict[str, dict[str, Tensor]]  # the tensors called A, B and alpha of each layer in a file


def read_lora(path: Path, model: nn.Module | None = None) -> tuple[Lora, dict[str, str]]:
    """Read a LoRA as diffusers, PEFT, kohya or ai-toolkit write it, alpha multiplied in; and its metadata.

    Raises UserError listing all that is wrong: names that FLUX.1 has not, halves without the other, numbers
    that are not finite and, if there is a model, what does not fit it. Warns about a LoRA that does nothing,
    and about the tensors of text encoders, which are left out.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if any(name.endswith(".meta_down") for name in tensors):
        raise UserError(f"{path} is stage 1's file; first python personalize.py PHOTO --meta {path}")
    texts = {key for key in tensors if TEXT_ENCODER.match(key)}
    entries, wrong = sort_tensors({key: tensors[key] for key in tensors if key not in texts})
    alphas, lora, problems = Alphas(path, metadata), {}, []
    for name, entry in entries.items():
        parts = read_layer(name, entry, alphas, problems)
        problems += [f"{part} is there twice, alone and fused" for part in sorted(parts.keys() & lora.keys())]
        lora |= parts
    problems = wrong + problems  # first what it is instead of a LoRA
    if not lora and not problems:
        problems = ["it holds no tensors of the transformer"]
    fault = "cannot be read as a LoRA" if problems else "does not fit this model"
    if model is not None:
        problems += misfits(lora, linear_shapes(model))
    refuse(path, problems, fault)
    if texts:
        warnings.warn(
            f"{path}: {len(texts)} tensors for text encoders are left out; "
            "only the transformer's part is used",
            stacklevel=2,
        )
    if not any(a.any() and b.any() for a, b in lora.values()):
        warnings.warn(f"{path}: the LoRA is zero in every layer and changes nothing", stacklevel=2)
    return lora, metadata


def sort_tensors(tensors: dict[str, Tensor]) -> tuple[Entries, list[str]]:
    """Return a file's tensors by layer, in the order of the model; and what is wrong with the others."""
    entries, wrong = defaultdict(dict), []
    for key, tensor in sorted(tensors.items()):
        match = KEY.fullmatch(key)
        place = find_name(match["module"]) if match else None
        if place is None:
            method = other_method(key)
            wrong.append(f"{key} is {method}, not LoRA" if method else f"{key} is for no layer of FLUX.1")
            continue
        name, number = place
        entry = entries[name.replace("#", number)]
        if match.lastgroup in entry:
            wrong.append(f"{key} duplicates another tensor of this layer; does the file hold two adapters?")
        else:
            entry[match.lastgroup] = tensor
    return {name: entries[name] for name in sorted(entries, key=model_order)}, wrong


def other_method(key: str) -> str | None:
    """Return the name of the method, other than LoRA, that a tensor's name belongs to."""
    for end, method in OTHER_METHODS.items():
        if re.search(rf"\.({end})$", key):
            return method
    return None


def model_order(name: str) -> tuple[int, int]:
    """Return what sorts layers by block, then as in the model; those outside the blocks come first."""
    known, number = find_name(name)
    return int(number or -1), [*FLAT.values()].index(known)


class Alphas:
    """The scale of a file's updates: alpha / rank, alpha / sqrt(rank) for rsLoRA, 1 without alpha."""

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
            self.is_rslora = bool(settings.get("use_rslora"))
        # No JSON, or JSON of another shape: no dictionary, no number.
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}: PEFT's settings that belong to it cannot be read ({error})") from error

    def factor(self, name: str, rank: int, stored: Tensor | None) -> float:
        """Return the factor of one layer; stored: the file's own alpha for it."""
        if stored is not None:
            return stored.item() / rank
        fits = [alpha for end, alpha in self.patterns.items() if f".{name}".endswith(f".{end}")]
        alpha = fits[0] if fits else self.alpha
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.is_rslora else rank)


def read_layer(name: str, entry: dict[str, Tensor], alphas: Alphas, problems: list[str]) -> Lora:
    """Return the parts of one layer of a file; add to `problems` and return nothing when it is no LoRA."""
    lacking = [f"lora_{half}" for half in "AB" if half not in entry]
    if lacking:
        problems.append(f"{name} lacks {' and '.join(lacking)}")
        return {}
    a, b = entry["A"], entry["B"]
    alpha = entry.get("alpha")
    given = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
    if a.ndim != 2 or b.ndim != 2 or not 0 < len(a) == b.shape[1]:
        problems.append(f"{name} has {given}, must be (rank, inputs) and (outputs, rank)")
        return {}
    if not (a.is_floating_point() and b.is_floating_point()):
        problems.append(f"{name} is of {a.dtype} and {b.dtype}, must be floating-point numbers")
        return {}
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
        problems.append(f"{name} has an alpha of shape {tuple(alpha.shape)}, must be one number")
        return {}
    a, b = (half.float() if half.element_size() == 1 else half for half in (a, b))  # 8 bits: no arithmetic
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
    """Split an update of fused projections: into its blocks if block-diagonal, else all share lora_A."""
    rank, rest = divmod(len(a), len(sizes))
    if rest == 0:
        blocks = [rows[:, k * rank : (k + 1) * rank] for k, rows in enumerate(b.split(sizes))]
        if torch.equal(torch.block_diag(*blocks), b):
            return list(zip(a.split(rank), blocks))
    return [(a, rows) for rows in b.split(sizes)]


def hash_weights(path: Path) -> str:
    """Return the hash by which A1111 and Civitai know a LoRA: SHA-256 without the header, 12 digits."""
    with path.open("rb") as file:
        file.seek(read_header(path)[1])
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
