"""The paper's user study (appendix C): a blinded page of questions, and tables 1 and 2 from the answers.

docs/benchmark.md describes how a study is made and what the page shows.
"""

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

from flux.checkpoint import read_json
from flux.errors import UserError, listed
from flux.texts import read_text
from people.photos import photo_size, read_photo
from run.arguments import Manual, Parser
from run.files import atomic
from scoring.inputs import class_of, find_photos, read_names, read_prompts
from scoring.intervals import student
from scoring.samples import Sample, find_text, scan_samples
from scoring.tables import markdown

TEMPLATE = Path(__file__).with_name("user_study.html")
TABLES = {
    "Table 1: best overall result": {"Multi-ref.": "multi-reference", "Single-ref.": "single-reference"},
    "Table 2: fidelity and variation": {"Recontextualised": "recontextualised", "Stylistic": "stylistic"},
}
SET = 3  # photos of a multi-reference question, and seeds of a part 2 question

Pictures = dict[str, dict[tuple[str, str, str], Sample]]  # of each system, by person, prompt and seed


# Questions


def find_pictures(systems: dict[str, Path]) -> Pictures:
    """Return the pictures that all systems have, and print how many are left out."""
    pictures = {}
    for name, folder in systems.items():
        try:
            samples = scan_samples(folder)
        except (UserError, OSError) as error:
            raise UserError(str(error).replace("--images ", f"--systems {name}=")) from error
        pictures[name] = {(sample.person, sample.prompt, sample.seed): sample for sample in samples}
    common = sorted(set.intersection(*map(set, pictures.values())))
    if not common:
        firsts = ", ".join(f"{name} begins with {'/'.join(min(made))}" for name, made in pictures.items())
        raise UserError(f"--systems: no person, prompt and seed is in all of them; {firsts}")
    for name, made in pictures.items():
        left_out = len(made) - len(common)
        if left_out:
            print(f"{name}: {left_out} of {len(made)} pictures left out, another system lacks them")
    return {name: {place: made[place] for place in common} for name, made in pictures.items()}


def choose_questions(
    seeds: dict[tuple[str, str], list[str]], n: int, take: int, used: Counter, rng: random.Random
) -> list[tuple[str, str, list[str]]]:
    """Choose n questions without repeating a picture. People come up equally often, then prompts.

    A question is a person, a prompt and `take` seeds. seeds: of each (person, prompt). used: what came up in
    the study so far, added to; it breaks ties.
    """
    counts, questions = Counter(), []

    def often(place: tuple[str, str]) -> list[tuple[int, int]]:
        """How often the person, then the prompt, then the pair came up here, and in the study."""
        person, prompt = place
        names = ("person", person), ("prompt", prompt), place
        return [(counts[name], used[name]) for name in names]

    for _ in range(n):
        free = [place for place in seeds if (counts[place] + 1) * take <= len(seeds[place])]
        if not free:
            most = f"{len(questions)} with {take} seed{'s' if take > 1 else ''} each"
            raise UserError(
                f"--questions {4 * n}: {n} of each kind need more pictures; of one they make {most}"
            )
        person, prompt = min(free, key=lambda place: (often(place), rng.random()))
        chosen = sorted(
            seeds[person, prompt],
            key=lambda seed: (counts[person, prompt, seed], used[person, prompt, seed], rng.random()),
        )[:take]
        for counter in (counts, used):
            counter.update([("person", person), ("prompt", prompt), (person, prompt)])
            counter.update((person, prompt, seed) for seed in chosen)
        questions.append((person, prompt, chosen))
    return questions


def make_questions(
    pictures: Pictures,
    photos: dict[str, list[Path]],
    texts: dict[str, list[str]],
    styles: set[int] | None,
    n: int,
    pair: Sequence[str],
    rng: random.Random,
) -> list[dict]:
    """Choose n questions of each kind; part 2 is left out, with a message, when there are too few seeds.

    texts: prompts of each person. styles: the numbers of those for a style; None: the second half. pair: the
    systems that part 2 compares.
    """
    seeds, used = {}, Counter()
    for person, prompt, seed in pictures[pair[0]]:
        seeds.setdefault((person, prompt), []).append(seed)
    with_other_photos = {place: seeds[place] for place in seeds if len(photos[place[0]]) > 1}
    selected = {
        "multi-reference": choose_questions(with_other_photos, n, 1, used, rng),
        "single-reference": choose_questions(seeds, n, 1, used, rng),
    }

    part2 = {"recontextualised": {}, "stylistic": {}}
    for (person, prompt), seeds_here in seeds.items():
        count = len(texts[person])
        numbers = range((count + 1) // 2, count) if styles is None else styles
        kind = "stylistic" if int(prompt) in numbers else "recontextualised"
        if len(seeds_here) >= SET:
            part2[kind][person, prompt] = seeds_here
    lacking = [kind for kind in part2 if not part2[kind]]
    if lacking:
        print(f"part 2 left out: no {' and no '.join(lacking)} prompt has {SET} seeds in all systems")
    else:
        for kind, places in part2.items():
            selected[kind] = choose_questions(places, n, SET, used, rng)

    questions = []
    for kind, places in selected.items():
        compared = pair if kind in part2 else pictures
        for person, prompt, chosen in places:
            shown = {
                system: [pictures[system][person, prompt, seed] for seed in chosen] for system in compared
            }
            first, *others = photos[person]
            references = [first]
            if kind == "multi-reference":
                references = rng.sample(others, min(SET, len(others)))
            question = {"kind": kind, "person": person, "prompt": prompt, "seeds": chosen}
            question["text"] = find_text(shown[pair[0]][0], texts[person])
            question["references"] = references
            question["options"] = {name: [sample.path for sample in made] for name, made in shown.items()}
            questions.append(question)
    return questions


# The page


def encode_picture(path: Path, limit: int, size: tuple[int, int] | None = None) -> bytes:
    """Encode a picture as JPEG, cut and scaled to size (height, width), of at most `limit` pixels a side."""
    image = read_photo(path)
    image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS) if size else image
    image.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    image = Image.fromarray(np.asarray(image))  # pixels alone: PIL would pass on the file's comment
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def write_page(out: Path, questions: list[dict], limit: int, settings: dict[str, object]) -> None:
    """Write page/, in which systems have random names, and beside it key.json, which tells these names."""
    made = []
    for question in questions:
        for paths in question["options"].values():
            made += paths
    sizes = {photo_size(path) for path in made}
    size = tuple(map(min, zip(*sizes)))  # the same for all systems, or the number of pixels would tell them
    if len(sizes) > 1:
        print(f"pictures of {len(sizes)} sizes cut and scaled to {size[1]}x{size[0]}")
    # Names and orders depend on the pictures' files, which those who answer do not have: from the seed alone
    # anybody with this program could compute the key.
    places = [[*question["seeds"], question["kind"], *question["options"]] for question in questions]
    digest = hashlib.sha256(json.dumps(places).encode())
    for path in made:
        digest.update(path.read_bytes())
    rng = random.Random(digest.hexdigest())
    (out / "page" / "pictures").mkdir(parents=True)
    copies: dict[Path, str] = {}

    def new() -> str:
        return f"{rng.getrandbits(64):016x}"

    def add(content: bytes) -> str:
        name = f"pictures/{new()}.jpg"
        (out / "page" / name).write_bytes(content)
        return name

    key = {"study": new(), "settings": settings, "questions": {}}
    page = {"id": key["study"], "size": size, "questions": []}
    for question in rng.sample(questions, len(questions)):
        for path in question["references"]:
            if path not in copies:
                copies[path] = add(encode_picture(path, limit))
        options = [{"id": new(), "system": name} for name in question["options"]]
        rng.shuffle(options)
        names = {option["id"]: option.pop("system") for option in options}
        for option in options:
            paths = question["options"][names[option["id"]]]
            option["pictures"] = [add(encode_picture(path, limit, size)) for path in paths]
        name, references = new(), [copies[path] for path in question["references"]]
        page["questions"].append(
            {"id": name, "text": question["text"], "references": references, "options": options}
        )
        key["questions"][name] = {**question, "options": names}
    html = TEMPLATE.read_text("utf-8").replace("{{study}}", json.dumps(page).replace("<", "\\u003c"))
    write(out / "key.json", json.dumps(key, indent=1, default=str))
    write(out / "page" / "index.html", html)


def write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")


# Tables


def read_answers(path: Path, key: dict) -> tuple[str, dict[str, dict]]:
    """Return a participant's id and answers by question; UserError when they are not of the key's study."""
    try:
        saved = json.loads(read_text(path))
        study, participant = str(saved["study"]), str(saved["participant"])
        answers = []
        for answer in saved["answers"]:
            answers.append((str(answer["question"]), str(answer["choice"]), float(answer["seconds"])))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is no whole file of answers ({type(error).__name__}: {error})") from error
    if study != key["study"]:
        raise UserError(f"{path} answers the study {study}, not {key['study']}")
    by_question = {}
    for question, choice, seconds in answers:
        options = key["questions"].get(question, {}).get("options", {})
        if choice not in options:
            raise UserError(f"{path}: question {question}, choice {choice}: the study has none such")
        if question in by_question:
            raise UserError(f"{path} answers question {question} twice")
        by_question[question] = {"system": options[choice], "seconds": seconds}
    return participant, by_question


def share(votes: np.ndarray) -> dict:
    """Return the percentage chosen, and half the width of its 95 % interval (None for one participant).

    votes: (participants, kinds, 2), how often each chose a system, and how many questions each answered.
    Answers are pooled in each kind, and the percentages of several kinds averaged, as in the paper's tables.
    Answers of one participant are correlated, so the interval is over participants: a ratio estimator's
    (Cochran, Sampling Techniques, 3rd edition, chapter 6) with Student's t. When everybody answered
    everything, that is the usual one for the mean of the participants' percentages.
    """
    chosen, answers = np.moveaxis(votes[votes[..., 1].any(axis=1)].astype(float), 2, 0)  # (n, kinds) each
    n = len(chosen)
    total = answers.sum(axis=0)
    if not total.all():
        return {"percent": None, "ci95": None, "participants": n}
    shares = chosen.sum(axis=0) / total
    residual = ((chosen - shares * answers) * n / total).mean(axis=1)  # (n,), of mean zero
    half = 100 * student(n - 1) * residual.std(ddof=1) / math.sqrt(n) if n > 1 else None
    return {"percent": 100 * shares.mean(), "ci95": half, "participants": n}


def tabulate(key: dict, answers: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """Count the answers of all participants: for each table, system and column what `share` returns."""
    tables = {}
    for title, columns in TABLES.items():
        asked = [question for question in key["questions"].values() if question["kind"] in columns.values()]
        shown = {name for question in asked for name in question["options"].values()}
        for system in key["settings"]["systems"]:
            if system in shown:
                votes = count_votes(key, answers, system, list(columns.values()))
                cells = {column: share(votes[:, [k]]) for k, column in enumerate(columns)}
                tables.setdefault(title, {})[system] = {"Overall": share(votes), **cells}
    return tables


def count_votes(
    key: dict, answers: dict[str, dict[str, dict]], system: str, kinds: Sequence[str]
) -> np.ndarray:
    """Return (participants, kinds, 2): how often each chose the system, and how often they answered."""
    votes = np.zeros((len(answers), len(kinds), 2), int)
    for k, given in enumerate(answers.values()):
        for question, answer in given.items():
            kind = key["questions"][question]["kind"]
            if kind in kinds:
                votes[k, kinds.index(kind)] += (answer["system"] == system, 1)
    return votes


def show(title: str, table: dict[str, dict]) -> str:
    """Lay a table out in Markdown, the greatest of each column in bold."""
    columns = list(next(iter(table.values())))
    best = {c: max((row[c]["percent"] or 0 for row in table.values()), default=0) for c in columns}
    lines = [["", *(f"{column} (%)" for column in columns)]]
    for system, row in table.items():
        line = [system.replace("|", r"\|")]
        for column in columns:
            percent, half = row[column]["percent"], row[column]["ci95"]
            text = "–" if percent is None else f"{percent:.2f}"
            if half is not None:
                text += f" ± {half:.2f}"
            line.append(f"**{text}**" if percent and percent == best[column] else text)
        lines.append(line)
    return f"{title}\n\n{markdown(lines)}"


# Command line

HELP = """
Ask people which system's pictures they like best, blinded, as the Meta-LoRA paper does (appendix C).

commands:
  make    write a page of questions, and the key to it       (python -m metaphd study make --help)
  tally   count the answers that came back: tables 1 and 2   (python -m metaphd study tally --help)

See docs/benchmark.md.
"""
MAKE = """
Write a page of blinded questions of four kinds, a quarter each. See docs/benchmark.md.

example:
  python -m metaphd study make --systems lora=out/a meta=out/b --people photos --prompts metaphd/prompts
"""
TALLY = """
Count the answers and print the paper's tables 1 and 2. See docs/benchmark.md.

example:
  python -m metaphd study tally --study study answers/*.json
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m metaphd study", description=HELP, formatter_class=Manual)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", help="make or tally")
    folder, file = {"type": Path, "metavar": "DIR"}, {"type": Path, "metavar": "FILE"}
    add = commands.add_parser("make", description=MAKE, formatter_class=Manual).add_argument
    add("--systems", nargs="+", required=True, metavar="NAME=DIR", help="pictures to compare, two or more")
    add("--people", required=True, **folder, help="real photos, DIR/<person>/*.jpg|png")
    add("--prompts", required=True, **file, help="a prompt per line; or a folder with a <class>.txt each")
    add(
        "--references", **file, help='the photo each system was given, {"anna": "03.jpg"}; default: the first'
    )
    add("--classes", **file, help='class of each person, {"anna": "woman"}; default: by name, as woman_anna')
    add("--out", default=Path("study"), **folder, help="a new folder for the study")
    add("--questions", type=int, default=64, help="of all kinds together, a multiple of 4")
    add("--pair", nargs=2, metavar="NAME", help="systems to compare in part 2; default: the first two")
    add("--style-prompts", metavar="N-M", help="such as 10-19 or 3,5,7-9; default: the list's second half")
    add("--size", type=int, default=768, help="longer side of the page's pictures at most, in pixels")
    add("--seed", type=int, default=0, help="of the choice of questions; default: 0")
    add = commands.add_parser("tally", description=TALLY, formatter_class=Manual).add_argument
    add("--study", default=Path("study"), **folder, help="folder that make wrote")
    add("answers", nargs="+", type=Path, metavar="FILE", help="what participants sent back")
    return parser.parse_args(argv)


def parse_systems(items: Sequence[str]) -> dict[str, Path]:
    """Read NAME=DIR ...; UserError for another form, a name given twice, and fewer than two."""
    pairs = [item.partition("=") for item in items]
    for item, (name, _, folder) in zip(items, pairs):
        if not name.strip() or not folder:
            raise UserError(f"--systems {item}: should read NAME=DIR")
    names = [name for name, _, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--systems: {name} is given {names.count(name)} times")
    if len(names) < 2:
        raise UserError(f"--systems {items[0]}: needed are two or more, to compare")
    return {name: Path(folder) for name, _, folder in pairs}


def parse_numbers(text: str) -> set[int]:
    """Read "3,5,7-9" as a set; UserError for another form."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UserError(f"--style-prompts {text}: should read like 10-19 or 3,5,7-9")
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return {number for part in ends for number in range(part[0], part[-1] + 1)}


def make(args: argparse.Namespace) -> None:
    """Choose the questions and write the page and its key."""
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
    check_counts(args.people, {person: len(photos.get(person, ())) for person in people})
    classes = read_names(args.classes, "--classes")
    texts = {name: read_prompts(args.prompts, class_of(name, classes)) for name in people}
    for (person, _, _), sample in pictures[pair[0]].items():
        find_text(sample, texts[person])  # raises when the list has no such number
    styles = parse_numbers(args.style_prompts) if args.style_prompts else None
    last = min(map(len, texts.values())) - 1
    if styles and max(styles) > last:
        raise UserError(f"--style-prompts {args.style_prompts}: the list ends with number {last}")

    rng = random.Random(args.seed)
    questions = make_questions(pictures, photos, texts, styles, args.questions // 4, pair, rng)
    try:
        write_page(args.out, questions, args.size, {**vars(args), "systems": systems, "pair": pair})
    except BaseException:  # Ctrl-C too: what is left of it would be in the way of the next try
        shutil.rmtree(args.out / "page", ignore_errors=True)
        (args.out / "key.json").unlink(missing_ok=True)
        raise
    print(f"{len(questions)} questions in {args.out / 'page'}; keep {args.out / 'key.json'} to yourself")


def check_counts(folder: Path, counts: dict[str, int]) -> None:
    """Raise UserError when someone has no photo, or nobody two; print who has few. counts: photos of each."""
    none = [person for person, n in counts.items() if not n]
    if none:
        raise UserError(f"--people {folder} has no photo of {listed(none)}")
    if max(counts.values()) < 2:
        raise UserError(f"--people {folder}: nobody has a second photo, for multi-reference questions")
    few = [f"{person} {n - 1}" for person, n in counts.items() if n <= SET]
    if few:
        print(
            f"fewer than {SET} photos besides the reference (all are shown; people with 0 get no "
            f"multi-reference question): {listed(few)}"
        )


def tally(args: argparse.Namespace) -> None:
    """Count the answers, print the tables, and write them beside the key."""
    path = args.study / "key.json"
    if not path.is_file():
        raise FileNotFoundError(f"--study {args.study}: there is no key.json, which `make` wrote")
    key = read_json(path)
    lacking = {"study", "settings", "questions"} - key.keys()
    if lacking:
        raise UserError(f"{path} is not the key that `make` wrote: it lacks {', '.join(sorted(lacking))}")
    answers, files = {}, {}
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
        names = listed(f"{name} ({n} of {total})" for name, n in incomplete.items())
        print(f"\nincomplete, used for what they hold: {len(incomplete)} of {len(answers)}: {names}")
    seconds = {}
    for name, given in answers.items():
        if given:
            seconds[name] = median(answer["seconds"] for answer in given.values())
    numbers = {"study": key["study"], "tables": tables, "incomplete": incomplete, "median seconds": seconds}
    write(args.study / "tally.md", text + "\n")
    write(args.study / "tally.json", json.dumps(numbers, indent=1))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.command == "make":
        make(args)
    else:
        tally(args)
