"""Read LoRA files that diffusers, PEFT, kohya, ai-toolkit, OneTrainer, XLabs or ComfyUI wrote."""

import hashlib
import json
import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.checkpoint import read_header, read_tensors
from flux.errors import UserError
from flux.formats import SWAPPED
from flux.texts import read_text
from flux.transformer import Transformer
from lora.bases import BASES
from lora.fitting import Shapes, clean, linear_shapes, misfits, refuse
from lora.names import NAMES, Lora, find_name, part_sizes, swap_halves
from lora.others import find_base, named_base, names_another, other_method, other_model

KEY = re.compile(
    r"(?:base_model\.model\.|model[._]|diffusion_model[._]|transformer\.|unet\.|lora_unet_|lora_transformer_|"
    r"lycoris_)*(?P<module>.+?)"
    r"(?:\.(?:(?P<A>lora_A|lora_down|(?:lora\.)?down)|(?P<B>lora_B|lora_up|(?:lora\.)?up)|(?P<alpha>alpha)$)"
    r"(?:(?:\.[^.]+)?\.weight)?)?"  # PEFT's own files have the adapter's name in the middle
)
LEFT_OUT = {  # beginnings of names
    r"lora_(te|clip)|(base_model\.)?text_encoder|(clip_[lg]|t5|t5xxl|te\d?)[._]": "for text encoders",
    r"bundle_emb\.": "of embeddings",
}
# What ComfyUI writes with a LoRA even where there is no change.
ADDED = re.compile(r".+\.(diff|diff_b|[wb]_norm|(lora_[AB]|lora_down|lora_up)(\.[^.]+)?\.bias)")

Matches = dict[str, re.Match | None]  # what KEY finds in the name of each tensor of a file
Entries = dict[str, dict[str, Tensor]]  # the tensors called A, B and alpha of each layer in a file


def read_lora(path: Path, model: Transformer | None = None) -> tuple[Lora, dict[str, str]]:
    """Read a LoRA of any program, alpha multiplied in; and its metadata. docs/formats.md lists what is read.

    Without a model the file alone has to show which base it is for. Raises UserError listing all that is
    wrong: another model's or method's names, halves without the other, numbers that are not finite and, if
    there is a model, what does not fit it. Warns about a LoRA that does nothing, about a header that names
    another base, and about tensors that are left out.
    """
    return read_for(path) if model is None else read_for(path, model.kind, linear_shapes(model))


def read_for(
    path: Path, kind: type[nn.Module] | None = None, shapes: Shapes | None = None
) -> tuple[Lora, dict[str, str]]:
    """Do what `read_lora` does; kind: the base's class, shapes: (d_out, d_in) of its layers, if known."""
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if any(name.endswith(".meta_down") for name in tensors):
        raise UserError(f"{path} is stage 1's file; first python personalize.py PHOTO --meta {path}")
    tensors, notes = leave_out(tensors)
    matches = {key: KEY.fullmatch(key) for key in sorted(tensors)}
    modules = module_shapes(matches, tensors)
    base, sign = find_base(modules, metadata)
    kind = kind or base or next(iter(BASES))
    refuse_others(path, matches, other_model(modules, kind))
    entries, wrong = sort_tensors(matches, tensors, kind)
    alphas, lora, problems = Alphas(path, metadata), {}, []
    for name, entry in entries.items():
        parts = read_layer(name, entry, alphas, problems, kind)
        problems += [f"{part} is there twice, alone and fused" for part in sorted(parts.keys() & lora.keys())]
        lora |= parts
    problems = wrong + problems  # first what it is instead of a LoRA
    if not lora and not problems:
        problems = ["it holds no tensors of the transformer"]
    fault = "cannot be read as a LoRA" if problems else "does not fit this model"
    if shapes is not None:
        problems += misfits(lora, shapes)
    if problems and base not in (None, kind):
        names = BASES[base].name, BASES[kind].name
        raise UserError(f"{path} is a LoRA for {names[0]}: {clean(sign)}; this model is {names[1]}")
    refuse(path, problems, fault)
    header = named_base(metadata)
    if header and names_another(header, kind):
        notes.append(f"its header names another base than {BASES[kind].usual}: {clean(header)}")
    if not any(a.any() and b.any() for a, b in lora.values()):
        notes.append("the LoRA is zero in every layer and changes nothing")
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)
    return lora, metadata


def leave_out(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Leave out tensors that are not the transformer's or change nothing; also return a note on each kind."""
    kept, counts = {}, Counter()
    for key, tensor in tensors.items():
        kind = next((kind for start, kind in LEFT_OUT.items() if re.match(start, key)), None)
        if kind is None and ADDED.fullmatch(key) and not tensor.float().any():
            kind = "of biases, norms and differences that are all zero"
        if kind:
            counts[kind] += 1
        else:
            kept[key] = tensor
    return kept, [f"{count} tensors {kind} are left out" for kind, count in counts.items()]


def module_shapes(matches: Matches, tensors: dict[str, Tensor]) -> Shapes:
    """Return (d_out, d_in) of each module of a file, by its name without prefix; empty if it has not both."""
    modules = defaultdict(dict)
    for key, match in matches.items():
        modules[match["module"] if match else key][match and match.lastgroup] = tensors[key]
    return {
        module: (len(entry["B"]), entry["A"].shape[1])
        if {"A", "B"} <= entry.keys() and entry["A"].ndim == entry["B"].ndim == 2
        else ()
        for module, entry in modules.items()
    }


def refuse_others(path: Path, matches: Matches, model: str | None) -> None:
    """Raise UserError for another model's LoRA, and for other methods than LoRA."""
    if model:
        accepted = "; ".join(base.models for base in BASES.values())
        raise UserError(f"{path} is {clean(model)}; accepted are LoRAs for {accepted}")
    others = [key for key in matches if other_method(key)]
    if others:
        raise UserError(
            f"{path} cannot be read as a LoRA: {clean(others[0])} is {other_method(others[0])}, not LoRA "
            f"({len(others)} such tensors); the program that trained it may merge it into a checkpoint"
        )


def sort_tensors(
    matches: Matches, tensors: dict[str, Tensor], kind: type[nn.Module]
) -> tuple[Entries, list[str]]:
    """Return a file's tensors by layer, in the order of the model; and those that are for no layer."""
    entries, wrong = defaultdict(dict), []
    for key, match in matches.items():
        place = find_name(match["module"], kind) if match and match.lastgroup != "module" else None
        if place is None:
            wrong.append(f"{key} is for no layer of {BASES[kind].name}")
            continue
        name, number = place
        entry = entries[name.replace("#", number)]
        if match.lastgroup in entry:
            wrong.append(f"{key} duplicates another tensor of this layer; does the file hold two adapters?")
        else:
            entry[match.lastgroup] = tensors[key]

    def model_order(name: str) -> tuple[int, int]:
        """Return what sorts layers by block, then as in the model; those outside the blocks come first."""
        known, number = find_name(name, kind)
        return int(number or -1), [*NAMES[kind]].index(known)

    return {name: entries[name] for name in sorted(entries, key=model_order)}, wrong


class Alphas:
    """The scale of a file's updates: alpha / rank, alpha / sqrt(rank) for rsLoRA, 1 without alpha."""

    def __init__(self, path: Path, metadata: dict[str, str]):
        # diffusers keeps PEFT's settings in the header; PEFT in a file beside its adapter_model.safetensors.
        text, beside = metadata.get("lora_adapter_metadata", "{}"), path.with_name("adapter_config.json")
        try:
            if path.stem == "adapter_model" and beside.is_file():
                text = read_text(beside)
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


def read_layer(
    name: str, entry: dict[str, Tensor], alphas: Alphas, problems: list[str], kind: type[nn.Module]
) -> Lora:
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
    known, number = find_name(name, kind)
    parts = [part.replace("#", number) for part in NAMES[kind][known]]
    # Uniform ranks may exceed the 64 channels of the first or last layer, but none exceeds what a block has.
    if len(a) > (len(parts) * a.shape[1] if number else max(a.shape[1], len(b))):
        problems.append(
            f"{name} has {given}: rank {len(a)} of {a.shape[1]} inputs; are its halves transposed?"
        )
        return {}
    a, b = (half.float() if half.element_size() == 1 else half for half in (a, b))  # 8 bits: no arithmetic
    factor = alphas.factor(name, len(a), alpha)
    if factor != 1:
        a = a.float() * factor
    if not (a.isfinite().all() and b.isfinite().all()):
        problems.append(f"{name} has numbers that are not finite")
        return {}
    if known == SWAPPED:
        b = swap_halves(b)
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
