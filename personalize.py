"""Stage 2, personalization (paper, section 3 and Algorithm 2): a photo of a person to an ordinary LoRA file.

    python personalize.py ref.jpg

writes ref.safetensors, which sample.py, diffusers and ComfyUI read, and ref_samples.png, made with it.
"""

import argparse
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import flux
from flux.errors import UserError
from flux.loading import folder_around, native_size
from flux.memory import memory_in_use, release
from flux.sampling import flow_loss, generate, spread_times
from lora.merging import read_header
from lora.names import FORMATS
from metalora import (
    TARGETS,
    assign_meta,
    clip_slots,
    export_lora,
    factors,
    inject,
    kaiming_,
    load_meta,
    use_slots,
)
from people.buckets import deal_batches
from people.cache import MemoryCache
from people.crops import crop_boxes, fit_shape
from people.latents import Picture, encode_pictures, encode_prompts, make_batch
from people.photos import Box, read_photo
from run.arguments import (
    HelpFormatter,
    Parser,
    add_memory_arguments,
    add_model_arguments,
    add_training_arguments,
    choose_device,
)
from run.command import run_script
from run.files import atomic, check_writable, fingerprint, hash_of
from run.pictures import contact_sheet
from run.plan import Way, files_to_plan, follow, make_plan
from run.terminal import printable
from vision.detector import find_faces, load_detector

STEPS = {"meta-lora": 375, "lora": 625}  # paper, section 4.2
# What the grid of samples shows besides the caption, as "a photo of a woman at the beach".
SCENES = ("at the beach", "in the city at night", "wearing a red shirt", "in a forest", "at sunset")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
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
    group.add_argument("--lr", type=float, default=4e-4, help="learning rate of AdamW")
    group.add_argument(
        "--no-augment", action="store_true", help="train on the whole photo, without crops and flips"
    )
    add_personal_arguments(group)
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
    group.add_argument(
        "--samples", type=int, default=4, help="pictures in the grid <out>_samples.png, up to 6; 0: none"
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--format", choices=FORMATS, default="diffusers", help="names in the file")
    add_memory_arguments(parser)
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"{args.photos[0].stem}.safetensors")
    args.steps = STEPS[args.method] if args.steps is None else args.steps
    args.rank = args.rank if args.rank is not None else 1 if len(args.photos) == 1 else 4
    args.caption = args.caption or f"a photo of a {args.class_word}"
    if args.out.suffix != ".safetensors" or args.out.is_dir():
        parser.error(f"--out {args.out}: must be a file whose name ends in .safetensors")
    if args.meta and args.method == "lora":
        parser.error("--meta belongs to --method meta-lora; plain LoRA uses no prior")
    if args.face and len(args.photos) > 1:
        parser.error("--face belongs to one photo; without it the face is found in each")
    return args


def add_personal_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what every personalization needs, one or a benchmark's many."""
    group.add_argument("--batch", type=int, default=1, help="crops in an update")
    group.add_argument(
        "--resolution", type=int, help="crops are shrunk to this side squared; default: the model's, 1024"
    )
    group.add_argument(
        "--targets", choices=TARGETS, default="all", help="layers that lora adapts; meta-lora: as stage 1 did"
    )
    group.add_argument(
        "--draws",
        choices=["independent", "spread"],
        default="spread",
        help="times spread evenly and every second noise the negative of the one before, which makes the "
        "average gradient less random; or times and noise of each update by chance, as in the paper",
    )


def parse_box(text: str) -> Box:
    """Read x0,y0,x1,y1."""
    try:
        x0, y0, x1, y1 = (round(float(number)) for number in text.split(","))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not four numbers x0,y0,x1,y1") from None
    return x0, y0, x1, y1


def find_face(
    path: Path,
    photo: Image.Image,
    detector,
    advice: str = "say where it is: --face x0,y0,x1,y1; or train on the whole photo: --no-augment",
) -> Box:
    """Return the box of the only face that matters; ValueError with advice when there is none or several."""
    faces = find_faces(photo, detector)
    if not faces:
        raise UserError(
            f"{path}: no face found in {photo.width}x{photo.height} pixels. Take a photo in which the face "
            f"is upright and unobstructed, or {advice}"
        )
    # Bystanders far behind do not count.
    prominent = [face for face in faces if face.area > faces[0].area / 4]
    if len(prominent) > 1:
        boxes = "\n".join("  " + ",".join(map(str, face.box)) for face in prominent)
        raise UserError(
            f"{path}: {len(prominent)} faces found. Crop the photo, or {advice}. Largest first:\n{boxes}"
        )
    return faces[0].box


def list_crops(photos: dict[Path, Image.Image], args: argparse.Namespace) -> list[tuple[Path, Box]]:
    """Return what is trained on: the crops of appendix D of every photo, or the whole photos."""
    if args.no_augment:
        return [(path, (0, 0, *photo.size)) for path, photo in photos.items()]
    detector = None if args.face else load_detector(args.detector)
    crops = []
    for path, photo in photos.items():
        face = args.face or find_face(path, photo, detector)
        crops += [(path, box) for box in crop_boxes(photo.size[::-1], face)]
    return crops


def show_crops(photos: dict[Path, Image.Image], crops: list[tuple[Path, Box]], path: Path) -> None:
    """Write all crops as one sheet, five to a row, with their sizes in the photo at the left."""
    pictures = [photos[photo].crop(box) for photo, box in crops]
    rows = [pictures[start : start + 5] for start in range(0, len(pictures), 5)]
    labels = [", ".join(f"{crop.width}x{crop.height}" for crop in row) for row in rows]
    with atomic(path) as temporary:
        contact_sheet(rows, labels).save(temporary)
    print(f"{path}: {len(pictures)} crops")


def named_meta(path: Path) -> Path:
    """Return the path of a stage-1 file; FileNotFoundError, saying how to get one, when there is none."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no stage-1 file at {path}. Train one (python train_meta.py --data PEOPLE, which ends with "
            "meta.safetensors) and pass it as --meta FILE; plain LoRA needs none: --method lora"
        )
    return path


def find_meta(
    transformer: Path, args: argparse.Namespace
) -> tuple[dict[str, Tensor], dict[str, str], Path] | None:
    """Load the stage-1 file, if the method needs one: tensors, metadata, path.

    Raises FileNotFoundError when there is none; warns when it is of another base.
    """
    if args.method == "lora":
        return None
    path = named_meta(args.meta or folder_around(transformer) / "meta.safetensors")
    tensors, metadata = load_meta(path)
    base = fingerprint(transformer)
    if metadata.get("base_hash", base) != base:
        warnings.warn(
            f"{path} was trained with {printable(metadata.get('base_model', 'another file'))}, which is not "
            f"{transformer}: as a prior it is worth less, unless they are two files of the same weights",
            stacklevel=2,
        )
    return tensors, metadata, path


def encode_crops(
    crops: Sequence[tuple[Path, Box]],
    autoencoder: flux.AutoEncoder,
    side: int,
    flip: bool,
    cache: MemoryCache,
) -> list[tuple]:
    """Return of each crop its shape, its posterior, and its mirror image's; without `flip` its own again."""
    multiple = 2 * autoencoder.sizes.reduction
    shapes = [fit_shape((y1 - y0, x1 - x0), side, multiple) for _, (x0, y0, x1, y1) in crops]
    pictures = [Picture(path, shape, box) for (path, box), shape in zip(crops, shapes)]
    flips = [replace(picture, flip=flip) for picture in pictures]
    keys = encode_pictures([*pictures, *flips], autoencoder, "", cache)
    pairs = zip(shapes, keys, keys[len(pictures) :])
    return [(shape, cache[own], cache[mirrored]) for shape, own, mirrored in pairs]


def prepare(
    model: flux.Flux, args: argparse.Namespace, meta: tuple | None, seeds: Sequence[int]
) -> list[Tensor]:
    """Add an adapter for each of the seeds, one per person, and return the factors to train."""
    if meta:
        tensors, metadata, path = meta
        inject(model, int(metadata["r1"]), args.rank, len(seeds), metadata["targets"], reset=False)
        assign_meta(model, tensors, path)
    else:
        inject(model, None, args.rank, len(seeds), args.targets, reset=False)
    for p in factors(model, "meta_down"):
        p.requires_grad_(False)
    for slot, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for mid in factors(model, "mid"):
            kaiming_(mid.data[slot], generator)
    for up in factors(model, "up"):
        up.data.zero_()
    return factors(model, "mid", "up")


def draw_batches(crops: list[tuple], prompt: dict, seed: int, args, device, dtype) -> Iterator[dict]:
    """Yield what a person's updates learn from, a batch each: crops, flips, latents, noise and times.

    crops: as `encode_crops` returns them.
    """
    dealing, drawing = (torch.Generator().manual_seed(seed + k) for k in (0, 1))
    # Dealt bit by bit, so that a longer training begins as a shorter one; `batch` uses make whole batches.
    shapes = [shape for shape, *_ in crops]
    turns = chain.from_iterable(deal_batches(shapes, args.batch, args.batch, dealing) for _ in count())
    start = torch.rand((), generator=drawing).item()
    times = spread_times(args.steps * args.batch, start, args.t_mean, args.t_std).split(args.batch)
    noise = None
    for t, turn in zip(times, turns):
        flips = torch.randint(2, (len(turn),), generator=drawing).tolist()
        entries = [(crops[k][1 + flip], prompt) for k, flip in zip(turn, flips)]
        batch = make_batch(entries, drawing, args, device, dtype)
        if args.draws == "spread":
            batch["t"] = t.to(device)
            if noise is not None and noise.shape == batch["noise"].shape:
                batch["noise"], noise = -noise, None
            else:
                noise = batch["noise"]
        yield batch


def train(
    model: flux.Flux, trained: list[Tensor], people: Sequence[Iterator[dict]], args, device
) -> Iterator[int]:
    """Run Algorithm 2's loop and yield the number of updates done, after each.

    people: what `draw_batches` yields, of the person in each slot. Several learn side by side, each with the
    loss, gradient norm and optimiser states it would have alone. ValueError when a loss is infinite or NaN.
    """
    optimiser = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
    bar = tqdm(zip(*people), "personalizing", args.steps, mininterval=1, dynamic_ncols=True)
    for step, batches in enumerate(bar, 1):
        together = defaultdict(list)  # batches of the same shape share a forward pass
        for slot, batch in enumerate(batches):
            together[batch["latents"].shape].append((slot, batch))
        mean = 0.0
        for (size, *_), group in together.items():
            slots, own = zip(*group)
            use_slots(model, torch.tensor(slots, device=device).repeat_interleave(size))
            batch = {name: torch.cat([some[name] for some in own]) for name in own[0]}
            loss = flow_loss(model, **batch, guidance=args.train_guidance) * len(group)  # the sum over people
            loss.backward()
            mean += loss.item() / len(batches)
        if not math.isfinite(mean):
            raise UserError(f"step {step}: the loss is {mean}; a smaller --lr than {args.lr:g} may help")
        clip_slots(trained, args.clip_grad)
        optimiser.step()
        optimiser.zero_grad()
        bar.set_postfix(loss=f"{mean:.3f}", memory=memory_in_use(device), refresh=False)
        yield step


def describe(
    args: argparse.Namespace, transformer: Path, meta: tuple | None, photos: Sequence[Path], way: Way
) -> dict[str, object]:
    """Return what a LoRA file says of itself; photos and the stage-1 file by their hashes."""
    about = {"base_model": transformer.name, "base_hash": fingerprint(transformer), "base_fp8": way.fp8}
    about |= {"photos": [hash_of(path) for path in photos]}
    about |= {"stage_1": hash_of(meta[2])} if meta else {}
    about |= {"targets": meta[1]["targets"] if meta else args.targets}
    told = ("method", "rank", "steps", "lr", "resolution", "caption", "seed", "no_augment", "batch", "draws")
    told += ("weight_decay", "clip_grad", "t_mean", "t_std", "train_guidance", "latents")
    return about | {key: getattr(args, key) for key in told}


def plan(
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    parts: dict[str, Path],
    meta: tuple | None,
) -> Way:
    """Choose how the transformer fits; no crop is larger than the resolution.

    parts: the model's files, as far as they are there; meta: as `find_meta` returns it, None: the paper's r1
    """
    r1 = None if args.method == "lora" else int(meta[1]["r1"]) if meta else 128
    settings = {"r1": r1, "r2": args.rank, "batch": args.batch, "resolution": args.resolution}
    return make_plan(args, "stage2", device, dtype, parts, **settings)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, dtype = choose_device(args)
    if args.plan:
        plan(args, device, dtype, files_to_plan(args), load_meta(args.meta) if args.meta else None)
        return

    # What can be wrong shows before anything takes long: the photos, the stage-1 file, the face, the rest.
    photos = {path: read_photo(path) for path in args.photos}
    check_writable(args.out.parent, "--out")
    if args.meta:
        read_header(named_meta(args.meta))
    crops = list_crops(photos, args)
    if args.show_crops:
        return show_crops(photos, crops, beside(args.out, "_crops.png"))
    files = flux.find_files(args)
    transformer = files.transformer
    args.resolution = side = args.resolution or native_size(files.folder)
    meta = find_meta(transformer, args)
    # Does the stage-1 file fit? This reads no weights.
    prepare(flux.load_flux(transformer, "meta"), args, meta, [args.seed])
    way = plan(args, device, dtype, vars(files), meta)
    about = describe(args, transformer, meta, args.photos, way)

    # Everything that does not change is computed once; then the encoders leave.
    autoencoder, cache = flux.load_autoencoder(files.autoencoder, device, dtype), MemoryCache()
    multiple = 2 * autoencoder.sizes.reduction
    encoded = encode_crops(crops, autoencoder, side, not args.no_augment, cache)
    del autoencoder
    release(device)
    conditioner = flux.load_conditioner(files, device, dtype, args.t5_length, args.vram)
    texts = [args.caption, *(f"a photo of a {args.class_word} {scene}" for scene in SCENES)]
    texts = texts[: max(1, args.samples)]
    prompts = {text: cache[key] for text, key in zip(texts, encode_prompts(texts, conditioner, "", cache))}
    del conditioner
    release(device)

    model = flux.load_flux(transformer, device if way.resident else "cpu", dtype)
    trained = prepare(model, args, meta, [args.seed])
    follow(model, way, device)
    batches = draw_batches(encoded, prompts[args.caption], args.seed, args, device, dtype)
    for _ in train(model, trained, [batches], args, device):
        pass  # nothing to do between the updates
    use_slots(model, None)

    export_lora(model, args.out, about, form=args.format)
    print(f"{args.out}: rank {args.rank}, {args.out.stat().st_size / 1e6:.1f} MB")
    if args.samples:
        autoencoder = flux.load_autoencoder(files.autoencoder, device, dtype)
        row, size = [photos[args.photos[0]]], fit_shape((side, side), side, multiple)
        for text in tqdm(texts, "sampling"):
            prompt = prompts[text]["txt"][None], prompts[text]["pooled"][None]
            row += generate(model, autoencoder, prompt, [args.seed], size)
        with atomic(beside(args.out, "_samples.png")) as temporary:
            contact_sheet([row], [], ["photo", *texts]).save(temporary)
        print(f"{beside(args.out, '_samples.png')}: {len(row) - 1} pictures")


def beside(path: Path, ending: str) -> Path:
    """Name a file after another: <stem><ending>; ref.png beside ref.safetensors could be the photo."""
    return path.with_name(path.stem + ending)


if __name__ == "__main__":
    run_script(main, "stopped; a file is written whole or not at all")
