"""An argument parser that lets no nonsense through: the same limits, in the same words, in every script."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from flux.errors import UserError
from flux.finding import HUB_MODELS, LOCAL_MODELS
from run.terminal import printable

MOST = 10**7
# What an option may be, by its name: least, most.
LIMITS = {
    **dict.fromkeys(("steps", "sample_steps", "batch", "save_every", "uses_per_image"), (1, MOST)),
    **dict.fromkeys(("bucket_ids", "min_photos", "at_once"), (1, MOST)),
    **dict.fromkeys(("r1", "r2", "rank", "ranks", "n", "seeds"), (1, 2**14)),
    **dict.fromkeys(("sample_every", "min_side"), (0, MOST)),
    "seed": (0, 2**32 - 1),
    "resolution": (16, 2**14),
    "t5_length": (1, 2**12),
    "samples": (0, 6),
    **dict.fromkeys(("weight_decay", "t_std", "guidance", "train_guidance", "cfg"), (0, math.inf)),
    **dict.fromkeys(("lr", "clip_grad"), (0, math.inf)),
    "vram": (0, math.inf),
    "max_yaw": (0, 90),
}
OPEN = ("lr", "clip_grad", "vram")  # their least is excluded


class Parser(argparse.ArgumentParser):
    """argparse with LIMITS, UTF-8 texts, finite numbers, no empty paths; a mistake ends with one line."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for kind, read in ((None, read_text), (int, read_whole), (float, read_number), (Path, read_path)):
            self.register("type", kind, read)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed = super().parse_args(args, namespace)
        for name, (least, most) in LIMITS.items():
            values = vars(parsed).get(name)
            for value in values if isinstance(values, list) else [values]:
                number, is_open = isinstance(value, int | float), name in OPEN
                if number and (not least <= value <= most or is_open and value == least):
                    ends = f"above {least}" if is_open else f"at least {least}"
                    ends += f" and at most {most}" if most < math.inf else ""
                    self.error(f"--{name.replace('_', '-')} {value}: must be {ends}")
        return parsed

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {printable(message[:400])}; --help lists all options\n")


def read_text(text: str) -> str:
    """Return text; argparse's error when it is not UTF-8."""
    if any("\ud800" <= char <= "\udfff" for char in text):  # what Python makes of bytes it cannot decode
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not UTF-8 text")
    return text


def read_whole(text: str) -> int:
    """Read a whole number; argparse's error when it is none."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None


def read_number(text: str) -> float:
    """Read a finite number; argparse's error when it is none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number")
    return number


def read_path(text: str) -> Path:
    """Read a path; argparse's error when it is empty."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty, must be a path")
    return Path(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show a default unless there is none, or the help text tells it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        tells = action.default in (None, "", False) or "default:" in action.help
        return action.help if tells else super()._get_help_string(action)


class Manual(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Print descriptions as they stand."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model runs, where and in which precision; the same in every script."""
    group = parser.add_argument_group("model")
    known = ", ".join([*HUB_MODELS, *LOCAL_MODELS])
    place = {"type": Path, "metavar": "PATH"}
    group.add_argument(
        "--model",
        default="flux-dev",
        help=f"{known}, a repository on the hub (owner/name), a folder laid out like one of them, or a "
        "transformer's file, also ComfyUI's; FLUX_DEV and the like may hold a path",
    )
    group.add_argument("--ae", **place, help="autoencoder; else FLUX_AE, else as --model")
    group.add_argument(
        "--clip-l", **place, help="CLIP's text encoder, file or folder; else FLUX_CLIP_L, else as --model"
    )
    group.add_argument("--t5", **place, help="T5 encoder, file or folder; else FLUX_T5, else as --model")
    group.add_argument(
        "--tokenizers",
        **place,
        help="folder with tokenizer/ and tokenizer_2/; else FLUX_TOKENIZERS, else as --model",
    )
    group.add_argument("--device", help="cuda, cuda:1, mps, cpu; default: a GPU if there is one")
    group.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="of weights and activations; default: bf16, fp32 on a CPU"
    )
    group.add_argument(
        "--t5-length", type=int, help="tokens per prompt; default: what the tokenizer's config says"
    )


def choose_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Resolve --device and --dtype."""
    default = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(args.device or default)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {args.device}: {reason}; this machine has {default}") from error
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(args.dtype)
    of_a_card = getattr(args, "plan", False) and args.vram  # that may be elsewhere
    exact = device.type == "cpu" and not of_a_card
    return device, dtype or (torch.float32 if exact else torch.bfloat16)


def add_memory_arguments(parser: argparse.ArgumentParser, training: bool = True) -> argparse._ArgumentGroup:
    """Add the options that say how the transformer fits the device; return their group."""
    group = parser.add_argument_group("memory")
    group.add_argument("--vram", type=float, help="GiB to stay within; default: all the GPU has")
    if training:
        group.add_argument(
            "--checkpoint",
            type=_count_or("auto", "none", "all", "attention"),
            default="auto",
            help="blocks to run again in the backward pass: auto, none, all, a number from the first on, or "
            "attention (all, but keep what attention returns)",
        )
    group.add_argument(
        "--stream",
        type=_count_or("auto"),
        default="auto",
        help="blocks kept in host memory: auto, or how many",
    )
    group.add_argument(
        "--base-dtype",
        choices=["auto", "bf16", "fp8"],
        default="auto",
        help="bf16: weights as they are; fp8: rounded to 8 bits; auto: rounded if nothing else fits",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile each block, once per shape; not with --stream nor with --checkpoint attention",
    )
    group.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    return group


def _count_or(*words: str) -> Callable[[str], str]:
    """Return an argparse type: one of the words, or a number from 0 on."""

    def parse(text: str) -> str:
        if text not in words and not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is neither {', '.join(words)} nor a number")
        return text

    return parse


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choices where the paper is silent; the same in both stages."""
    group = parser.add_argument_group("choices where the paper is silent")
    group.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    group.add_argument("--clip-grad", type=float, default=1.0, help="largest norm of a gradient")
    group.add_argument("--t-mean", type=float, default=0.0, help="times are logit-normal with this mean")
    group.add_argument("--t-std", type=float, default=1.0, help="and this standard deviation")
    group.add_argument("--train-guidance", type=float, default=1.0, help="guidance input while training")
    group.add_argument("--latents", choices=["sample", "mean"], default="sample", help="of the posterior")
