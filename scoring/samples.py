"""Pictures made by a system, `<person>/<prompt>/<seed>.png`, and the prompt and base picture of each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flux.errors import UserError
from people.folders import composed, is_hidden
from people.photos import DAMAGED, PHOTO_SUFFIXES, opened


@dataclass(frozen=True)
class Sample:
    """A picture that a system made, `<person>/<prompt>/<seed>.png`."""

    person: str
    # "03" for the folders 03, 3 and 03_any-words; the whole name if it does not begin with a number
    prompt: str
    seed: str
    path: Path


def scan_samples(folder: Path) -> list[Sample]:
    """List a system's pictures, sorted by name.

    Raises FileNotFoundError when there is no such folder, and UserError when it holds no pictures, pictures
    at another level, or two with the same person, prompt and seed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder}: no such folder")
    layout = f"--images {folder}: pictures should be <person>/<prompt>/<seed>.png"
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*"))]
    files = [file for file in files if file.suffix.lower() in PHOTO_SUFFIXES]
    files = [file for file in files if not any(map(is_hidden, file.parts))]
    if not files:
        raise UserError(f"{layout}; there are none")
    stray = [file for file in files if len(file.parts) != 3]
    if stray:
        raise UserError(f"{layout}; {len(stray)} of {len(files)} are not, such as {stray[0]}")
    samples: dict[tuple[str, str, str], Sample] = {}
    for file in files:
        person, prompt, _ = map(composed, file.parts)
        number = re.match(r"\d+", prompt)
        place = (person, f"{int(number[0]):02d}" if number else prompt, file.stem)
        if place in samples:
            raise UserError(f"{samples[place].path} and {folder / file} have the same prompt and seed")
        samples[place] = Sample(*place, folder / file)
    return list(samples.values())


def make_rows(
    samples: Sequence[Sample],
    classes: dict[str, str],
    prompts: dict[str, list[str]] | None = None,
    base: Path | None = None,
) -> list[dict]:
    """Return a row for each picture, with its prompt as "text" and the base model's picture as "base".

    classes: of each person; prompts: a list for each class; base: a folder, see `find_base`.
    """
    rows = [{**vars(sample), "class": classes[sample.person]} for sample in samples]
    for sample, row in zip(samples, rows):
        if prompts:
            row["text"] = find_text(sample, prompts[row["class"]])
        if base:
            row["base"] = find_base(sample, base, row["class"])
    return rows


def find_missing(
    samples: Sequence[Sample], classes: dict[str, str], prompts: dict[str, list[str]] | None = None
) -> list[str]:
    """List the pictures that are missing for all people in `classes` to have every prompt with every seed.

    The prompts are those in the list for the class if there is one, else all that any person has.
    """
    present = {(sample.person, sample.prompt, sample.seed) for sample in samples}
    folders = sorted({sample.prompt for sample in samples})
    seeds = sorted({sample.seed for sample in samples})
    missing = []
    for person, kind in classes.items():
        expected = [f"{n:02d}" for n in range(len(prompts[kind]))] if prompts else folders
        for prompt in expected:
            for seed in seeds:
                if (person, prompt, seed) not in present:
                    missing.append(f"{person}/{prompt}/{seed}")
    return missing


def find_text(sample: Sample, prompts: Sequence[str]) -> str:
    """Return the prompt of a picture: the one at its number in the list.

    Raises UserError when the list has no such number, and when the picture itself names another prompt:
    a wrong list of the right length would otherwise go unnoticed.
    """
    if not sample.prompt.isdecimal() or int(sample.prompt) >= len(prompts):
        places = f"a number from 00 to {len(prompts) - 1:02d}, its place in the list of prompts"
        raise UserError(f"{sample.path.parent}: a prompt's folder should begin with {places}")
    text, written = prompts[int(sample.prompt)], written_prompt(sample.path)
    if written is not None and written.split() != text.split():
        raise UserError(
            f"{sample.path} was made from the prompt {written!r}, but number {sample.prompt} in the list of "
            f"prompts is {text!r}"
        )
    return text


def written_prompt(picture: Path) -> str | None:
    """Return the prompt that `sample.py` wrote into a picture's header; None when there is none."""
    try:
        with opened(picture) as image:
            text = str(image.info.get("prompt", "{"))
    except (*DAMAGED, UserError):  # `read_photo` will say what is wrong
        return None
    return None if text.startswith("{") else text  # ComfyUI writes its graph there, as JSON


def find_base(sample: Sample, base: Path, kind: str) -> Path:
    """Return the base model's picture for the same prompt and seed, as <prompt>/<seed>.png.

    It is looked for in the folder of the person, in that of the class `kind`, and in `base` itself.
    """
    person, *name = sample.path.parts[-3:]
    name = Path(*name)
    for path in (base / person / name, base / kind / name, base / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"--base {base} has no {name} to compare with {sample.path}")
