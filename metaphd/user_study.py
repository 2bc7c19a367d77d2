"""The paper's user study (appendix C): a blinded page of questions, and tables 1 and 2 from the answers."""

import argparse
import hashlib
import io
import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image, ImageOps

from flux.errors import UserError
from people.photos import photo_size, read_photo
from run.arguments import Manual, Parser
from run.files import atomic
from scoring.samples import (
    Sample,
    class_of,
    find_photos,
    find_text,
    read_json,
    read_names,
    read_prompts,
    scan_samples,
)
from scoring.tables import markdown, student

TEMPLATE = Path(__file__).with_name("user_study.html")
TABLES = {
    "Table 1: best overall result": {"Multi-ref.": "multi-reference", "Single-ref.": "single-reference"},
    "Table 2: fidelity and variation": {"Recontextualised": "recontextualised", "Stylistic": "stylistic"},
}
SET = 3  # photos of a multi-reference question, and seeds of a part 2 question

# Questions


def find_pictures(systems: dict[str, Path]) -> dict[str, dict[tuple[str, str, str], Sample]]:
    """Return each system's pictures by person, prompt and seed: those that all have; say what is left out."""
    pictures = {}
    for name, folder in systems.items():
        try:
            samples = scan_samples(folder)
        except (ValueError, OSError) as error:
            raise UserError(str(error).replace("--images ", f"--systems {name}=")) from error
        pictures[name] = {(sample.person, sample.prompt, sample.seed): sample for sample in samples}
    common = sorted(set.intersection(*map(set, pictures.values())))
    if not common:
        firsts = ", ".join(f"{name} begins with {'/'.join(min(own))}" for name, own in pictures.items())
        raise UserError(f"--systems: no person, prompt and seed is in all of them; {firsts}")
    for name, own in pictures.items():
        if len(own) > len(common):
            print(
                f"{name}: {len(own) - len(common)} of {len(own)} pictures left out, another system lacks them"
            )
    return {name: {place: own[place] for place in common} for name, own in pictures.items()}


def draw(
    seeds: dict[tuple[str, str], list[str]], n: int, take: int, used: Counter, rng: random.Random
) -> list[tuple[str, str, list[str]]]:
    """Draw n questions (person, prompt, `take` seeds), no picture twice; people, then prompts, equally often.

    seeds: of each (person, prompt). used: what came up in the study so far, added to; it breaks ties.
    """
    own, drawn = Counter(), []
    for _ in range(n):
        left = [place for place in seeds if (own[place] + 1) * take <= len(seeds[place])]
        if not left:
            most = f"{len(drawn)} with {take} seed{'s' * (take > 1)} each"
            raise UserError(
                f"--questions {4 * n}: {n} of each kind need more pictures; of one they make {most}"
            )
        counts = lambda place: [(own[name], used[name]) for name in (*enumerate(place), place)]
        place = min(left, key=lambda place: (counts(place), rng.random()))
        some = sorted(seeds[place], key=lambda s: (own[*place, s], used[*place, s], rng.random()))[:take]
        for counter in (own, used):
            counter.update([*enumerate(place), place, *((*place, s) for s in some)])
        drawn.append((*place, some))
    return drawn


def make_questions(pictures: dict, photos: dict, texts: dict, styles: set | None, n: int, pair, rng) -> list:
    """Draw n questions of each kind, a dict each; part 2 is left out, and said so, when seeds are too few.

    texts: prompts of each person. styles: the numbers of those for a style; None: the second half.
    """
    seeds, used = {}, Counter()
    for person, prompt, seed in next(iter(pictures.values())):
        seeds.setdefault((person, prompt), []).append(seed)
    several = {place: some for place, some in seeds.items() if len(photos[place[0]]) > 1}
    drawn = {
        "multi-reference": draw(several, n, 1, used, rng),
        "single-reference": draw(seeds, n, 1, used, rng),
    }

    parts = {"recontextualised": {}, "stylistic": {}}
    for (person, prompt), some in seeds.items():
        count = len(texts[person])
        stylistic = int(prompt) in (range((count + 1) // 2, count) if styles is None else styles)
        if len(some) >= SET:
            parts["stylistic" if stylistic else "recontextualised"][person, prompt] = some
    if lacking := [kind for kind in parts if not parts[kind]]:
        print(f"part 2 left out: no {' and no '.join(lacking)} prompt has {SET} seeds in all systems")
    else:
        drawn |= {kind: draw(part, n, SET, used, rng) for kind, part in parts.items()}

    questions = []
    for kind, (person, prompt, some) in [(name, question) for name in drawn for question in drawn[name]]:
        first, *others = photos[person]
        options = {
            system: [own[person, prompt, seed] for seed in some]
            for system, own in pictures.items()
            if system in pair or kind not in parts
        }
        question = {"kind": kind, "person": person, "prompt": prompt, "seeds": some}
        question["text"] = find_text(options[pair[0]][0], texts[person])
        question["references"] = [first]
        if kind == "multi-reference":
            question["references"] = rng.sample(others, min(SET, len(others)))
        question["options"] = {system: [made.path for made in own] for system, own in options.items()}
        questions.append(question)
    return questions


# The page


def clean(path: Path, limit: int, size: tuple[int, int] | None = None) -> bytes:
    """Encode a picture as JPEG, cut and scaled to size (height, width), of at most `limit` pixels a side."""
    image = read_photo(path)
    image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS) if size else image
    image.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    image = Image.fromarray(np.asarray(image))  # pixels alone: PIL would pass on the file's comment
    image.save(buffer := io.BytesIO(), "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def write_page(out: Path, questions: list[dict], limit: int, settings: dict) -> None:
    """Write page/, where systems are but random names, and the key to those, key.json, beside it."""
    made = [path for question in questions for paths in question["options"].values() for path in paths]
    sizes = {photo_size(path) for path in made}
    size = tuple(map(min, zip(*sizes)))  # every system's, or the number of pixels would tell it
    if len(sizes) > 1:
        print(f"pictures of {len(sizes)} sizes cut and scaled to {size[1]}x{size[0]}")
    # Names and orders are drawn from the pictures' own files, which those who answer do not have: from the
    # seed alone, anybody with this program could work out the key.
    places = [[*question["seeds"], question["kind"], *question["options"]] for question in questions]
    digest = hashlib.sha256(json.dumps(places).encode())
    for path in made:
        digest.update(path.read_bytes())
    rng = random.Random(digest.hexdigest())
    new = lambda: f"{rng.getrandbits(64):016x}"

    (out / "page" / "pictures").mkdir(parents=True)
    copies: dict[Path, str] = {}

    def add(content: bytes) -> str:
        name = f"pictures/{new()}.jpg"
        (out / "page" / name).write_bytes(content)
        return name

    key = {"study": new(), "settings": settings, "questions": {}}
    page = {"id": key["study"], "size": size, "questions": []}
    for question in rng.sample(questions, len(questions)):
        for path in question["references"]:
            copies[path] = copies.get(path) or add(clean(path, limit))
        options = [{"id": new(), "system": name} for name in question["options"]]
        rng.shuffle(options)
        names = {option["id"]: option.pop("system") for option in options}
        for option in options:
            paths = question["options"][names[option["id"]]]
            option["pictures"] = [add(clean(path, limit, size)) for path in paths]
        references = [copies[path] for path in question["references"]]
        page["questions"].append(
            {"id": new(), "text": question["text"], "references": references, "options": options}
        )
        key["questions"][page["questions"][-1]["id"]] = {**question, "options": names}
    html = TEMPLATE.read_text("utf-8").replace("{{study}}", json.dumps(page).replace("<", "\\u003c"))
    write(out / "key.json", json.dumps(key, indent=1, default=str))
    write(out / "page" / "index.html", html)


def write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")


# Tables


def read_answers(path: Path, key: dict) -> tuple[str, dict[str, dict]]:
    """Return a participant's id and answers by question; ValueError when they are not of the key's study."""
    try:
        saved = json.loads(path.read_text("utf-8"))
        study, participant = str(saved["study"]), str(saved["participant"])
        answers = [(str(a["question"]), str(a["choice"]), float(a["seconds"])) for a in saved["answers"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is no whole file of answers ({type(error).__name__}: {error})") from error
    if study != key["study"]:
        raise UserError(f"{path} answers the study {study}, not {key['study']}")
    read = {}
    for question, choice, seconds in answers:
        if question not in key["questions"] or choice not in key["questions"][question]["options"]:
            raise UserError(f"{path}: question {question}, choice {choice}: the study has none such")
        if question in read:
            raise UserError(f"{path} answers question {question} twice")
        read[question] = {"system": key["questions"][question]["options"][choice], "seconds": seconds}
    return participant, read


def estimate(votes: np.ndarray) -> dict:
    """Return the percentage chosen, and half the width of its 95 % interval (None for one participant).

    votes: (participants, kinds, 2), how often each chose a system, and how many questions each answered.
    Answers are pooled in each kind, and the percentages of several kinds averaged, as in the paper's tables.
    A participant's answers go together, so the interval is over participants: a ratio estimator's (Cochran,
    Sampling Techniques, 3rd edition, chapter 6) with Student's t. When everybody answered everything, that is
    the usual one for the mean of the participants' percentages.
    """
    chosen, answers = np.moveaxis(votes[votes[..., 1].any(axis=1)].astype(float), 2, 0)  # (n, kinds) each
    n, total = len(chosen), answers.sum(axis=0)
    if not total.all():
        return {"percent": None, "ci95": None, "participants": n}
    share = chosen.sum(axis=0) / total
    residual = ((chosen - share * answers) * n / total).mean(axis=1)  # (n,), of mean zero
    half = 100 * student(n - 1) * residual.std(ddof=1) / math.sqrt(n) if n > 1 else None
    return {"percent": 100 * share.mean(), "ci95": half, "participants": n}


def tabulate(key: dict, answers: dict[str, dict]) -> dict[str, dict]:
    """Count the answers of all participants: for each table, system and column what `estimate` returns."""
    tables = {}
    for title, columns in TABLES.items():
        own = [question for question in key["questions"].values() if question["kind"] in columns.values()]
        shown = {name for question in own for name in question["options"].values()}
        for system in [name for name in key["settings"]["systems"] if name in shown]:
            votes = np.zeros((len(answers), len(columns), 2), int)
            for row, given in zip(votes, answers.values()):
                for kind, cell in zip(columns.values(), row):
                    some = [a["system"] for q, a in given.items() if key["questions"][q]["kind"] == kind]
                    cell[:] = some.count(system), len(some)
            cells = {column: estimate(votes[:, [k]]) for k, column in enumerate(columns)}
            tables.setdefault(title, {})[system] = {"Overall": estimate(votes), **cells}
    return tables


def show(title: str, table: dict[str, dict]) -> str:
    """Lay a table out in Markdown, the greatest of each column in bold."""
    columns = list(next(iter(table.values())))
    best = {c: max((row[c]["percent"] or 0 for row in table.values()), default=0) for c in columns}
    lines = [["", *(f"{column} (%)" for column in columns)]]
    for system, row in table.items():
        lines.append([system.replace("|", r"\|")])
        for column, (percent, half, _) in ((column, cell.values()) for column, cell in row.items()):
            text = (
                "–" if percent is None else f"{percent:.2f}" + (f" ± {half:.2f}" if half is not None else "")
            )
            lines[-1].append(f"**{text}**" if percent and percent == best[column] else text)
    return f"{title}\n\n{markdown(lines)}"


# Command line

MANUAL = """
Ask people which system's pictures they like best, blinded, as the Meta-LoRA paper does (appendix C).

commands:
  make    write a page of questions, and the key to it     (python study.py make --help)
  tally   read the answers that came back: tables 1 and 2  (python study.py tally --help)

Make the page, send the folder study/page to people, and keep study/key.json to yourself. The page needs no
server and no network: one opens index.html, answers, and sends back the file that it saves at the end.
"""
MAKE = """
Write a page of blinded questions, of four kinds, a quarter each:
  multi-reference    one picture by each system for the same person, prompt and seed: which is the best? Shown
                     beside three photos of the person that no system was given
  single-reference   the same, beside the one photo that they were given
  recontextualised   three seeds by each of two systems, for a prompt that places the person: which set?
  stylistic          the same, for a prompt that changes the style

files:
  --systems     DIR/<person>/<prompt>/<seed>.png; a prompt's folder begins with its place in the list, counted
                from 0: 03, or 03_any-words. Only pictures that every system has are used
  --people      DIR/<person>/*.jpg|png, real photos; the first by name is the reference, which the systems
                were given, unless --references names another: {"anna": "03.jpg"}
  --prompts     a prompt per line, [man/woman] and [his/her] filled in by class; or a folder, as prompts/,
                with a <class>.txt for each class
  --classes     {"anna": "woman", ...}; without it woman_anna is a woman, man_2 a man, others a person
  --out         a new folder. page/ is to be handed out; key.json, which tells the systems, is not

People, and then prompts, come up as equally often as the pictures allow. Pictures are copied under random
names as JPEG of one size, without metadata. All answer the same questions, each in an order of their own.

example:
  python study.py make --systems lora=out/lora meta-lora=out/meta --people photos --prompts prompts
"""
TALLY = """
Count the answers and print the paper's tables 1 and 2: how often each system was chosen, in percent, with the
95 % confidence interval over participants (Student's t). Overall is the mean of the kinds of question. The
tables go to tally.md, and all numbers to tally.json, in the study's folder.

example:
  python study.py tally --study study answers/*.json
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m metaphd study", description=MANUAL, formatter_class=Manual)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", help="make or tally")
    folder, file = {"type": Path, "metavar": "DIR"}, {"type": Path, "metavar": "FILE"}
    add = commands.add_parser("make", description=MAKE, formatter_class=Manual).add_argument
    add("--systems", nargs="+", required=True, metavar="NAME=DIR", help="pictures to compare, two or more")
    add("--people", required=True, **folder, help="real photos of the people")
    add("--prompts", required=True, **file, help="what the pictures were made from; or a folder")
    add("--references", **file, help="which photo of each person the systems were given")
    add("--classes", **file, help="class of each person")
    add("--out", default=Path("study"), **folder, help="folder for the study")
    add("--questions", type=int, default=64, help="of all kinds together, a multiple of 4")
    add("--pair", nargs=2, metavar="NAME", help="systems to compare in part 2; default: the first two")
    add("--style-prompts", metavar="N-M", help="such as 10-19 or 3,5,7-9; default: the list's second half")
    add("--size", type=int, default=768, help="longer side of the page's pictures at most, in pixels")
    add("--seed", type=int, default=0, help="of what is drawn; default: 0")
    add = commands.add_parser("tally", description=TALLY, formatter_class=Manual).add_argument
    add("--study", default=Path("study"), **folder, help="folder that make wrote")
    add("answers", nargs="+", type=Path, metavar="FILE", help="what participants sent back")
    return parser.parse_args(argv)


def parse_systems(items: Sequence[str]) -> dict[str, Path]:
    """Read NAME=DIR ...; ValueError for another form, a name given twice, and fewer than two."""
    pairs = [item.partition("=") for item in items]
    for item, (name, _, folder) in zip(items, pairs):
        if not name.strip() or not folder:
            raise UserError(f"--systems {item}: should read NAME=DIR")
    names = [name for name, _, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--systems: {twice[0]} is given {len(twice)} times")
    if len(names) < 2:
        raise UserError(f"--systems {items[0]}: needed are two or more, to compare")
    return {name: Path(folder) for name, _, folder in pairs}


def parse_numbers(text: str) -> set[int]:
    """Read "3,5,7-9" as a set; ValueError for another form."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UserError(f"--style-prompts {text}: should read like 10-19 or 3,5,7-9")
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return {number for part in ends for number in range(part[0], part[-1] + 1)}


def make(args: argparse.Namespace) -> None:
    systems = parse_systems(args.systems)
    pair = args.pair or list(systems)[:2]
    if len(set(pair) & systems.keys()) < 2:
        raise UserError(f"--pair {' '.join(pair)}: should be two of --systems, {', '.join(systems)}")
    if args.questions < 4 or args.questions % 4 or args.size < 1:
        raise UserError(f"--questions {args.questions} must be 4, 8, ..., and --size {args.size} at least 1")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out} is not empty: a study is never overwritten, give a new folder")

    pictures = find_pictures(systems)
    people = sorted({person for person, _, _ in pictures[pair[0]]})
    photos = find_photos(args.people, read_names(args.references, "--references"))
    counts = {person: len(photos.get(person, ())) for person in people}
    if none := [person for person, n in counts.items() if not n]:
        raise UserError(f"--people {args.people} has no photo of {', '.join(none)}")
    if max(counts.values()) < 2:
        raise UserError(f"--people {args.people}: nobody has a second photo, for multi-reference questions")
    if few := [f"{person} {n - 1}" for person, n in counts.items() if n <= SET]:
        print(
            f"fewer than {SET} photos besides the reference, all are shown; without any, none of that kind: "
            f"{', '.join(few)}"
        )
    given = read_names(args.classes, "--classes")
    texts = {name: read_prompts(args.prompts, class_of(name, given)) for name in people}
    for (person, _, _), sample in pictures[pair[0]].items():
        find_text(sample, texts[person])  # raises when the list has no such number
    styles = parse_numbers(args.style_prompts) if args.style_prompts else None
    if styles and max(styles) >= (shortest := min(map(len, texts.values()))):
        raise UserError(f"--style-prompts {args.style_prompts}: the list ends with number {shortest - 1}")

    rng = random.Random(args.seed)
    questions = make_questions(pictures, photos, texts, styles, args.questions // 4, pair, rng)
    try:
        write_page(args.out, questions, args.size, {**vars(args), "systems": systems, "pair": pair})
    except BaseException:  # Ctrl-C too: what is left of it would be in the way of the next try
        shutil.rmtree(args.out / "page", ignore_errors=True)
        (args.out / "key.json").unlink(missing_ok=True)
        raise
    print(f"{len(questions)} questions in {args.out / 'page'}; keep {args.out / 'key.json'} to yourself")


def tally(args: argparse.Namespace) -> None:
    path = args.study / "key.json"
    if not path.is_file():
        raise FileNotFoundError(f"--study {args.study}: there is no key.json, which `make` wrote")
    key, answers, files = read_json(path, str(path)), {}, {}
    if lacking := {"study", "settings", "questions"} - key.keys():
        raise UserError(f"{path} is not the key that `make` wrote: it lacks {', '.join(sorted(lacking))}")
    for file in args.answers:
        participant, given = read_answers(file, key)
        if participant in files:
            raise UserError(f"{files[participant]} and {file} are by the same participant: leave one out")
        files[participant], answers[participant] = file, given
    tables, total = tabulate(key, answers), len(key["questions"])
    count = f"{len(answers)} participants, {sum(map(len, answers.values()))} answers"
    text = "\n\n".join([count, *(show(title, table) for title, table in tables.items())])
    print(text)
    incomplete = {str(files[name]): len(given) for name, given in answers.items() if len(given) < total}
    if incomplete:
        names = ", ".join(f"{name} ({n} of {total})" for name, n in incomplete.items())
        print(f"\nincomplete, used for what they hold: {len(incomplete)} of {len(answers)}: {names}")
    seconds = {name: median(a["seconds"] for a in given.values()) for name, given in answers.items() if given}
    numbers = {"study": key["study"], "tables": tables, "incomplete": incomplete, "median seconds": seconds}
    write(args.study / "tally.md", text + "\n")
    write(args.study / "tally.json", json.dumps(numbers, indent=1))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    {"make": make, "tally": tally}[args.command](args)
