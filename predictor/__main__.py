"""Train a predictor: photos of many people to one `predictor.safetensors`. This is beyond the paper.

    python -m predictor --data /ids --class woman

After it, `python personalize.py ref.jpg --start predicted` begins where the predictor ends. /ids is as for
train_meta.py, with two photos or more of each person. The same command again goes on where the run was.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

import flux
from flux.hashes import fingerprint
from flux.loading import ModelFiles, native_size
from flux.memory import release
from flux.model import Flux
from flux.sampling import flow_loss
from metalora import TARGETS, SlotAdamW, assign_meta, clip_slots, inject, load_meta, use_slots
from people.buckets import count_batches, deal_batches, deal_buckets
from people.cache import content_key
from people.dataset import Batch, BucketData, LatentDataset
from people.encoding import make_batch, send
from people.folders import Person, Photo
from people.photos import READING, read_photo
from people.preparing import add_people_arguments, prepare_data
from predictor.eyes import Eye, add_eye_arguments, find_eye
from predictor.model import Predictor, save_predictor
from run.arguments import HelpFormatter, Parser
from run.bucket_run import BucketRun, Stopped
from run.command import Stop, command_line, run_script
from run.files import alone
from run.models import add_model_arguments, choose_device, find_model
from run.ranks import Ranks
from run.seeds import generator_for
from run.settings import Training, add_training_arguments

BETAS = (0.9, 0.99)
WARM_UP = 50  # steps in which the learning rate grows


@dataclass(frozen=True)
class FaceBatch(Batch):
    """Photos of people, and of each person the embedding of another photo."""

    faces: Tensor  # (b, width)
    seen: list[dict[str, Tensor]]  # batches of those other photos, for `refine`


def train_predictor(
    model: Flux,
    learner: "PredictorLearner",
    buckets: Sequence[Sequence[int]],
    dataloader: Callable[[Sequence[int]], Iterator[FaceBatch]],
    run: BucketRun,
    training: Training,
) -> None:
    """Train meta_down and the predictor together, or continue it, on buckets of people."""
    while run.step < run.q_total:
        for batch in dataloader(buckets[run.open_bucket()]):
            numbers = update(model, learner, batch, learner.rate(run.step), training)
            run.advance(numbers, batch.photos, batch.t)
        run.close_bucket()


def update(
    model: Flux, learner: "PredictorLearner", batch: FaceBatch, lr: float, training: Training
) -> dict[str, Tensor]:
    """Predict everyone's mid and up from one photo, and move what they come from to denoise another photo.

    Returns the loss and the norm of the gradient; nothing moves if one of them is not finite.
    """
    rows, personal = learner.predictor(batch.faces), learner.personal
    personal.data[: len(rows)] = rows.detach()  # a slot for each sample
    use_slots(model, batch.slots)
    refine(model, learner, batch, training)
    loss = flow_loss(model, **batch.inputs, guidance=training.train_guidance)  # L_diff
    (loss * learner.share(len(rows))).backward()
    rows.backward(personal.grad[: len(rows)])
    return learner.step(loss, len(rows), lr)


def refine(model: Flux, learner: "PredictorLearner", batch: FaceBatch, training: Training) -> None:
    """Train the predicted rows on the photos that were seen, as stage 2 would: MAML of first order."""
    optimizer = SlotAdamW(learner.personal, learner.inner_lr, 0.0)
    for p in learner.meta_down:
        p.requires_grad_(not batch.seen)
    for inputs in batch.seen:
        flow_loss(model, **inputs, guidance=training.train_guidance, reduction="none").flatten(1).mean(
            dim=1
        ).sum().backward()
        clip_slots(learner.personal, training.clip_grad)
        optimizer.step(batch.slots)
        learner.personal.grad = None
    for p in learner.meta_down:
        p.requires_grad_(not learner.frozen)


def batches(
    bucket: Sequence[int],
    dataset: LatentDataset,
    load: Callable[[tuple[int, ...]], tuple[BucketData, list[Tensor | None]]],
    run: BucketRun,
    batch_size: int,
    inner: int,
    training: Training,
) -> Iterator[FaceBatch]:
    """Yield what is left of a bucket's turn: every photo once, each with another photo of its person."""
    (data, faces), generator = load(tuple(bucket)), run.generator("order", run.visit)
    others = choices(data.slots, [face is not None for face in faces])
    order = deal_batches(data.shapes, 1, batch_size, generator)
    while len(order) < run.q_bucket:  # another rank has more batches
        order += deal_batches(data.shapes, 1, batch_size, generator)
    for chosen in order[run.bucket_step : run.bucket_step + run.steps_left]:
        generator = run.generator("noise", run.step)
        seen = [others[k][int(torch.randint(len(others[k]), (), generator=generator))] for k in chosen]
        batch = dataset.batch(data, chosen, generator, training)
        steps = int(torch.randint(inner + 1, (), generator=generator)) if inner else 0
        given = [data.entries[k] for k in seen]
        refining = [
            make_batch(given, generator, training, dataset.device, dataset.dtype) for _ in range(steps)
        ]
        slots = torch.arange(len(chosen), device=dataset.device)
        (vectors,) = send([torch.stack([faces[k] for k in seen])], dataset.device)
        yield FaceBatch(batch.inputs, slots, batch.photos, vectors, refining)


def choices(slots: Sequence[int], visible: Sequence[bool]) -> list[list[int]]:
    """Return for each photo the others of its person in which a face was found; its own if there is none."""
    members = defaultdict(list)
    for k, slot in enumerate(slots):
        if visible[k]:
            members[slot].append(k)
    return [[j for j in members[slot] if j != k] or members[slot] for k, slot in enumerate(slots)]


class PredictorLearner:
    """What is trained: the predictor and meta_down, by one AdamW."""

    def __init__(
        self,
        model: Flux,
        predictor: Predictor,
        steps: int,
        training: Training,
        frozen: bool,
        inner_lr: float,
        ranks: Ranks | None = None,
    ):
        """steps: in all, which the learning rate's course needs; frozen: whether meta_down stays."""
        self.steps, self.training, self.ranks = steps, training, ranks or Ranks()
        self.predictor, self.personal, self.frozen, self.inner_lr = (
            predictor,
            model.factors.personal,
            frozen,
            inner_lr,
        )
        self.meta_down = list(model.factors.meta_down)
        self.trained = [*predictor.parameters(), *([] if frozen else self.meta_down)]
        self.optimizer = torch.optim.AdamW(
            self.trained, training.lr, BETAS, weight_decay=training.weight_decay, fused=True
        )

    def rate(self, step: int) -> float:
        """Return a step's learning rate: it grows for WARM_UP steps and falls to 0 over the second half."""
        return self.training.lr * min(1.0, (step + 1) / WARM_UP, 2 * (1 - step / self.steps))

    def share(self, photos: int) -> float:
        return photos / self.ranks.sum(photos)

    def step(self, loss: Tensor, photos: int, lr: float) -> dict[str, Tensor]:
        self.ranks.sum_gradients(self.trained)
        numbers = {"loss": self.ranks.sum(loss.detach() * self.share(photos))}
        numbers["grad"] = get_total_norm([p.grad for p in self.trained])
        clip_grads_with_norm_(self.trained, self.training.clip_grad, numbers["grad"])
        finite = torch.stack([*numbers.values()]).isfinite().all()
        self.optimizer.found_inf = 1 - finite.float()  # with 1, torch's fused AdamW changes nothing
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for p in (self.personal, *self.trained):
            p.grad = None
        return numbers

    # What `BucketRun` saves and brings back

    def start_bucket(self, bucket: int) -> None:
        pass

    def bucket_state(self) -> dict:
        return {}  # nothing belongs to a bucket

    def load_bucket_state(self, state: dict) -> None:
        pass

    def state_dict(self) -> dict:
        return {"trained": [p.data for p in self.trained], "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for p, stored in zip(self.trained, state["trained"], strict=True):
            p.data.copy_(stored)
        self.optimizer.load_state_dict(state["optimizer"])


# --- The faces ---------------------------------------------------------------------------------------------


class Faces:
    """The embeddings of all photos by one eye, kept in the data set's cache."""

    def __init__(self, dataset: LatentDataset, eye: Eye):
        self.dataset, self.recipe = dataset, ("eye", 1, READING, eye.name, eye.weights)
        self.encode(eye)

    def key(self, photo: Photo) -> str:
        return content_key(*self.recipe, photo.digest)

    def encode(self, eye: Eye) -> None:
        """Embed all photos that are not in the cache yet; a photo without a face gets an empty entry."""
        cache = self.dataset.cache
        for person in tqdm(self.dataset.people, "faces"):
            for photo in person.photos:
                if self.key(photo) not in cache:
                    face = eye.embed(photo.path, read_photo(photo.path))
                    cache.put(self.key(photo), {"face": torch.zeros(0) if face is None else face})

    def __call__(self, people: Iterable[Person]) -> list[Tensor | None]:
        """Return the embedding of each photo of some people, None where no face was found."""
        keys = [self.key(photo) for person in people for photo in person.photos]
        faces = [self.dataset.cache.get(key)["face"] for key in keys]
        return [face if len(face) else None for face in faces]


# --- The command -------------------------------------------------------------------------------------------

MAY_CHANGE = ("data", "out", "save_every", "strict", "device", "deterministic")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    ranks = Ranks()
    device, dtype = choose_device(args)
    files = find_model(args)
    with alone(args.out), Stop() as stop:
        try:
            result = train(args, files, device, dtype, stop, ranks)
            print(f"{result}: next, python personalize.py PHOTO --start predicted --predictor {result}")
        except Stopped:
            print(f"\nstopped; this goes on:\n  {command_line('-m predictor', argv)}")


def train(args, files: ModelFiles, device, dtype, stop: Stop, ranks: Ranks) -> Path:
    resolution, training = args.resolution or native_size(files.folder), Training.of(args)
    prior = load_meta(args.meta) if args.meta else None
    dataset = prepare_data(args, files, resolution, {}, MAY_CHANGE, device, dtype, ranks)
    eye = find_eye(args.eye, args.eye_weights, files, device)
    faces, about = Faces(dataset, eye), {"eye": eye.name, "eye_weights": eye.weights}
    del eye
    release(device)
    pids = range(len(dataset.people))
    buckets = deal_buckets(pids, args.bucket_ids, generator_for("buckets", args.seed))
    q_buckets = [count_batches(dataset.shapes(bucket), 1, args.batch) for bucket in buckets]

    model = flux.load_flux(files.transformer, device, dtype)
    r1, targets = (prior.r1, prior.targets) if prior else (args.r1, args.targets)
    inject(model, r1, args.r2, args.batch, targets, generator_for("meta_down", args.seed))
    everyone = torch.stack([face for face in faces(dataset.people) if face is not None])
    size = model.factors.personal.shape[1]
    torch.manual_seed(args.seed)
    predictor = Predictor(everyone.shape[1], args.codes, size, args.hidden)
    predictor.mean.copy_(everyone.mean(dim=0))
    predictor.deviation.copy_(everyone.std(dim=0))
    predictor.table.data[0] = model.factors.personal.data[0].cpu()
    predictor.to(device)
    if prior:
        assign_meta(model, prior)
    learner = PredictorLearner(model, predictor, args.steps, training, bool(prior), args.inner_lr, ranks)
    run = BucketRun(
        args.out,
        learner,
        q_buckets=q_buckets,
        q_total=args.steps,
        bucket_warmup=0.0,
        seed=args.seed,
        ranks=ranks,
        stop=stop,
        device=device,
        save_every=args.save_every,
    )
    run.resume()

    @lru_cache(maxsize=1)  # a single bucket is read once
    def load(bucket: tuple[int, ...]) -> tuple[BucketData, list[Tensor | None]]:
        return dataset.load(bucket), faces([dataset.people[pid] for pid in bucket])

    dataloader = partial(
        batches,
        dataset=dataset,
        load=load,
        run=run,
        batch_size=args.batch,
        inner=args.inner,
        training=training,
    )
    with run:
        train_predictor(model, learner, buckets, dataloader, run, training)
    about |= {"r1": r1, "r2": args.r2, "targets": targets, "method": "predictor", "class": args.class_word}
    about |= {"base_model": files.transformer.name, "base_fingerprint": fingerprint(files.transformer)}
    about |= {"steps": run.step, "people": len(dataset.people), "lr": args.lr, "batch": args.batch}
    result = args.out / "predictor.safetensors"
    save_predictor(model, predictor, result, about)
    return result


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m predictor", description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    add_people_arguments(parser)
    add_eye_arguments(parser)
    add_model_arguments(parser)
    group = parser.add_argument_group("method")
    group.add_argument(
        "--meta",
        type=Path,
        help="a stage-1 file whose meta_down is kept as it is; default: it is trained along",
    )
    group.add_argument("--r1", type=int, default=128, help="rows of meta_down")
    group.add_argument("--r2", type=int, default=1, help="rank of an identity's update")
    group.add_argument("--targets", choices=TARGETS, default="all", help="which layers are adapted")
    group.add_argument("--codes", type=int, default=128, help="numbers that tell a person from others")
    group.add_argument("--hidden", type=int, default=0, help="width of a second layer; 0: the map is linear")
    group.add_argument("--inner", type=int, default=0, help="steps of refinement at most")
    group.add_argument("--inner-lr", type=float, default=8e-3)
    group.add_argument("--steps", type=int, default=5000, help="optimizer updates in all")
    group.add_argument("--bucket-ids", type=int, default=2000, help="people whose photos are in memory")
    group.add_argument("--batch", type=int, default=16, help="photos in an update, of each rank")
    group.add_argument("--lr", type=float, default=2e-3, help="learning rate of AdamW")
    add_training_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", type=Path, default=Path("out/predictor"), help="folder for everything that is written"
    )
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, "stopped at once; the same command goes on from the last checkpoint")
