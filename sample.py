"""Prompt to pictures, with a LoRA of a person or without.

python sample.py --lora out.safetensors --prompt "a photo of a woman at the beach"
python sample.py --lora out.safetensors style.safetensors --strength 1 0.6 --prompt "a photo of a woman"
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import flux
from flux.errors import UserError
from flux.loading import ModelFiles, native_size
from flux.memory import release
from flux.sampling import generate
from flux.transformer import Transformer
from lora.finding import find_lora
from lora.merging import merge_loras, pair_strengths
from lora.names import Lora
from lora.reading import hash_weights, read_lora
from metalora import inject_loras, split_loras
from run.arguments import HelpFormatter, Parser
from run.command import run_script
from run.costs import Plan
from run.files import check_writable, next_number, slug
from run.models import add_model_arguments, choose_device, files_to_plan, find_model, take_defaults
from run.pictures import contact_sheet, parameters, read_tags, save_picture, save_sheet
from run.plan import MemoryOptions, add_memory_arguments, make_plan

MAX_SIDE = 4096  # pixels; FLUX.1 was made for up to 2 megapixels


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, dtype = choose_device(args)
    # What can be wrong shows before the model is downloaded. A LoRA on the hub is fetched here.
    args.lora = [(find_lora(path), strength) for path, strength in args.lora]
    args.prompt = [without_tags(prompt, args.lora) for prompt in args.prompt]
    loras = [(read_lora(path)[0], strength) for path, strength in args.lora]
    if args.plan:
        plan(args, loras, device, dtype, files_to_plan(args))
        return
    check_writable(args.out, "--out")
    files = find_model(args)
    take_defaults(args, files)
    if args.negative and args.cfg <= 1:
        raise UserError(f"--negative does nothing at --cfg {args.cfg:g}: give --cfg above 1, such as 2")
    # Do they fit? That reads no weights of the model.
    base = flux.load_transformer(files.transformer, "meta")
    loras = [(read_lora(path, base)[0], strength) for path, strength in args.lora]
    size = args.size or (native_size(files.folder),) * 2
    autoencoder = flux.load_autoencoder(files.autoencoder, device, dtype)
    check_size(size, autoencoder.sizes.token_pixels)
    chosen = plan(args, loras, device, dtype, vars(files))

    # The text encoders go before the transformer comes: together they would not fit 24 GB.
    conditioner = flux.load_conditioner(files, device, dtype, args.t5_length, args.vram)
    prompts = [conditioner.encode([prompt]) for prompt in args.prompt]
    negative = conditioner.encode([args.negative]) if args.cfg > 1 else None
    del conditioner
    release(device)
    model = load_model(files, chosen, loras, args.no_merge, device, dtype)

    names = ("steps", "guidance", "cfg") if base.sizes.guidance else ("steps", "cfg")
    sampler = {name: getattr(args, name) for name in names}
    settings = {**sampler, "size": f"{size[1]}x{size[0]}", "model": files.transformer.name}
    hashes = [(path.stem, strength, hash_weights(path)) for path, strength in args.lora]
    if args.lora:
        settings["lora"] = ", ".join(path.name for path, _ in args.lora)
        settings["strength"] = ", ".join(f"{strength:g}" for _, strength in args.lora)
        settings["lora_hashes"] = ", ".join(f"{name}: {digest}" for name, _, digest in hashes)
    if args.negative:
        settings["negative"] = args.negative

    seeds, rows = [args.seed + k for k in range(args.n)], []
    bar = tqdm(total=len(prompts) * args.n * args.steps, desc="sampling", unit="step", dynamic_ncols=True)
    sampler |= {"negative": negative, "tile": chosen.tile, "progress": lambda _: bar.update()}
    start = next_number(args.out)  # so that no earlier picture is replaced
    used = slug(" ".join(path.stem for path, _ in args.lora))
    for number, (text, prompt) in enumerate(zip(args.prompt, prompts), start):
        rows.append([])
        for seed in seeds:
            (picture,) = generate(model, autoencoder, prompt, [seed], size, **sampler)
            about = {"prompt": text, "seed": seed, **settings}
            about["parameters"] = parameters(text, seed, settings, hashes)
            name = "_".join(filter(None, [f"{number:02d}", slug(text), used, str(seed)]))
            save_picture(picture, args.out / f"{name}.png", about)
            rows[-1].append(picture)
    bar.close()
    if len(prompts) * args.n > 1:
        cell = tuple(min(max(side, 192), 512) for side in size)
        titles = [f"seed {seed}" for seed in seeds]
        save_sheet(contact_sheet(rows, args.prompt, titles, cell), args.out / f"grid_{start:02d}.png")
    count = len(prompts) * args.n
    print(f"{count} picture{'s' * (count > 1)} in {args.out}, from number {start:02d} on")


def load_model(
    files: ModelFiles,
    chosen: Plan,
    loras: Sequence[tuple[Lora, float]],
    no_merge: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Transformer:
    """Load the transformer as planned, with LoRAs merged into its weights, or beside them.

    Merged weights could not stay mapped to their file, and a LoRA may drown in the rounding to 8 bits.
    """
    model = flux.load_transformer(files.transformer, chosen.place(device), dtype)
    apart = no_merge or not chosen.resident
    inside, outside = split_loras(model, loras) if apart else ([], loras)
    if inside:
        inject_loras(model, [inside])
    merge_loras(chosen.apply(model, device), outside)
    return model


def plan(
    args: argparse.Namespace,
    loras: Sequence[tuple[Lora, float]],
    device: torch.device,
    dtype: torch.dtype,
    parts: dict[str, Path],
) -> Plan:
    """Choose how the transformer fits; parts: the model's files, as far as they are there."""
    rank = sum(max(len(a) for a, _ in lora.values()) for lora, _ in loras)
    workload = {"r1": None, "r2": rank, "identities": int(bool(loras)), "merge": not args.no_merge}
    workload |= {"resolution": math.isqrt(math.prod(args.size))} if args.size else {}
    return make_plan("sample", parts, MemoryOptions.of(args), device, dtype, args.t5_length, **workload)


def check_size(size: tuple[int, int], multiple: int) -> None:
    """Raise UserError when the model cannot make pictures of this (height, width)."""
    if any(side not in range(multiple, MAX_SIDE + 1, multiple) for side in size):
        near = "x".join(
            str(min(max(1, round(side / multiple)), MAX_SIDE // multiple) * multiple) for side in size[::-1]
        )
        raise UserError(
            f"--size {size[1]}x{size[0]}: both sides must be multiples of {multiple}, from {multiple} to "
            f"{MAX_SIDE}; {near} is near"
        )


def without_tags(prompt: str, loras: Sequence[tuple[Path, float]]) -> str:
    """Take <lora:name:strength> tags out of a prompt; UserError for a tag without the same --lora."""
    text, tags = read_tags(prompt)
    given = {(path.stem, strength) for path, strength in loras}
    if not given.issuperset(tags):
        options = f"--lora {' '.join(name for name, _ in tags)} --strength"
        options += "".join(f" {strength:g}" for _, strength in tags)
        raise UserError(f"the prompt {prompt!r} has tags without the same options: pass {options}")
    return text


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--prompt", nargs="+", required=True, help="what to show; several make a row each")
    parser.add_argument(
        "--lora",
        type=Path,
        nargs="+",
        default=[],
        help="LoRA files of any program, folders that hold one, or repositories on the hub (owner/name); "
        "default: the base model alone",
    )
    parser.add_argument(
        "--strength",
        type=float,
        nargs="+",
        default=[1.0],
        help="factor on the update, for all LoRAs or for each",
    )
    parser.add_argument("--out", type=Path, default=Path("out/samples"), help="folder for the pictures")
    parser.add_argument("--n", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    add_model_arguments(parser)

    group = parser.add_argument_group("sampler (defaults: the paper's, or those of FLUX.2)")
    group.add_argument(
        "--size",
        type=parse_size,
        help="pixels, as 768 or 1024x768 (width x height); default: the model's, 1024",
    )
    group.add_argument("--steps", type=int, help="Euler steps; default: 30; FLUX.2 klein 50, distilled 4")
    group.add_argument("--guidance", type=float, help="the guidance input of models with one; default: 3.5")
    group.add_argument(
        "--cfg",
        type=float,
        help="true classifier-free guidance; above 1 every step costs two; default: 1, FLUX.2 klein base 4",
    )
    group.add_argument("--negative", default="", help="prompt to move away from; needs --cfg above 1")
    group = add_memory_arguments(parser, training=False)
    group.add_argument(
        "--no-merge",
        action="store_true",
        help="keep LoRAs apart from the weights, as is done anyway when these are streamed or in 8 bits",
    )
    args = parser.parse_args(argv)
    if args.negative and args.cfg is not None and args.cfg <= 1:  # else the model's own is looked at later
        parser.error(f"--negative does nothing at --cfg {args.cfg:g}: give --cfg above 1, such as 2")
    try:
        args.lora = pair_strengths(args.lora, args.strength) if args.lora else []
    except UserError as error:
        parser.error(str(error))
    return args


def parse_size(text: str) -> tuple[int, int]:
    """Read "768" or "1024x768" (width x height) as (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1024 or 1024x768")
    return int(match[2] or match[1]), int(match[1])


if __name__ == "__main__":
    run_script(main)
