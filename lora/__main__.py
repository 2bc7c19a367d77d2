"""Look at LoRA files, convert and merge them: python -m lora info|convert|merge"""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from flux.checkpoint import read_tensors
from flux.errors import UserError
from lora.merging import merge_file, pair_strengths
from lora.names import FORMATS, clean
from lora.reading import read_lora
from lora.writing import fresh, name_tensors, write_tensors
from run.arguments import HelpFormatter, Parser
from run.command import run_script
from run.files import check_writable

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
            raise UserError(f"{path}: its meta_down should be (parts, r1, d_in)")
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m lora",
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


if __name__ == "__main__":
    run_script(main)
