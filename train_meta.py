"""Stage 1, meta-training (paper, section 3 and Algorithm 1): photos of many people to one `meta.safetensors`.

    python train_meta.py --data /ids --r1 128 --class woman

/ids holds a folder of photos per person, each photo with or without a caption (.txt) of the same name. The
same command again goes on where the run was, however it ended. On several GPUs, with --batch photos on each:
torchrun --nproc-per-node 8 train_meta.py ...
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import flux
from flux.errors import UserError
from flux.finding import find_files
from flux.loading import ModelFiles, native_size
from flux.memory import checkpoint_blocks, memory_in_use, weight_bytes
from flux.sampling import flow_loss, generate
from metalora import TARGETS, SlotAdamW, factors, inject, kaiming_, save_meta, use_slots
from people.buckets import count_batches, deal_batches, deal_buckets
from people.cache import TensorCache
from people.crops import fit_shape
from people.dataset import Recipe
from people.folders import Person, list_folders
from people.latents import make_batch
from people.manifest import Roster, survey
from people.photos import Size, read_photo
from run.arguments import (
    HelpFormatter,
    Parser,
    add_memory_arguments,
    add_model_arguments,
    add_training_arguments,
    choose_device,
)
from run.checkpoints import Bank, Checkpoints, check_settings
from run.command import Stop, bytes_of, command_line, explain_out_of_memory, run_script
from run.files import alone, atomic, fingerprint
from run.log import Log
from run.pictures import contact_sheet
from run.plan import Way, files_to_plan, follow, make_plan
from run.ranks import Team, shard
from run.terminal import printable

# All other settings must stay as they are when a run goes on.
MAY_CHANGE = ("data", "out", "steps", "save_every", "sample_every", "keep_buckets", "strict")
MAY_CHANGE += ("device", "vram", "stream", "checkpoint", "base_dtype", "compile", "plan", "world", "shard")
MOST_SKIPPED = 10  # steps in a row whose loss or gradient is not finite


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    group = parser.add_argument_group("people")
    group.add_argument("--data", type=Path, required=True, help="folder of people: <person>/*.jpg|png|webp")
    group.add_argument(
        "--class",
        dest="class_word",
        default="person",
        help="word of the default caption; paper: woman or man",
    )
    group.add_argument(
        "--resolution",
        type=int,
        help="photos are shrunk to this side squared, in pixels; default: the model's, 1024",
    )
    group.add_argument(
        "--min-side",
        type=int,
        help="photos with a shorter side are left out, in pixels; default: an eighth of --resolution",
    )
    group.add_argument(
        "--min-photos", type=int, default=1, help="people with fewer good photos are left out; paper: 20"
    )
    group.add_argument(
        "--strict", action="store_true", help="stop when a photo is not used, or not used as it is"
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
    group.add_argument("--batch", type=int, default=4, help="photos in an update, of each rank")
    group.add_argument("--lr", type=float, default=4e-4, help="learning rate of AdamW")
    group.add_argument(
        "--ema", type=float, default=0.0, help="decay of an average of meta_down to save instead; 0: none"
    )
    add_training_arguments(parser)

    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", type=Path, default=Path("out/meta"), help="folder for everything that is written"
    )
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--sample-every", type=int, default=1000, help="steps between sample grids; 0: none")
    group.add_argument(
        "--keep-buckets",
        action="store_true",
        help="store also the buckets that do not come back before --steps, so that --steps can be raised",
    )
    group.add_argument("--seed", type=int, default=0, help="of the start, the order, times and noise")
    group.add_argument(
        "--shard",
        action="store_true",
        help="spread the frozen weights over torchrun's ranks (FSDP2): for models that do not fit one card",
    )
    add_memory_arguments(parser)
    args = parser.parse_args(argv)
    if args.shard and (args.stream not in ("auto", "0") or args.base_dtype == "fp8" or args.compile):
        parser.error("--shard goes neither with --stream nor with --base-dtype fp8 nor with --compile")
    if args.shard and (args.plan or args.vram):
        parser.error("--shard is not planned: leave --plan and --vram away")
    if not 0 <= args.bucket_warmup < 1:
        parser.error(f"--bucket-warmup {args.bucket_warmup}: a part of a bucket's steps, from 0 to below 1")
    if not 0 <= args.ema < 1:
        parser.error(f"--ema {args.ema}: a decay, from 0 to below 1")
    return args


class Trainer:
    """Everything a run needs to go on: model, optimisers and the position in the order of buckets.

    lengths: the steps of each bucket. In a team every rank has a trainer, with the mid and up of its people.
    """

    def __init__(
        self,
        model: flux.Flux,
        args: argparse.Namespace,
        checkpoints: Checkpoints,
        bank: Bank,
        lengths: list[int],
        team: Team,
    ):
        self.model, self.args, self.checkpoints, self.bank = model, args, checkpoints, bank
        self.lengths, self.team = lengths, team
        self.meta_down, self.personal = factors(model, "meta_down"), factors(model, "mid", "up")
        self.most = len(self.personal[0])  # people in a bucket
        for p in self.personal:
            p.data = team.own(p.data)
        decay = args.weight_decay
        self.meta_optimiser = torch.optim.AdamW(self.meta_down, args.lr, weight_decay=decay, fused=True)
        self.average = [p.detach().clone() for p in self.meta_down] if args.ema else None
        self.step = self.visit = self.bucket_step = 0
        self.saved_visit = 0  # that of the last checkpoint
        self.skipped = 0  # steps in a row, the last one included
        self.interrupted = None  # the state of the bucket in which a checkpoint was made

    def open_bucket(self, bucket: int) -> None:
        """Give the bucket its mid, up and their optimiser: fresh on its first turn, then as it left them."""
        if self.visit > bucket and self.bank.buckets == 1 and not self.interrupted:
            return  # the only bucket has never been away
        self.optimiser = SlotAdamW(self.personal, self.args.lr, self.args.weight_decay)
        state, self.interrupted = self.interrupted, None
        if state is None and self.visit == bucket:
            generator = generator_of(self.args.seed, bucket)
            for mid, up in zip(self.personal[::2], self.personal[1::2]):
                everyone = torch.empty(self.most, *mid.shape[1:])  # the same start in teams of any size
                kaiming_(everyone, generator)
                mid.data.copy_(self.team.own(everyone))
                up.data.zero_()
            return
        state = state or self.team.own(self.bank.fetch(self.visit))
        for own, stored in zip(self.personal, state["factors"], strict=True):
            own.data.copy_(stored)
        self.optimiser.load_state_dict(state["optimiser"])

    def close_bucket(self, returns: bool) -> None:
        """Store the bucket until its next turn, if there will be one.

        The checkpoint must hold the same state already: a run that stops in between then closes the bucket
        once more; the other way round it would train the stored bucket a second time.
        """
        if returns and self.bank.buckets > 1:
            self.bank.store(self.visit, self.bucket_state())
        self.visit, self.bucket_step = self.visit + 1, 0

    def bucket_state(self) -> dict:
        """Return mid, up and the optimiser's state of the open bucket's people, of all ranks together."""
        own = {"factors": [p.data for p in self.personal], "optimiser": self.optimiser.state_dict()}
        return self.team.gather(own, self.most)

    def save(self) -> None:
        """Write a checkpoint: all that the run needs to go on."""
        state = {
            "step": self.step,
            "visit": self.visit,
            "bucket_step": self.bucket_step,
            "q_bucket": self.lengths[self.visit % len(self.lengths)],
            "skipped": self.skipped,
            "meta_down": [p.data for p in self.meta_down],
            "meta_optimiser": self.meta_optimiser.state_dict(),
            "average": self.average,
            "open_bucket": self.bucket_state(),
        }
        self.checkpoints.save(self.step, state)
        self.bank.forget(before=self.saved_visit + 1 - self.bank.buckets)  # the checkpoint before needs these
        self.saved_visit = self.visit

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one; forget what came after it.

        With another number of ranks a bucket has another number of steps: its turn goes on at the same part.
        """
        with self.team.lead_first():  # damaged ones are then out of the way
            state = self.checkpoints.load()
        newest = self.team.once(lambda: state and state["step"])
        if newest != (state and state["step"]):
            raise UserError(f"{self.checkpoints.folder} is not the same folder for all ranks")
        if state is None:
            self.bank.forget(since=0)  # another run's
            return
        for name in ("step", "visit", "bucket_step", "skipped"):
            setattr(self, name, state[name])
        q_bucket = self.lengths[self.visit % len(self.lengths)]
        self.bucket_step = round(self.bucket_step * q_bucket / state.get("q_bucket", q_bucket))
        for own, stored in zip(self.meta_down, state["meta_down"], strict=True):
            own.data.copy_(stored)
        self.meta_optimiser.load_state_dict(state["meta_optimiser"])
        for own, stored in zip(self.average or (), state["average"] or (), strict=True):
            own.copy_(stored)
        self.interrupted = self.team.own(state["open_bucket"])
        self.saved_visit = self.visit
        self.bank.forget(since=self.visit)

    def update(self, batch: dict[str, Tensor], slots: Tensor, warm_up: bool) -> dict[str, float]:
        """Move mid and up of the people in the batch and, after the warm-up, meta_down.

        Returns the loss and the gradient's norms before clipping. If one is not finite, nothing moves. In a
        team all of them are those of the batches of all ranks, taken as one.
        """
        for p in self.meta_down:
            p.requires_grad_(not warm_up)
        use_slots(self.model, slots)  # they stay set until backward has returned
        loss = flow_loss(self.model, **batch, guidance=self.args.train_guidance)
        share = len(slots) / self.team.sum(len(slots))
        (loss * share).backward()
        loss = self.team.sum(loss.detach() * share)
        if not warm_up:
            self.team.add_up_([p.grad for p in self.meta_down])
        parts = {"mid": self.personal[::2], "up": self.personal[1::2]}
        parts |= {} if warm_up else {"meta_down": self.meta_down}
        norms = {name: get_total_norm([p.grad for p in part]) for name, part in parts.items()}
        norms |= {name: self.team.norm(norms[name]) for name in ("mid", "up")}
        norm = get_total_norm(norms.values())
        self.skipped = 0 if (loss + norm).isfinite() else self.skipped + 1
        if self.skipped:
            for p in (*self.personal, *self.meta_down):
                p.grad = None
        else:
            self.descend(sum(parts.values(), []), norm, slots, warm_up)
        return {"loss": loss.item(), **{f"grad_{name}": value.item() for name, value in norms.items()}}

    def descend(self, moving: list[Tensor], norm: Tensor, slots: Tensor, warm_up: bool) -> None:
        """Clip the gradients and step."""
        clip_grads_with_norm_(moving, self.args.clip_grad, norm)
        self.optimiser.step(slots.unique())
        if not warm_up:
            self.meta_optimiser.step()
            self.meta_optimiser.zero_grad()
            if self.average:
                torch._foreach_lerp_(self.average, [p.data for p in self.meta_down], 1 - self.args.ema)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average, if there is one, in the place of meta_down for a while."""
        live = [p.data for p in self.meta_down]
        for p, average in zip(self.meta_down, self.average or ()):
            p.data = average
        try:
            yield
        finally:
            for p, data in zip(self.meta_down, live):
                p.data = data

    def resident(self) -> dict[str, int]:
        """Return what lies in memory, in bytes by name."""
        trained = [*self.meta_down, *self.personal]
        frozen = weight_bytes(self.model) - bytes_of(trained)
        return {
            "the frozen base": frozen // self.team.size if self.args.shard else frozen,
            "meta_down, gradient, AdamW's state": (4 + bool(self.average)) * bytes_of(self.meta_down),
            "mid and up of a bucket, gradient, AdamW's state": 4 * bytes_of(self.personal),
        }


def generator_of(seed: int, number: int, rank: int = 0) -> torch.Generator:
    """Return a rank's generator of the numbered bucket, visit or step, so that a run can go on anywhere."""
    # Ranks are far apart modulo 2^32: torch looks at no more of a seed.
    return torch.Generator().manual_seed(seed * 1_000_003 + number + rank * 2_654_435_761)


def deal_turn(
    q_bucket: int, shapes: list[Size], args: argparse.Namespace, generator: torch.Generator
) -> list[list[int]]:
    """Deal a bucket's batches; where other ranks have more of them, these photos are dealt once more."""
    batches = []
    while len(batches) < q_bucket:
        batches += deal_batches(shapes, args.uses_per_image, args.batch, generator)
    return batches[:q_bucket]


def plan(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, parts: dict[str, Path]) -> Way:
    """Choose how the transformer fits; parts: the model's files, as far as they are there."""
    settings = {"r1": args.r1, "r2": args.r2, "batch": args.batch, "average": bool(args.ema)}
    settings["identities"] = -(-args.bucket_ids // args.world)
    return make_plan(args, "stage1", device, dtype, parts, args.resolution, **settings)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    team = Team()  # of one, unless torchrun has started more
    args.world = team.size
    if args.plan:
        plan(args, *choose_device(args), files_to_plan(args))
        return
    if args.shard and team.size == 1:
        raise UserError("--shard spreads weights over several processes: start them with torchrun")
    device, dtype = choose_device(args)
    device = team.device(device)
    args.dtype = str(dtype)
    again = command_line(Path(__file__).name, argv, team.command)
    list_folders(args.data)
    with team.together(device):
        with team.lead_first():  # it may have to be downloaded
            files = find_files(args)
        args.resolution = args.resolution or native_size(files.folder)
        args.min_side = args.resolution // 8 if args.min_side is None else args.min_side
        with alone(args.out) if team.leads else nullcontext(), Stop() as stop:
            team.wait()  # until the folder is ours
            try:
                finished = train(args, files, device, dtype, stop, team)
            except torch.OutOfMemoryError as error:
                raise UserError(explain_out_of_memory(error, device, stop.resident)) from error
            except KeyboardInterrupt:
                if stop.wanted or team.size > 1:  # the second time, or the other ranks are elsewhere
                    raise
                finished = False
    if not finished and team.leads:
        print(f"\nstopped; this goes on:\n  {again}")


def train(args: argparse.Namespace, files: ModelFiles, device, dtype, stop: Stop, team: Team) -> bool:
    """Run Algorithm 1, or go on with it; return whether it came to its end."""
    if args.shard:
        blocks = "all" if args.checkpoint == "auto" else args.checkpoint
        way = Way(int(blocks) if blocks.isdecimal() else blocks)
        checkpoint_blocks(flux.load_flux(files.transformer, "meta"), way.checkpoint)  # are there so many?
    else:
        way = team.once(lambda: plan(args, device, dtype, vars(files)))
    recipe = Recipe(files, args, dtype)

    def look() -> Roster:
        roster, report = survey(
            args.data, args.out / "people.jsonl", recipe.shape, args.min_side, args.min_photos
        )
        report.tell(args.data, args.out / "data.tsv", args.strict)
        return roster

    people = team.once(look)
    checkpoints = Checkpoints(args.out / "checkpoints", team.leads)
    if (old := args.out / "checkpoint.pt").exists() and not checkpoints.any():
        raise UserError(f"{old} is of a version that this one cannot go on from: take another --out")
    base = fingerprint(files.transformer)
    settings = {**vars(args), "base": base, "fp8": way.fp8, **people.contents()}
    file, started = args.out / "settings.json", checkpoints.any()
    team.once(lambda: check_settings(file, settings, MAY_CHANGE, started))

    buckets = deal_buckets(range(len(people)), args.bucket_ids, torch.Generator().manual_seed(args.seed))
    shapes_of = lambda part: [recipe.shape(photo.size) for pid in part for photo in people[pid].photos]
    batches_of = lambda part: count_batches(shapes_of(part), args.uses_per_image, args.batch)
    # q_bucket of each; in a team that of the rank with most of its photos.
    lengths = [max(map(batches_of, team.parts(bucket))) for bucket in buckets]
    if sum(lengths) > args.steps:
        print(f"--steps {args.steps} end before everybody had a turn, which takes {sum(lengths)}")
    cache = TensorCache(args.out / "cache")
    recipe.encode(people, cache, device, team)
    team.wait()  # each has made a part
    sample_prompts = recipe.prompts(cache)

    whole = way.resident and not args.shard
    model = flux.load_flux(files.transformer, device if whole else "cpu", dtype)
    if args.shard:
        shard(model, team, device)
    most = max(map(len, buckets))
    inject(model, args.r1, args.r2, most, args.targets, torch.Generator().manual_seed(args.seed))
    follow(model, way, device)
    bank = Bank(args.out / "buckets", len(buckets), team.leads)
    trainer = Trainer(model, args, checkpoints, bank, lengths, team)
    stop.resident = trainer.resident()
    trainer.resume()

    # Algorithm 1. Its i_curr is `step`, its i_cb `bucket_step`; both are counted on after an interruption.
    with Log(args.out / "log.jsonl", trainer.step, args.steps, team.leads) as log, stop.patiently():
        while trainer.step < args.steps:
            number = trainer.visit % len(buckets)  # buckets take turns
            bucket = [people[pid] for pid in team.mine(buckets[number])]
            trainer.open_bucket(number)
            bank.read_ahead(trainer.visit + 1)
            photos, slots, shapes, entries = recipe.load(bucket, cache)
            q_bucket, q_warmup = lengths[number], round(args.bucket_warmup * lengths[number])
            batches = deal_turn(q_bucket, shapes, args, generator_of(args.seed, trainer.visit, team.rank))

            while trainer.bucket_step < q_bucket and trainer.step < args.steps:
                began = time.perf_counter()
                chosen = batches[trainer.bucket_step]
                generator = generator_of(args.seed, trainer.step, team.rank)
                batch = make_batch([entries[k] for k in chosen], generator, args, device, dtype)
                present = torch.tensor([slots[k] for k in chosen], device=device)
                warm_up = trainer.bucket_step < q_warmup
                found = trainer.update(batch, present, warm_up)
                trainer.step += 1
                trainer.bucket_step += 1

                line = {"step": trainer.step, "bucket": number, "phase": "warm-up" if warm_up else "all"}
                line |= {**found, "lr": args.lr, "memory": memory_in_use(device)}
                line["images_per_second"] = round(team.sum(len(chosen)) / (time.perf_counter() - began), 3)
                if trainer.skipped:
                    line["photos"] = team.joined([str(photos[k].path) for k in chosen])
                    line["t"] = team.joined(batch["t"].tolist())
                log.write(line)
                stopping = team.any(stop.wanted)
                ends = trainer.bucket_step == q_bucket or trainer.step == args.steps
                gives_up = trainer.skipped >= MOST_SKIPPED
                if ends or gives_up or stopping or trainer.step % args.save_every == 0:
                    trainer.save()
                    log.draw()
                sampling = args.sample_every and trainer.step % args.sample_every == 0
                if sampling and not (stopping or gives_up):
                    shown = bucket[: min(2, len(buckets[number]) // team.size)]  # as many on every rank
                    sample_grid(trainer, shown, sample_prompts, files, device, dtype)
                if gives_up:
                    raise UserError(
                        f"{trainer.skipped} steps in a row had a loss or gradient that is not finite, see "
                        f"the end of {log.file}; the weights as before them are in {checkpoints.folder}"
                    )
                if stopping:
                    return False
            if trainer.bucket_step == q_bucket:
                away = sum(lengths) - q_bucket  # steps until the next turn
                trainer.close_bucket(args.keep_buckets or trainer.step + away < args.steps)

    metadata = {
        "method": "meta-lora stage 1",
        "class": args.class_word,
        "base_model": files.transformer.name,
        "base_hash": base,
        "steps": trainer.step,
    }
    metadata |= {name: getattr(args, name) for name in ("r1", "r2", "targets", "lr", "seed")}
    result = args.out / "meta.safetensors"
    if team.leads:
        save_meta(model, result, metadata, trainer.average)
    print(f"{result}: next, python personalize.py PHOTO --model {args.model} --meta {result}")
    return True


def sample_grid(
    trainer: Trainer, people: list[Person], prompts: dict, files: ModelFiles, device, dtype
) -> None:
    """Draw the bucket's first people as the model knows them: a photo, then two pictures of each prompt.

    Rank 0 does, and the others if it needs their parts of the weights.
    """
    if not (trainer.team.leads or trainer.args.shard):
        return
    autoencoder = flux.load_autoencoder(files.autoencoder, device, dtype)
    side, rows = trainer.args.resolution, []
    size = fit_shape((side, side), side, 2 * autoencoder.sizes.reduction)
    with trainer.averaged():
        for slot, person in enumerate(people):
            use_slots(trainer.model, torch.tensor([slot], device=device))
            rows.append([read_photo(person.photos[0].path)])
            for prompt in prompts.values():
                for seed in (0, 1):
                    rows[-1] += generate(trainer.model, autoencoder, prompt, [seed], size)
    if not trainer.team.leads:
        return
    titles = ["photo", *(f"{text}, seed {seed}" for text in prompts for seed in (0, 1))]
    (trainer.args.out / "samples").mkdir(exist_ok=True)
    with atomic(trainer.args.out / "samples" / f"{trainer.step:06d}.png") as temporary:
        contact_sheet(rows, [printable(person.name) for person in people], titles).save(temporary)


if __name__ == "__main__":
    run_script(main, "stopped at once; the same command goes on from the last checkpoint")
