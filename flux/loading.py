"""Find the files of a model and load them exactly: header first, then memory-mapped, assigned, strict.

A model is a folder in the layout of black-forest-labs/FLUX.1-dev: `flux1-*.safetensors`, `ae.safetensors`,
`text_encoder/`, `text_encoder_2/` (sharded or not), `tokenizer/`, `tokenizer_2/`.
"""

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

import torch
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.clip import CLIPSizes, CLIPText
from flux.conditioner import Conditioner, load_tokenizers
from flux.model import Flux, FluxSizes
from flux.t5 import T5, T5Sizes

HUB_MODELS = {"flux-dev": ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors")}
LOCAL_MODELS = {"tiny": Path(__file__).parents[1] / "tiny" / "weights"}
PARTS = ("ae.safetensors", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # and a transformer
PICKLED = (".bin", ".pt", ".pth")
HUB_FILES = (
    "ae.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
)


def find_model(name: str) -> Path:
    """Return the folder of a model: a name from the tables above, or a folder on disk.

    Hub models are taken from the hub's cache, and what is missing there is downloaded. Raises
    FileNotFoundError, saying what to do, when the folder is no model or the hub refuses.
    """
    if name in HUB_MODELS:
        repo, transformer = HUB_MODELS[name]
        return _from_hub(repo, [transformer, *HUB_FILES])
    folder = local_folder(name)
    find_transformer(folder)
    if missing := [part for part in PARTS if not (folder / part).exists()]:
        raise FileNotFoundError(f"{folder} is not a whole FLUX.1 model: it lacks {', '.join(missing)}")
    return folder


def local_folder(name: str) -> Path:
    """Return the folder of a model that is not the hub's; FileNotFoundError when there is none."""
    folder = LOCAL_MODELS.get(name, Path(name))
    if not folder.is_dir():
        known = ", ".join([*HUB_MODELS, *LOCAL_MODELS])
        raise FileNotFoundError(f"--model {name}: neither a folder nor one of the known models ({known})")
    return folder


def find_transformer(folder: Path) -> Path:
    """Return the one `flux1-*.safetensors` of a model folder; FileNotFoundError when not just one."""
    files = sorted(folder.glob("flux1-*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise FileNotFoundError(f"{folder} must hold exactly one flux1-*.safetensors; found {found}")
    return files[0]


def _from_hub(repo: str, files: list[str]) -> Path:
    """Return the folder of the hub's cache that holds the files, downloaded if one is missing."""
    cached = {file: try_to_load_from_cache(repo, file) for file in files}
    # Not a path is None, or a mark for "the hub has no such file".
    missing = [file for file, path in cached.items() if not isinstance(path, str)]
    if not missing:
        return Path(cached[files[0]]).parent
    try:
        get_hf_file_metadata(hf_hub_url(repo, missing[0]))  # fails within 10 s; a download would keep trying
        return Path(snapshot_download(repo, allow_patterns=files))
    except Exception as error:  # the network's errors have other types in every version of huggingface_hub
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{repo} is not whole in the hub cache and cannot be downloaded "
            f"({type(error).__name__}: {reason}).\n"
            f"Accept its licence at https://huggingface.co/{repo}, then run `hf auth login` with a read "
            "token or set HF_TOKEN;\nor name a folder that holds the files already: --model FOLDER "
            f"({files[0]}, {', '.join(PARTS)});\n"
            "or try everything on the small model that comes along: --model tiny"
        ) from error


def hub_file(repo: str, file: str, revision: str) -> Path:
    """Return a file from the hub's cache, or download it; OSError within seconds when there is no network."""
    found = try_to_load_from_cache(repo, file, revision=revision)
    try:
        if not isinstance(found, str):
            get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))  # a download would keep trying
            found = hf_hub_download(repo, file, revision=revision)
    except Exception as error:  # the network's errors have other types in every version of huggingface_hub
        raise OSError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
    return Path(found)


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """Open a safetensors file; ValueError names it when it is damaged or of another kind."""
    try:
        with safe_open(file, "pt") as f:
            yield f
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from error


def unpickle(file: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote, running none of its code; ValueError when it is none."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # from six modules: damaged, cut short, of another kind, or with code in it
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{file} is not a whole PyTorch file of weights ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} holds something else than a dictionary of tensors")
    return state


@dataclass(frozen=True)
class Checkpoint:
    """The headers of one or several safetensors files, read as one; or a state dict of `torch.save`."""

    path: Path
    file_of: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    unpickled: dict[str, Tensor] = field(default_factory=dict)  # such a file has no header to read first

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read the headers of a file, or of all shards in a folder; ValueError names a damaged file."""
        path = Path(path)
        if path.suffix in PICKLED and path.is_file():
            state = unpickle(path)
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            return cls(path, dict.fromkeys(state, path), shapes, state)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{path}: no such safetensors file, or a folder without any")
        file_of, shapes = {}, {}
        for file in files:
            with opened(file) as f:
                for name in f.keys():
                    if name in file_of:
                        raise ValueError(f"{path}: {name} is in {file_of[name].name} and in {file.name}")
                    file_of[name] = file
                    shapes[name] = tuple(f.get_slice(name).get_shape())
        return cls(path, file_of, shapes)

    @property
    def config(self) -> dict:
        """The `config.json` beside the weights, empty when there is none."""
        file = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        try:
            return json.loads(file.read_text()) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON ({error})") from error

    def read(self, names: list[str], device: str | torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read tensors; on the CPU and in the file's own dtype they stay mapped to the file, uncopied.

        Integers, BatchNorm's counters for one, keep their dtype.
        """
        if self.unpickled:
            return {name: cast(self.unpickled[name], device, dtype) for name in names}
        tensors = {}
        for file in dict.fromkeys(self.file_of[name] for name in names):
            with opened(file) as f:
                for name in names:
                    if self.file_of[name] == file:
                        tensors[name] = cast(f.get_tensor(name), device, dtype)
        return tensors


def cast(tensor: Tensor, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def load(
    kind: type[nn.Module], sizes_kind: type, path: Path | str, device="cpu", dtype=torch.bfloat16
) -> nn.Module:
    """Build `kind` on the meta device with the sizes the header tells, then assign the weights.

    Raises ValueError that lists every missing, unexpected and misshapen tensor and names the file.
    """
    checkpoint, ignored = Checkpoint.open(path), getattr(kind, "IGNORED", ())
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name not in ignored}
    config = checkpoint.config
    try:
        sizes = sizes_kind.from_shapes(shapes, config)
        with torch.device("meta"):
            model = kind(sizes)
    except (KeyError, ValueError, IndexError) as error:
        reason = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else error
        some = ", ".join(sorted(shapes)[:3]) or "no tensor"
        message = f"{path} is not a {kind.__name__} checkpoint: {reason}; it begins with {some}"
        raise ValueError(message) from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in shapes]
    problems += [f"unexpected {name} {shape}" for name, shape in shapes.items() if name not in expected]
    problems += [
        f"{name} is {shapes[name]}, must be {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit {sizes}:\n  " + "\n  ".join(problems))
    model.load_state_dict(checkpoint.read(list(expected), device, dtype), assign=True, strict=True)
    return model.requires_grad_(False).eval()


def load_flux(path: Path | str, device="cpu", dtype=torch.bfloat16) -> Flux:
    """Load the transformer from a file, or a folder of shards; frozen."""
    return load(Flux, FluxSizes, path, device, dtype)


def load_autoencoder(path: Path | str, device="cpu", dtype=torch.bfloat16) -> AutoEncoder:
    """Load the autoencoder; frozen."""
    return load(AutoEncoder, AutoEncoderSizes, path, device, dtype)


def load_t5(path: Path | str, device="cpu", dtype=torch.bfloat16) -> T5:
    """Load the T5 encoder; frozen."""
    return load(T5, T5Sizes, path, device, dtype)


def load_clip(path: Path | str, device="cpu", dtype=torch.bfloat16) -> CLIPText:
    """Load the CLIP text encoder; frozen."""
    return load(CLIPText, CLIPSizes, path, device, dtype)


def load_conditioner(
    folder: Path, device="cpu", dtype=torch.bfloat16, t5_length: int | None = None
) -> Conditioner:
    """Load both text encoders of a model folder and their tokenizers."""
    t5 = load_t5(folder / "text_encoder_2", device, dtype)
    clip = load_clip(folder / "text_encoder", device, dtype)
    return Conditioner(t5, clip, load_tokenizers(folder, t5_length))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a small safetensors file whole, with its metadata; ValueError names a file that is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with opened(path) as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to, which becomes `path` when the block ends and vanishes when it fails.

    So a stopped run leaves the old file or the new one, never half a file. The suffix stays: PIL goes by it.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path, option: str) -> None:
    """Make a folder if it is not there; OSError when nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{option}: cannot write to {folder} ({error.strerror})") from error


def check_sha256(file: Path, pinned: str) -> Path:
    """Return a downloaded file; ValueError when it is not the one whose hash we know."""
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != pinned:
        raise ValueError(f"{file} has SHA-256 {digest}, not {pinned}: delete it and try again")
    return file


def native_size(folder: Path) -> int:
    """Return the side in pixels of the pictures a model makes: its config's `sample_size`, else 1024."""
    config = folder / "config.json"
    return json.loads(config.read_text()).get("sample_size", 1024) if config.is_file() else 1024


def fingerprint(*paths: Path) -> str:
    """Tell weights apart without reading gigabytes: a hash of each file's size, first and last MiB."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            with file.open("rb") as f:
                size = f.seek(0, os.SEEK_END)
                f.seek(0)
                digest.update(f"{size} ".encode() + f.read(2**20))
                f.seek(max(0, size - 2**20))
                digest.update(f.read())
    return digest.hexdigest()


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
    group.add_argument(
        "--model", default="flux-dev", help=f"{known}, or a folder laid out like FLUX.1-dev's on the hub"
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
    device = torch.device(args.device or default)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(args.dtype)
    return device, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


def run_script(main: Callable[[], None], stopped: str = "stopped") -> None:
    """Run a script's main; what its user can mend ends with one message instead of a traceback."""
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"  # a line, without the code that warns
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{stopped}")
