"""LoRA files of FLUX.1: what its layers are called by whom, reading what others wrote, two formats to write.

Here a LoRA is a dictionary from the diffusers name of a projection to lora_A (rank, d_in) and lora_B
(d_out, rank), with nothing left to multiply by. How it is trained is in `metalora.py`.
"""

import json
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from arguments import Parser
from flux.formats import FLUX, SWAPPED
from flux.loading import HelpFormatter, atomic, check_writable, opened, read_tensors
from flux.memory import drop_pages, file_ranges
from flux.terminal import printable

Lora = dict[str, tuple[Tensor, Tensor]]
FORMATS = ("diffusers", "kohya")

# --- Names -------------------------------------------------------------------------------------------------

# Every linear layer, with # for the block's number -> its parts in diffusers, in the order of the fused rows.
# We adapt nothing outside the blocks; others do.
PARTS = {
    layer.replace("{}", "#"): [part.replace("{}", "#") for part in parts]
    for layer, parts in FLUX.items()
    if not layer.endswith(".scale")
}
LAYER_OF = {part: layer for layer, parts in PARTS.items() for part in parts}
# Kohya writes underscores for dots, which nobody can undo; so every name is looked up with underscores.
FLAT = {name.replace(".", "_"): name for name in [*PARTS, *LAYER_OF]}

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
# Of a file's header, what is not true of it any more once it has been converted or merged.
STALE = re.compile(r"lora_adapter_metadata|modelspec\.hash_.*|sshs_.*|ss_network_(dim|alpha)")
TEXT_ENCODER = re.compile(r"lora_te|text_encoder")


def part_sizes(count: int, d_out: int, d_in: int) -> list[int]:
    """Return the output rows of each of `count` parts: q, k, v as wide as the model, then what is left."""
    return [d_out] if count == 1 else [d_in, d_in, d_in, d_out - 3 * d_in][:count]


def find_name(module: str) -> tuple[str, str] | None:
    """Return a layer or part as the tables call it, and the block's number; None for what FLUX.1 has not."""
    flat = module.replace(".", "_")
    if block := re.search(r"_(\d+)_", flat):
        flat = f"{flat[: block.start()]}_#_{flat[block.end() :]}"
    known = flat in FLAT and "#" not in module
    return (FLAT[flat], block[1] if block else "") if known else None


def layer_of(part: str) -> tuple[str, list[str]]:
    """Return the layer that a part belongs to, and all the parts of that layer."""
    name, number = find_name(part)
    layer = LAYER_OF[name]
    return layer.replace("#", number), [other.replace("#", number) for other in PARTS[layer]]


# --- Reading -----------------------------------------------------------------------------------------------


def read_lora(path: Path, model: nn.Module | None = None) -> tuple[Lora, dict[str, str]]:
    """Read a LoRA as diffusers, PEFT, kohya or ai-toolkit write it, alpha multiplied in; and its metadata.

    Raises ValueError listing all that is wrong: names that FLUX.1 has not, halves without the other, numbers
    that are not finite and, if there is a model, what does not fit it. Warns about a LoRA that does nothing,
    and about text encoders' tensors, which are left out.
    """
    tensors, metadata = read_tensors(path := Path(path))
    if any(name.endswith(".meta_down") for name in tensors):
        raise ValueError(f"{path} is stage 1's file; first python personalize.py PHOTO --meta {path}")
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
            raise ValueError(f"{path}: PEFT's settings that belong to it cannot be read ({error})") from error

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


def swap_halves(b: Tensor) -> Tensor:
    """Exchange the upper and the lower half of the rows: shift and scale of SWAPPED, either way."""
    return torch.cat(b.chunk(2)[::-1])


def split_fused(a: Tensor, b: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Split an update of fused projections: block-diagonal into the blocks, any other sharing lora_A."""
    rank, rest = divmod(len(a), len(sizes))
    if not rest:
        blocks = [rows[:, k * rank : (k + 1) * rank] for k, rows in enumerate(b.split(sizes))]
        if torch.equal(torch.block_diag(*blocks), b):
            return list(zip(a.split(rank), blocks))
    return [(a, rows) for rows in b.split(sizes)]


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of every linear layer, of whatever class, by name."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "in_features")}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def misfits(lora: Lora, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """List what of a LoRA does not fit a model of linear layers with these weights, (d_out, d_in) by name."""
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


def refuse(path: Path, problems: list[str]) -> None:
    """Raise ValueError if there are problems with a file, naming the first twenty."""
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError(
            f"{path} does not fit this model:\n  " + "\n  ".join(map(clean, problems[:20] + more))
        )


def clean(text: object, length: int = 300) -> str:
    """Make text from a file safe to print: what could steer a terminal is escaped, and its end cut off."""
    text = str(text)
    return printable(text if len(text) <= length else f"{text[:length]} ...")


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
        raise ValueError(f"{checkpoint} is no FLUX.1 file with the original names (double_blocks.0 ...)")
    read = []
    for path, strength in loras:
        lora, _ = read_lora(path)
        refuse(path, misfits(lora, shapes))
        read.append((lora, strength))
    by_layer = layer_updates(read, shapes)
    if any(f"{name}.{word}" in weights for name in by_layer for word in ("scale_weight", "weight_scale")):
        raise ValueError(f"{checkpoint} holds scaled 8-bit weights; merge into the 16-bit file")
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
                    raise ValueError(f"{clean(name)} has numbers too large for {tensor.dtype} after merging")
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
            drop_pages(stored, mapped)


def fresh(metadata: dict[str, str]) -> dict[str, str]:
    """Return a header's text without what no longer holds: hashes, and alpha, which is multiplied in."""
    return {key: value for key, value in metadata.items() if not STALE.fullmatch(key)}


def read_header(path: Path) -> tuple[dict, int]:
    """Return a safetensors file's header, and where its data begin; ValueError when it is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with opened(path), path.open("rb") as file:  # `opened` checks lengths and offsets
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


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
        raise ValueError(f"{path} is not written: {len(broken)} tensors are not finite, such as {broken[0]}")
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **text})


# --- The command line of metalora.py -----------------------------------------------------------------------


def norm(a: Tensor, b: Tensor) -> float:
    """Return the Frobenius norm of B A without multiplying it out."""
    a, b = a.double(), b.double()
    return ((a @ a.T) * (b.T @ b)).sum().clamp(min=0).sqrt().item()


def show_info(path: Path) -> None:
    """Print what a file is: method, format, rank, base, what its header says, and the norm of each layer."""
    tensors, metadata = read_tensors(path)
    if downs := {name: t for name, t in tensors.items() if name.endswith(".meta_down")}:
        if any(t.ndim != 3 for t in downs.values()):
            raise ValueError(f"{path}: its meta_down should be (parts, r1, d_in)")
        print(f"{path}: stage 1 of Meta-LoRA, meta_down of {len(downs)} layers; no LoRA yet")
        rows = [(name, f"{t.shape[-2]}", t.float().norm().item()) for name, t in downs.items()]
    else:
        lora, _ = read_lora(path)
        kohya = any(name.startswith("lora_unet_") for name in tensors)
        diffusers = all(re.match(r"transformer\..*\.lora_[AB]\.weight$", name) for name in tensors)
        form = "kohya" if kohya else "diffusers" if diffusers else "another"
        ranks = sorted({len(a) for a, _ in lora.values()})
        method = clean(metadata.get("method", "LoRA"))
        base = clean(metadata.get("base_model", metadata.get("ss_sd_model_name", "unknown")))
        size = sum(a.numel() + b.numel() for a, b in lora.values())
        print(f"{path}: {method}, {form} format, one adapter of {len(lora)} projections, {size:,} numbers")
        print(f"rank {', '.join(map(str, ranks))}; base {base}")
        rows = [(part, f"{len(a)}", norm(a, b)) for part, (a, b) in lora.items()]
    for key, value in sorted(metadata.items()):
        print(f"  {clean(key)}: {clean(value)}")
    print(f"{'rank':>6} {'norm':>12}  layer")
    for name, rank, size in rows:
        print(f"{rank:>6} {size:12.6g}  {clean(name)}")
    print(f"{'':6} {sum(size**2 for *_, size in rows) ** 0.5:12.6g}  all together")


def pair_strengths(paths: Sequence[Path], strengths: Sequence[float]) -> list[tuple[Path, float]]:
    """Give each LoRA its strength: one for all, or one for each; ValueError for another count."""
    if len(strengths) not in (1, len(paths)):
        raise ValueError(
            f"--strength has {len(strengths)} numbers for {len(paths)} LoRAs: give one, or one each"
        )
    return [(path, strengths[k % len(strengths)]) for k, path in enumerate(paths)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="metalora.py",
        description="Look at LoRA files, convert and merge them.",
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = lambda name, text: commands.add_parser(
        name, help=text, description=text, formatter_class=HelpFormatter
    )
    info = make("info", "what a file is: method, rank, base, norm of each layer")
    info.add_argument("file", type=Path, nargs="+")
    convert = make("convert", "write a LoRA of any origin in another format, alpha multiplied in")
    convert.add_argument("file", type=Path)
    convert.add_argument("out", type=Path)
    convert.add_argument("--format", choices=FORMATS, required=True)
    merge = make("merge", "add LoRAs to a transformer's file, in float32, rounded once")
    merge.add_argument(
        "checkpoint", type=Path, help="one file with the original names, as flux1-dev.safetensors"
    )
    merge.add_argument("out", type=Path)
    merge.add_argument("--lora", type=Path, nargs="+", required=True)
    merge.add_argument(
        "--strength", type=float, nargs="+", default=[1.0], help="one for all, or one for each"
    )
    args = parser.parse_args(argv)
    if args.command == "info":
        for file in args.file:
            show_info(file)
        return
    if args.out.exists():
        raise FileExistsError(f"{args.out} is there already; name a new file")
    check_writable(args.out.parent, "out")
    if args.command == "convert":
        lora, metadata = read_lora(args.file)
        write_tensors(name_tensors(lora, args.format), args.out, fresh(metadata))
    else:
        merge_file(args.checkpoint, pair_strengths(args.lora, args.strength), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
