"""Prompt to pictures, with a LoRA of a person or without.

python sample.py --lora out.safetensors --prompt "a photo of a woman at the beach"
python sample.py --lora out.safetensors style.safetensors --strength 1 0.6 --prompt "a photo of a woman"
"""

import argparse
import hashlib
import json
import math
import re
from pathlib import Path

from tqdm import tqdm

import flux
from flux.errors import UserError
from flux.loading import native_size
from flux.memory import release
from flux.sampling import generate
from lora.merging import pair_strengths, read_header
from lora.names import linear_shapes, misfits, refuse
from lora.reading import read_lora
from metalora import inject_loras, merge_loras, split_loras
from run.arguments import HelpFormatter, Parser, add_memory_arguments, add_model_arguments, choose_device
from run.command import run_script
from run.files import atomic, check_writable
from run.pictures import contact_sheet, save_picture
from run.plan import files_to_plan, follow, make_plan

MAX_SIDE = 4096  # pixels; FLUX.1 was made for up to 2 megapixels


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--prompt", nargs="+", required=True, help="what to show; several make a row each")
    parser.add_argument(
        "--lora",
        type=Path,
        nargs="+",
        default=[],
        help="LoRA files, of this program, diffusers, kohya or ai-toolkit; default: the base model alone",
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

    group = parser.add_argument_group("sampler (defaults: the paper's)")
    group.add_argument(
        "--size",
        type=parse_size,
        help="pixels, as 768 or 1024x768 (width x height); default: the model's, 1024",
    )
    group.add_argument("--steps", type=int, default=30, help="Euler steps")
    group.add_argument("--guidance", type=float, default=3.5, help="the model's guidance input")
    group.add_argument(
        "--cfg", type=float, default=1.0, help="true classifier-free guidance; above 1 every step costs two"
    )
    group.add_argument("--negative", default="", help="prompt to move away from; needs --cfg above 1")
    group = add_memory_arguments(parser, training=False)
    group.add_argument(
        "--no-merge",
        action="store_true",
        help="keep LoRAs apart from the weights, as is done anyway when these are streamed or in 8 bits",
    )
    args = parser.parse_args(argv)
    if args.negative and args.cfg <= 1:
        parser.error(f"--negative does nothing at --cfg {args.cfg}: give --cfg above 1, such as 2")
    try:
        args.lora = pair_strengths(args.lora, args.strength) if args.lora else []
    except ValueError as error:
        parser.error(str(error))
    return args


def parse_size(text: str) -> tuple[int, int]:
    """Read "768" or "1024x768" (width x height) as (height, width)."""
    if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1024 or 1024x768")
    return int(match[2] or match[1]), int(match[1])


def hash_weights(path: Path) -> str:
    """Return what A1111 and Civitai know a LoRA by: SHA-256 of the file without its header, 12 digits."""
    with path.open("rb") as file:
        file.seek(read_header(path)[1])
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def parameters(prompt: str, seed: int, settings: dict, loras: list[tuple[str, float, str]]) -> str:
    """Write settings as AUTOMATIC1111 and Forge do, for programs that read them from a picture.

    loras: name, strength and hash of each.
    """
    tags = [f" <lora:{name}:{strength:g}>" for name, strength, _ in loras]
    lines = [prompt + "".join(tags)]
    lines += [f"Negative prompt: {settings['negative']}"] if "negative" in settings else []
    values = {
        "Steps": settings["steps"],
        "Sampler": "Euler",
        "CFG scale": f"{settings['cfg']:g}",
        "Distilled CFG Scale": f"{settings['guidance']:g}",
        "Seed": seed,
        "Size": settings["size"],
        "Model": Path(settings["model"]).stem,
    }
    if loras:
        values["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, _, digest in loras)
    quoted = lambda text: json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text
    lines.append(", ".join(f"{key}: {quoted(str(value))}" for key, value in values.items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, dtype = choose_device(args)
    # What can be wrong shows before anything is downloaded.
    loras = [(read_lora(path)[0], strength) for path, strength in args.lora]
    rank = sum(max(len(a) for a, _ in lora.values()) for lora, _ in loras)
    job = {"r1": None, "r2": rank, "identities": int(bool(loras)), "merge": not args.no_merge}
    job |= {"resolution": math.isqrt(math.prod(args.size))} if args.size else {}
    if args.plan:
        make_plan(args, "sample", device, dtype, files_to_plan(args), **job)
        return
    check_writable(args.out, "--out")
    files = flux.find_files(args)
    transformer = files.transformer
    # Do they fit? That reads no weights of the model.
    shapes = linear_shapes(flux.load_flux(transformer, "meta"))
    for (path, _), (lora, _) in zip(args.lora, loras):
        refuse(path, misfits(lora, shapes))
    hashes = [(path.stem, strength, hash_weights(path)) for path, strength in args.lora]
    size = args.size or (native_size(files.folder),) * 2
    autoencoder = flux.load_autoencoder(files.autoencoder, device, dtype)
    check_size(size, 2 * autoencoder.sizes.reduction)
    way = make_plan(args, "sample", device, dtype, vars(files), **job)

    # The text encoders come first and go before the transformer is there: together they would not fit 24 GB.
    conditioner = flux.load_conditioner(files, device, dtype, args.t5_length, args.vram)
    prompts = [conditioner.encode([prompt]) for prompt in args.prompt]
    negative = conditioner.encode([args.negative]) if args.cfg > 1 else None
    del conditioner
    release(device)

    model = flux.load_flux(transformer, device if way.resident else "cpu", dtype)
    # Merged weights could not stay mapped to their file, and a LoRA may drown in the rounding to 8 bits.
    apart = args.no_merge or not way.resident
    inside, outside = split_loras(model, loras) if apart else ([], loras)
    if inside:
        inject_loras(model, [inside])
    merge_loras(follow(model, way, device), outside)
    sampler = {"steps": args.steps, "guidance": args.guidance, "cfg": args.cfg}
    settings = {**sampler, "size": f"{size[1]}x{size[0]}", "model": transformer.name}
    if args.lora:
        names, strengths = zip(*((path.name, f"{strength:g}") for path, strength in args.lora))
        settings |= {"lora": ", ".join(names), "strength": ", ".join(strengths)}
        settings |= {"lora_hashes": ", ".join(f"{name}: {digest}" for name, _, digest in hashes)}
    if args.negative:
        settings |= {"negative": args.negative}

    seeds, rows = [args.seed + k for k in range(args.n)], []
    bar = tqdm(total=len(prompts) * args.n * args.steps, desc="sampling", unit="step", dynamic_ncols=True)
    for number, (text, prompt) in enumerate(zip(args.prompt, prompts)):
        rows.append([])
        for seed in seeds:
            (picture,) = generate(
                model,
                autoencoder,
                prompt,
                [seed],
                size,
                negative=negative,
                progress=lambda _: bar.update(),
                **sampler,
            )
            path = args.out / f"{number:02d}_{slug(text)}_{seed}.png"
            told = {"prompt": text, "seed": seed, **settings}
            save_picture(picture, path, {**told, "parameters": parameters(text, seed, settings, hashes)})
            rows[-1].append(picture)
    bar.close()
    if len(prompts) * args.n > 1:
        cell = tuple(min(max(side, 192), 512) for side in size)
        with atomic(args.out / "grid.png") as temporary:
            contact_sheet(rows, args.prompt, [f"seed {seed}" for seed in seeds], cell).save(temporary)
    print(f"{len(prompts) * args.n} pictures in {args.out}")


def check_size(size: tuple[int, int], multiple: int) -> None:
    """Raise ValueError when the model cannot make pictures of this (height, width)."""
    if any(side not in range(multiple, MAX_SIDE + 1, multiple) for side in size):
        near = "x".join(
            str(min(max(1, round(side / multiple)), MAX_SIDE // multiple) * multiple) for side in size[::-1]
        )
        raise UserError(
            f"--size {size[1]}x{size[0]}: both sides must be multiples of {multiple}, from {multiple} to "
            f"{MAX_SIDE}; {near} is near"
        )


def slug(text: str) -> str:
    """Make a prompt safe in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "empty"


if __name__ == "__main__":
    run_script(main)
