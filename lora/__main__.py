"""Look at LoRA files, convert and merge them: python -m lora info|convert|merge"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from flux.checkpoint import read_tensors
from flux.errors import UserError
from lora.bases import BASES
from lora.finding import find_lora
from lora.fitting import clean
from lora.merging import merge_file, pair_strengths
from lora.names import FORMATS
from lora.others import find_base, named_base
from lora.reading import read_lora
from lora.writing import format_of, name_tensors, without_stale, write_tensors
from run.arguments import HelpFormatter, Parser
from run.command import run_script
from run.files import check_writable


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    options = {"formatter_class": HelpFormatter}
    parser = Parser(
        prog="python -m lora", description="Look at LoRA files of FLUX, convert and merge them.", **options
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="info|convert|merge")

    text = "print what a file is: method, format, rank, base, header, and the norm of each layer's update"
    info = commands.add_parser("info", help=text, description=text, **options)
    info.add_argument(
        "file", type=Path, nargs="+", help="LoRA of any program, or meta.safetensors of stage 1"
    )

    text = "write a LoRA of any program with the names of another, alpha multiplied in"
    convert = commands.add_parser("convert", help=text, description=text, **options)
    convert.add_argument("file", type=Path, help="LoRA of any program")
    convert.add_argument("out", type=Path, help="new file; an existing one is not overwritten")
    convert.add_argument("--format", choices=FORMATS, required=True, help="ComfyUI reads all three")

    text = "add LoRAs to a transformer's weights, in float32, rounded once to the file's own dtype"
    merge = commands.add_parser("merge", help=text, description=text, **options)
    merge.add_argument(
        "checkpoint", type=Path, help="one file with the original names, such as flux1-dev.safetensors"
    )
    merge.add_argument("out", type=Path, help="new file of the same size; an existing one is not overwritten")
    merge.add_argument("--lora", type=Path, nargs="+", required=True, help="LoRAs of any program")
    text = "factor on the update: one for all LoRAs, or one for each; default: 1"
    merge.add_argument("--strength", type=float, nargs="+", default=[1.0], help=text)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.command == "info":
        for file in args.file:
            show_info(find_lora(file))
        return
    if args.out.exists():
        raise FileExistsError(f"{args.out} is there already; name a new file")
    check_writable(args.out.parent, "out")
    if args.command == "convert":
        lora, metadata = read_lora(find_lora(args.file))
        write_tensors(name_tensors(lora, args.format), args.out, without_stale(metadata))
    else:
        merge_file(args.checkpoint, pair_strengths([*map(find_lora, args.lora)], args.strength), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


def show_info(path: Path) -> None:
    """Print what a file is: method, format, rank, base, what its header says, and the norm of each layer."""
    tensors, metadata = read_tensors(path)
    meta_downs = {name: tensor for name, tensor in tensors.items() if name.endswith(".meta_down")}
    rows = show_meta(path, meta_downs) if meta_downs else show_lora(path, tensors, metadata)
    for key, value in sorted(metadata.items()):
        print(f"  {clean(key)}: {clean(value)}")
    print(f"{'rank':>6} {'norm':>12}  layer")
    for name, rank, norm in rows:
        print(f"{rank:>6} {norm:12.6g}  {clean(name)}")
    total = sum(norm**2 for _, _, norm in rows) ** 0.5
    print(f"{'':6} {total:12.6g}  all together")


def show_meta(path: Path, meta_downs: dict[str, Tensor]) -> list[tuple[str, int, float]]:
    """Print that a file is stage 1's; return name, r1 and norm of each layer."""
    if any(tensor.ndim != 3 for tensor in meta_downs.values()):
        raise UserError(f"{path}: its meta_down should be (parts, r1, d_in)")
    print(f"{path}: stage 1 of Meta-LoRA, meta_down of {len(meta_downs)} layers; no LoRA yet")
    return [(name, tensor.shape[1], tensor.float().norm().item()) for name, tensor in meta_downs.items()]


def show_lora(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> list[tuple[str, int, float]]:
    """Print method, format, rank and base of a LoRA; return name, rank and norm of each projection."""
    lora, _ = read_lora(path)
    method = clean(metadata.get("method", "LoRA"))
    kind, _ = find_base({part: (len(b), a.shape[1]) for part, (a, b) in lora.items()}, {})
    base = clean(named_base(metadata) or (BASES[kind].name if kind else "unknown"))
    size = sum(a.numel() + b.numel() for a, b in lora.values())
    ranks = sorted({len(a) for a, _ in lora.values()})
    form = format_of(tensors)
    print(f"{path}: {method}, {form} format, one adapter of {len(lora)} projections, {size:,} numbers")
    print(f"rank {', '.join(map(str, ranks))}; base {base}")
    return [(part, len(a), update_norm(a, b)) for part, (a, b) in lora.items()]


def update_norm(a: Tensor, b: Tensor) -> float:
    """Return the Frobenius norm of B A without multiplying it out."""
    a, b = a.double(), b.double()
    return ((a @ a.T) * (b.T @ b)).sum().clamp(min=0).sqrt().item()


if __name__ == "__main__":
    run_script(main)
