"""Personalize many people in one process, with one frozen base: everybody's photos to a LoRA file each.

    python -m family anna.jpg boris.jpg clara/     # out/family/anna.safetensors, boris.., clara..
    python -m family --people photos               # of every photo and every folder in a folder

Each file is as `personalize.py` makes it of the same photos with the same options, caption and face. The same
command again goes on with those who are not done.
"""

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import flux
import personalize
from family.side_by_side import personalize_together
from flux.checkpoint import read_header
from flux.errors import UserError
from flux.hashes import sha256
from flux.loading import native_size
from flux.memory import release
from flux.sampling import generate
from lora.reading import read_lora
from lora.writing import format_of
from metalora import Prior, eject, export_lora, inject_loras, load_meta, use_slots
from people.crops import crop_boxes, fit_shape
from people.encoding import encode_negative, encode_prompt, stack_prompts
from people.faces import known_face, locate_face
from people.folders import (
    captions_beside,
    composed,
    expand_folders,
    folders_in,
    list_contents,
    photos_in,
    read_caption,
)
from people.photos import Box, read_photo
from predictor.start import export_row, eye_of, predict
from run.arguments import Manual, Parser
from run.command import run_script
from run.costs import Plan, Workload
from run.files import alone, name_of, slug
from run.models import choose_device, files_to_plan, find_model, take_defaults
from run.pictures import contact_sheet, save_picture, save_sheet
from run.plan import MemoryOptions, plan_one_of, workload_for
from run.settings import Training
from vision.detector import load_detector

AT_ONCE = (1, 2, 4, 8)  # numbers of people side by side to choose from


@dataclass(frozen=True, eq=False)
class Person:
    """Somebody to be learned."""

    name: str  # also of the file
    photos: list[Path]
    caption: str
    rank: int | None  # None: as the predictor's


def find_people(args: argparse.Namespace) -> list[Person]:
    """List the people that the arguments name, one for each photo and each folder of photos.

    Raises FileNotFoundError or UserError when there are none, a folder has no photo, or two people would
    have one file.
    """
    paths = [*args.photos]
    if args.people:
        if not args.people.is_dir():
            raise FileNotFoundError(f"--people {args.people}: no such folder")
        paths += folders_in(args.people) + photos_in(args.people)
    if not paths:
        where = f"--people {args.people} has neither photos nor folders" if args.people else "no photos"
        raise UserError(f"{where}: give a photo, or a folder of photos, of each person")
    contents = cache(lambda folder: list_contents(folder, folder, below=False))
    people, owners = [], {}
    for path in dict.fromkeys(paths):
        photos, name = expand_folders([path]), name_of(path)
        other = owners.setdefault(composed(name).casefold(), path)  # some disks tell no case apart
        if other != path:
            raise UserError(f"{other} and {path} would both become {name}.safetensors: rename one of them")
        caption = args.caption
        if not caption and len(photos) == 1 and photos[0].is_file():
            caption, _ = read_caption(photos[0], contents(photos[0].parent))
        elif not caption and args.steps and captions_beside(photos):
            unused = captions_beside(photos)[0]
            warnings.warn(f"captions such as {unused} are not used: {name} has several photos", stacklevel=2)
        rank = args.rank or (None if args.start == "predicted" else personalize.default_rank(photos))
        people.append(Person(name, photos, caption or f"a photo of a {args.class_word}", rank))
    return people


class Family:
    """What everybody shares: the settings, the base model, and where results lie."""

    def __init__(self, args: argparse.Namespace):
        """Check all that can be wrong before anything takes long; find out who is to be learned."""
        self.args, self.people = args, find_people(args)
        self.settings = personalize.settings_of(args)
        self.device, self.dtype = choose_device(args)
        self.lost: dict[Person, str] = {}  # who cannot be learned, and why
        self.rows: dict[Person, torch.Tensor] = {}  # what a predictor sees
        self.encoded: dict[Person, list[personalize.EncodedCrop]] = {}
        self.unlearned: list[Person] = []
        for file in filter(None, [args.meta and personalize.existing_prior(args.meta), args.predictor]):
            read_header(file)  # is it a safetensors file?
        self.crops = self.list_crops()
        self.files = find_model(args)
        take_defaults(args, self.files)
        self.training, self.sampler = Training.of(args), flux.default_sampler(self.files)
        self.resolution = args.resolution or native_size(self.files.folder)
        self.settings, self.prior, self.trained = personalize.find_start(args, self.settings, self.files)
        self.at_once, self.plan = 1, None
        if self.settings.steps:
            model = flux.load_transformer(self.files.transformer, "meta")
            personalize.add_adapters(model, self.prior, 1, args.targets, [0])  # does the stage-1 file fit?
            ranks = [person.rank or self.settings.rank for person in self.people]
            self.at_once, self.plan = plan(
                args, ranks, self.prior, self.resolution, self.device, self.dtype, vars(self.files)
            )
        shared = {"resolution": self.resolution, "seed": args.seed}
        shared |= personalize.describe(
            self.settings, self.training, self.files.transformer, self.prior, [], self.trained
        )
        shared |= {"base_fp8": self.plan.fp8} if self.plan else {}
        # What everybody's file says of itself, as `personalize.py` writes it.
        self.about = {
            person: shared
            | {"rank": person.rank or self.settings.rank, "caption": person.caption}
            | {"photos": [sha256(path) for path in person.photos]}
            for person in self.living()
        }
        self.unlearned = [person for person in self.living() if not self.is_done(person)]

    # What is there

    def lora(self, person: Person) -> Path:
        return self.args.out / f"{person.name}.safetensors"

    def sample(self, person: Person, number: int) -> Path:
        return self.args.out / "samples" / person.name / f"{number}_{slug(self.texts(person)[number])}.png"

    def living(self) -> list[Person]:
        return [person for person in self.people if person not in self.lost]

    def lose(self, person: Person, reason: object) -> None:
        """Leave a person out from now on; `main` says so again at the end."""
        self.lost[person] = str(reason)
        if person in self.unlearned:
            self.unlearned.remove(person)
        tqdm.write(f"{person.name} is left out: {reason}")

    def list_crops(self) -> dict[Person, list[tuple[Path, Box]]]:
        """Read all photos; return the crops of those without a file, see `personalize.list_crops`."""
        detector, crops = None, {}
        for person in tqdm(self.people, "photos", disable=len(self.people) < 10):
            photos = {path: read_photo(path) for path in person.photos}
            if self.lora(person).exists():
                continue
            if not self.settings.augment:
                crops[person] = personalize.list_crops(photos, augment=False)
                continue
            detector, boxes = detector or load_detector(self.args.detector), []
            try:
                for path, photo in photos.items():
                    face = locate_face(path, photo, detector, ", or train on whole photos: --no-augment")
                    boxes += [(path, crop) for crop in crop_boxes(photo.size[::-1], face)]
                crops[person] = boxes
            except UserError as error:
                self.lose(person, error)
        return crops

    def is_done(self, person: Person) -> bool:
        """Tell whether a person's file is there, and say so; UserError when it was made otherwise."""
        path = self.lora(person)
        if not path.exists():
            return False
        header, _ = read_header(path)
        found, changed = header.get("__metadata__", {}), []
        for key, value in self.about[person].items():
            text = value if isinstance(value, str) else json.dumps(value)
            if found.get(key) != text:
                changed.append(f"{key}: {found.get(key)}, now {text}")
        form = format_of(header.keys() - {"__metadata__"})
        if form != self.args.format:
            changed.append(f"--format: {form}, now {self.args.format}")
        if changed:
            lines = "\n".join(f"  {line[:200]}" for line in changed)
            raise UserError(f"{path} was made with other settings; take another --out, or these:\n{lines}")
        print(f"{path} is there already")
        return True

    def unsampled(self) -> list[Person]:
        """Return the people of whom pictures are missing."""
        numbers = range(self.args.samples)
        return [p for p in self.living() if not all(self.sample(p, number).exists() for number in numbers)]

    def texts(self, person: Person) -> list[str]:
        """Return a person's prompts: the caption, with which it is trained, and those of other pictures."""
        scenes = [f"a photo of a {self.args.class_word} {scene}" for scene in personalize.SCENES]
        return [person.caption, *scenes][: max(1, self.args.samples)]

    # The work

    def predict(self) -> None:
        """See everybody whose file is missing with the predictor, a row each."""
        if not (self.trained and self.unlearned):
            return
        args = self.args
        eye = eye_of(self.trained, args.eye_weights, self.files, self.device, args.detector)
        for person in tqdm([*self.unlearned], "predicting", disable=len(self.unlearned) < 10):
            photos = {path: read_photo(path) for path in person.photos}
            advice = "write its box into a faces.json beside it"
            try:
                known = {path: known_face(path) for path in photos}
                self.rows[person] = predict(self.trained, eye, photos, self.files.transformer, known, advice)
            except UserError as error:
                self.lose(person, error)
        del eye
        release(self.device)

    def write_rows(self) -> None:
        """Write what was predicted, untrained."""
        for person, row in self.rows.items():
            transformer, settings = self.files.transformer, self.settings
            path, about = self.lora(person), self.about[person]
            try:
                export_row(transformer, settings.targets, settings.rank, row, path, about, self.args.format)
            except UserError as error:  # a number that float16 does not hold
                self.lose(person, f"{person.photos[0]}: {error}")
            else:
                print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

    def encode(self) -> None:
        """Encode photos and prompts; the encoders have left memory when this returns."""
        autoencoder = flux.load_autoencoder(self.files.autoencoder, self.device, self.dtype)
        self.multiple = autoencoder.sizes.token_pixels
        for person in tqdm([*self.unlearned], "latents", disable=len(self.unlearned) < 10):
            photos = {path: read_photo(path) for path in person.photos}
            try:
                self.encoded[person] = personalize.encode_crops(
                    photos, self.crops[person], autoencoder, self.resolution, self.settings.augment
                )
            except UserError as error:  # a crop is too small
                self.lose(person, f"{person.photos[0]}: {error}")
        del autoencoder
        release(self.device)
        args = self.args
        conditioner = flux.load_conditioner(self.files, self.device, self.dtype, args.t5_length, args.vram)
        texts = dict.fromkeys(text for person in self.living() for text in self.texts(person))
        texts = tqdm(texts, "prompts", disable=len(texts) < 50)
        self.prompts = {text: encode_prompt(text, conditioner) for text in texts}
        negative = encode_negative(self.sampler["cfg"], conditioner)
        self.sampler["negative"] = negative
        del conditioner
        release(self.device)

    def groups(self) -> Iterator[list[Person]]:
        """Deal the people to be learned into groups of one rank; those of the same shapes come together."""
        shapes = {person: [crop.shape for crop in self.encoded[person]] for person in self.unlearned}
        for rank in {person.rank for person in shapes}:
            same = sorted((person for person in shapes if person.rank == rank), key=shapes.get)
            for start in range(0, len(same), self.at_once):
                yield same[start : start + self.at_once]

    def load(self) -> None:
        place = self.plan.place(self.device)
        self.model = flux.load_transformer(self.files.transformer, place, self.dtype)
        self.plan.apply(self.model, self.device)

    def learn(self, group: Sequence[Person]) -> None:
        """Train people side by side and write their files."""
        print(f"learning {', '.join(person.name for person in group)}; {len(self.unlearned)} to go")
        settings = replace(self.settings, rank=group[0].rank or self.settings.rank)
        seeds = [self.args.seed] * len(group)
        personal = personalize.add_adapters(self.model, self.prior, settings.rank, settings.targets, seeds)
        if self.rows:
            personal.data.copy_(torch.stack([self.rows[person] for person in group]))
        batches = [
            personalize.draw_batches(
                self.encoded[person],
                self.prompts[person.caption],
                settings,
                self.training,
                self.args.seed,
                self.device,
                self.dtype,
            )
            for person in group
        ]
        steps = [settings.steps]
        ((_, slots),) = personalize_together(self.model, personal, batches, steps, self.training, self.device)
        for slot, person in enumerate(group):
            if slot in slots:
                self.export(person, slot)
            else:
                advice = f"a smaller --lr than {self.training.lr:g} may help"
                self.lose(person, f"{person.photos[0]}: the loss became infinite or NaN; {advice}")
        eject(self.model)

    def export(self, person: Person, slot: int) -> None:
        """Write a person's file."""
        path = self.lora(person)
        try:
            export_lora(self.model, path, self.about[person], slot, self.args.format)
        except UserError as error:  # a number that float16 does not hold
            return self.lose(person, f"{person.photos[0]}: {error}")
        for picture in self.sample(person, 0).parent.glob("[0-9]_*.png"):  # made with an earlier file
            picture.unlink()
        self.unlearned.remove(person)
        print(f"{path}: rank {self.about[person]['rank']}, {path.stat().st_size / 1e6:.1f} MB")

    def generate(self) -> None:
        """Make the missing pictures with the files, those of `at_once` people in a batch."""
        people = self.unsampled()
        autoencoder = flux.load_autoencoder(self.files.autoencoder, self.device, self.dtype)
        side = self.resolution
        bar = tqdm(total=len(people) * self.args.samples, desc="sampling", unit="picture", dynamic_ncols=True)
        for start in range(0, len(people), self.at_once):
            group = people[start : start + self.at_once]
            loras = [read_lora(self.lora(person), self.model)[0] for person in group]
            inject_loras(self.model, [[(lora, 1.0)] for lora in loras])
            use_slots(self.model, torch.arange(len(group), device=self.device))
            for number in range(self.args.samples):
                texts = [self.texts(person)[number] for person in group]
                prompt = stack_prompts([self.prompts[text] for text in texts])
                seeds, size = [self.args.seed] * len(group), fit_shape((side, side), side, self.multiple)
                pictures = generate(self.model, autoencoder, prompt, seeds, size, **self.sampler)
                for person, text, picture in zip(group, texts, pictures):
                    path = self.sample(person, number)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_picture(picture, path, {"prompt": text, "seed": self.args.seed})
                bar.update(len(group))
            eject(self.model)
        bar.close()

    def show(self) -> None:
        """Write a contact sheet: a row for everyone, with the first photo and all samples."""

        def small(path: Path) -> Image.Image:
            picture = read_photo(path)
            picture.thumbnail((256, 256))
            return picture

        rows = []
        for person in self.living():
            paths = [self.sample(person, number) for number in range(self.args.samples)]
            rows.append([*map(small, [person.photos[0], *paths])])
        titles = ["photo", "the caption", *self.texts(self.people[0])[1:]]
        path = self.args.out / "people.png"
        save_sheet(contact_sheet(rows, [person.name for person in self.living()], titles), path)
        print(f"{path}: {len(rows)} people to look at")


def plan(
    args: argparse.Namespace,
    ranks: Sequence[int],
    prior: Prior | None,
    resolution: int | None,
    device: torch.device,
    dtype: torch.dtype,
    parts: dict[str, Path],
) -> tuple[int, Plan]:
    """Choose how many people are trained side by side, of AT_ONCE unless the user says so, and how they fit.

    ranks: of all people. prior: None for r1 as in the paper. parts: the model's files, as far as they are
    there.
    """
    r1 = None if args.method == "lora" else prior.r1 if prior else Workload.r1
    options, sizes = MemoryOptions.of(args), {"r1": r1, "r2": max(ranks)}
    work = workload_for("stage2", parts, options, device, dtype, args.t5_length, resolution, **sizes)
    counts = [args.at_once] if args.at_once else AT_ONCE
    counts = sorted({min(count, len(ranks)) for count in counts})
    works = [replace(work, identities=count, batch=count * args.batch) for count in counts]
    work, chosen = plan_one_of(works, options, device)
    return work.identities, chosen


# --- The command -------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.plan:
        if not args.steps:
            return print("--steps 0 does not load the transformer: there is nothing to plan")
        ranks = [person.rank or 1 for person in find_people(args)]
        prior = load_meta(args.meta) if args.meta else None
        plan(args, ranks, prior, args.resolution, *choose_device(args), files_to_plan(args))
        return
    with alone(args.out):
        family = Family(args)
        family.predict()
        if not args.steps:
            family.write_rows()
        elif family.unlearned or family.unsampled():
            family.encode()
            family.load()
            for group in family.groups():
                family.learn(group)
            if family.unsampled():
                family.generate()
        if args.samples and family.living():
            family.show()
    if family.lost:
        lines = [f"  {person.name}: {reason}" for person, reason in family.lost.items()]
        problem = f"{len(lines)} of {len(family.people)} people could not be learned:"
        raise UserError("\n".join([problem, *lines]))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    limits = personalize.LIMITS
    parser = Parser(prog="python -m family", description=__doc__, formatter_class=Manual, limits=limits)
    parser.add_argument(
        "photos", type=Path, nargs="*", metavar="photo", help="of each person a photo, or a folder of photos"
    )
    parser.add_argument(
        "--people", type=Path, metavar="DIR", help="and everybody in DIR: each photo and each folder is one"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/family"), metavar="DIR", help="folder for everything"
    )
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="K",
        help="people trained side by side; default: 1, 2, 4 or 8, the largest number that takes no longer "
        "per person than the fastest by the memory plan",
    )
    personalize.add_stage2_arguments(parser)
    args = parser.parse_args(argv)
    personalize.settle(parser, args)
    return args


if __name__ == "__main__":
    run_script(main, "stopped; files are whole, and the same command goes on with the others")
