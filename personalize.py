"""Stage 2, personalization (paper, section 3 and Algorithm 2): from one photo of a person to an ordinary LoRA file.

    python personalize.py ref.jpg

writes ref.safetensors, which sample.py, diffusers and ComfyUI read, and ref.png, pictures made with it.
"""

import argparse
import hashlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import flux
from data import (
    Box,
    MemoryCache,
    Picture,
    add_training_arguments,
    contact_sheet,
    crop_boxes,
    deal_batches,
    encode_pictures,
    encode_prompts,
    fit_shape,
    make_batch,
    read_photo,
)
from flux.loading import HelpFormatter, add_model_arguments, atomic, choose_device, native_size
from flux.memory import checkpoint_blocks, memory_in_use, release
from flux.sampling import flow_loss, generate
from metalora import TARGETS, adapters, assign_meta, export_lora, factors, inject, load_meta
from vision.detector import find_faces, load_detector

STEPS = {"meta-lora": 375, "lora": 625}  # paper, section 4.2


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument(
        "photos", type=Path, nargs="+", metavar="photo", help="one photo of the person, or several"
    )
    parser.add_argument("--out", type=Path, help="LoRA file to write; default: <photo>.safetensors here")
    parser.add_argument(
        "--meta", type=Path, help="file of stage 1; default: meta.safetensors beside the model's weights"
    )
    parser.add_argument(
        "--class", dest="class_word", default="person", help="word of the default caption: woman, man"
    )
    parser.add_argument("--caption", help='what the photo shows; default: "a photo of a <class>"')
    add_model_arguments(parser)

    group = parser.add_argument_group("method (defaults: the paper's)")
    group.add_argument(
        "--method", choices=STEPS, default="meta-lora", help="meta-lora, or lora, which needs no --meta"
    )
    group.add_argument("--steps", type=int, help="optimiser updates; default: 375, and 625 for lora")
    group.add_argument(
        "--rank", type=int, help="r2, the rank of the LoRA; default: 1, and 4 for several photos"
    )
    group.add_argument("--batch", type=int, default=1, help="crops in an update")
    group.add_argument("--lr", type=float, default=4e-4, help="learning rate of AdamW")
    group.add_argument(
        "--resolution", type=int, help="crops are shrunk to this side squared; default: the model's, 1024"
    )
    group.add_argument(
        "--no-augment", action="store_true", help="train on the whole photo, without crops and flips"
    )
    group.add_argument(
        "--targets", choices=TARGETS, default="all", help="layers that lora adapts; meta-lora: as stage 1 did"
    )
    add_training_arguments(parser)

    group = parser.add_argument_group("face")
    group.add_argument(
        "--face", type=parse_box, help="x0,y0,x1,y1 in pixels instead of looking for it; one photo only"
    )
    group.add_argument("--detector", type=Path, help="YuNet's .onnx file; default: from the hub")
    group.add_argument(
        "--show-crops", action="store_true", help="write the crops as <out>_crops.png and stop"
    )

    group = parser.add_argument_group("run")
    group.add_argument("--samples", type=int, default=4, help="pictures in the grid <out>.png; 0: none")
    group.add_argument(
        "--no-checkpointing", action="store_true", help="keep all activations: faster, more memory"
    )
    group.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"{args.photos[0].stem}.safetensors")
    args.steps = args.steps or STEPS[args.method]
    args.rank = args.rank or (1 if len(args.photos) == 1 else 4)
    args.caption = args.caption or f"a photo of a {args.class_word}"
    if args.out.suffix != ".safetensors":
        parser.error(f"--out {args.out}: the file's name must end in .safetensors")
    if args.face and len(args.photos) > 1:
        parser.error("--face belongs to one photo; without it the face is found in each")
    return args


def parse_box(text: str) -> Box:
    """Read x0,y0,x1,y1."""
    try:
        x0, y0, x1, y1 = (round(float(number)) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not four numbers x0,y0,x1,y1") from None
    return x0, y0, x1, y1


def find_face(path: Path, photo: Image.Image, detector) -> Box:
    """Return the box of the only face that matters; ValueError with advice when there is none or several."""
    faces = find_faces(photo, detector)
    prominent = [
        face for face in faces if face.area > faces[0].area / 4
    ]  # bystanders far behind do not count
    if not faces:
        raise ValueError(
            f"{path}: no face found in {photo.width}x{photo.height} pixels. Take a photo in which the face is "
            "upright and unobstructed, or say where it is: --face x0,y0,x1,y1; or train on the whole photo: --no-augment"
        )
    if len(prominent) > 1:
        boxes = "\n".join("  --face " + ",".join(map(str, face.box)) for face in prominent)
        raise ValueError(
            f"{path}: {len(prominent)} faces found. Crop the photo, or say which one, largest first:\n{boxes}"
        )
    return faces[0].box


def list_pictures(args: argparse.Namespace, multiple: int) -> list[Picture]:
    """Return what is trained on: the crops of appendix D of every photo, or the whole photos."""
    detector = None if args.face or args.no_augment else load_detector(args.detector)
    pictures = []
    for path in args.photos:
        photo = read_photo(path)
        height, width = photo.size[::-1]
        boxes = [(0, 0, width, height)]
        if not args.no_augment:
            boxes = crop_boxes((height, width), args.face or find_face(path, photo, detector))
        for box in boxes:
            x0, y0, x1, y1 = box
            pictures.append(Picture(path, fit_shape((y1 - y0, x1 - x0), args.resolution, multiple), box))
    return pictures


def show_crops(pictures: list[Picture], path: Path) -> None:
    """Write all crops as one sheet, five to a row, each titled with its sizes in the photo and in training."""
    crops = [read_photo(picture.path).crop(picture.box) for picture in pictures]
    titles = [f"{crop.width}x{crop.height} as {p.shape[1]}x{p.shape[0]}" for crop, p in zip(crops, pictures)]
    rows = [crops[start : start + 5] for start in range(0, len(crops), 5)]
    labels = [", ".join(titles[start : start + 5]) for start in range(0, len(crops), 5)]
    with atomic(path) as temporary:
        contact_sheet(rows, labels).save(temporary)
    print(f"{path}: {len(crops)} crops")


def find_meta(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    """Load the stage-1 file; FileNotFoundError says how to get one."""
    path = args.meta or folder / "meta.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no stage-1 file at {path}. Train one (python train_meta.py --data PEOPLE, which ends with "
            "meta.safetensors) and pass it as --meta FILE; plain LoRA needs none: --method lora"
        )
    return *load_meta(path), path


def prepare(model: flux.Flux, args: argparse.Namespace, meta: tuple | None) -> list[Tensor]:
    """Add the adapter for one identity and return the factors to train.

    A plain LoRA is the special case in which mid is the identity matrix and meta_down is trained instead.
    """
    generator = torch.Generator().manual_seed(args.seed)
    if meta:
        tensors, metadata, path = meta
        inject(model, int(metadata["r1"]), args.rank, 1, metadata["targets"], generator)
        assign_meta(model, tensors, path)
        trained = factors(model, "mid", "up")
    else:
        inject(model, args.rank, args.rank, 1, args.targets, generator)
        for mid in factors(model, "mid"):
            mid.data.copy_(torch.eye(args.rank))
        trained = factors(model, "meta_down", "up")
    for p in [p for layer in adapters(model).values() for p in (layer.meta_down, layer.mid, layer.up)]:
        p.requires_grad_(any(p is own for own in trained))
    return trained


def train(
    model: flux.Flux, trained: list[Tensor], pictures: list[tuple], prompt: dict, args, device, dtype
) -> None:
    """Algorithm 2. pictures: for each crop its shape, its latents and its flipped latents."""
    optimiser = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay)
    generator = torch.Generator().manual_seed(args.seed)
    uses = math.ceil(args.steps * args.batch / len(pictures)) + 1
    batches = deal_batches([shape for shape, *_ in pictures], uses, args.batch, generator)[: args.steps]
    bar = tqdm(batches, "personalizing", mininterval=1, dynamic_ncols=True)
    for chosen in bar:
        flips = torch.randint(2, (len(chosen),), generator=generator).tolist()
        batch = make_batch(
            [(pictures[k][1 + flip], prompt) for k, flip in zip(chosen, flips)],
            generator,
            args,
            device,
            dtype,
        )
        loss = flow_loss(model, **batch, guidance=args.train_guidance)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, args.clip_grad)
        optimiser.step()
        optimiser.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", memory=memory_in_use(device), refresh=False)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, dtype = choose_device(args)
    for path in args.photos:  # cheap checks first: the photos, the face, the files
        read_photo(path)
    folder = flux.find_model(args.model)
    args.resolution = args.resolution or native_size(folder)
    autoencoder = flux.load_autoencoder(folder / "ae.safetensors", device, dtype)
    pictures = list_pictures(args, 2 * autoencoder.sizes.reduction)
    if args.show_crops:
        return show_crops(pictures, args.out.with_name(args.out.stem + "_crops.png"))
    meta = find_meta(args, folder) if args.method == "meta-lora" else None
    args.out.parent.mkdir(parents=True, exist_ok=True)

    # Everything that does not change is computed once; then the encoders leave.
    cache = MemoryCache()
    flips = [picture if args.no_augment else replace(picture, flip=True) for picture in pictures]
    keys = encode_pictures([p for pair in zip(pictures, flips) for p in pair], autoencoder, "", cache)
    del autoencoder
    release(device)
    conditioner = flux.load_conditioner(folder, device, dtype, args.t5_length)
    prompts = [args.caption, *(f"{args.caption} {scene}" for scene in SCENES)][: max(1, args.samples)]
    prompts = [cache[key] for key in encode_prompts(prompts, conditioner, "", cache)]
    del conditioner
    release(device)

    transformer = flux.find_transformer(folder)
    model = flux.load_flux(transformer, device, dtype)
    trained = prepare(model, args, meta)
    if not args.no_checkpointing:
        checkpoint_blocks(model)
    latents = [(p.shape, cache[a], cache[b]) for p, a, b in zip(pictures, keys[::2], keys[1::2])]
    train(model, trained, latents, prompts[0], args, device, dtype)

    metadata = {
        "base_model": transformer.name,
        "photos": [hashlib.sha256(p.read_bytes()).hexdigest() for p in args.photos],
    }
    metadata |= {name: getattr(args, name) for name in ("method", "rank", "steps", "lr", "caption", "seed")}
    export_lora(model, args.out, metadata)
    print(f"{args.out}: rank {args.rank}, {args.out.stat().st_size / 1e6:.1f} MB")
    if args.samples:
        sample_grid(model, prompts, folder, args, device, dtype)


# What the grid shows besides the caption itself; they follow it, as in "a photo of a woman at the beach".
SCENES = ("at the beach", "in the city at night", "wearing a red shirt", "in a forest", "at sunset")


def sample_grid(model: flux.Flux, prompts: list[dict], folder: Path, args, device, dtype) -> None:
    """Write <out>.png: the photo, then a picture for each prompt, all of the first seed."""
    autoencoder = flux.load_autoencoder(folder / "ae.safetensors", device, dtype)
    row, size = [read_photo(args.photos[0])], (args.resolution, args.resolution)
    for prompt in tqdm(prompts, "sampling"):
        row += generate(model, autoencoder, (prompt["txt"][None], prompt["pooled"][None]), [args.seed], size)
    with atomic(args.out.with_suffix(".png")) as temporary:
        titles = ["photo", args.caption, *(f"... {scene}" for scene in SCENES)][: len(row)]
        contact_sheet([row], [], titles).save(temporary)
    print(f"{args.out.with_suffix('.png')}: {len(prompts)} pictures")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
