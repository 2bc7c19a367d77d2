"""Train a predictor: photos of many people to one `predictor.safetensors`. This is beyond the paper.

    python -m predictor --data /ids --class woman

Then `python personalize.py ref.jpg --start predicted` writes a LoRA without training. /ids is as for
train_meta.py, with two photos or more of each person. The same command again goes on where the run was.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

import flux
from flux.errors import UserError
from flux.hashes import fingerprint
from flux.loading import ModelFiles, native_size
from flux.memory import release, weight_bytes
from flux.sampling import flow_loss, spread_times
from flux.transformer import Transformer
from metalora import TARGETS, Prior, assign_meta, inject, load_meta, use_slots
from people.buckets import count_batches, deal_batches, deal_buckets
from people.cache import TensorCache, content_key
from people.dataset import Batch, BucketData, LatentDataset
from people.encoding import send
from people.faces import known_face
from people.folders import Person, Photo
from people.grids import sample_grid
from people.photos import READING, read_photo
from people.preparing import add_people_arguments, prepare_data
from people.sources import find_people
from predictor.eyes import Eye, add_eye_arguments, find_eye
from predictor.model import Predictor, find_traits, save_predictor
from run.arguments import HelpFormatter, Parser
from run.bucket_run import BucketRun, Stopped
from run.command import STOPPED, Stop, command_line, explain_out_of_memory, is_out_of_memory, run_script
from run.costs import Plan
from run.files import alone
from run.models import add_model_arguments, choose_device, files_to_plan, find_model, take_defaults
from run.pictures import save_sheet
from run.plan import MemoryOptions, add_memory_arguments, make_plan
from run.ranks import Ranks
from run.seeds import generator_for
from run.settings import Training, add_training_arguments

BETAS = (0.9, 0.99)  # AdamW's; with 0.999 it would take a fifth of a short run to know its gradients
LR_WARMUP = 50  # steps in which the learning rate grows
VERSION = 1  # raise it whenever an eye sees something else in a photo, so that all are embedded anew


@dataclass(frozen=True)
class FaceBatch(Batch):
    """Photos, and for each of them the embedding of another photo of the same person."""

    faces: Tensor  # (b, width)


def train_predictor(
    model: Transformer,
    learner: "PredictorLearner",
    buckets: Sequence[Sequence[int]],
    dataloader: Callable[[Sequence[int]], Iterator[FaceBatch]],
    run: BucketRun,
    training: Training,
) -> None:
    """Train the predictor and meta_down together, or continue it, on buckets of people (their pids)."""
    while run.step < run.q_total:
        for batch in dataloader(buckets[run.open_bucket()]):
            numbers = update(model, learner, batch, learner.rate(run.step), training)
            run.advance(numbers, batch.photos, batch.t)
        run.close_bucket()


def update(
    model: Transformer, learner: "PredictorLearner", batch: FaceBatch, lr: float, training: Training
) -> dict[str, Tensor]:
    """Predict mid and up from one photo of each person, and move what they come from to denoise another.

    Returns the loss and the norm of the gradient. If one of them is not finite, nothing moves.
    """
    rows = learner.predictor(batch.faces)
    learner.personal.data[: len(rows)] = rows.detach()
    use_slots(model, batch.slots)
    loss = flow_loss(model, **batch.inputs, guidance=training.train_guidance)  # L_diff
    loss = loss * learner.share(len(rows))
    loss.backward()  # as far as the rows,
    rows.backward(learner.personal.grad[: len(rows)])  # and on to the predictor
    return learner.step(loss, lr)


def batches(
    bucket: Sequence[int],
    load: Callable[[tuple[int, ...]], "FacesOfBucket"],
    dataset: LatentDataset,
    run: BucketRun,
    batch_size: int,
    training: Training,
) -> Iterator[FaceBatch]:
    """Yield what is left of a bucket's turn: every photo once, each with another photo of its person."""
    bucket, order, generator = load(tuple(bucket)), [], run.generator("order", run.visit)
    photos = bucket.photos
    shapes = [bucket.data.shapes[k] for k in photos]
    while len(order) < run.q_bucket:  # once, unless another rank has more batches
        order += deal_batches(shapes, 1, batch_size, generator)
    for dealt in order[run.bucket_step : run.bucket_step + run.steps_left]:
        chosen, generator = [photos[k] for k in dealt], run.generator("noise", run.step)
        batch = dataset.batch(bucket.data, chosen, generator, training)
        # Times that cover their distribution evenly make the gradient less noisy.
        start = torch.rand((), generator=generator).item()
        times = spread_times(len(chosen), start, training.t_mean, training.t_std)
        faces = torch.stack([bucket.draw_face(k, generator) for k in chosen])
        (times,), (faces,) = send([times], dataset.device), send([faces], dataset.device)
        slots = torch.arange(len(chosen), device=dataset.device)
        yield FaceBatch({**batch.inputs, "t": times}, slots, batch.photos, faces)


class PredictorLearner:
    """What is trained, the predictor and meta_down, by one AdamW. Every rank has the same."""

    def __init__(
        self,
        model: Transformer,
        predictor: Predictor,
        steps: int,
        training: Training,
        ranks: Ranks | None = None,
    ):
        """steps: of the whole run, on which the learning rate depends. meta_down may be frozen."""
        self.predictor, self.steps, self.training, self.ranks = predictor, steps, training, ranks or Ranks()
        self.personal = model.factors.personal  # a slot for each photo of a batch
        self.trained = [*predictor.parameters(), *(p for p in model.factors.meta_down if p.requires_grad)]
        decay = training.weight_decay
        self.optimizer = torch.optim.AdamW(self.trained, training.lr, BETAS, weight_decay=decay, fused=True)

    def rate(self, step: int) -> float:
        """Return a step's learning rate: it grows for LR_WARMUP steps and falls to 0 over the second half."""
        return self.training.lr * min(1.0, (step + 1) / LR_WARMUP, 2 * (1 - step / self.steps))

    def share(self, photos: int) -> float:
        """Return which part of all ranks' photos those of this rank are."""
        return photos / self.ranks.sum(photos)

    def step(self, loss: Tensor, lr: float) -> dict[str, Tensor]:
        """Update by the gradients of all ranks; return the sum of their losses, and the gradient's norm."""
        self.ranks.sum_gradients(self.trained)
        norm = get_total_norm([p.grad for p in self.trained])
        numbers = {"loss": self.ranks.sum(loss.detach()), "grad": norm}
        clip_grads_with_norm_(self.trained, self.training.clip_grad, norm)
        # With 1, torch's fused AdamW changes nothing.
        self.optimizer.found_inf = 1 - torch.stack([*numbers.values()]).isfinite().all().float()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        for p in (self.personal, *self.trained):
            p.grad = None
        return numbers

    # What `BucketRun` saves and brings back; nothing belongs to a bucket

    def start_bucket(self, bucket: int) -> None:
        pass

    def bucket_state(self) -> dict:
        return {}

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
    """The embeddings of photos, in the cache of a data set."""

    def __init__(self, cache: TensorCache, eye: Eye):
        self.cache, self.recipe = cache, ("eye", VERSION, READING, eye.name, eye.weights)
        self.whole = eye.detector is None

    def key(self, photo: Photo) -> str:
        return content_key(*self.recipe, photo.digest, None if self.whole else known_face(photo.path))

    def encode(self, people: Iterable[Person], eye: Eye, ranks: Ranks) -> None:
        """Embed the photos that are not in the cache yet; one without a face gets an empty entry."""
        for person in tqdm(people, "faces", disable=not ranks.leads):
            for photo in person.photos:
                key = self.key(photo)
                if ranks.makes(key) and key not in self.cache:
                    face = eye.find_and_embed(photo.path, read_photo(photo.path))
                    self.cache.put(key, {"face": torch.zeros(0) if face is None else face})
        ranks.wait()  # until the others have embedded their parts

    def of(self, people: Iterable[Person]) -> list[Tensor | None]:
        """Return the embedding of each photo of some people, (width,); None where no face was found."""
        entries = [self.cache.get(self.key(photo)) for person in people for photo in person.photos]
        if None in entries:
            raise UserError(f"{self.cache.folder} has lost entries; the same command makes them anew")
        return [entry["face"] if len(entry["face"]) else None for entry in entries]

    def seen(self, people: Iterable[Person]) -> Iterator[tuple[Person, Photo, Tensor]]:
        """Yield of each person the first photo with a face, and its embedding; nobody without one."""
        for person in people:
            for photo, face in zip(person.photos, self.of([person])):
                if face is not None:
                    yield person, photo, face
                    break


@dataclass(frozen=True)
class FacesOfBucket:
    """A bucket's photos with their embeddings."""

    data: BucketData
    faces: list[Tensor | None]
    others: list[list[int]]  # of each photo, those of the same person that it can be predicted from

    @property
    def photos(self) -> list[int]:
        """The photos that there is another one for."""
        return [k for k, others in enumerate(self.others) if others]

    def draw_face(self, photo: int, generator: torch.Generator) -> Tensor:
        """Return the embedding of another photo of the person, drawn at random."""
        others = self.others[photo]
        return self.faces[others[int(torch.randint(len(others), (), generator=generator))]]


def list_others(slots: Sequence[int], visible: Sequence[bool]) -> list[list[int]]:
    """Return for each photo the others of its person in which a face was found."""
    members = defaultdict(list)
    for k, slot in enumerate(slots):
        if visible[k]:
            members[slot].append(k)
    return [[other for other in members[slot] if other != k] for k, slot in enumerate(slots)]


# --- The command -------------------------------------------------------------------------------------------

# All other settings must stay as they are when a run goes on.
MAY_CHANGE = ("data", "out", "save_every", "sample_every", "strict", "device", "vram", "stream", "checkpoint")
MAY_CHANGE += ("base_dtype", "compile", "plan", "world", "deterministic", "eye", "eye_weights", "meta")


def main(argv: list[str] | None = None) -> int | None:
    args = parse_arguments(argv)
    ranks = Ranks()  # one, unless torchrun has started more
    device, dtype = choose_device(args)
    if args.plan:
        plan(args, load_meta(args.meta) if args.meta else None, device, dtype, files_to_plan(args))
        return
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
                words = f"--model {args.model} --start predicted --predictor {result}"
                words += f" --eye-weights {args.eye_weights}" if args.eye_weights else ""
                print(f"{result}: next, python personalize.py PHOTO {words}")
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(explain_out_of_memory(error, device, stop.resident)) from error
            except Stopped:
                print(f"\nstopped; this goes on:\n  {command_line('-m predictor', argv, ranks.command)}")
                return STOPPED if ranks.size == 1 else 0  # torchrun would call it a failure


def train(
    args: argparse.Namespace,
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    stop: Stop,
    ranks: Ranks,
) -> Path:
    """Prepare the data and the model, train, and return the file that is written."""
    resolution, training = args.resolution or native_size(files.folder), Training.of(args)
    prior = load_prior(args, files.transformer) if args.meta else None
    chosen = ranks.once(lambda: plan(args, prior, device, dtype, vars(files)))
    with ranks.lead_first():  # it may have to be downloaded
        eye = find_eye(args.eye, args.eye_weights, files, device)
    settings = {"fp8": chosen.fp8, "eye's weights": [eye.name, eye.weights]}
    settings |= {"prior": prior and fingerprint(prior.path)}
    dataset = prepare_data(args, files, resolution, settings, MAY_CHANGE, device, dtype, ranks)
    faces = Faces(dataset.cache, eye)
    faces.encode(dataset.people, eye, ranks)
    everyone = faces.of(dataset.people)
    tell_missing(everyone, args.data, args.strict)
    about = {"eye": eye.name, "eye_weights": eye.weights}
    del eye
    release(device)

    @lru_cache(maxsize=1)  # a single bucket is read once
    def load(bucket: tuple[int, ...]) -> FacesOfBucket:
        data, embedded = dataset.load(bucket), faces.of(dataset.people[pid] for pid in bucket)
        return FacesOfBucket(data, embedded, list_others(data.slots, [face is not None for face in embedded]))

    buckets, q_buckets = deal_people(args, dataset, faces, ranks)
    model = load_model(args, files, chosen, prior, device, dtype)
    predictor = start_predictor(model, dataset.people, everyone, args.codes, args.hidden, args.seed).to(
        device
    )
    learner = PredictorLearner(model, predictor, args.steps, training, ranks)
    stop.resident = {
        "the frozen base": weight_bytes(model) - sum(p.nbytes for p in model.factors.parameters()),
        "predictor and meta_down, gradient, AdamW's state": 4 * sum(p.nbytes for p in learner.trained),
    }
    prompts, sampler = dataset.load_sample_prompts()

    def write_samples() -> None:
        if ranks.leads:
            people = [dataset.people[pid] for pid in buckets[run.bucket]]
            shown = [*islice(faces.seen(people), min(2, args.batch))]
            how = files.autoencoder, prompts, sampler, resolution, device, dtype
            sheet = predicted_grid(model, predictor, shown, *how)
            save_sheet(sheet, args.out / "samples" / f"{run.step:06d}.png")

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
        sample_every=args.sample_every,
        write_samples=write_samples,
    )
    run.resume()
    dataloader = partial(
        batches, load=load, dataset=dataset, run=run, batch_size=args.batch, training=training
    )
    with run:
        mine = [ranks.mine(bucket) for bucket in buckets]
        train_predictor(model, learner, mine, dataloader, run, training)

    about |= {"method": "predictor", "class": args.class_word, "base_model": files.transformer.name}
    about |= {"base_fingerprint": fingerprint(files.transformer), "people": len(dataset.people)}
    about |= dict(zip(("r1", "targets"), shape_of(args, prior)))
    about |= {name: getattr(args, name) for name in ("r2", "steps", "batch", "lr", "seed")}
    result = args.out / "predictor.safetensors"
    if ranks.leads:
        save_predictor(model, predictor, result, about)
    return result


def deal_people(
    args: argparse.Namespace, dataset: LatentDataset, faces: Faces, ranks: Ranks
) -> tuple[list[list[int]], list[int]]:
    """Return the buckets, and the steps of each one's turn; UserError when nobody in one can be predicted."""
    buckets = deal_buckets(range(len(dataset.people)), args.bucket_ids, generator_for("buckets", args.seed))
    steps = [[count_steps(dataset, faces, args.batch, part) for part in ranks.parts(b)] for b in buckets]
    if not all(map(all, steps)):
        raise UserError(
            f"{args.data}: of the people of a bucket, or of a rank's part of it, nobody has a photo and "
            "another one in which the eye finds a face"
        )
    return buckets, [max(parts) for parts in steps]


@torch.no_grad()
def predicted_grid(
    model: Transformer, predictor: Predictor, shown: Sequence[tuple[Person, Photo, Tensor]], *how: object
) -> Image.Image:
    """Make a sheet of people who are predicted from the photos beside them; how: as for `sample_grid`."""
    rows = predictor(torch.stack([face for _, _, face in shown]).to(predictor.mean.device))
    model.factors.personal.data[: len(rows)] = rows
    photos = {person.name: photo for person, photo, _ in shown}
    return sample_grid(model, partial(use_slots, model), photos, *how)


def load_prior(args: argparse.Namespace, transformer: Path) -> Prior:
    """Load the stage-1 file of --meta; UserError when it does not fit the model or the other options."""
    prior = load_meta(args.meta)
    given = {"r1": args.r1, "targets": args.targets}
    for name, own in {"r1": prior.r1, "targets": prior.targets}.items():
        if given[name] not in (None, own):
            raise UserError(f"{args.meta} has {name} {own}, not {given[name]}: leave --{name} away")
    model = inject(flux.load_transformer(transformer, "meta"), prior.r1, 1, 1, prior.targets, reset=False)
    assign_meta(model, prior)
    if prior.metadata.get("base_fingerprint") not in (None, fingerprint(transformer)):
        print(f"{args.meta} was trained with another base model than {transformer}")
    return prior


def shape_of(args: argparse.Namespace, prior: Prior | None) -> tuple[int, str]:
    """Return r1 and targets, by default the paper's or the stage-1 file's."""
    return (prior.r1, prior.targets) if prior else (args.r1 or 128, args.targets or "all")


def tell_missing(faces: Sequence[Tensor | None], data: Path, strict: bool) -> None:
    """Say how many photos have no face that the eye finds; UserError for them if `strict`.

    UserError, too, when there are not two with a face.
    """
    missing = sum(face is None for face in faces)
    text = f"no face found in {missing} of {len(faces)} photos of {data}: nobody is predicted from these"
    if strict and missing:
        raise UserError(f"--strict: {text}")
    if len(faces) - missing < 2:
        raise UserError(f"{data}: the eye finds a face in {len(faces) - missing} of {len(faces)} photos")
    if missing:
        print(text)


def count_steps(dataset: LatentDataset, faces: Faces, batch_size: int, pids: Sequence[int]) -> int:
    """Return the batches of these people's photos that can be predicted from another one."""
    people = [dataset.people[pid] for pid in pids]
    slots = [slot for slot, person in enumerate(people) for _ in person.photos]
    others = list_others(slots, [face is not None for face in faces.of(people)])
    shapes = [shape for shape, some in zip(dataset.shapes(pids), others, strict=True) if some]
    return count_batches(shapes, 1, batch_size)


def load_model(
    args: argparse.Namespace,
    files: ModelFiles,
    chosen: Plan,
    prior: Prior | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Transformer:
    """Load the transformer as planned, with a slot for each photo of a batch."""
    model = flux.load_transformer(files.transformer, chosen.place(device), dtype)
    r1, targets = shape_of(args, prior)
    inject(model, r1, args.r2, args.batch, targets, generator_for("meta_down", args.seed))
    if prior:
        assign_meta(model, prior)
    return chosen.apply(model, device)


def start_predictor(
    model: Transformer,
    people: Iterable[Person],
    faces: Sequence[Tensor | None],
    codes: int,
    hidden: int,
    seed: int,
) -> Predictor:
    """Return a predictor that gives everyone the start of stage 2, a random mid and a zero up.

    faces: of all photos of the people.
    """
    owners = [pid for pid, person in enumerate(people) for _ in person.photos]
    owners = torch.tensor([pid for pid, face in zip(owners, faces, strict=True) if face is not None])
    everyone = torch.stack([face for face in faces if face is not None])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = Predictor(everyone.shape[1], codes, model.factors.personal.shape[1], hidden)
    predictor.mean.copy_(everyone.mean(dim=0))
    predictor.traits.copy_(find_traits(everyone, owners))
    predictor.table.data[0] = model.factors.personal.data[0].cpu()
    return predictor


def plan(
    args: argparse.Namespace,
    prior: Prior | None,
    device: torch.device,
    dtype: torch.dtype,
    parts: dict[str, Path],
) -> Plan:
    """Choose how the transformer fits. The table takes what mid and up of as many identities take."""
    settings = {"r1": shape_of(args, prior)[0], "r2": args.r2, "batch": args.batch}
    settings |= {"resolution": args.resolution, "identities": args.batch + 1 + args.codes}
    settings |= {"codes": args.codes}
    return make_plan("stage1", parts, MemoryOptions.of(args), device, dtype, args.t5_length, **settings)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    description = __doc__.split("\n")[0]
    parser = Parser(prog="python -m predictor", description=description, formatter_class=HelpFormatter)
    add_people_arguments(parser)
    parser.set_defaults(min_photos=2)
    add_eye_arguments(parser)
    add_model_arguments(parser)
    group = parser.add_argument_group("method")
    group.add_argument(
        "--meta", type=Path, help="stage-1 file whose meta_down is kept; default: it is trained as well"
    )
    group.add_argument("--r1", type=int, help="rows of meta_down; default: 128, or those of --meta")
    group.add_argument("--r2", type=int, default=1, help="rank of an identity's update")
    group.add_argument(
        "--targets", choices=TARGETS, help="which layers are adapted; default: all, or as --meta"
    )
    group.add_argument("--codes", type=int, default=128, help="numbers by which people differ")
    group.add_argument(
        "--hidden", type=int, default=0, help="width of a second layer before them; 0: the map is linear"
    )
    group.add_argument("--steps", type=int, default=5000, help="optimizer updates in all")
    group.add_argument(
        "--bucket-ids", type=int, default=200, help="people whose photos are in memory, 1 MB a photo at 1024"
    )
    group.add_argument("--batch", type=int, default=16, help="photos in an update, in each process")
    group.add_argument(
        "--lr", type=float, default=1e-3, help="learning rate of AdamW; tried on the toy model only"
    )
    add_training_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", type=Path, default=Path("out/predictor"), help="folder for everything that is written"
    )
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--sample-every", type=int, default=1000, help="steps between sample grids; 0: none")
    group.add_argument("--seed", type=int, default=0, help="of the start, the order, times and noise")
    add_memory_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, "stopped at once; the same command goes on from the last checkpoint, if there is one")
