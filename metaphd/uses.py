"""How the benchmark uses a LoRA: at which strengths, and with which second LoRA, a style, on top."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

import metrics
from flux.errors import UserError
from flux.transformer import Transformer
from lora.finding import find_lora
from lora.names import Lora
from lora.reading import read_lora
from metalora import split_loras
from run.arguments import Parser
from scoring.evaluators import Evaluators


@dataclass(frozen=True)
class Use:
    """A strength of the person's LoRA, and one of the style; 0: without a style."""

    strength: float = 1.0
    stack: float = 0.0

    @classmethod
    def of(cls, settings: dict) -> "Use":
        """Return the use that is in the settings of a system."""
        return cls(**{field.name: settings.get(field.name, field.default) for field in fields(cls)})

    @property
    def settings(self) -> dict[str, float]:
        """What differs from the ordinary use, for the settings of a system."""
        return {key: value for key, value in vars(self).items() if value != getattr(Use, key)}

    @property
    def suffix(self) -> str:
        """What a system's name ends with: nothing, or as _x0.5 and _stack0.5."""
        strength = f"_x{self.strength:g}" if self.strength != 1 else ""
        return strength + (f"_stack{self.stack:g}" if self.stack else "")

    @property
    def valid(self) -> bool:
        numbers = all(isinstance(value, int | float) for value in vars(self).values())
        return numbers and self.strength > 0 and self.stack >= 0

    def mix(self, lora: Lora | None, style: Lora | None) -> list[tuple[Lora, float]]:
        """Return what `inject_loras` takes for a slot; lora: None for the base model."""
        mixed = [(lora, self.strength)] if lora else []
        return mixed + ([(style, self.stack)] if self.stack else [])


def plan_uses(args: argparse.Namespace, before: Iterable[dict] = ()) -> list[Use]:
    """Return the uses that the options ask for, and those of the systems of earlier runs in --out.

    Raises UserError when these have a second LoRA that the options do not name.
    """
    earlier = [*map(Use.of, before)]
    stacked = any(use.stack for use in earlier)
    stacks = args.stack_strengths or [1.0] * (bool(args.stack) and not stacked)
    uses = dict.fromkeys([*earlier, *(Use(*pair) for pair in product(args.strengths, [0.0, *stacks]))])
    if stacked and not args.stack:
        raise UserError(f"{args.out} holds systems with a second LoRA: give its file again, as --stack FILE")
    return sorted(uses, key=lambda use: (use.stack, use.strength))


def name_systems(trained: dict[str, dict], uses: Sequence[Use]) -> dict[str, dict]:
    """Return the settings of every system by its name: each of the trained ones in each use."""
    named = product(trained.items(), uses)
    return {name + use.suffix: {**settings, **use.settings} for (name, settings), use in named}


def uses_of_base(uses: Sequence[Use]) -> list[Use]:
    """Return how the base model is used: alone, and with the style of each use."""
    return list(dict.fromkeys(Use(stack=use.stack) for use in uses))


def read_stack(path: Path, model: Transformer) -> Lora:
    """Read the second LoRA; UserError when it does not fit the model, or adapts more than its blocks."""
    lora = read_lora(find_lora(path), model)[0]
    outside = split_loras(model, [(lora, 1.0)])[1]
    if outside:
        names = ", ".join(sorted(outside[0][0])[:3])
        raise UserError(
            f"--stack {path} adapts layers outside of the blocks, such as {names}: not possible here"
        )
    return lora


def score_style(rows: Sequence[dict], evaluators: Evaluators, text: str) -> None:
    """Add to the rows how much of the style a picture has: CLIP-T with a text that names it."""
    images = evaluators.embed_images([row["path"] for row in rows])
    for row, value in zip(rows, metrics.clip_t(images, evaluators.embed_texts([text])).tolist(), strict=True):
        row["style"] = value


def add_use_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("how the LoRAs are used: all combinations of")
    factors = {"type": float, "nargs": "+", "metavar": "X"}
    group.add_argument("--strengths", **factors, default=[1.0], help="factors on the person's LoRA")
    group.add_argument(
        "--stack",
        type=Path,
        metavar="FILE",
        help="a second LoRA, such as a style, on top: every system is also scored with it",
    )
    group.add_argument(
        "--stack-strengths", **factors, help="factors on the second LoRA; default: those in --out, or 1"
    )
    group.add_argument(
        "--stack-text", help='what the second LoRA should bring, such as "a sketch"; its CLIP-T is the style'
    )


def settle_uses(parser: Parser, args: argparse.Namespace) -> None:
    """End with an error on options that belong to --stack, without it."""
    if not args.stack and (args.stack_strengths or args.stack_text):
        parser.error("--stack-strengths and --stack-text belong to --stack FILE")
