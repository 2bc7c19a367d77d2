"""Stage 1, meta-training (paper, section 3 and Algorithm 1): photos of many people to one `meta.safetensors`.

    python train_meta.py --data /ids --r1 128 --class woman

/ids holds a folder of photos per person, each photo with or without a caption (.txt) of the same name. The
same command again goes on where an interrupted run last saved.
"""

import argparse
import json
import time
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm

import flux
from data import (
    Person,
    Picture,
    TensorCache,
    add_training_arguments,
    common_shape,
    contact_sheet,
    deal_batches,
    deal_buckets,
    encode_pictures,
    encode_prompts,
    fit_shape,
    make_batch,
    photo_size,
    read_photo,
    scan_people,
)
from flux.loading import (
    HelpFormatter,
    add_model_arguments,
    atomic,
    choose_device,
    fingerprint,
    native_size,
    run_script,
)
from flux.memory import checkpoint_blocks, memory_in_use, release
from flux.sampling import flow_loss, generate
from metalora import TARGETS, SlotAdamW, factors, inject, kaiming_, save_meta, use_slots

# All other settings must stay as they are when a run goes on.
MAY_CHANGE = ("data", "out", "steps", "save_every", "sample_every", "no_checkpointing", "device")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of people: <person>/*.jpg|png|webp")
    parser.add_argument(
        "--out", type=Path, default=Path("out/meta"), help="folder for everything that is written"
    )
    parser.add_argument(
        "--class",
        dest="class_word",
        default="person",
        help="word of the default caption; paper: woman or man",
    )
    add_model_arguments(parser)

    group = parser.add_argument_group("method (defaults: the paper's)")
    group.add_argument("--r1", type=int, default=128, help="rows of meta_down")
    group.add_argument("--r2", type=int, default=1, help="rank of an identity's update")
    group.add_argument("--targets", choices=TARGETS, default="all", help="which layers are adapted")
    group.add_argument("--steps", type=int, default=50_000, help="optimiser updates in all")
    group.add_argument("--bucket-ids", type=int, default=50, help="people trained together")
    group.add_argument("--uses-per-image", type=int, default=10, help="times a bucket shows each photo")
    group.add_argument(
        "--bucket-warmup", type=float, default=0.4, help="part of a bucket's steps with meta_down frozen"
    )
    group.add_argument("--batch", type=int, default=4, help="photos in an update")
    group.add_argument("--lr", type=float, default=4e-4, help="learning rate of AdamW")
    group.add_argument(
        "--resolution",
        type=int,
        help="photos are shrunk to this side squared, in pixels; default: the model's, 1024",
    )
    group.add_argument(
        "--ema", type=float, default=0.0, help="decay of an average of meta_down to save instead; 0: none"
    )
    add_training_arguments(parser)

    group = parser.add_argument_group("run")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--sample-every", type=int, default=1000, help="steps between sample grids; 0: none")
    group.add_argument(
        "--no-checkpointing", action="store_true", help="keep all activations: faster, more memory"
    )
    group.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 <= args.bucket_warmup < 1:
        parser.error(f"--bucket-warmup {args.bucket_warmup}: a part of a bucket's steps, from 0 to below 1")
    for name in ("r1", "r2", "steps", "bucket_ids", "uses_per_image", "batch", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    return args


class Trainer:
    """Everything a run needs to go on: model, optimisers and the position in the order of buckets."""

    def __init__(self, model: flux.Flux, args: argparse.Namespace):
        self.model, self.args = model, args
        self.meta_down, self.personal = factors(model, "meta_down"), factors(model, "mid", "up")
        self.meta_optimiser = torch.optim.AdamW(self.meta_down, args.lr, weight_decay=args.weight_decay)
        self.average = [p.detach().clone() for p in self.meta_down] if args.ema else None
        self.step = self.visit = self.bucket_step = 0
        self.interrupted = None  # the state of the bucket in which a checkpoint was made
        self.bank = args.out / "buckets"

    def open_bucket(self, bucket: int, first_turn: bool) -> None:
        """Give the bucket its mid, up and their optimiser: fresh on its first turn, then as it left them."""
        self.optimiser = SlotAdamW(self.personal, self.args.lr, self.args.weight_decay)
        state, self.interrupted = self.interrupted, None
        if state is None and first_turn:
            generator = generator_of(self.args.seed, bucket)
            for mid, up in zip(self.personal[::2], self.personal[1::2]):
                kaiming_(mid, generator)
                up.data.zero_()
            return
        state = state or torch.load(self.bank / f"{bucket}.pt", map_location="cpu", weights_only=True)
        for own, stored in zip(self.personal, state["factors"], strict=True):
            own.data.copy_(stored)
        self.optimiser.load_state_dict(state["optimiser"])

    def close_bucket(self, bucket: int) -> None:
        """Store the bucket until its next turn.

        The checkpoint must hold the same state already: a run that stops in between then closes the bucket
        once more; the other way round it would train the stored bucket a second time.
        """
        self.bank.mkdir(exist_ok=True)
        with atomic(self.bank / f"{bucket}.pt") as temporary:
            torch.save(self.bucket_state(), temporary)
        self.visit, self.bucket_step = self.visit + 1, 0

    def bucket_state(self) -> dict:
        return {"factors": [p.data for p in self.personal], "optimiser": self.optimiser.state_dict()}

    def save(self) -> None:
        state = {
            "step": self.step,
            "visit": self.visit,
            "bucket_step": self.bucket_step,
            "meta_down": [p.data for p in self.meta_down],
            "meta_optimiser": self.meta_optimiser.state_dict(),
            "average": self.average,
            "open_bucket": self.bucket_state(),
        }
        with atomic(self.args.out / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        """Load the checkpoint, if there is one."""
        file = self.args.out / "checkpoint.pt"
        if not file.exists():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.step, self.visit, self.bucket_step = state["step"], state["visit"], state["bucket_step"]
        for own, stored in zip(self.meta_down, state["meta_down"], strict=True):
            own.data.copy_(stored)
        self.meta_optimiser.load_state_dict(state["meta_optimiser"])
        for own, stored in zip(self.average or (), state["average"] or (), strict=True):
            own.copy_(stored)
        self.interrupted = state["open_bucket"]

    def update(self, batch: dict[str, Tensor], slots: Tensor, warm_up: bool) -> float:
        """Move mid and up of the people in the batch and, after the warm-up, meta_down; return the loss."""
        for p in self.meta_down:
            p.requires_grad_(not warm_up)
        use_slots(self.model, slots)  # they stay set until backward has returned
        loss = flow_loss(self.model, **batch, guidance=self.args.train_guidance)
        loss.backward()
        moving = self.personal if warm_up else [*self.personal, *self.meta_down]
        torch.nn.utils.clip_grad_norm_(moving, self.args.clip_grad)
        self.optimiser.step(slots.unique())
        if not warm_up:
            self.meta_optimiser.step()
            self.meta_optimiser.zero_grad()
            if self.average:
                torch._foreach_lerp_(self.average, [p.data for p in self.meta_down], 1 - self.args.ema)
        return loss.item()


def generator_of(seed: int, number: int) -> torch.Generator:
    """Return the generator of the numbered bucket, visit or step, so that a run can go on anywhere."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def encode(
    people: list[Person], folder: Path, cache: TensorCache, args, device, dtype
) -> tuple[dict[Path, tuple], dict[str, tuple[Tensor, Tensor]]]:
    """Encode all photos and captions to the cache; the encoders are gone when this returns.

    Returns by photo its shape and its keys in the cache, of latents and of caption; and by text what the
    sample grids show: txt (1, l, d) and pooled (1, d).
    """
    default = f"a photo of a {args.class_word}"
    shown = [default, f"{default} smiling at the beach"]
    autoencoder = flux.load_autoencoder(folder / "ae.safetensors", device, dtype)
    multiple = 2 * autoencoder.sizes.reduction
    photos = [photo for person in people for photo in person.photos]
    shapes = [common_shape(photo_size(photo.path), args.resolution, multiple) for photo in photos]
    pictures = [Picture(photo.path, shape) for photo, shape in zip(photos, shapes)]
    keys = encode_pictures(pictures, autoencoder, f"{fingerprint(folder / 'ae.safetensors')} {dtype}", cache)
    del autoencoder
    release(device)

    conditioner = flux.load_conditioner(folder, device, dtype, args.t5_length)
    captions = [photo.caption or default for photo in photos]
    prompts = list(dict.fromkeys([*captions, *shown]))
    encoder = f"{fingerprint(folder / 'text_encoder', folder / 'text_encoder_2')} {args.t5_length} {dtype}"
    prompt_keys = dict(zip(prompts, encode_prompts(prompts, conditioner, encoder, cache)))
    del conditioner
    release(device)

    by_photo = {
        photo.path: (shape, key, prompt_keys[caption])
        for photo, shape, key, caption in zip(photos, shapes, keys, captions)
    }
    encoded = {text: cache.get(prompt_keys[text]) for text in shown}
    return by_photo, {text: (prompt["txt"][None], prompt["pooled"][None]) for text, prompt in encoded.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, dtype = choose_device(args)
    people = scan_people(args.data)
    folder = flux.find_model(args.model)
    args.resolution = args.resolution or native_size(folder)
    args.out.mkdir(parents=True, exist_ok=True)
    check_settings(args, people)
    count = sum(len(person.photos) for person in people)
    print(f"{len(people)} people, {count} photos, in {args.data}")
    if (needed := count * args.uses_per_image // args.batch) > args.steps:
        print(f"--steps {args.steps} end before everybody had a turn, which takes about {needed}")

    cache = TensorCache(args.out / "cache")
    by_photo, sample_prompts = encode(people, folder, cache, args, device, dtype)
    buckets = deal_buckets(people, args.bucket_ids, torch.Generator().manual_seed(args.seed))
    most = max(len(bucket) for bucket in buckets)

    transformer = flux.find_transformer(folder)
    model = flux.load_flux(transformer, device, dtype)
    inject(model, args.r1, args.r2, most, args.targets, torch.Generator().manual_seed(args.seed))
    if not args.no_checkpointing:
        checkpoint_blocks(model)
    trainer = Trainer(model, args)
    trainer.resume()
    bar = tqdm(
        total=args.steps, initial=trainer.step, desc="meta-training", mininterval=1, dynamic_ncols=True
    )
    log = open_log(args.out / "log.jsonl", trainer.step)

    # Algorithm 1. Its i_curr is `step`, its i_cb `bucket_step`; both are counted on after an interruption.
    while trainer.step < args.steps:
        number = trainer.visit % len(buckets)  # buckets take turns
        bucket = buckets[number]
        trainer.open_bucket(number, first_turn=trainer.visit < len(buckets))
        slots, shapes, latents, captions = zip(
            *((slot, *by_photo[photo.path]) for slot, person in enumerate(bucket) for photo in person.photos)
        )
        loaded = {key: cache.get(key) for key in {*latents, *captions}}
        generator = generator_of(args.seed, trainer.visit)
        batches = deal_batches(shapes, args.uses_per_image, args.batch, generator)
        q_bucket, q_warmup = len(batches), round(args.bucket_warmup * len(batches))

        while trainer.bucket_step < q_bucket and trainer.step < args.steps:
            chosen = batches[trainer.bucket_step]
            entries = [(loaded[latents[k]], loaded[captions[k]]) for k in chosen]
            batch = make_batch(entries, generator_of(args.seed, trainer.step), args, device, dtype)
            present = torch.tensor([slots[k] for k in chosen], device=device)
            warm_up = trainer.bucket_step < q_warmup
            loss = trainer.update(batch, present, warm_up)
            trainer.step += 1
            trainer.bucket_step += 1

            status = {"bucket": number, "warm_up": warm_up}
            line = {"step": trainer.step, **status, "loss": round(loss, 5), "time": round(time.time(), 1)}
            log.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{loss:.3f}", **status, memory=memory_in_use(device), refresh=False)
            bar.update()
            if args.sample_every and trainer.step % args.sample_every == 0:
                sample_grid(trainer, bucket[:2], sample_prompts, folder, device, dtype)
            ends = trainer.bucket_step == q_bucket or trainer.step == args.steps
            if ends or trainer.step % args.save_every == 0:
                trainer.save()
        if trainer.bucket_step == q_bucket:
            trainer.close_bucket(number)

    log.close()
    bar.close()
    metadata = {
        "method": "meta-lora stage 1",
        "class": args.class_word,
        "base_model": transformer.name,
        "steps": trainer.step,
    }
    metadata |= {name: getattr(args, name) for name in ("r1", "r2", "targets", "lr", "seed")}
    result = args.out / "meta.safetensors"
    save_meta(model, result, metadata, trainer.average)
    print(f"{result}: next, python personalize.py PHOTO --model {args.model} --meta {result}")


def check_settings(args: argparse.Namespace, people: list[Person]) -> None:
    """Save the settings beside the result, or compare them with those of the run that is to go on there."""
    file = args.out / "settings.json"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {f"photos of {person.name}": len(person.photos) for person in people}
    if (args.out / "checkpoint.pt").exists():
        before = json.loads(file.read_text())
        changed = [key for key in before | settings if before.get(key) != settings.get(key)]
        if changed := [key for key in changed if key not in MAY_CHANGE]:
            lines = [f"  {key}: {before.get(key)} -> {settings.get(key)}" for key in changed]
            raise ValueError(
                f"{args.out} holds a run with other settings; take another --out, or the same settings:\n"
                + "\n".join(lines)
            )
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def open_log(file: Path, step: int) -> TextIO:
    """Open the log, a line per step, to go on after `step`: lines beyond the checkpoint are dropped."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    with atomic(file) as temporary:
        temporary.write_text("".join(lines[:step]))
    return file.open("a", buffering=1)


def sample_grid(trainer: Trainer, people: list[Person], prompts: dict, folder: Path, device, dtype) -> None:
    """Draw the bucket's first people as the model knows them: a photo, then two pictures of each prompt."""
    autoencoder = flux.load_autoencoder(folder / "ae.safetensors", device, dtype)
    side, rows = trainer.args.resolution, []
    size = fit_shape((side, side), side, 2 * autoencoder.sizes.reduction)
    for slot, person in enumerate(people):
        use_slots(trainer.model, torch.tensor([slot], device=device))
        rows.append([read_photo(person.photos[0].path)])
        for prompt in prompts.values():
            for seed in (0, 1):
                rows[-1] += generate(trainer.model, autoencoder, prompt, [seed], size)
    titles = ["photo", *(f"{text}, seed {seed}" for text in prompts for seed in (0, 1))]
    (trainer.args.out / "samples").mkdir(exist_ok=True)
    with atomic(trainer.args.out / "samples" / f"{trainer.step:06d}.png") as temporary:
        contact_sheet(rows, [person.name for person in people], titles).save(temporary)


if __name__ == "__main__":
    run_script(
        main, "stopped; the same command goes on from the last checkpoint, if there is one (--save-every)"
    )
