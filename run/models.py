"""Which model a command loads, on which device and in which precision: the options, and what they mean."""

import argparse
import os
import sys
from pathlib import Path

import torch

from flux.errors import UserError, first_line
from flux.finding import (
    HUB_MODELS,
    NoSuchPart,
    NotOnHub,
    UnknownModel,
    find_files,
    find_named,
    local_parts,
)
from flux.loading import ModelFiles, default_sampler, load_transformer
from run.costs import KNOWN
from run.settings import Training

SHIPPED = {"tiny": Path(__file__).parents[1] / "tiny" / "weights"}
OPTIONS = {
    "autoencoder": "--ae",
    "clip": "--clip-l",
    "t5": "--t5",
    "qwen3": "--qwen3",
    "tokenizers": "--tokenizers",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `find_model` and `choose_device` read."""
    group = parser.add_argument_group("model")
    known = ", ".join([*HUB_MODELS, *SHIPPED])
    place = {"type": Path, "metavar": "PATH"}
    group.add_argument(
        "--model",
        default="flux-dev",
        help=f"{known}, a repository on the hub (owner/name), a folder in the same layout, or a file of the "
        "transformer, also ComfyUI's; environment variables like FLUX_DEV may hold a path for a name",
    )
    group.add_argument("--ae", **place, help="autoencoder; else FLUX_AE or FLUX2_AE, else as --model")
    group.add_argument(
        "--clip-l", **place, help="CLIP's text encoder, file or folder; else FLUX_CLIP_L, else as --model"
    )
    group.add_argument("--t5", **place, help="T5 encoder, file or folder; else FLUX_T5, else as --model")
    group.add_argument(
        "--qwen3", **place, help="Qwen3, FLUX.2's, file or folder; else FLUX_QWEN3, else as --model"
    )
    group.add_argument(
        "--tokenizers",
        **place,
        help="folder with tokenizer/ and, of FLUX.1, tokenizer_2/; else FLUX_TOKENIZERS or FLUX2_TOKENIZERS, "
        "else as --model",
    )
    add_device_argument(group)
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU, take operations that give the same bits each time, which may be slower",
    )
    group.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="of weights and activations; default: bf16, fp32 on a CPU"
    )
    group.add_argument(
        "--text-length",
        "--t5-length",
        dest="t5_length",
        type=int,
        help="tokens per prompt; default: what the tokenizer's config says, of FLUX.2 at most 512",
    )


def add_device_argument(group: argparse._ArgumentGroup) -> None:
    """Add --device."""
    group.add_argument("--device", help="cuda, cuda:1, mps, cpu; default: a GPU if there is one")


def named_model(name: str) -> tuple[Path | None, str | None]:
    """Return the file or folder that --model names, or else the repository on the hub."""
    try:
        return (SHIPPED[name], None) if name in SHIPPED else find_named(name)
    except UnknownModel as error:
        raise UnknownModel(f"--model {error}, nor {', '.join(SHIPPED)}") from error


def find_model(args: argparse.Namespace) -> ModelFiles:
    """Find or download the files of the model that the options name.

    Raises FileNotFoundError, saying what to do, when a part is neither on this disk nor can be downloaded,
    and UserError for an option that the model's base has no use for.
    """
    values = {part: getattr(args, option[2:].replace("-", "_")) for part, option in OPTIONS.items()}
    given = {part: value for part, value in values.items() if value}
    for part, path in given.items():
        if not path.exists():
            raise FileNotFoundError(f"{OPTIONS[part]} {path}: no such file or folder")
    named_model(args.model)  # is there such a model?
    try:
        return find_files(str(SHIPPED.get(args.model, args.model)), given)
    except NoSuchPart as error:
        raise UserError(f"{OPTIONS[error.part]} {given[error.part]}: {error}") from error
    except NotOnHub as error:
        raise FileNotFoundError(
            f"{error};\nor name files that you have: --model FILE or FOLDER, "
            f"{', '.join(OPTIONS.values())} (see --help);\n"
            "or try everything with the toy model of this repository: --model tiny"
        ) from error


def take_defaults(args: argparse.Namespace, files: ModelFiles) -> None:
    """Set the options that were left to the model: how it is sampled, and some of training.

    Raises UserError when --guidance or --train-guidance is given for a model without that input.
    """
    sizes = load_transformer(files.transformer, "meta").sizes
    for name in () if sizes.guidance else ("guidance", "train_guidance"):
        value = getattr(args, name, None)
        if value is not None:
            hint = ", but --cfg works" if name == "guidance" else ""
            option = f"--{name.replace('_', '-')} {value:g}"
            raise UserError(f"{option}: {files.transformer} has no guidance input{hint}")
    sampler = default_sampler(files)
    left = {**sampler, "sample_steps": sampler["steps"], "t_mean": files.base.kind.T_MEAN}
    left |= {"train_guidance": Training.train_guidance}
    for name, value in left.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def files_to_plan(args: argparse.Namespace) -> dict[str, Path]:
    """Return the model's files that are on this disk; --plan downloads no model."""
    path, repo = named_model(args.model)
    if repo and repo not in KNOWN:
        print(f"{args.model} is on the hub: the plan assumes that it has FLUX.1-dev's size")
    return local_parts(path) if path else {}


def choose_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Return what --device and --dtype mean, and set PyTorch up before anything is computed.

    Raises UserError when there is no such device.
    """
    let_segments_grow()
    if getattr(args, "deterministic", False):
        compute_deterministically()
    default = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(args.device or default)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise UserError(f"--device {args.device}: {first_line(error)}; this machine has {default}") from error
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(args.dtype)
    plans_for_a_gpu = getattr(args, "plan", False) and args.vram  # of another machine, perhaps
    on_cpu = device.type == "cpu" and not plans_for_a_gpu
    return device, dtype or (torch.float32 if on_cpu else torch.bfloat16)


def compute_deterministically() -> None:
    """Let PyTorch give the same bits for the same input on the same machine, or raise RuntimeError.

    For attention PyTorch then leaves out cuDNN, and the backward passes of FlashAttention and of the memory-
    efficient kernel add up in a fixed order (sdp_utils.cpp and attention_backward.cu in its
    aten/src/ATen/native/transformers/cuda). Call it before CUDA is used: cuBLAS reads its setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Else PyTorch fills all new memory, which takes time and helps only who reads what was never written.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def let_segments_grow() -> None:
    """Let the GPU's allocator grow its segments, since crops of many shapes would fragment fixed ones.

    It does nothing if the user has set up the allocator, or where torch has no such segments. Through torch's
    setter, because recent versions read the environment when they are imported.
    """
    ours = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}.isdisjoint(os.environ)
    if ours and sys.platform == "linux" and torch.version.cuda:
        recent = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (recent or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
