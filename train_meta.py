"""Stage 1, meta-training (paper, section 3 and Algorithm 1): from photos of many people to one `meta.safetensors`.

    python train_meta.py --data /ids --r1 128 --class woman

/ids holds a folder of photos per person, each photo with or without a caption (.txt) of the same name. The same
command again goes on where an interrupted run last saved.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import flux
from data import (
    Person,
    Picture,
    TensorCache,
    add_training_arguments,
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
from flux.loading import HelpFormatter, add_model_arguments, atomic, choose_device, fingerprint, native_size
from flux.memory import checkpoint_blocks, memory_in_use, release
from flux.sampling import flow_loss, generate
from metalora import TARGETS, SlotAdamW, factors, inject, kaiming_, save_meta, use_slots

MUST_STAY = (
    "model",
    "r1",
    "r2",
    "bucket_ids",
    "uses_per_image",
    "bucket_warmup",
    "batch",
    "resolution",
    "targets",
    "seed",
)


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

    def __init__(self, model: flux.Flux, slots: int, args: argparse.Namespace):
        self.model, self.args = model, args
        self.meta_down, self.personal = factors(model, "meta_down"), factors(model, "mid", "up")
        self.slots = slots
        self.meta_optimiser = torch.optim.AdamW(self.meta_down, args.lr, weight_decay=args.weight_decay)
        self.average = [p.detach().clone() for p in self.meta_down] if args.ema else None
        self.step = self.visit = self.bucket_step = 0
        self.bank = args.out / "buckets"

    def open_bucket(self, bucket: int) -> None:
        """Give the bucket its mid and up, and their optimiser: as stored, or fresh on its first turn."""
        self.optimiser = SlotAdamW(self.personal, self.args.lr, self.args.weight_decay)
        file = self.bank / f"{bucket}.pt"
        if file.exists():
            self._set_personal(torch.load(file, map_location="cpu", weights_only=True))
            return
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + bucket)
        for mid, up in zip(self.personal[::2], self.personal[1::2]):
            kaiming_(mid, generator)
            up.data.zero_()

    def close_bucket(self, bucket: int) -> None:
        """Store the bucket's factors and go on to the next; the checkpoint then never lies before a stored bucket."""
        self.bank.mkdir(exist_ok=True)
        with atomic(self.bank / f"{bucket}.pt") as temporary:
            torch.save(self._personal_state(), temporary)
        self.visit, self.bucket_step = self.visit + 1, 0

    def _personal_state(self) -> dict:
        return {"factors": [p.data for p in self.personal], "optimiser": self.optimiser.state_dict()}

    def _set_personal(self, state: dict) -> None:
        for own, stored in zip(self.personal, state["factors"], strict=True):
            own.data.copy_(stored)
        self.optimiser.load_state_dict(state["optimiser"])

    def save(self) -> None:
        state = {
            "step": self.step,
            "visit": self.visit,
            "bucket_step": self.bucket_step,
            "meta_down": [p.data for p in self.meta_down],
            "meta_optimiser": self.meta_optimiser.state_dict(),
            "average": self.average,
            # Between two buckets there is nothing personal to keep: the bank has it.
            "personal": self._personal_state() if self.bucket_step else None,
        }
        with atomic(self.args.out / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def resume(self) -> dict | None:
        """Load the checkpoint, if there is one; return the state of the bucket it was in the middle of."""
        file = self.args.out / "checkpoint.pt"
        if not file.exists():
            return None
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.step, self.visit, self.bucket_step = state["step"], state["visit"], state["bucket_step"]
        for own, stored in zip(self.meta_down, state["meta_down"], strict=True):
            own.data.copy_(stored)
        self.meta_optimiser.load_state_dict(state["meta_optimiser"])
        self.average = (
            [p.to(own.device) for p, own in zip(state["average"], self.meta_down)] if self.average else None
        )
        return state["personal"]

    def update(self, batch: dict[str, Tensor], slots: Tensor, warm_up: bool) -> float:
        """One step of Algorithm 1: move the identities present, and after the bucket's warm-up meta_down too."""
        for p in self.meta_down:
            p.requires_grad_(not warm_up)
        use_slots(self.model, slots)  # they stay set until backward has returned
        loss = flow_loss(self.model, **batch, guidance=self.args.train_guidance)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            self.personal + ([] if warm_up else self.meta_down), self.args.clip_grad
        )
        self.optimiser.step(slots.unique())
        if not warm_up:
            self.meta_optimiser.step()
            self.meta_optimiser.zero_grad()
            if self.average:
                torch._foreach_lerp_(self.average, [p.data for p in self.meta_down], 1 - self.args.ema)
        return loss.item()


def encode(
    people: list[Person], folder: Path, cache: TensorCache, args, device, dtype
) -> tuple[dict, dict, list[str]]:
    """Encode all photos and captions to the cache; the encoders are gone when this returns.

    Returns, by photo, the picture and its two keys; the caption keys; and the keys of the sample prompts.
    """
    default = f"a photo of a {args.class_word}"
    autoencoder = flux.load_autoencoder(folder / "ae.safetensors", device, dtype)
    multiple = 2 * autoencoder.sizes.reduction
    photos = [photo for person in people for photo in person.photos]
    pictures = [Picture(p.path, fit_shape(photo_size(p.path), args.resolution, multiple)) for p in photos]
    keys = encode_pictures(pictures, autoencoder, fingerprint(folder / "ae.safetensors"), cache)
    del autoencoder
    release(device)

    conditioner = flux.load_conditioner(folder, device, dtype, args.t5_length)
    captions = [photo.caption or default for photo in photos]
    prompts = list(dict.fromkeys([*captions, default, f"{default} smiling at the beach"]))
    encoder = f"{fingerprint(folder / 'text_encoder', folder / 'text_encoder_2')} {args.t5_length} {dtype}"
    prompt_keys = dict(zip(prompts, encode_prompts(prompts, conditioner, encoder, cache)))
    del conditioner
    release(device)

    by_photo = {
        photo.path: (picture.shape, key, prompt_keys[caption])
        for photo, picture, key, caption in zip(photos, pictures, keys, captions)
    }
    return by_photo, [prompt_keys[prompt] for prompt in prompts[-2:]]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, dtype = choose_device(args)
    people = scan_people(args.data)
    folder = flux.find_model(args.model)
    args.resolution = args.resolution or native_size(folder)
    args.out.mkdir(parents=True, exist_ok=True)
    check_settings(args, [person.name for person in people])
    print(f"{len(people)} people, {sum(len(p.photos) for p in people)} photos, in {args.data}")

    cache = TensorCache(args.out / "cache")
    by_photo, sample_keys = encode(people, folder, cache, args, device, dtype)
    buckets = deal_buckets(people, args.bucket_ids, torch.Generator().manual_seed(args.seed))
    slots = max(len(bucket) for bucket in buckets)

    model = flux.load_flux(flux.find_transformer(folder), device, dtype)
    inject(model, args.r1, args.r2, slots, args.targets, torch.Generator().manual_seed(args.seed))
    if not args.no_checkpointing:
        checkpoint_blocks(model)
    trainer = Trainer(model, slots, args)
    interrupted = trainer.resume()
    bar = tqdm(
        total=args.steps, initial=trainer.step, desc="meta-training", mininterval=1, dynamic_ncols=True
    )
    log = (args.out / "log.jsonl").open("a", buffering=1)

    while trainer.step < args.steps:
        # Buckets take turns. Which photos meet in a batch depends on the seed and the visit alone.
        index = trainer.visit % len(buckets)
        bucket = buckets[index]
        trainer.open_bucket(index)
        if interrupted:
            trainer._set_personal(interrupted)
            interrupted = None
        photos = [
            (slot, *by_photo[photo.path]) for slot, person in enumerate(bucket) for photo in person.photos
        ]
        loaded = {key: cache.get(key) for key in {key for _, _, *keys in photos for key in keys}}
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + trainer.visit)
        batches = deal_batches([shape for _, shape, *_ in photos], args.uses_per_image, args.batch, generator)
        q_bucket, q_warmup = len(batches), int(args.bucket_warmup * len(batches))

        while trainer.bucket_step < q_bucket and trainer.step < args.steps:
            chosen = [photos[k] for k in batches[trainer.bucket_step]]
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + trainer.step)
            batch = make_batch(
                [(loaded[a], loaded[b]) for *_, a, b in chosen], generator, args, device, dtype
            )
            warm_up = trainer.bucket_step < q_warmup
            loss = trainer.update(batch, torch.tensor([slot for slot, *_ in chosen], device=device), warm_up)
            trainer.step += 1
            trainer.bucket_step += 1

            line = {"step": trainer.step, "bucket": index, "warm_up": warm_up, "loss": round(loss, 5)}
            log.write(json.dumps({**line, "time": round(time.time(), 1)}) + "\n")
            bar.set_postfix(
                loss=f"{loss:.3f}", bucket=index, warm_up=warm_up, memory=memory_in_use(device), refresh=False
            )
            bar.update()
            if args.sample_every and trainer.step % args.sample_every == 0:
                sample_grid(trainer, bucket, sample_keys, cache, folder, args, device)
            if trainer.step % args.save_every == 0 and trainer.bucket_step < q_bucket:
                trainer.save()
        if trainer.bucket_step == q_bucket:
            trainer.close_bucket(index)
        trainer.save()

    log.close()
    bar.close()
    metadata = {
        "method": "meta-lora stage 1",
        "class": args.class_word,
        "base_model": flux.find_transformer(folder).name,
    }
    metadata |= {name: getattr(args, name) for name in ("r1", "r2", "targets", "steps", "seed")}
    save_meta(model, args.out / "meta.safetensors", metadata, trainer.average)
    print(
        f"{args.out / 'meta.safetensors'}: next, python personalize.py PHOTO --meta {args.out / 'meta.safetensors'}"
    )


def check_settings(args: argparse.Namespace, names: list[str]) -> None:
    """Save the settings beside the result, or compare them with those of the run that is to go on there."""
    file = args.out / "settings.json"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings["people"] = names
    if file.exists() and (args.out / "checkpoint.pt").exists():
        before = json.loads(file.read_text())
        changed = [key for key in (*MUST_STAY, "people") if before.get(key) != settings[key]]
        if changed:
            lines = [f"  {key}: {before.get(key)} -> {settings[key]}" for key in changed]
            raise ValueError(
                f"{args.out} holds a run with other settings; take another --out, or the same settings:\n"
                + "\n".join(lines)
            )
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def sample_grid(
    trainer: Trainer, bucket: list[Person], prompt_keys: list[str], cache, folder: Path, args, device
) -> None:
    """Draw the bucket's first two people as the model knows them by now: a photo, then pictures from fixed seeds."""
    autoencoder = flux.load_autoencoder(folder / "ae.safetensors", device, trainer.model.img_in.weight.dtype)
    rows = []
    for slot, person in enumerate(bucket[:2]):
        use_slots(trainer.model, torch.tensor([slot], device=device))
        row = [read_photo(person.photos[0].path)]
        for key in prompt_keys:
            prompt = cache.get(key)
            prompt = prompt["txt"][None], prompt["pooled"][None]
            row += generate(
                trainer.model,
                autoencoder,
                prompt,
                [args.seed, args.seed + 1],
                (args.resolution, args.resolution),
            )
        rows.append(row)
    (args.out / "samples").mkdir(exist_ok=True)
    with atomic(args.out / "samples" / f"{trainer.step:06d}.png") as temporary:
        contact_sheet(rows, [person.name for person in bucket[:2]], ["photo", "seed 0", "seed 1"]).save(
            temporary
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
