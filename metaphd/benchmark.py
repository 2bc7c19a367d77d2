"""The paper's protocol (section 4): learn everybody from one photo, draw every prompt with every seed, score.

    python benchmark.py --people people --meta meta.safetensors --out out/benchmark

A system is a method at a rank, a learning rate and a number of steps, meta-lora_r1_lr0.0004_s375. In --out:

    loras/<system>/<person>.safetensors
    pictures/<system>/<person>/<prompt>/<seed>.png     the base model's in pictures/base/<class>
    scores/<system>.json, .csv, .md                    every number; those of the pictures; the table
    sheets/<system>/<person>.jpg                       the reference photo, then prompts x seeds
    scores.md, curves.png, report.html                 all systems side by side

The base model is loaded once. What is there already is not made again: a stopped run goes on where it was,
and one that asks for more methods, ranks, rates, steps, people or seeds adds to it. The base model's pictures
are the same for everybody of a class, so its intervals over people mean little.
A faces.json beside the photos, {"01.jpg": [x0, y0, x1, y1]}, is believed instead of the detector.
"""

import argparse
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

import flux
import metrics
import personalize
from flux.errors import UserError
from flux.loading import native_size
from flux.memory import release
from flux.sampling import generate
from lora.reading import read_lora
from metalora import Prior, eject, export_lora, inject_loras, load_meta, use_slots
from metaphd.side_by_side import personalize_together
from people.cache import TensorCache
from people.crops import crop_boxes
from people.faces import find_face, known_face
from people.folders import scan_people
from people.latents import encode_prompt
from people.photos import read_photo
from run.arguments import Manual, Parser
from run.command import command_line
from run.files import alone, atomic, fingerprint, sha256
from run.models import add_model_arguments, choose_device, files_to_plan, find_model
from run.pictures import save_picture
from run.plan import MemoryOptions, Plan, Workload, add_memory_arguments, estimate, make_plan
from run.settings import Training, add_training_arguments
from scoring.curves import draw_curves
from scoring.evaluators import Evaluators, add_evaluator_arguments, load_evaluators
from scoring.inputs import class_of, find_photos, read_names, read_prompts
from scoring.report import write_report
from scoring.samples import Sample
from scoring.sheets import write_sheets
from scoring.tables import TITLES, table, write_scores
from vision.detector import load_detector

METHODS = ("meta-lora", "lora", "meta-lora-noaug", "lora-noaug")
# What may differ between two runs in one folder; anything else would mix numbers of different things. Of
# files the content is compared, not the name.
MAY_CHANGE = ("people", "out", "method", "ranks", "lr", "steps", "seeds", "at_once", "device")
MAY_CHANGE += ("vram", "stream", "checkpoint", "base_dtype", "compile", "plan")  # 8 bits are told apart
MAY_CHANGE += ("meta", "prompts", "references", "classes", "clip", "recognizer", "detector", "no_face")


@dataclass(frozen=True, eq=False)
class Subject:
    """A person of the benchmark."""

    name: str
    kind: str  # the class: man, woman, or another that has prompts of its own
    photos: list[Path]  # the first is the reference, from which the person is learned
    caption: str  # the reference's
    prompts: list[str]


@dataclass(frozen=True)
class Run:
    """A training of everybody, from which LoRAs are taken after each of some numbers of steps."""

    method: str
    rank: int
    lr: float
    steps: tuple[int, ...]

    @property
    def augment(self) -> bool:
        return not self.method.endswith("-noaug")

    def system(self, step: int) -> str:
        return f"{self.method}_r{self.rank}_lr{self.lr:g}_s{step}"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m metaphd run", description=__doc__, formatter_class=Manual)
    folder, file = {"type": Path, "metavar": "DIR"}, {"type": Path, "metavar": "FILE"}
    parser.add_argument(
        "--people",
        required=True,
        **folder,
        help="DIR/<person>/*.jpg|png, two or more each; DIR/<man|woman>/*.jpg, one each, without R-FaceSim",
    )
    parser.add_argument("--out", default=Path("out/benchmark"), **folder, help="folder for all that is made")
    parser.add_argument(
        "--meta", **file, help="of stage 1; default: meta.safetensors beside the model's weights"
    )
    prompts = Path(__file__).parent / "prompts" / "frontal.txt"
    parser.add_argument(
        "--prompts", type=Path, default=prompts, metavar="FILE", help="or a folder with <class>.txt"
    )
    parser.add_argument("--references", **file, help='{"anna": "03.jpg"}; default: the first photo by name')
    parser.add_argument("--classes", **file, help='{"anna": "woman"}; default: by name, as woman_anna')
    add_model_arguments(parser)

    group, several = parser.add_argument_group("systems: all combinations of"), {"nargs": "+", "metavar": "N"}
    group.add_argument(
        "--method", nargs="+", choices=METHODS, default=["meta-lora", "lora"], help="-noaug: no crops"
    )
    group.add_argument("--ranks", **several, type=int, default=[1], help="r2, the ranks of the LoRAs")
    group.add_argument("--lr", **several, type=float, default=[4e-4], help="learning rates of AdamW")
    group.add_argument(
        "--steps", **several, type=int, help="all taken from one training; default: 375, and 625 for lora"
    )
    group = parser.add_argument_group("personalization (defaults: the paper's)")
    personalize.add_personal_arguments(group)
    group.add_argument("--seed", type=int, default=0)
    add_training_arguments(parser)
    group = parser.add_argument_group("sampler (defaults: the paper's)")
    group.add_argument("--seeds", type=int, default=5, help="pictures of each prompt, with seeds 0, 1, ...")
    group.add_argument("--sample-steps", type=int, default=30, help="Euler steps")
    group.add_argument("--guidance", type=float, default=3.5, help="the model's guidance input")
    add_evaluator_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--at-once", type=int, default=1, help="people who learn side by side, and pictures in a batch"
    )
    add_memory_arguments(parser)
    return parser.parse_args(argv)


def find_subjects(args: argparse.Namespace) -> list[Subject]:
    """Read who is there, which photo is the reference, and what is to be drawn."""
    references = read_names(args.references, "--references")
    classes = read_names(args.classes, "--classes")
    captions = {
        photo.path: photo.caption
        for person in scan_people(args.people, "--people")
        for photo in person.photos
    }
    subjects = []
    for name, photos in find_photos(args.people, references, least=2).items():
        kind = class_of(name, classes)
        caption = captions[photos[0]] or f"a photo of a {kind}"
        subjects.append(Subject(name, kind, photos, caption, read_prompts(args.prompts, kind)))
    return subjects


def plan_runs(args: argparse.Namespace, before: Sequence[dict] = ()) -> list[Run]:
    """Return the trainings that the lists ask for, and those of the systems that were there before."""
    wanted: dict[tuple, set[int]] = {}
    for system in before:
        wanted.setdefault((system["method"], system["rank"], system["lr"]), set()).add(system["steps"])
    for method, rank, lr in product(args.method, args.ranks, args.lr):
        steps = args.steps or [personalize.STEPS[method.removesuffix("-noaug")]]
        wanted.setdefault((method, rank, lr), set()).update(steps)
    return [Run(*key, tuple(sorted(steps))) for key, steps in wanted.items()]


class Benchmark:
    """What all systems share: people, encoded photos and prompts, the model, and where results lie."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.subjects = args, find_subjects(args)
        self.file = args.out / "settings.json"
        self.before = self._read_settings()
        self.runs = plan_runs(args, self.before.get("systems", {}).values())
        self.systems = {"base": {}}
        for run in self.runs:
            grid = {"method": run.method, "rank": run.rank, "lr": run.lr}
            self.systems |= {run.system(step): {**grid, "steps": step} for step in run.steps}
        self.device, self.dtype = choose_device(args)
        self.files = find_model(args)
        self.transformer = self.files.transformer
        self.side = args.resolution or native_size(self.files.folder)
        self.prior = None
        for run in self.runs:  # does the stage-1 file fit? reads no weights
            if run.method.startswith("meta-lora"):
                self.prior = self.prior or personalize.find_prior(self.transformer, args.meta)
            self.add_adapters(flux.load_flux(self.transformer, "meta"), run, [0])
        self.plan = plan(args, self.device, self.dtype, vars(self.files), self.prior)

    def settings(self, run: Run) -> personalize.Personalization:
        return personalize.Personalization(
            method=run.method.removesuffix("-noaug"),
            rank=run.rank,
            targets=self.args.targets,
            steps=max(run.steps),
            batch=self.args.batch,
            augment=run.augment,
            draws=self.args.draws,
        )

    def prior_of(self, run: Run) -> Prior | None:
        return self.prior if run.method.startswith("meta-lora") else None

    def add_adapters(self, model: flux.Flux, run: Run, seeds: Sequence[int]) -> list[torch.Tensor]:
        return personalize.add_adapters(model, self.prior_of(run), run.rank, self.args.targets, seeds)

    def check(self) -> None:
        """Embed all photos and prompts before days of work, and find the faces."""
        evaluators = self.load_evaluators()
        evaluators.embed_texts([text for subject in self.subjects for text in subject.prompts])
        metrics.embed_photos({subject.name: subject.photos for subject in self.subjects}, evaluators)
        detector, self.boxes = cache(lambda: load_detector(self.args.detector)), {}
        for augment in sorted({run.augment for run in self.runs}):
            for subject in self.subjects:
                photo = read_photo(path := subject.photos[0])
                boxes = [(0, 0, *photo.size)]
                if augment:
                    advice = f"tell where it is in {path.with_name('faces.json')}, or take the -noaug methods"
                    face = known_face(path) or find_face(path, photo, detector(), advice)
                    boxes = crop_boxes(photo.size[::-1], face)
                self.boxes[augment, subject] = boxes

    def load_evaluators(self) -> Evaluators:
        args, cache = self.args, TensorCache(self.args.out / "judged")
        return load_evaluators(args.model, cache, self.device, args.clip, args.recognizer, args.detector)

    def _read_settings(self) -> dict:
        if not self.file.exists():
            if any((self.args.out / name).exists() for name in ("loras", "pictures")):
                raise UserError(
                    f"{self.args.out} holds results, but no settings.json to tell of which settings"
                )
            return {}
        try:
            before = json.loads(self.file.read_text("utf-8"))
            for system in before["systems"].values():
                keys = "method", "rank", "lr", "steps"
                method, *numbers = (system[key] for key in keys)
                if method not in METHODS or not all(isinstance(x, int | float) and x > 0 for x in numbers):
                    raise UserError(f"there is no such system, {system}")
            return before
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.file} is damaged ({error}): take another --out") from error

    def record(self) -> None:
        """Save the settings beside the results; ValueError when results of other settings are there."""
        own = {key: value for key, value in vars(self.args).items() if key not in MAY_CHANGE}
        own |= {"dtype": str(self.dtype), "transformer": fingerprint(self.transformer)}
        own |= {"fp8": self.plan.fp8}
        own |= {"stage 1": sha256(self.prior.path)} if self.prior else {}
        for s in self.subjects:
            own[f"prompts of {s.kind}"] = s.prompts
            own[f"photo of {s.name}"] = [s.kind, s.caption, sha256(s.photos[0])]
        own |= {f"crops of {s.name}": boxes for (augment, s), boxes in self.boxes.items() if augment}
        own = json.loads(json.dumps(own, default=str))
        if changed := [key for key in own if self.before.get(key, own[key]) != own[key]]:
            lines = [f"  {key}: {str(self.before[key])[:60]} -> {str(own[key])[:60]}" for key in changed]
            problem = f"{self.args.out} holds results of other settings; take another --out, or these:\n"
            raise UserError(problem + "\n".join(lines[:20]))
        with atomic(self.file) as temporary:
            settings = {**self.before, **own, "systems": {k: v for k, v in self.systems.items() if v}}
            temporary.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")

    def encode(self) -> None:
        """Encode the reference photos and all prompts; the encoders are gone when this returns."""
        self.crops = {}
        autoencoder = flux.load_autoencoder(self.files.autoencoder, self.device, self.dtype)
        for (augment, subject), boxes in tqdm(self.boxes.items(), "photos", disable=len(self.boxes) < 10):
            photos = {subject.photos[0]: read_photo(subject.photos[0])}
            crops = [(subject.photos[0], box) for box in boxes]
            encoded = personalize.encode_crops(photos, crops, autoencoder, self.side, augment)
            self.crops[augment, subject] = encoded
        del autoencoder
        release(self.device)
        length, vram = self.args.t5_length, self.args.vram
        conditioner = flux.load_conditioner(self.files, self.device, self.dtype, length, vram)
        texts = dict.fromkeys(text for s in self.subjects for text in (s.caption, *s.prompts))
        texts = tqdm(texts, "prompts", disable=len(texts) < 50)
        self.texts = {text: encode_prompt(text, conditioner) for text in texts}
        del conditioner
        release(self.device)

    def load(self) -> None:
        self.autoencoder = flux.load_autoencoder(self.files.autoencoder, self.device, self.dtype)
        place = self.device if self.plan.resident else "cpu"
        self.model = flux.load_flux(self.transformer, place, self.dtype)
        self.plan.apply(self.model, self.device)

    def unload(self) -> None:
        del self.model, self.autoencoder
        release(self.device)

    def lora(self, system: str, subject: Subject) -> Path:
        return self.args.out / "loras" / system / f"{subject.name}.safetensors"

    def samples(self, system: str, subject: Subject) -> list[Sample]:
        """Return the pictures that a system makes of somebody; the base model's are those of the class."""
        folder = self.args.out / "pictures" / system / (subject.kind if system == "base" else subject.name)
        places = product([f"{k:02d}" for k in range(len(subject.prompts))], map(str, range(self.args.seeds)))
        return [Sample(subject.name, k, seed, folder / k / f"{seed}.png") for k, seed in places]

    def untrained(self, run: Run) -> list[Subject]:
        """Return those who lack a LoRA."""
        lacks = lambda s: not all(self.lora(run.system(step), s).exists() for step in run.steps)
        return [subject for subject in self.subjects if lacks(subject)]

    def undrawn(self, system: str) -> list[tuple[Subject, list[Sample]]]:
        """Return those who lack a picture, and which; of the base model one of each class."""
        subjects = {s.kind: s for s in self.subjects}.values() if system == "base" else self.subjects
        lacking = [(s, [x for x in self.samples(system, s) if not x.path.exists()]) for s in subjects]
        return [(subject, samples) for subject, samples in lacking if samples]

    def complete(self) -> bool:
        return not any(map(self.untrained, self.runs)) and not any(map(self.undrawn, self.systems))

    def learn(self, run: Run) -> None:
        """Train everybody whose LoRAs are not all there, --at-once people side by side."""
        settings, training = self.settings(run), Training.of(self.args, lr=run.lr)
        for group in chunks(self.untrained(run), self.args.at_once):
            print(f"{run.system(max(run.steps))}: {', '.join(s.name for s in group)}")
            # Everybody has a seed: else all would share the luck of one draw of noise.
            seeds = [self.args.seed + zlib.crc32(s.name.encode()) for s in group]
            trained = self.add_adapters(self.model, run, seeds)
            batches = [
                personalize.draw_batches(
                    self.crops[run.augment, s],
                    self.texts[s.caption],
                    settings,
                    training,
                    seed,
                    self.device,
                    self.dtype,
                )
                for s, seed in zip(group, seeds)
            ]
            learning = range(len(group))
            updates = personalize_together(
                self.model, trained, batches, settings.steps, training, self.device
            )
            for step, learning in updates:
                for slot in learning if step in run.steps else ():
                    self.export(run, step, group[slot], seeds[slot], slot)
            eject(self.model)
            if lost := [s.name for slot, s in enumerate(group) if slot not in learning]:
                raise UserError(
                    f"{run.system(settings.steps)}: the loss of {', '.join(lost)} became infinite or NaN; the "
                    f"others are learned. A smaller --lr than {run.lr:g} may help"
                )

    def export(self, run: Run, step: int, subject: Subject, seed: int, slot: int) -> None:
        """Write somebody's LoRA after a number of steps, unless it is there."""
        if (path := self.lora(run.system(step), subject)).exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        training = Training.of(self.args, lr=run.lr)
        about = {"resolution": self.side, "caption": subject.caption, "seed": seed, "base_fp8": self.plan.fp8}
        about = personalize.describe(
            self.settings(run), training, self.transformer, self.prior_of(run), subject.photos[:1], **about
        )
        export_lora(self.model, path, about | {"steps": step}, slot)

    def draw(self, system: str) -> None:
        """Make the pictures that are not there, --at-once in a batch, with the files that `learn` wrote."""
        missing = self.undrawn(system)
        total = sum(len(samples) for _, samples in missing)
        bar = tqdm(total=total, desc=system, unit="picture", dynamic_ncols=True, disable=not total)
        for group in chunks(missing, self.args.at_once):
            if system != "base":
                loras = [read_lora(self.lora(system, s), self.model)[0] for s, _ in group]
                inject_loras(self.model, [[(lora, 1.0)] for lora in loras])
            todo = [(slot, s.prompts, x) for slot, (s, samples) in enumerate(group) for x in samples]
            for some in chunks(todo, self.args.at_once):
                slots, prompts, samples = zip(*some)
                use_slots(self.model, torch.tensor(slots, device=self.device))
                texts = [own[int(x.prompt)] for own, x in zip(prompts, samples)]
                prompt = [
                    torch.stack([self.texts[text][part] for text in texts]) for part in ("txt", "pooled")
                ]
                seeds = [int(x.seed) for x in samples]
                size = (native_size(self.files.folder),) * 2
                steps, guidance = self.args.sample_steps, self.args.guidance
                pictures = generate(
                    self.model, self.autoencoder, prompt, seeds, size, steps=steps, guidance=guidance
                )
                for text, x, picture in zip(texts, samples, pictures):
                    x.path.parent.mkdir(parents=True, exist_ok=True)
                    save_picture(picture, x.path, {"prompt": text, "seed": x.seed, "system": system})
                bar.update(len(some))
            eject(self.model)
        bar.close()

    def score(self, system: str, evaluators: Evaluators) -> dict:
        """Compute all metrics of a system, write them, and draw a sheet for everybody; return the scores."""
        rows, names = [], [*TITLES]
        for subject in self.subjects:
            for x, base in zip(self.samples(system, subject), self.samples("base", subject)):
                text = subject.prompts[int(x.prompt)]
                rows.append({**vars(x), "class": subject.kind, "text": text, "base": base.path})
        photos = {subject.name: subject.photos for subject in self.subjects}
        about = {"system": self.systems[system], "settings": vars(self.args)}
        scores = metrics.evaluate(rows, evaluators, photos, names, self.args.no_face, **about)
        write_scores(self.args.out / "scores" / f"{system}.json", scores, names)
        write_sheets(self.args.out / "sheets" / system, scores, photos)
        return scores


def plan(
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    parts: dict[str, Path],
    prior: Prior | None,
) -> Plan:
    """Choose how the transformer fits while --at-once people learn side by side, by the largest method.

    parts: the model's files, as far as they are there.
    """
    people = {"r2": max(args.ranks), "identities": args.at_once, "batch": args.at_once * args.batch}
    r1s = {None if x.startswith("lora") else prior.r1 if prior else 128 for x in args.method}
    r1 = max(r1s, key=lambda r1: estimate(Workload("stage2", r1=r1, **people), Plan()).adapters)
    people |= {"r1": r1, "resolution": args.resolution}
    return make_plan("stage2", parts, MemoryOptions.of(args), device, dtype, args.t5_length, **people)


def chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def main(argv: list[str] | None = None) -> None:
    args, again = parse_arguments(argv), command_line("-m metaphd run", argv)
    if args.plan:
        plan(args, *choose_device(args), files_to_plan(args), load_meta(args.meta) if args.meta else None)
        return
    with alone(args.out):
        try:
            measure(args)
        except KeyboardInterrupt:
            print(f"\nstopped; this goes on:\n  {again}")


def measure(args: argparse.Namespace) -> None:
    """Make and score what is not there yet."""
    benchmark = Benchmark(args)
    benchmark.check()
    benchmark.record()
    if not benchmark.complete():
        benchmark.encode()
        benchmark.load()
        benchmark.draw("base")
        for run in benchmark.runs:
            benchmark.learn(run)
            for step in run.steps:
                benchmark.draw(run.system(step))
        benchmark.unload()

    evaluators = benchmark.load_evaluators()
    systems = tqdm(benchmark.systems, "scoring", unit="system")
    scores = {name: benchmark.score(name, evaluators) for name in systems}
    text = table({name: own["overall"] for name, own in scores.items()}, [*TITLES])
    text += f"\n\n{evaluators.note}" if evaluators.note else ""
    print(text)
    with atomic(args.out / "scores.md") as temporary:
        temporary.write_text(text + "\n", "utf-8")
    curves = args.out / "curves.png"
    drawn = draw_curves(curves, scores)
    photos = {subject.name: subject.photos for subject in benchmark.subjects}
    write_report(args.out / "report.html", scores, photos, curves if drawn else None, text)
    print(f"{args.out / 'report.html'} to look at")
