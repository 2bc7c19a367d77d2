"""Stage 2, personalization (paper, section 3 and Algorithm 2): a photo of a person to an ordinary LoRA file.

    python personalize.py ref.jpg

writes ref.safetensors, which sample.py, diffusers and ComfyUI read, and ref_samples.png, made with it.
"""

import argparse
import math
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, count
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import flux
from flux.checkpoint import read_header
from flux.errors import UserError
from flux.hashes import fingerprint, sha256
from flux.loading import ModelFiles, folder_around, native_size
from flux.memory import peak_memory, release
from flux.sampling import flow_loss, generate, spread_times
from flux.transformer import Transformer
from lora.names import FORMATS
from metalora import (
    TARGETS,
    Prior,
    assign_meta,
    clip_slots,
    export_lora,
    inject,
    kaiming_,
    load_meta,
)
from people.buckets import deal_batches
from people.crops import crop_boxes, fit_shape, to_tensor
from people.encoding import encode_negative, encode_picture, encode_prompt, make_batch, stack_prompts
from people.faces import clip_face, find_face
from people.folders import captions_beside, expand_folders
from people.photos import Box, Size, read_photo
from predictor.model import Trained
from predictor.start import export_row, eye_of, find_predictor, predict
from run.arguments import MOST, HelpFormatter, Parser, parse_box
from run.command import run_script
from run.costs import Plan, Workload
from run.files import beside, check_new, check_writable, name_of
from run.late import read_late
from run.models import add_model_arguments, choose_device, files_to_plan, find_model, take_defaults
from run.pictures import contact_sheet, save_sheet
from run.plan import MemoryOptions, add_memory_arguments, make_plan
from run.seeds import generator_for
from run.settings import Training, add_training_arguments
from run.terminal import printable
from vision.detector import load_detector
from watching.judge import Judge
from watching.watch import Watch, list_files, watched_steps

STEPS = {"meta-lora": 375, "lora": 625}  # paper, section 4.2
LIMITS = {"steps": (0, MOST)}
# What the grid of samples shows besides the caption, as "a photo of a woman at the beach".
SCENES = ("at the beach", "in the city at night", "wearing a red shirt", "in a forest", "at sunset")


@dataclass(frozen=True)
class Personalization:
    """How a person is learned; the defaults are the paper's."""

    method: str = "meta-lora"  # or "lora", the paper's baseline, which needs no stage-1 file
    rank: int = 1  # r2
    targets: str = "all"  # layers that lora adapts; meta-lora: as stage 1 did
    steps: int = STEPS["meta-lora"]
    batch: int = 1  # crops in an update
    augment: bool = True  # crops and flips, or the photo as it is
    draws: str = "independent"  # or "spread", which is ours; see `draw_batches`
    start: str = "zero"  # or "predicted", which is ours; see predictor/


def personalize(
    model: Transformer,
    prior: Prior | None,
    crops: Sequence["EncodedCrop"],
    prompt: dict[str, Tensor],
    settings: Personalization,
    training: Training,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    start: Tensor | None = None,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Run Algorithm 2: fit mid and up to the crops of one person's photo; meta_down is frozen.

    prior: a stage-1 file; None for a plain LoRA. crops: what `list_crops` and `encode_crops` make of the
    photo (augment-and-create-data). The model then holds the adapter. Algorithm 2 as printed multiplies q_st2
    by the number of crops; by appendix B.1, 375 iterations of 2.8 s in 18 minutes, it is the total.
    start: what to begin with instead of the paper's, a row of `Factors.personal`; ours, see predictor/.
    watch: called before the first update and after each, with the number of updates so far; see watching/.
    Raises UserError when a loss is infinite or NaN.
    """
    # initialize, load-down-weights
    personal = add_adapters(model, prior, settings.rank, settings.targets, [seed])
    if start is not None:
        personal.data.copy_(start)
    batches = draw_batches(crops, prompt, settings, training, seed, device, dtype)
    # The loop is in `updates`. Its losses arrive a step late, so that no step waits for the host.
    losses = read_late(updates(model, personal, batches, training), watch)
    bar = tqdm(losses, "personalizing", settings.steps, mininterval=1, dynamic_ncols=True)
    for step, loss in enumerate(bar, 1):
        if not math.isfinite(loss):
            raise UserError(f"step {step}: the loss is {loss}; a smaller --lr than {training.lr:g} may help")
        bar.set_postfix(loss=f"{loss:.3f}", memory=f"{peak_memory(device):.1f} GiB", refresh=False)


def updates(
    model: Transformer, personal: Tensor, batches: Iterable[dict[str, Tensor]], training: Training
) -> Iterator[Tensor]:
    """Update mid and up with each batch, the loop of Algorithm 2; yield the losses, unread."""
    optimizer = torch.optim.AdamW([personal], training.lr, weight_decay=training.weight_decay, fused=True)
    for batch in batches:  # for iter = 1 to q_st2, for item in dataset
        loss = flow_loss(model, **batch, guidance=training.train_guidance)  # loss <- model(batch): L_diff
        loss.backward()  # update-mid-and-up-layers
        clip_slots(personal, training.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def add_adapters(
    model: Transformer, prior: Prior | None, rank: int, targets: str, seeds: Sequence[int]
) -> Tensor:
    """Add an adapter for each of the seeds, one per person; return mid and up, a row for each.

    prior: of stage 1, which is frozen; None for plain LoRA on the targets.
    """
    if prior:
        inject(model, prior.r1, rank, len(seeds), prior.targets, reset=False)
        assign_meta(model, prior)
    else:
        inject(model, None, rank, len(seeds), targets, reset=False)
    model.factors.personal.data.zero_()  # up stays so
    for slot, seed in enumerate(seeds):
        generator = generator_for("mid", seed)
        for _, mid, _ in model.factors.by_layer().values():
            kaiming_(mid[slot], generator)
    return model.factors.personal


@dataclass(frozen=True)
class EncodedCrop:
    """A crop in the shape that it is trained in."""

    shape: Size
    posterior: dict[str, Tensor]  # mean and std (z, h, w)
    mirrored: dict[str, Tensor]  # of its mirror image; without augmentation its own again


def list_crops(
    photos: dict[Path, Image.Image], augment: bool, face: Box | None = None, detector: Path | None = None
) -> list[tuple[Path, Box]]:
    """Return what is trained on: the crops of appendix D of every photo, or the whole photos."""
    if not augment:
        return [(path, (0, 0, *photo.size)) for path, photo in photos.items()]
    network = None if face else load_detector(detector)
    crops = []
    for path, photo in photos.items():
        box = clip_face(path, photo, face) if face else find_face(path, photo, network)
        crops += [(path, crop) for crop in crop_boxes(photo.size[::-1], box)]
    return crops


def encode_crops(
    photos: dict[Path, Image.Image],
    crops: Sequence[tuple[Path, Box]],
    autoencoder: flux.AutoEncoder,
    resolution: int,
    augment: bool,
) -> list[EncodedCrop]:
    """Return the posterior of each crop and of its mirror image, in the shape that it is trained in."""
    encoded = []
    for path, (x0, y0, x1, y1) in tqdm(crops, "latents", disable=len(crops) < 50):
        shape = fit_shape((y1 - y0, x1 - x0), resolution, autoencoder.sizes.token_pixels)
        picture = to_tensor(photos[path], shape, (x0, y0, x1, y1))
        posterior = encode_picture(picture, autoencoder)
        mirrored = encode_picture(picture.flip(-1), autoencoder) if augment else posterior
        encoded.append(EncodedCrop(shape, posterior, mirrored))
    return encoded


def draw_batches(
    crops: Sequence[EncodedCrop],
    prompt: dict[str, Tensor],
    settings: Personalization,
    training: Training,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of a person, the arguments of `flow_loss`: crops, flipped at random, times and noise.

    A batch has one shape. Each crop is used `batch` times before any is used again. With "independent" draws
    times and noise are random. With "spread" draws the times cover their distribution evenly (stratified),
    and of two batches of one shape the second has the negative noise of the first (antithetic), which reduces
    the variance of the average gradient.
    """
    # A copy of all crops and of the prompt stays on the device: 2 MB a crop of 1024 x 1024, 4 MB the prompt.
    prompt = {name: part.to(device, dtype) for name, part in prompt.items()}
    posteriors = [
        [{name: part.to(device) for name, part in entry.items()} for entry in (crop.posterior, crop.mirrored)]
        for crop in crops
    ]
    dealing, drawing = generator_for("order", seed), generator_for("noise", seed)
    shapes = [crop.shape for crop in crops]
    # Dealt bit by bit, so that a longer training begins as a shorter one; `batch` uses make whole batches.
    deals = (deal_batches(shapes, settings.batch, settings.batch, dealing) for _ in count())
    start = torch.rand((), generator=drawing).item()
    times = spread_times(settings.steps * settings.batch, start, training.t_mean, training.t_std).to(device)
    negatives: dict[torch.Size, Tensor] = {}  # of noise that was used once, by shape
    for t, chosen in zip(times.split(settings.batch), chain.from_iterable(deals)):
        flips = torch.randint(2, (len(chosen),), generator=drawing).tolist()
        entries = [(posteriors[k][flip], prompt) for k, flip in zip(chosen, flips)]
        batch = make_batch(entries, drawing, training, device, dtype)
        if settings.draws == "spread":
            batch["t"] = t
            shape = batch["noise"].shape
            if shape in negatives:
                batch["noise"] = negatives.pop(shape)
            else:
                negatives[shape] = -batch["noise"]
        yield batch


# --- The stage-1 file, and what a LoRA file says of itself ------------------------------------------------


def find_prior(transformer: Path, path: Path | None) -> Prior:
    """Load a stage-1 file, or the one beside a model's weights; warn when it is of another base."""
    path = existing_prior(path or folder_around(transformer) / "meta.safetensors")
    prior = load_meta(path)
    warn_of_another_base(prior, transformer)
    return prior


def find_start(
    args: argparse.Namespace, settings: Personalization, files: ModelFiles
) -> tuple[Personalization, Prior | None, Trained | None]:
    """Load the stage-1 file or the predictor that the settings need; return them as it completes them."""
    if settings.method == "meta-lora":
        return settings, find_prior(files.transformer, args.meta), None
    if settings.start == "zero":
        return settings, None, None
    trained = find_predictor(args.predictor, files)
    warn_of_another_base(trained.prior, files.transformer)
    if args.rank not in (None, trained.r2):
        raise UserError(f"{trained.prior.path} predicts LoRAs of rank {trained.r2}, not --rank {args.rank}")
    return replace(settings, rank=trained.r2, targets=trained.prior.targets), None, trained


def warn_of_another_base(prior: Prior, transformer: Path) -> None:
    """Warn when a stage-1 file or a predictor was trained with other weights than these."""
    base = fingerprint(transformer)
    if prior.metadata.get("base_fingerprint", base) != base:
        trained_with = printable(prior.metadata.get("base_model", "another file"))
        warnings.warn(
            f"{prior.path} was trained with {trained_with}, not with {transformer}: as a prior it is worth "
            "less, unless these are two files of the same weights",
            stacklevel=3,
        )


def existing_prior(path: Path) -> Path:
    """Return the path of a stage-1 file; FileNotFoundError, saying how to get one, when there is none."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no stage-1 file at {path}. Train one (python train_meta.py --data PEOPLE, which ends with "
            "meta.safetensors) and pass it as --meta FILE; plain LoRA needs none: --method lora"
        )
    return path


def describe(
    settings: Personalization,
    training: Training,
    transformer: Path,
    prior: Prior | None,
    photos: Sequence[Path],
    trained: Trained | None = None,
) -> dict[str, object]:
    """Return what a LoRA file says of itself; photos, stage-1 file or predictor by their hashes."""
    about = {**asdict(settings), **asdict(training)}
    about |= {"base_model": transformer.name, "base_fingerprint": fingerprint(transformer)}
    about |= {"photos": [sha256(path) for path in photos]}
    about |= {"stage_1": sha256(prior.path), "targets": prior.targets} if prior else {}
    if trained:
        about |= {name: trained.prior.metadata[name] for name in ("eye", "eye_weights")}
        about |= {"predictor": sha256(trained.prior.path)}
    return about


# --- The command -------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, dtype = choose_device(args)
    settings = settings_of(args)
    if args.plan:
        if not settings.steps:
            return print("--steps 0 does not load the transformer: there is nothing to plan")
        prior = load_meta(args.meta) if args.meta else None
        plan(args, settings, prior, args.resolution, device, dtype, files_to_plan(args))
        return

    # What can be wrong shows before anything takes long: the photos, the stage-1 file, the face, the rest.
    photos = {path: read_photo(path) for path in args.photos}
    check_writable(args.out.parent, "--out")
    if not args.show_crops:
        written = [args.out, *([beside(args.out, "_samples.png")] if args.samples else [])]
        written += list_files(args.out, args.watch, args.steps, args.keep) if args.watch else []
        for path in written:
            check_new(path, args.force)
    for file in filter(None, [args.meta and existing_prior(args.meta), args.predictor]):
        read_header(file)  # is it a safetensors file?
    crops = list_crops(photos, settings.augment, args.face, args.detector)
    if args.show_crops:
        return show_crops(photos, crops, beside(args.out, "_crops.png"))
    texts = [args.caption, *(f"a photo of a {args.class_word} {scene}" for scene in SCENES)]
    texts = [*dict.fromkeys(texts[: max(1, args.samples)])]
    judge = None
    if args.watch:
        first, face = args.photos[0], args.face
        face = face and clip_face(first, photos[first], face)
        judge = Judge(args.model, first, face, texts, args.detector)
    files = find_model(args)
    take_defaults(args, files)
    training, sampler = Training.of(args), flux.default_sampler(files)
    resolution = args.resolution or native_size(files.folder)
    settings, prior, trained = find_start(args, settings, files)
    start = None
    if trained:
        eye = eye_of(trained, args.eye_weights, files, device, args.detector)
        start = predict(trained, eye, photos, files.transformer, {args.photos[0]: args.face})
        del eye
        release(device)
        if judge:
            judge.warn_of_eye(trained.prior.metadata["eye_weights"])
    about = {"resolution": resolution, "caption": args.caption, "seed": args.seed}
    about |= describe(settings, training, files.transformer, prior, args.photos, trained)
    if not settings.steps:
        export_row(files.transformer, settings.targets, settings.rank, start, args.out, about, args.format)
        return tell_result(args, settings.rank)
    # Does the stage-1 file fit? This reads no weights.
    add_adapters(
        flux.load_transformer(files.transformer, "meta"), prior, settings.rank, settings.targets, [args.seed]
    )
    chosen = plan(args, settings, prior, resolution, device, dtype, vars(files))
    about["base_fp8"] = chosen.fp8

    # Everything that does not change is computed once; then the encoders leave.
    autoencoder = flux.load_autoencoder(files.autoencoder, device, dtype)
    encoded = encode_crops(photos, crops, autoencoder, resolution, settings.augment)
    multiple = autoencoder.sizes.token_pixels
    del autoencoder
    release(device)
    conditioner = flux.load_conditioner(files, device, dtype, args.t5_length, args.vram)
    prompts = {text: encode_prompt(text, conditioner) for text in texts}
    sampler["negative"] = encode_negative(sampler["cfg"], conditioner)
    del conditioner
    release(device)

    model = flux.load_transformer(files.transformer, chosen.place(device), dtype)
    chosen.apply(model, device)
    prompt, watch = prompts[args.caption], None
    if judge:
        watch = Watch(
            model=model,
            out=args.out,
            steps=watched_steps(args.watch, settings.steps),
            judge=judge,
            photo=photos[args.photos[0]],
            prompts=prompts,
            autoencoder=files.autoencoder,
            resolution=resolution,
            seed=args.seed,
            sampler=sampler,
            about=about if args.keep else None,
            form=args.format,
        )
    personalize(model, prior, encoded, prompt, settings, training, args.seed, device, dtype, start, watch)

    export_lora(model, args.out, about, form=args.format)
    if args.samples:
        autoencoder = flux.load_autoencoder(files.autoencoder, device, dtype)
        row, size = [photos[args.photos[0]]], fit_shape((resolution, resolution), resolution, multiple)
        for prompt in tqdm(prompts.values(), "sampling"):
            row += generate(model, autoencoder, stack_prompts([prompt]), [args.seed], size, **sampler)
        save_sheet(contact_sheet([row], [], ["photo", *prompts]), beside(args.out, "_samples.png"))
        print(f"{beside(args.out, '_samples.png')}: {len(row) - 1} pictures")
    tell_result(args, settings.rank)


def tell_result(args: argparse.Namespace, rank: int) -> None:
    """Say what was written, and how to use it."""
    size, photos = args.out.stat().st_size / 1e6, len(args.photos)
    print(f"{args.out}: rank {rank}, {size:.1f} MB, from {photos} photo{'s' * (photos > 1)}")
    words = ["--model", args.model, "--lora", str(args.out)]
    print(f"next, python sample.py {shlex.join(words)} --prompt TEXT")


def plan(
    args: argparse.Namespace,
    settings: Personalization,
    prior: Prior | None,
    resolution: int | None,
    device: torch.device,
    dtype: torch.dtype,
    parts: dict[str, Path],
) -> Plan:
    """Choose how the transformer fits; no crop is larger than the resolution.

    prior: None for r1 as in the paper. parts: the model's files, as far as they are there.
    """
    r1 = None if settings.method == "lora" else prior.r1 if prior else Workload.r1
    workload = {"r1": r1, "r2": settings.rank or 1, "batch": settings.batch, "resolution": resolution}
    return make_plan("stage2", parts, MemoryOptions.of(args), device, dtype, args.t5_length, **workload)


def show_crops(photos: dict[Path, Image.Image], crops: list[tuple[Path, Box]], path: Path) -> None:
    """Write all crops as one sheet, five to a row, with their sizes in the photo at the left."""
    pictures = [photos[photo].crop(box) for photo, box in crops]
    rows = [pictures[start : start + 5] for start in range(0, len(pictures), 5)]
    labels = [", ".join(f"{crop.width}x{crop.height}" for crop in row) for row in rows]
    note = ", replacing an earlier sheet" if path.exists() else ""
    save_sheet(contact_sheet(rows, labels), path)
    print(f"{path}: {len(pictures)} crops{note}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter, limits=LIMITS)
    parser.add_argument(
        "photos",
        type=Path,
        nargs="+",
        metavar="photo",
        help="one photo of the person, or several, or a folder of them",
    )
    parser.add_argument("--out", type=Path, help="LoRA file to write; default: named after the photo, here")
    parser.add_argument("--force", action="store_true", help="replace files that are there already")
    group = add_stage2_arguments(parser)
    group.add_argument(
        "--face", type=parse_box, help="x0,y0,x1,y1 in pixels instead of looking for it; one photo only"
    )
    group.add_argument(
        "--show-crops", action="store_true", help="write the crops as <out>_crops.png and stop"
    )
    group = parser.add_argument_group("watching, which changes nothing of the training")
    group.add_argument(
        "--watch",
        type=int,
        metavar="N",
        help="every N updates make small pictures of the prompts of --samples, of the caption at least, and "
        "score them if the evaluators are on this disk: <out>_watch.png and <out>_watch.csv",
    )
    group.add_argument(
        "--keep",
        action="store_true",
        help="with --watch: write the LoRA as it is then as well, <out>_<step>.safetensors",
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"{name_of(args.photos[0])}.safetensors")
    args.photos = expand_folders(args.photos)
    settle(parser, args)
    if args.watch and not args.steps:
        parser.error("--watch looks at a training, and --steps 0, the default of --start predicted, has none")
    if args.keep and not args.watch:
        parser.error("--keep belongs to --watch N")
    unused = captions_beside(args.photos) if args.steps and not args.caption else []
    if unused:
        warnings.warn(f"captions such as {unused[0]} are not used: --caption gives one", stacklevel=2)
    if args.rank is None and args.start != "predicted":  # else as the predictor's
        args.rank = default_rank(args.photos)
    args.caption = args.caption or f"a photo of a {args.class_word}"
    if args.out.suffix != ".safetensors" or args.out.is_dir():
        parser.error(f"--out {args.out}: must be a file whose name ends in .safetensors")
    if args.face and len(args.photos) > 1:
        parser.error("--face belongs to one photo; without it the face is found in each")
    return args


def settle(parser: Parser, args: argparse.Namespace) -> None:
    """Set --method and --steps where they follow from other options; end with an error on contradictions."""
    predicted = args.start == "predicted"
    if predicted and (args.meta or args.method == "meta-lora"):
        parser.error(
            "--start predicted has a prior of its own and trains a plain LoRA: no --meta, no meta-lora"
        )
    args.method = args.method or ("lora" if predicted else "meta-lora")
    if args.steps is None:
        args.steps = 0 if predicted else STEPS[args.method]
    if not args.steps and not predicted:
        parser.error("--steps 0 belongs to --start predicted")
    if (args.predictor or args.eye_weights) and not predicted:
        parser.error("--predictor and --eye-weights belong to --start predicted")
    if not args.steps:
        args.no_augment, args.samples = True, 0  # it neither trains nor loads the transformer
    if args.meta and args.method == "lora":
        parser.error("--meta belongs to --method meta-lora; plain LoRA uses no prior")


def default_rank(photos: Sequence[Path]) -> int:
    return 1 if len(photos) == 1 else 4


def add_stage2_arguments(parser: Parser) -> argparse._ArgumentGroup:
    """Add what one person and a family have in common; return the group of options about faces."""
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
        "--method",
        choices=STEPS,
        help="meta-lora, or lora, which needs no --meta; default: meta-lora, and lora with --start predicted",
    )
    group.add_argument("--steps", type=int, help="optimizer updates; default: 375, 625 for lora")
    group.add_argument(
        "--rank", type=int, help="r2, the rank of the LoRA; default: 1, and 4 for several photos"
    )
    group.add_argument("--lr", type=float, default=4e-4, help="learning rate of AdamW")
    group.add_argument(
        "--start",
        choices=["zero", "predicted"],
        default="zero",
        help="zero: at the base model; predicted, which is ours: at the LoRA that a predictor sees in the "
        "photo, so that --steps may be 0, its default",
    )
    group.add_argument(
        "--predictor", type=Path, help="its file; default: predictor.safetensors beside the model's weights"
    )
    group.add_argument(
        "--eye-weights",
        type=Path,
        help="of the network that it sees with; default: the model's, or the hub's",
    )
    group.add_argument(
        "--no-augment", action="store_true", help="train on the whole photo, without crops and flips"
    )
    add_personal_arguments(group)
    add_training_arguments(parser)

    group = parser.add_argument_group("run")
    group.add_argument(
        "--samples",
        type=int,
        default=4,
        help="pictures in the grid of samples, up to 6; 0: none, as always with --steps 0",
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--format", choices=FORMATS, default="diffusers", help="names in the file")
    add_memory_arguments(parser)
    group = parser.add_argument_group("face")
    group.add_argument("--detector", type=Path, help="YuNet's .onnx file; default: the one in vision/")
    return group


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
        default=Personalization.draws,
        help="independent: times and noise at random; spread, which is ours: times spread evenly, and every "
        "second noise of a shape is the negative of the one before",
    )


def settings_of(args: argparse.Namespace) -> Personalization:
    names = [field.name for field in fields(Personalization) if field.name != "augment"]
    return Personalization(augment=not args.no_augment, **{name: getattr(args, name) for name in names})


if __name__ == "__main__":
    run_script(main, "stopped; a file is written whole or not at all")
