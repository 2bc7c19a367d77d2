"""The paper's protocol (section 4) for many people: learn each from a photo, generate pictures, score.

What lies in the folder --out and how a run is continued or extended is described in docs/benchmark.md.
"""

import argparse
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import torch
from tqdm import tqdm

import flux
import metrics
import personalize
from family.side_by_side import personalize_together
from flux.checkpoint import read_json
from flux.errors import UserError
from flux.hashes import fingerprint, sha256
from flux.loading import native_size
from flux.memory import release
from flux.sampling import generate
from flux.transformer import Transformer
from lora.finding import find_lora
from lora.reading import read_lora
from metalora import Prior, eject, export_lora, inject_loras, load_meta, use_slots
from metaphd.others import METRIC, add_other_arguments, read_others, score_others
from metaphd.uses import (
    Use,
    add_use_arguments,
    name_systems,
    plan_uses,
    read_stack,
    score_style,
    settle_uses,
    uses_of_base,
)
from people.cache import TensorCache
from people.crops import crop_boxes
from people.encoding import encode_negative, encode_prompt, stack_prompts
from people.faces import known_face, locate_face
from people.folders import scan_people
from people.photos import Box, read_photo
from predictor.start import eye_of, find_predictor, predict
from run.arguments import MOST, Manual, Parser
from run.command import STOPPED, command_line
from run.costs import Plan, Workload, estimate
from run.files import alone, atomic
from run.models import add_model_arguments, choose_device, files_to_plan, find_model, take_defaults
from run.pictures import save_picture
from run.plan import MemoryOptions, add_memory_arguments, make_plan
from run.settings import Training, add_training_arguments
from scoring.curves import plot_curves
from scoring.evaluators import Evaluators, add_evaluator_arguments, load_evaluators
from scoring.inputs import class_of, find_photos, read_names, read_prompts
from scoring.report import write_report
from scoring.samples import Sample
from scoring.sheets import write_sheets
from scoring.strengths import plot_strengths
from scoring.tables import OPTIONAL, TITLES, table, write_scores
from vision import inception_resnet
from vision.detector import load_detector

PROMPTS = Path(__file__).parent / "prompts" / "frontal.txt"
METHODS = ("meta-lora", "lora", "meta-lora-noaug", "lora-noaug", "predicted", "refined", "refined-noaug")
# Options that may differ between two runs in one --out. Any other difference would mix results that cannot be
# compared. Of files not the name but the content is compared, see `Benchmark.record`.
MAY_CHANGE = ("people", "out", "method", "ranks", "lr", "steps", "seeds", "at_once", "device")
# With --base-dtype fp8 results change: fp8 is recorded as a setting of its own.
MAY_CHANGE += ("vram", "stream", "checkpoint", "base_dtype", "compile", "plan", "deterministic")
MAY_CHANGE += ("meta", "prompts", "references", "classes", "clip", "recognizer", "detector", "no_face")
MAY_CHANGE += ("predictor", "eye_weights", "strengths", "stack", "stack_strengths", "stack_text")
MAY_CHANGE += ("couples", "class_bleed")


@dataclass(frozen=True, eq=False)
class Subject:
    """A person of the benchmark."""

    name: str
    kind: str  # the class: man, woman, or another that has prompts of its own
    learned: list[Path]  # the photos that the person is learned from; the first is the reference
    others: list[Path]  # photos for R-FaceSim
    caption: str  # of what is learned
    prompts: list[str]

    @property
    def photos(self) -> list[Path]:
        """What is compared with: the reference and the others."""
        return [self.learned[0], *self.others]


@dataclass(frozen=True)
class Run:
    """One training of every person, from which LoRAs are taken after several numbers of steps."""

    method: str
    rank: int
    lr: float
    steps: tuple[int, ...]

    @property
    def augment(self) -> bool:
        return not self.method.endswith("-noaug") and self.method != "predicted"

    @property
    def predicted(self) -> bool:
        """Whether it starts where a predictor sees the person; the method "predicted" also ends there."""
        return self.method.startswith(("predicted", "refined"))

    def system(self, steps: int) -> str:
        """Name the system that this training gives after a number of steps."""
        return f"{self.method}_r{self.rank}_lr{self.lr:g}_s{steps}"

    @property
    def systems(self) -> dict[str, dict[str, object]]:
        """Each system's settings, by its name."""
        shared = {"method": self.method, "rank": self.rank, "lr": self.lr}
        return {self.system(steps): {**shared, "steps": steps} for steps in self.steps}


def find_subjects(args: argparse.Namespace) -> list[Subject]:
    """List the people of --people, each with reference photo, caption, class and prompts."""
    references = read_names(args.references, "--references")
    classes = read_names(args.classes, "--classes")
    captions = {}
    for person in scan_people(args.people, "--people"):
        captions |= {photo.path: photo.caption for photo in person.photos}
    subjects = []
    for name, photos in find_photos(args.people, references, least=1 + args.photos).items():
        kind = class_of(name, classes)
        learned, others = photos[: args.photos], photos[args.photos :]
        contents = {path.read_bytes() for path in learned}
        copies = [path for path in others if path.read_bytes() in contents]
        if copies:
            raise UserError(f"{copies[0]} is a copy of a photo that {name} is learned from: remove it")
        if len(learned) < args.photos:  # in man/ and woman/ everybody has one
            raise UserError(f"--photos {args.photos}: --people {args.people} has one photo of {name}")
        caption = captions[photos[0]] if len(learned) == 1 else ""  # several have none in common
        prompts = read_prompts(args.prompts, kind)
        subjects.append(Subject(name, kind, learned, others, caption or f"a photo of a {kind}", prompts))
    return subjects


def is_system(settings: object) -> bool:
    """Tell whether these are settings of a system, as `Run.systems` gives them."""
    if not isinstance(settings, dict) or settings.get("method") not in METHODS:
        return False
    numbers = [settings.get(key) for key in ("rank", "lr", "steps")]
    if not all(isinstance(number, int | float) for number in numbers):
        return False
    rank, lr, steps = numbers
    right = rank > 0 and lr > 0 and (steps == 0 if settings["method"] == "predicted" else steps > 0)
    return right and Use.of(settings).valid


def plan_runs(args: argparse.Namespace, before: Sequence[dict] = ()) -> list[Run]:
    """Return the trainings that the options ask for, and those of the systems of earlier runs in --out."""
    wanted: dict[tuple[str, int, float], set[int]] = {}
    for system in before:
        wanted.setdefault((system["method"], system["rank"], system["lr"]), set()).add(system["steps"])
    for method, rank, lr in product(args.method, args.ranks, args.lr):
        if method == "predicted":
            if (method, rank) not in {key[:2] for key in wanted}:
                wanted[method, rank, lr] = {0}  # whatever the rate
            continue
        steps = args.steps or [personalize.STEPS["lora" if method.startswith("lora") else "meta-lora"]]
        wanted.setdefault((method, rank, lr), set()).update(steps)
    return [Run(*key, tuple(sorted(steps))) for key, steps in wanted.items()]


class Benchmark:
    """What all systems share: people, encoded photos and prompts, the model, and where results lie."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.subjects = args, find_subjects(args)
        self.file = args.out / "settings.json"
        self.before = self._read_settings()
        before = self.before.get("systems", {}).values()
        self.runs, self.uses = plan_runs(args, before), plan_uses(args, before)
        self.systems = name_systems({"base": {}}, uses_of_base(self.uses))
        for run in self.runs:
            self.systems |= name_systems(run.systems, self.uses)
        self.prompts = {"pictures": {subject.kind: subject.prompts for subject in self.subjects}}
        others = read_others(args, self.prompts["pictures"])
        self.prompts |= others
        asked = [METRIC[show] for show in others] + ["style"] * bool(args.stack_text)
        self.metrics = [metric for metric in TITLES if metric not in OPTIONAL or metric in asked]
        self.device, self.dtype = choose_device(args)
        self.files = find_model(args)
        take_defaults(args, self.files)
        self.training_resolution = args.resolution or native_size(self.files.folder)
        self.prior = self.trained = None
        if any(run.method.startswith("meta-lora") for run in self.runs):
            self.prior = personalize.find_prior(self.files.transformer, args.meta)
        if any(run.predicted for run in self.runs):
            self.trained = find_predictor(args.predictor, self.files)
            personalize.warn_of_another_base(self.trained.prior, self.files.transformer)
            if {run.rank for run in self.runs if run.predicted} != {self.trained.r2}:
                path = self.trained.prior.path
                raise UserError(
                    f"{path} predicts LoRAs of rank {self.trained.r2}: no other --ranks go with it"
                )
        for run in self.runs:  # does the stage-1 file fit? This reads no weights
            self.add_adapters(flux.load_transformer(self.files.transformer, "meta"), run, [0])
        self.style = None
        if args.stack:
            self.style = read_stack(args.stack, flux.load_transformer(self.files.transformer, "meta"))
        self.plan = plan(args, self.device, self.dtype, vars(self.files), self.prior)

    # Settings

    def personalization(self, run: Run) -> personalize.Personalization:
        """Return how the people of a run are learned."""
        return personalize.Personalization(
            method="meta-lora" if run.method.startswith("meta-lora") else "lora",
            start="predicted" if run.predicted else "zero",
            rank=run.rank,
            targets=self.targets(run),
            steps=max(run.steps),
            batch=self.args.batch,
            augment=run.augment,
            draws=self.args.draws,
        )

    def prior_of(self, run: Run) -> Prior | None:
        return self.prior if run.method.startswith("meta-lora") else None

    def targets(self, run: Run) -> str:
        return self.trained.prior.targets if run.predicted else self.args.targets

    def add_adapters(self, model: Transformer, run: Run, seeds: Sequence[int]) -> torch.Tensor:
        """Add an adapter for each person's seed; return mid and up, a row for each, as stage 2 begins."""
        return personalize.add_adapters(model, self.prior_of(run), run.rank, self.targets(run), seeds)

    def _read_settings(self) -> dict:
        """Return the settings of the earlier run in --out; UserError when they are missing or damaged."""
        if not self.file.exists():
            if any((self.args.out / name).exists() for name in ("loras", "pictures")):
                raise UserError(
                    f"{self.args.out} holds results, but no settings.json that says how they were made"
                )
            return {}
        try:
            before = read_json(self.file)
        except UserError as error:
            raise UserError(f"{self.file} is damaged: take another --out ({error})") from error
        systems = before.get("systems")
        if not isinstance(systems, dict):
            raise UserError(f"{self.file} is damaged: take another --out (it lists no systems)")
        unknown = [name for name, settings in systems.items() if not is_system(settings)]
        if unknown:
            raise UserError(f"{self.file} is damaged: take another --out (unknown: {', '.join(unknown)})")
        return before

    def record(self) -> None:
        """Save the settings beside the results; UserError when --out holds results of other settings."""
        settings = {key: value for key, value in vars(self.args).items() if key not in MAY_CHANGE}
        settings |= {"dtype": str(self.dtype), "fp8": self.plan.fp8}
        settings |= {"transformer": fingerprint(self.files.transformer)}
        if self.prior:
            settings["stage 1"] = sha256(self.prior.path)
        if self.trained:
            settings["predictor"] = sha256(self.trained.prior.path)
        if self.style:
            settings["second LoRA"] = sha256(find_lora(self.args.stack))
        for show, prompts in self.prompts.items():
            name = "prompts" if show == "pictures" else show
            settings |= {f"{name} of {kind}": texts for kind, texts in prompts.items()}
        for subject in self.subjects:
            photos = [sha256(path) for path in subject.learned]
            settings[f"photo of {subject.name}"] = [subject.kind, subject.caption, *photos]
        for (augment, subject), crops in self.crops.items():
            if augment:
                settings[f"crops of {subject.name}"] = [box for _, box in crops]
        settings = json.loads(json.dumps(settings, default=str))
        changed = [key for key in settings if self.before.get(key, settings[key]) != settings[key]]
        if changed:
            lines = [f"  {key}: {str(self.before[key])[:60]} -> {str(settings[key])[:60]}" for key in changed]
            problem = f"{self.args.out} holds results of other settings; take another --out, or these:\n"
            raise UserError(problem + "\n".join(lines[:20]))
        systems = {name: system for name, system in self.systems.items() if "method" in system}
        with atomic(self.file) as temporary:
            text = json.dumps({**self.before, **settings, "systems": systems}, indent=1)
            temporary.write_text(text + "\n", "utf-8")

    # Before anything takes long

    def check(self) -> None:
        """Read all photos and prompts as the scorers do, and find the faces, before days of work begin."""
        evaluators = self.load_evaluators()
        evaluators.embed_texts([text for subject in self.subjects for text in subject.prompts])
        if self.args.stack_text:
            evaluators.embed_texts([self.args.stack_text])
        metrics.embed_photos({subject.name: subject.photos for subject in self.subjects}, evaluators)
        self.check_predictions(evaluators)
        self.detector = None
        self.crops: dict[tuple[bool, Subject], list[tuple[Path, Box]]] = {}
        for augment in sorted({run.augment for run in self.runs}):
            for subject in self.subjects:
                self.crops[augment, subject] = self.list_crops(subject.learned, augment)

    def check_predictions(self, evaluators: Evaluators) -> None:
        """Predict everyone's LoRA, a row each; UserError when the eye would also score the likeness."""
        self.rows = {}
        if not self.trained:
            return
        judges = [evaluators.used.get("identity"), inception_resnet.SHA256]
        judges += [sha256(self.args.recognizer)] if self.args.recognizer else []
        if self.trained.prior.metadata["eye_weights"] in judges:
            raise UserError(
                f"{self.trained.prior.path} sees with the network that scores faces here: its scores would "
                "flatter it. Take another --recognizer, or a predictor with another eye"
            )
        args, transformer = self.args, self.files.transformer
        eye = eye_of(self.trained, args.eye_weights, self.files, self.device, args.detector)
        for subject in self.subjects:
            photos = {path: read_photo(path) for path in subject.learned}
            known = {path: known_face(path) for path in photos}
            advice = f"write its box into {subject.learned[0].with_name('faces.json')}"
            self.rows[subject] = predict(self.trained, eye, photos, transformer, known, advice)
        del eye
        release(self.device)

    def list_crops(self, paths: Sequence[Path], augment: bool) -> list[tuple[Path, Box]]:
        """Return the crops of photos (appendix D), or the whole photos."""
        photos = {path: read_photo(path) for path in paths}
        if not augment:
            return personalize.list_crops(photos, augment)
        self.detector = self.detector or load_detector(self.args.detector)
        crops = []
        for path, photo in photos.items():
            face = locate_face(path, photo, self.detector, ", or take the -noaug methods")
            crops += [(path, box) for box in crop_boxes(photo.size[::-1], face)]
        return crops

    def load_evaluators(self) -> Evaluators:
        args, cache = self.args, TensorCache(self.args.out / "judged")
        return load_evaluators(args.model, cache, self.device, args.clip, args.recognizer, args.detector)

    # Models

    def encode(self) -> None:
        """Encode what is learned and all prompts; the encoders have left memory when this returns."""
        self.encoded = {}
        autoencoder = flux.load_autoencoder(self.files.autoencoder, self.device, self.dtype)
        for (augment, subject), crops in tqdm(self.crops.items(), "photos", disable=len(self.crops) < 10):
            photos = {path: read_photo(path) for path in subject.learned}
            encoded = personalize.encode_crops(photos, crops, autoencoder, self.training_resolution, augment)
            self.encoded[augment, subject] = encoded
        del autoencoder
        release(self.device)
        length, vram = self.args.t5_length, self.args.vram
        conditioner = flux.load_conditioner(self.files, self.device, self.dtype, length, vram)
        texts = dict.fromkeys(subject.caption for subject in self.subjects)
        texts |= dict.fromkeys(chain.from_iterable(chain(*(x.values() for x in self.prompts.values()))))
        texts = tqdm(texts, "prompts", disable=len(texts) < 50)
        self.texts = {text: encode_prompt(text, conditioner) for text in texts}
        negative = encode_negative(self.args.cfg, conditioner)
        self.sampler = {name: getattr(self.args, name) for name in ("guidance", "cfg")}
        self.sampler |= {"steps": self.args.sample_steps, "negative": negative}
        del conditioner
        release(self.device)

    def load(self) -> None:
        """Load the autoencoder and the transformer, which stay until `unload`."""
        self.autoencoder = flux.load_autoencoder(self.files.autoencoder, self.device, self.dtype)
        place = self.plan.place(self.device)
        self.model = flux.load_transformer(self.files.transformer, place, self.dtype)
        self.plan.apply(self.model, self.device)

    def unload(self) -> None:
        del self.model, self.autoencoder
        release(self.device)

    # What is there

    def lora(self, system: str, subject: Subject) -> Path:
        """Return the file of a person's LoRA, the same in all uses of it."""
        folder = system.removesuffix(Use.of(self.systems.get(system, {})).suffix)
        return self.args.out / "loras" / folder / f"{subject.name}.safetensors"

    def is_base(self, system: str) -> bool:
        return "method" not in self.systems[system]

    def samples(self, system: str, subject: Subject, show: str = "pictures") -> dict[Sample, str]:
        """Return the pictures of a person by a system with their prompts; of the base model, of the class."""
        owner = subject.kind if self.is_base(system) else subject.name
        folder, samples = self.args.out / show / system / owner, {}
        texts = enumerate(self.prompts[show][subject.kind])
        for (number, text), seed in product(texts, range(self.args.seeds)):
            place = f"{number:02d}", str(seed)
            samples[Sample(subject.name, *place, folder / place[0] / f"{seed}.png")] = text
        return samples

    def untrained(self, run: Run) -> list[Subject]:
        """Return the people of whom a LoRA is missing."""
        systems = [*run.systems]
        return [s for s in self.subjects if not all(self.lora(name, s).exists() for name in systems)]

    def missing_pictures(self, system: str) -> list[tuple[Subject, list[tuple[str, Sample]]]]:
        """Return the people of whom pictures are missing, with these; for the base one person of a class."""
        subjects = {s.kind: s for s in self.subjects}.values() if self.is_base(system) else self.subjects
        missing = []
        for subject in subjects:
            samples = chain.from_iterable(self.samples(system, subject, x).items() for x in self.prompts)
            lacking = [(text, sample) for sample, text in samples if not sample.path.exists()]
            if lacking:
                missing.append((subject, lacking))
        return missing

    def complete(self) -> bool:
        return not any(map(self.untrained, self.runs)) and not any(map(self.missing_pictures, self.systems))

    # The work

    def learn(self, run: Run) -> None:
        """Train the people whose LoRAs are missing, --at-once of them side by side.

        Raises UserError at the end, when all others are learned, if somebody's loss became infinite or NaN.
        """
        settings, training = self.personalization(run), Training.of(self.args, lr=run.lr)
        lost = []
        for group in chunks(self.untrained(run), self.args.at_once):
            print(f"{run.system(settings.steps)}: {', '.join(subject.name for subject in group)}")
            # One seed per person, so that people do not share the same noise.
            seeds = [self.args.seed + zlib.crc32(subject.name.encode()) for subject in group]
            personal = self.add_adapters(self.model, run, seeds)
            if run.predicted:
                personal.data.copy_(torch.stack([self.rows[subject] for subject in group]))
            if run.method == "predicted":
                for slot, subject in enumerate(group):
                    self.export(run, 0, subject, seeds[slot], slot)
                eject(self.model)
                continue
            batches = [
                personalize.draw_batches(
                    self.encoded[run.augment, subject],
                    self.texts[subject.caption],
                    settings,
                    training,
                    seed,
                    self.device,
                    self.dtype,
                )
                for subject, seed in zip(group, seeds)
            ]
            updates = personalize_together(self.model, personal, batches, run.steps, training, self.device)
            for step, slots in updates:
                for slot in slots:
                    self.export(run, step, group[slot], seeds[slot], slot)
            eject(self.model)
            lost += [subject.name for slot, subject in enumerate(group) if slot not in slots]
        if lost:
            raise UserError(
                f"{run.system(settings.steps)}: the loss of {', '.join(lost)} became infinite or NaN; all "
                f"others are learned. A smaller --lr than {run.lr:g} may help"
            )

    def export(self, run: Run, step: int, subject: Subject, seed: int, slot: int) -> None:
        """Write a person's LoRA after a number of steps, unless it is there."""
        path = self.lora(run.system(step), subject)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        about = personalize.describe(
            self.personalization(run),
            Training.of(self.args, lr=run.lr),
            self.files.transformer,
            self.prior_of(run),
            subject.learned,
            self.trained if run.predicted else None,
        )
        about |= {"resolution": self.training_resolution, "caption": subject.caption, "seed": seed}
        about |= {"base_fp8": self.plan.fp8, "steps": step}
        export_lora(self.model, path, about, slot)

    def generate(self, system: str) -> None:
        """Make the missing pictures, --at-once in a batch, with the files that `learn` wrote."""
        missing = self.missing_pictures(system)
        total = sum(len(samples) for _, samples in missing)
        bar = tqdm(total=total, desc=system, unit="picture", dynamic_ncols=True, disable=not total)
        base, use = self.is_base(system), Use.of(self.systems[system])
        for group in chunks(missing, self.args.at_once):
            files = [None if base else self.lora(system, subject) for subject, _ in group]
            slots = [use.mix(file and read_lora(file, self.model)[0], self.style) for file in files]
            if any(slots):
                inject_loras(self.model, slots)
            wanted = []  # (slot, prompt's text, picture)
            for slot, (_, samples) in enumerate(group):
                wanted += [(slot, text, sample) for text, sample in samples]
            for batch in chunks(wanted, self.args.at_once):
                self.generate_batch(system, batch)
                bar.update(len(batch))
            eject(self.model)
        bar.close()

    def generate_batch(self, system: str, batch: Sequence[tuple[int, str, Sample]]) -> None:
        """Generate and save pictures: the slot of the person, the prompt, and where each belongs."""
        slots, texts, samples = zip(*batch)
        use_slots(self.model, torch.tensor(slots, device=self.device))
        prompt = stack_prompts([self.texts[text] for text in texts])
        sample_side = native_size(self.files.folder)
        pictures = generate(
            self.model,
            self.autoencoder,
            prompt,
            [int(sample.seed) for sample in samples],
            (sample_side, sample_side),
            **self.sampler,
        )
        for text, sample, picture in zip(texts, samples, pictures):
            sample.path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(picture, sample.path, {"prompt": text, "seed": sample.seed, "system": system})

    def score(self, system: str, evaluators: Evaluators) -> dict:
        """Compute all metrics of a system, write them and everyone's sheet; return the scores."""
        rows = self.rows_of(system, "pictures")
        photos = {subject.name: subject.photos for subject in self.subjects}
        if self.args.stack_text:
            score_style(rows, evaluators, self.args.stack_text)
        others = {show: self.rows_of(system, show) for show in self.prompts if show != "pictures"}
        about = {"system": self.systems[system], "settings": vars(self.args)}
        about["others"] = score_others(others, evaluators, photos)
        scores = metrics.evaluate(rows, evaluators, photos, self.metrics, self.args.no_face, **about)
        write_scores(self.args.out / "scores" / f"{system}.json", scores, self.metrics)
        write_sheets(self.args.out / "sheets" / system, scores, photos)
        return scores

    def rows_of(self, system: str, show: str) -> list[dict]:
        """Return a row for each picture of a system, beside the base model's, which has the same style."""
        base, rows = "base" + Use(stack=Use.of(self.systems[system]).stack).suffix, []
        for subject in self.subjects:
            samples, bases = (self.samples(name, subject, show) for name in (system, base))
            for (sample, text), beside in zip(samples.items(), bases):
                rows.append({**vars(sample), "class": subject.kind, "text": text, "base": beside.path})
        return rows


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """Yield the items in groups of a size, the last of what is left."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


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
    sizes = {"r2": max(args.ranks), "identities": args.at_once, "batch": args.at_once * args.batch}
    r1s = set()
    for method in args.method:
        r1s.add((prior.r1 if prior else 128) if method.startswith("meta-lora") else None)
    adapters = {r1: estimate(Workload("stage2", r1=r1, **sizes), Plan()).adapters for r1 in r1s}
    sizes |= {"r1": max(adapters, key=adapters.get), "resolution": args.resolution}
    return make_plan("stage2", parts, MemoryOptions.of(args), device, dtype, args.t5_length, **sizes)


# --- The command -------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int | None:
    args = parse_arguments(argv)
    if args.plan:
        prior = load_meta(args.meta) if args.meta else None
        plan(args, *choose_device(args), files_to_plan(args), prior)
        return
    with alone(args.out):
        try:
            measure(args)
        except KeyboardInterrupt:
            print(f"\nstopped; this goes on:\n  {command_line('-m metaphd run', argv)}")
            return STOPPED


def measure(args: argparse.Namespace) -> None:
    """Make and score what is not there yet."""
    benchmark = Benchmark(args)
    benchmark.check()
    benchmark.record()
    if not benchmark.complete():
        benchmark.encode()
        benchmark.load()
        for system in filter(benchmark.is_base, benchmark.systems):
            benchmark.generate(system)
        for run in benchmark.runs:
            benchmark.learn(run)
            for system in name_systems(run.systems, benchmark.uses):
                benchmark.generate(system)
        benchmark.unload()

    evaluators = benchmark.load_evaluators()
    systems = tqdm(benchmark.systems, "scoring", unit="system")
    scores = {name: benchmark.score(name, evaluators) for name in systems}
    text = table({name: system["overall"] for name, system in scores.items()}, benchmark.metrics)
    if evaluators.note:
        text += f"\n\n{evaluators.note}"
    print(text)
    with atomic(args.out / "scores.md") as temporary:
        temporary.write_text(text + "\n", "utf-8")
    curves = {args.out / "curves.png": plot_curves, args.out / "strengths.png": plot_strengths}
    curves = [file for file, plot in curves.items() if plot(file, scores)]
    photos = {subject.name: subject.photos for subject in benchmark.subjects}
    write_report(args.out / "report.html", scores, photos, curves, text)
    print(f"{args.out / 'report.html'} to look at")


HELP = """
Personalize every person from a photo, or --photos N, generate every prompt with every seed, and score (paper,
section 4).
See docs/benchmark.md.

examples:
  python -m metaphd run --people people --meta meta.safetensors --out out/benchmark
  python -m metaphd run --model tiny --people people --method lora-noaug --steps 30 60 --seeds 1
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    limits = {"photos": (1, MOST)}
    parser = Parser(prog="python -m metaphd run", description=HELP, formatter_class=Manual, limits=limits)
    folder, file = {"type": Path, "metavar": "DIR"}, {"type": Path, "metavar": "FILE"}
    parser.add_argument(
        "--people",
        required=True,
        **folder,
        help="photos: DIR/<person>/*.jpg, two or more of each; or DIR/<man|woman>/*.jpg, one of each person, "
        "for which there is no R-FaceSim",
    )
    parser.add_argument("--out", default=Path("out/benchmark"), **folder, help="folder for all results")
    parser.add_argument(
        "--meta", **file, help="stage-1 file; default: meta.safetensors beside the model's weights"
    )
    parser.add_argument(
        "--prompts", **file, default=PROMPTS, help="a prompt per line; or a folder with a <class>.txt each"
    )
    parser.add_argument(
        "--references",
        **file,
        help='which photo each person is learned from, {"anna": "03.jpg"}; default: the first by name',
    )
    parser.add_argument(
        "--classes", **file, help='class of each person, {"anna": "woman"}; default: by name, as woman_anna'
    )
    parser.add_argument(
        "--predictor", **file, help="default: predictor.safetensors beside the model's weights"
    )
    parser.add_argument("--eye-weights", **file, help="of the network it sees with; default: the model's")
    add_model_arguments(parser)

    group = parser.add_argument_group("systems: all combinations of")
    several = {"nargs": "+", "metavar": "N"}
    group.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=["meta-lora", "lora"],
        help="predicted: what a predictor sees in the photo, without training (see predictor/); refined: "
        "trained from there; -noaug: on the whole photo instead of crops and flips",
    )
    parser.add_argument(
        "--photos",
        type=int,
        default=1,
        metavar="N",
        help="how many photos a person is learned from: the reference and the first others by name",
    )
    group.add_argument("--ranks", **several, type=int, default=[1], help="r2, the ranks of the LoRAs")
    group.add_argument("--lr", **several, type=float, default=[4e-4], help="learning rates of AdamW")
    group.add_argument(
        "--steps",
        **several,
        type=int,
        help="all taken from one training; default: 375, and 625 for lora",
    )
    group = parser.add_argument_group("personalization (defaults: the paper's)")
    personalize.add_personal_arguments(group)
    group.add_argument("--seed", type=int, default=0)
    add_training_arguments(parser)
    group = parser.add_argument_group("sampler (defaults: the paper's)")
    group.add_argument("--seeds", type=int, default=5, help="pictures of each prompt, with seeds 0, 1, ...")
    group.add_argument("--sample-steps", type=int, help="Euler steps; default: the model's, as in sample.py")
    group.add_argument("--guidance", type=float, help="the model's guidance input; default: likewise")
    group.add_argument("--cfg", type=float, help="classifier-free guidance; default: likewise")
    add_evaluator_arguments(parser)
    add_use_arguments(parser)
    add_other_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--at-once", type=int, default=1, help="people trained side by side, and pictures in a batch"
    )
    add_memory_arguments(parser)
    args = parser.parse_args(argv)
    settle_uses(parser, args)
    return args
