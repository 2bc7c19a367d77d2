"""The benchmark's pictures of other people: beside the learned person, and instead of the learned person."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import metrics
from flux.errors import UserError
from run.arguments import Parser
from scoring.bleed import score_bleed
from scoring.evaluators import Evaluators
from scoring.inputs import read_prompts

# The metric of each kind of picture, by the folder in --out.
METRIC = {"couples": "bleed", "other-class": "class-bleed"}
OTHER = {"man": "woman", "woman": "man"}


def read_others(args: argparse.Namespace, kinds: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Return the prompts of these pictures, by folder and by the class of the learned person."""
    prompts = {}
    if args.couples:
        prompts["couples"] = {kind: read_prompts(args.couples, kind, "--couples") for kind in kinds}
    if args.class_bleed:
        unknown = sorted({*kinds} - OTHER.keys())
        if unknown:
            raise UserError(
                f"--class-bleed: of the class {unknown[0]} there is no other; it must be man or woman"
            )
        prompts["other-class"] = {kind: read_prompts(args.prompts, OTHER[kind]) for kind in kinds}
        for kind, texts in prompts["other-class"].items():
            same = {*texts} & {*read_prompts(args.prompts, kind)}
            if same:
                raise UserError(f"--class-bleed: {min(same)!r} in --prompts is the same for man and woman")
    return prompts


def score_others(
    rows: dict[str, list[dict]], evaluators: Evaluators, photos: dict[str, Sequence[Path]]
) -> list[dict]:
    """Return the scored rows of all kinds; the kind comes before the number of the prompt."""
    scored = []
    for folder, own in rows.items():
        score_bleed(own, metrics.embed_references(own, photos, evaluators), evaluators, METRIC[folder])
        scored += [{**row, "prompt": f"{folder} {row['prompt']}"} for row in own]
    return scored


def add_other_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("other people: do they look like the learned person?")
    group.add_argument(
        "--couples",
        type=Path,
        metavar="FILE",
        help='prompts of two people, such as "a [man/woman] and an old man"; or a folder as for --prompts',
    )
    group.add_argument(
        "--class-bleed",
        action="store_true",
        help="also make pictures of the other class: of men with a woman's LoRA, of women with a man's",
    )
