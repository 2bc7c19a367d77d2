"""Stage 1, meta-training (paper, section 3 and Algorithm 1): photos of many people to one `meta.safetensors`.

    python train_meta.py --data /ids --r1 128 --class woman

/ids holds a folder of photos per person, each photo with or without a caption; docs/data.md has the other
layouts. The same command again goes on where the run was, however it ended, and with a larger --steps also
after its end. On several GPUs, with --batch photos on each: torchrun --nproc-per-node 8 train_meta.py ...
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import flux
from flux.errors import UserError
from flux.hashes import fingerprint
from flux.loading import ModelFiles, native_size
from flux.memory import checkpoint_blocks, weight_bytes
from flux.sampling import flow_loss
from flux.transformer import Transformer
from metalora import (
    TARGETS,
    Prior,
    SlotAdamW,
    assign_meta,
    clip_slots,
    inject,
    kaiming_,
    load_meta,
    save_meta,
    use_slots,
)
from people.buckets import count_batches, deal_batches, deal_buckets
from people.dataset import Batch, LatentDataset
from people.grids import sample_grid
from people.preparing import add_people_arguments, prepare_data
from people.sources import find_people
from run.arguments import HelpFormatter, Parser
from run.bucket_run import BucketRun, Stopped
from run.command import STOPPED, Stop, command_line, explain_out_of_memory, is_out_of_memory, run_script
from run.costs import Plan
from run.files import alone
from run.models import add_model_arguments, choose_device, files_to_plan, find_model, take_defaults
from run.pictures import save_sheet
from run.plan import MemoryOptions, add_memory_arguments, make_plan
from run.ranks import Ranks, shard
from run.seeds import generator_for
from run.settings import Training, add_training_arguments
from run.terminal import printable


def meta_train(
    model: Transformer,
    learner: "MetaLearner",
    buckets: Sequence[Sequence[int]],
    dataloader: Callable[[Sequence[int]], Iterator[Batch]],
    run: BucketRun,
    training: Training,
) -> None:
    """Run Algorithm 1, or continue it: meta-learn meta_down over buckets of identities (their pids).

    run: the counters i_curr and i_cb, and saving, logging and stopping, for which it raises `Stopped`.
    """
    while run.step < run.q_total:  # i_curr < q_total
        number = run.open_bucket()  # for bucket in buckets: loads its LoM and LoU; i_cb <- 0
        for batch in dataloader(buckets[number]):  # for batch in data and i_cb < q_bucket
            warm_up = run.bucket_step < run.q_warmup  # i_cb < q_warm-up
            numbers = update(model, learner, batch, warm_up, training)
            run.advance(numbers, batch.photos, batch.t)  # i_cb <- i_cb + 1, and i_curr likewise
        run.close_bucket()


def update(
    model: Transformer, learner: "MetaLearner", batch: Batch, warm_up: bool, training: Training
) -> dict[str, Tensor]:
    """Move mid and up of the identities in the batch and, after the warm-up, meta_down as well.

    Returns the loss and the norms of the gradients. If one of them is not finite, nothing moves. The device
    finds that out; the host does not wait for it.
    """
    for meta_down in learner.meta_down:
        meta_down.requires_grad_(not warm_up)
    use_slots(model, batch.slots)
    loss = flow_loss(model, **batch.inputs, guidance=training.train_guidance)  # L_diff
    numbers = learner.backward(loss, len(batch.slots))
    finite = torch.stack([*numbers.values()]).isfinite().all()
    learner.step_mid_and_up(batch.slots, finite)  # update-mid-and-up-layers
    if not warm_up:
        learner.step_meta_down(numbers["grad_meta_down"], finite)  # both together: update-model
    learner.zero_grad()
    return numbers


def batches(
    bucket: Sequence[int],
    dataset: LatentDataset,
    run: BucketRun,
    batch_size: int,
    uses_per_image: int,
    training: Training,
) -> Iterator[Batch]:
    """Yield what is left of a bucket's turn: every photo `uses_per_image` times, in batches of one shape."""
    data, order, generator = dataset.load(bucket), [], run.generator("order", run.visit)
    while len(order) < run.q_bucket:  # once, unless another rank has more batches
        order += deal_batches(data.shapes, uses_per_image, batch_size, generator)
    first = run.bucket_step  # not 0 if the run was stopped within this turn
    for chosen in order[first : first + run.steps_left]:
        yield dataset.batch(data, chosen, run.generator("noise", run.step), training)


class MetaLearner:
    """What stage 1 trains: meta_down by AdamW, mid and up as if each identity had an AdamW of its own.

    Every rank has the same meta_down, and mid and up of its own identities.
    """

    def __init__(
        self,
        model: Transformer,
        training: Training,
        seed: int = 0,
        ema: float = 0.0,
        ranks: Ranks | None = None,
    ):
        """ema: decay of an average of meta_down; 0: none."""
        self.training, self.seed, self.ema, self.ranks = training, seed, ema, ranks or Ranks()
        self.factors = model.factors
        self.meta_down, self.personal = list(model.factors.meta_down), model.factors.personal
        self.slots = len(self.personal)  # of the largest bucket, before they are divided among the ranks
        self.personal.data = self.ranks.take_rows(self.personal.data)
        lr, decay = training.lr, training.weight_decay
        self.meta_optimizer = torch.optim.AdamW(self.meta_down, lr, weight_decay=decay, fused=True)
        self.slot_optimizer = SlotAdamW(self.personal, lr, decay)
        self.average = [p.detach().clone() for p in self.meta_down] if ema else None

    def backward(self, loss: Tensor, photos: int) -> dict[str, Tensor]:
        """Compute the gradients; return the loss, and the norms of the gradients before clipping.

        photos: the size of this rank's batch. With several ranks all numbers are those of the joined batches.
        """
        share = photos / self.ranks.sum(photos)
        (loss * share).backward()
        moving = [p for p in self.meta_down if p.requires_grad]
        self.ranks.sum_gradients(moving)
        numbers = {"loss": self.ranks.sum(loss.detach() * share)}
        gradients = self.factors.split(self.personal.grad)
        for name, parts in {"mid": gradients[::2], "up": gradients[1::2]}.items():
            numbers[f"grad_{name}"] = self.ranks.norm(get_total_norm(parts))
        if moving:
            numbers["grad_meta_down"] = get_total_norm([p.grad for p in moving])
        return numbers

    def step_mid_and_up(self, slots: Tensor, finite: Tensor) -> None:
        """Clip the gradient of each identity in the batch on its own, and move its mid and up if finite."""
        clip_slots(self.personal, self.training.clip_grad)
        self.slot_optimizer.step(slots, finite)

    def step_meta_down(self, norm: Tensor, finite: Tensor) -> None:
        """Clip the gradient of meta_down, which has this norm, and move it and its average if finite."""
        clip_grads_with_norm_(self.meta_down, self.training.clip_grad, norm)
        self.meta_optimizer.found_inf = 1 - finite.float()  # with 1, torch's fused AdamW changes nothing
        self.meta_optimizer.step()
        for average, p in zip(self.average or (), self.meta_down):
            average.lerp_(p.data, (1 - self.ema) * finite)

    def zero_grad(self) -> None:
        for p in (self.personal, *self.meta_down):
            p.grad = None

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

    # What `BucketRun` saves and brings back

    def start_bucket(self, bucket: int) -> None:
        """Draw mid as LoRA does, the same for any number of ranks; up is zero."""
        generator = generator_for("bucket", self.seed, bucket)
        for _, mid, up in self.factors.by_layer().values():
            everyone = torch.empty(self.slots, *mid.shape[1:])
            kaiming_(everyone, generator)
            mid.copy_(self.ranks.take_rows(everyone))
            up.zero_()
        self.slot_optimizer = SlotAdamW(self.personal, self.training.lr, self.training.weight_decay)

    def bucket_state(self) -> dict:
        """Return mid, up and their optimizer's state, of all ranks together."""
        state = {"personal": self.personal.data, "optimizer": self.slot_optimizer.state_dict()}
        return self.ranks.gather_rows(state, self.slots)

    def load_bucket_state(self, state: dict) -> None:
        state = self.ranks.take_rows(state)
        self.personal.data.copy_(state["personal"])
        self.slot_optimizer.load_state_dict(state["optimizer"])

    def state_dict(self) -> dict:
        """Return meta_down, its optimizer's state and its average."""
        meta_down = [p.data for p in self.meta_down]
        optimizer = self.meta_optimizer.state_dict()
        return {"meta_down": meta_down, "optimizer": optimizer, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        for p, stored in zip(self.meta_down, state["meta_down"], strict=True):
            p.data.copy_(stored)
        self.meta_optimizer.load_state_dict(state["optimizer"])
        for average, stored in zip(self.average or (), state["average"] or (), strict=True):
            average.copy_(stored)


# --- The command -------------------------------------------------------------------------------------------

# All other settings must stay as they are when a run goes on.
MAY_CHANGE = ("data", "out", "steps", "save_every", "sample_every", "keep_buckets", "strict")
MAY_CHANGE += ("device", "vram", "stream", "checkpoint", "base_dtype", "compile", "plan", "world", "shard")
MAY_CHANGE += ("start",)  # what is in the file may not
MAY_CHANGE += ("deterministic",)  # it changes rounding only, as most of these do


def main(argv: list[str] | None = None) -> int | None:
    args = parse_arguments(argv)
    ranks = Ranks()  # one, unless torchrun has started more; first, so that each keeps to its own card
    device, dtype = choose_device(args)
    if args.plan:
        plan(args, device, dtype, files_to_plan(args), ranks.size)
        return
    if args.shard and ranks.size == 1:
        raise UserError("--shard spreads weights over several processes: start them with torchrun")
    device = ranks.device(device)
    find_people(args.data)  # fails early
    with ranks.together(device):
        with ranks.lead_first():  # it may have to be downloaded
            files = find_model(args)
        take_defaults(args, files)
        with alone(args.out) if ranks.leads else nullcontext(), Stop() as stop:
            ranks.wait()  # until the folder is ours
            try:
                result = train(args, files, device, dtype, stop, ranks)
                print(f"{result}: next, python personalize.py PHOTO --model {args.model} --meta {result}")
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(explain_out_of_memory(error, device, stop.resident)) from error
            except (Stopped, KeyboardInterrupt) as stopped:
                if isinstance(stopped, KeyboardInterrupt) and (stop.wanted or ranks.size > 1):
                    raise  # stopped at once, or the other ranks are elsewhere
                again = command_line(Path(__file__).name, argv, ranks.command)
                print(f"\nstopped; this goes on:\n  {again}")
                return STOPPED if ranks.size == 1 else 0  # torchrun would call it a failure


def train(
    args: argparse.Namespace,
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    stop: Stop,
    ranks: Ranks,
) -> Path:
    """Prepare the data and the model, run Algorithm 1, and return the file that is written."""
    resolution, training = args.resolution or native_size(files.folder), Training.of(args)
    prior = load_start(args.start, args.r1, args.targets, files.transformer) if args.start else None
    chosen = ranks.once(lambda: plan(args, device, dtype, vars(files), ranks.size))
    settings = {"fp8": chosen.fp8, "prior": prior and fingerprint(prior.path)}
    dataset = prepare_data(args, files, resolution, settings, MAY_CHANGE, device, dtype, ranks)
    pids = range(len(dataset.people))
    buckets = deal_buckets(pids, args.bucket_ids, generator_for("buckets", args.seed))
    q_buckets = count_steps(buckets, dataset, args.batch, args.uses_per_image, ranks)
    if sum(q_buckets) > args.steps:
        print(f"--steps {args.steps} is too few to train every bucket once ({sum(q_buckets)} steps)")

    model = load_model(args, files, chosen, prior, max(map(len, buckets)), device, dtype, ranks)
    learner = MetaLearner(model, training, args.seed, args.ema, ranks)
    stop.resident = resident(model, learner, ranks.size if args.shard else 1)
    prompts, sampler = dataset.load_sample_prompts()

    def write_samples() -> None:
        """Write pictures of two people of the bucket. With --shard all ranks hold a part of the weights."""
        if ranks.leads or args.shard:
            bucket = buckets[run.bucket]
            pids = ranks.mine(bucket)[: min(2, len(bucket) // ranks.size)]  # as many on every rank
            photos = {person.name: person.photos[0] for person in map(dataset.people.__getitem__, pids)}
            choose, how = partial(use_slots, model), (prompts, sampler, resolution, device, dtype)
            with learner.averaged():
                sheet = sample_grid(model, choose, photos, files.autoencoder, *how)
            if ranks.leads:
                save_sheet(sheet, args.out / "samples" / f"{run.step:06d}.png")

    run = BucketRun(
        args.out,
        learner,
        q_buckets=q_buckets,
        q_total=args.steps,
        bucket_warmup=args.bucket_warmup,
        seed=args.seed,
        ranks=ranks,
        stop=stop,
        device=device,
        save_every=args.save_every,
        sample_every=args.sample_every,
        write_samples=write_samples,
        keep_buckets=args.keep_buckets,
    )
    run.resume()
    dataloader = partial(
        batches,
        dataset=dataset,
        run=run,
        batch_size=args.batch,
        uses_per_image=args.uses_per_image,
        training=training,
    )
    with run:
        meta_train(model, learner, [ranks.mine(bucket) for bucket in buckets], dataloader, run, training)

    about = {"method": "meta-lora stage 1", "class": args.class_word, "base_model": files.transformer.name}
    about |= {"base_fingerprint": fingerprint(files.transformer), "steps": run.step}
    about |= {name: getattr(args, name) for name in ("r1", "r2", "targets", "lr", "seed")}
    about |= {"start_fingerprint": fingerprint(prior.path)} if prior else {}
    result = args.out / "meta.safetensors"
    if ranks.leads:
        with learner.averaged():
            save_meta(model, result, about)
    return result


def count_steps(
    buckets: Sequence[Sequence[int]],
    dataset: LatentDataset,
    batch_size: int,
    uses_per_image: int,
    ranks: Ranks,
) -> list[int]:
    """Return the steps of each bucket's turn: as many as the rank with most photos needs."""
    q_buckets = []
    for bucket in buckets:
        shapes = [dataset.shapes(share) for share in ranks.parts(bucket)]
        q_buckets.append(max(count_batches(x, uses_per_image, batch_size) for x in shapes))
    return q_buckets


def load_start(path: Path, r1: int, targets: str, transformer: Path) -> Prior:
    """Read the file from which meta_down starts; UserError when it has another r1 or other targets."""
    prior = load_meta(path)
    if (prior.r1, prior.targets) != (r1, targets):
        had = f"--r1 {prior.r1} and --targets {prior.targets}"
        raise UserError(f"--from {path} has {had}; this run has --r1 {r1} and --targets {targets}")
    base = fingerprint(transformer)
    if prior.metadata.get("base_fingerprint", base) != base:
        print(f"--from {printable(path)} was trained with another base model than {transformer.name}")
    return prior


def load_model(
    args: argparse.Namespace,
    files: ModelFiles,
    chosen: Plan,
    prior: Prior | None,
    slots: int,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Transformer:
    """Load the transformer as planned, with adapters for so many identities (the paper's initialize)."""
    whole = chosen.resident and not args.shard
    model = flux.load_transformer(files.transformer, device if whole else "cpu", dtype)
    if args.shard:
        shard(model, ranks, device)
    inject(model, args.r1, args.r2, slots, args.targets, generator_for("meta_down", args.seed))
    if prior:
        assign_meta(model, prior, freeze=False)
    return chosen.apply(model, device)


def plan(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, parts: dict[str, Path], ranks: int
) -> Plan:
    """Choose how the transformer fits; parts: the model's files, as far as they are there."""
    if args.shard:
        blocks = "all" if args.checkpoint == "auto" else args.checkpoint
        chosen = Plan(int(blocks) if blocks.isdecimal() else blocks)
        model = flux.load_transformer(parts["transformer"], "meta")
        checkpoint_blocks(model, chosen.checkpoint)  # raises if there are fewer
        return chosen
    identities = -(-args.bucket_ids // ranks)
    settings = {"r1": args.r1, "r2": args.r2, "batch": args.batch, "average": bool(args.ema)}
    settings |= {"resolution": args.resolution, "identities": identities}
    return make_plan("stage1", parts, MemoryOptions.of(args), device, dtype, args.t5_length, **settings)


def resident(model: Transformer, learner: MetaLearner, ranks: int) -> dict[str, int]:
    """Return what lies in memory, in bytes by name; ranks: over how many the base is spread."""
    meta_down, personal = sum(p.nbytes for p in learner.meta_down), learner.personal.nbytes
    return {
        "the frozen base": (weight_bytes(model) - meta_down - personal) // ranks,
        "meta_down, gradient, AdamW's state": (4 + bool(learner.average)) * meta_down,
        "mid and up of a bucket, gradient, AdamW's state": 4 * personal,
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    add_people_arguments(parser)
    add_model_arguments(parser)

    group = parser.add_argument_group("method (defaults: the paper's)")
    group.add_argument("--r1", type=int, default=128, help="rows of meta_down")
    group.add_argument("--r2", type=int, default=1, help="rank of an identity's update")
    group.add_argument("--targets", choices=TARGETS, default="all", help="which layers are adapted")
    group.add_argument("--steps", type=int, default=50_000, help="optimizer updates in all")
    group.add_argument("--bucket-ids", type=int, default=50, help="people trained together")
    group.add_argument("--uses-per-image", type=int, default=10, help="times a bucket shows each photo")
    group.add_argument(
        "--bucket-warmup", type=float, default=0.4, help="part of a bucket's steps with meta_down frozen"
    )
    group.add_argument("--batch", type=int, default=4, help="photos in an update, in each process")
    group.add_argument("--lr", type=float, default=4e-4, help="learning rate of AdamW")
    group.add_argument(
        "--from", dest="start", type=Path, help="meta.safetensors of another run, from which meta_down starts"
    )
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
        help="store also the buckets that do not come back before --steps; else mid and up of their people "
        "begin anew when --steps is raised",
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


if __name__ == "__main__":
    run_script(main, "stopped at once; the same command goes on from the last checkpoint, if there is one")
