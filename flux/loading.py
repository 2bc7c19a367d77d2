"""Find the files of a model, and load each part.

A model is a folder, here or on the hub, in diffusers' layout (`transformer/`, `vae/`, `text_encoder/`,
`text_encoder_2/`, `tokenizer/`, `tokenizer_2/`) or in black-forest-labs', whose `flux1-*.safetensors` and
`ae.safetensors` stand for the first two; or it is a transformer's file, and the other parts are elsewhere.
"""

import argparse
import hashlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryFile

import torch
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from safetensors import SafetensorError
from torch import Tensor

from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.checkpoint import load, opened, read_json, shards
from flux.clip import CLIPSizes, CLIPText
from flux.conditioner import Conditioner, load_tokenizers
from flux.formats import kinds_inside
from flux.memory import Stream, device_memory, weight_bytes
from flux.model import Flux, FluxSizes
from flux.t5 import T5, T5Sizes
from flux.terminal import Shown, printable_lines

HUB_MODELS = {
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux-krea-dev": "black-forest-labs/FLUX.1-Krea-dev",
}
LOCAL_MODELS = {"tiny": Path(__file__).parents[1] / "tiny" / "weights"}
# Where a part lies in a model's folder, ours first; a name without a suffix is a folder, of shards perhaps.
PLACES = {
    "transformer": ("flux1-*.safetensors", "flux1-*.sft", "transformer", "flux*.safetensors"),
    "autoencoder": ("ae.safetensors", "ae.sft", "vae"),
    "clip": ("text_encoder",),
    "t5": ("text_encoder_2",),
    "tokenizers": ("tokenizer", "tokenizer_2"),  # both
}
TOKENIZER_FILES = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json")
TOKENIZER_2_FILES = ("tokenizer_2/tokenizer.json", "tokenizer_2/spiece.model")  # either, and the config
TOKENIZER_2_CONFIG = "tokenizer_2/tokenizer_config.json"
HUB_WEIGHTS = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|config\.json"
OPTIONS = {"autoencoder": "--ae", "clip": "--clip-l", "t5": "--t5", "tokenizers": "--tokenizers"}
VARIABLES = {
    "autoencoder": "FLUX_AE",
    "clip": "FLUX_CLIP_L",
    "t5": "FLUX_T5",
    "tokenizers": "FLUX_TOKENIZERS",
}
SHARED = ("autoencoder", "clip", "t5")  # the same in all HUB_MODELS
TIMEOUT = 10  # seconds for the hub's first answer


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model are; weights are a file or a folder of shards."""

    transformer: Path
    autoencoder: Path
    clip: Path
    t5: Path
    tokenizers: Path  # holds tokenizer/ and tokenizer_2/

    @property
    def folder(self) -> Path:
        """Where other files of the model lie: config.json, meta.safetensors, judges."""
        return folder_around(self.transformer)


def folder_around(transformer: Path) -> Path:
    """Return the model's folder: where the transformer lies, or in diffusers' layout what is around that."""
    folder = transformer.parent
    return folder.parent if folder.name == "transformer" else folder


def find_files(args: argparse.Namespace) -> ModelFiles:
    """Find every part of the model that the options of `add_model_arguments` name; read only headers.

    A part is looked for in this order: its option, what --model names on disk, its environment variable, the
    hub's cache, the hub. What the model itself lacks is taken from FLUX.1-dev. Raises FileNotFoundError that
    says what to do, and ValueError when a file does not fit its part, or the parts not each other.
    """
    found = given_parts(args)
    path, repo = find_named(args.model)
    if path:
        found = local_parts(path) | found
    for part, variable in VARIABLES.items():
        if part not in found and (place := os.environ.get(variable)):
            found[part] = existing(Path(place), variable)

    lacking = lambda parts=tuple(PLACES): [part for part in parts if part not in found]
    if repo:
        found |= cached_parts(repo, lacking())
        if repo in HUB_MODELS.values():
            for other in HUB_MODELS.values():
                found |= cached_parts(other, lacking(SHARED))
        found = parts_inside(found) | found
        if lacking():
            found |= download_parts(repo, lacking())
            found = parts_inside(found) | found
    for other in HUB_MODELS.values():
        found |= cached_parts(other, lacking())
    if lacking():
        found |= download_parts(HUB_MODELS["flux-dev"], lacking())
    files = ModelFiles(**found)
    check_parts(files)
    return files


def find_named(name: str) -> tuple[Path | None, str | None]:
    """Return the file or folder that --model means, or else the repository on the hub."""
    variable = name.upper().replace("-", "_")
    if name in HUB_MODELS:
        place = os.environ.get(variable)  # FLUX_DEV, as black-forest-labs' own code
        return (existing(Path(place), variable), None) if place else (None, HUB_MODELS[name])
    path = LOCAL_MODELS.get(name, Path(name))
    if name and path.exists():
        return path, None
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix not in (".safetensors", ".sft"):
        return None, name
    known = ", ".join([*HUB_MODELS, *LOCAL_MODELS])
    raise FileNotFoundError(
        f"--model {name}: neither a folder nor a file nor one of the known models ({known})"
    )


def existing(path: Path, what: str) -> Path:
    """Return a path that is there; FileNotFoundError, which says what named it, when it is not."""
    if not path.exists():
        raise FileNotFoundError(f"{what} {path}: no such file or folder")
    return path


def given_parts(args: argparse.Namespace) -> dict[str, Path]:
    """Return the parts that have an option of their own."""
    values = {part: getattr(args, option[2:].replace("-", "_"), None) for part, option in OPTIONS.items()}
    return {part: existing(Path(x), OPTIONS[part]) for part, x in values.items() if x}


def local_parts(path: Path) -> dict[str, Path]:
    """Return the parts in a model's folder, or those inside a transformer's file and around it."""
    folder, parts = (path, PLACES) if path.is_dir() else (folder_around(path), OPTIONS)
    found = {part: place for part in parts if (place := part_in(folder, part))}
    if path == folder and "transformer" not in found:
        raise FileNotFoundError(
            f"{path} must hold exactly one {PLACES['transformer'][0]}, or a transformer/; found none"
        )
    found = {"transformer": path} | found
    return found | parts_inside(found)


def part_in(folder: Path, part: str) -> Path | None:
    """Return where a part lies in a model's folder; FileNotFoundError when it is not whole."""
    if part == "tokenizers":
        has = lambda file: (folder / file).is_file()
        whole = all(map(has, (*TOKENIZER_FILES, TOKENIZER_2_CONFIG))) and any(map(has, TOKENIZER_2_FILES))
        return folder if whole else None
    for pattern in PLACES[part]:
        places = sorted(folder.glob(pattern))
        if len(places) > 1:
            names = ", ".join(place.name for place in places)
            raise FileNotFoundError(f"{folder} must hold exactly one {pattern}; found {names}")
        if places:
            shards(places[0])
            return places[0]
    return None


def parts_inside(found: dict[str, Path]) -> dict[str, Path]:
    """Return the other parts that a ComfyUI checkpoint holds beside the transformer."""
    if not (file := found.get("transformer")) or file.is_dir():
        return {}
    with opened(file) as f:
        kinds = kinds_inside(list(f.keys()))
    return {part: file for part, kind in KINDS.items() if kind in kinds}


def cached_parts(repo: str, parts: list[str]) -> dict[str, Path]:
    """Return those of the parts that are whole in the hub's cache, in any snapshot, the latest first."""
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    main = storage / "refs" / "main"
    latest = main.read_text() if main.is_file() else ""
    snapshots = sorted(storage.glob("snapshots/*"), key=lambda folder: folder.name != latest)
    found = {}
    for part in parts:
        for snapshot in snapshots:
            with suppress(FileNotFoundError):  # half of it: it will be downloaded
                if part not in found and (place := part_in(snapshot, part)):
                    found[part] = place
    return found


def download_parts(repo: str, parts: list[str]) -> dict[str, Path]:
    """Download those of the parts that a repository on the hub has; FileNotFoundError says what to do."""
    try:
        names = [file.rfilename for file in HfApi().model_info(repo, timeout=TIMEOUT).siblings]
        files = [file for part in parts for file in hub_names(repo, names, part)]
        folders = {hub_file(repo, file).parents[file.count("/")] for file in files}
    except ValueError:  # a wrong hash, or several models
        raise
    except Exception as error:  # the network's errors have other types in every version of huggingface_hub
        if "transformer" not in parts and repo not in HUB_MODELS.values():
            print(f"cannot ask {repo} for {', '.join(parts)} ({type(error).__name__})")
            return {}
        raise FileNotFoundError(refusal(repo, parts, error)) from error
    found = {part: place for x in folders for part in parts if (place := part_in(x, part))}
    if "transformer" in parts and "transformer" not in found:
        raise FileNotFoundError(f"https://huggingface.co/{repo} has no FLUX.1 transformer in safetensors")
    return found


def hub_names(repo: str, names: list[str], part: str) -> list[str]:
    """Choose the files of a part from all of a repository's."""
    if part == "tokenizers":
        wanted = (*TOKENIZER_FILES, TOKENIZER_2_CONFIG, *TOKENIZER_2_FILES)
        return [name for name in names if name in wanted]
    for place in PLACES[part]:
        if "." in place:
            chosen = [name for name in names if fnmatch(name, place) and "/" not in name]
            if len(chosen) > 1:
                raise ValueError(
                    f"{repo} has several models, {', '.join(chosen)}: download one, then --model FILE"
                )
        else:
            chosen = [name for name in names if re.fullmatch(f"{place}/({HUB_WEIGHTS})", name)]
        if chosen:
            return chosen
    return []


def refusal(repo: str, parts: list[str], error: Exception) -> str:
    """Say why the hub did not give parts of a model, and what to do."""
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{repo} is not whole in the hub cache and cannot be downloaded ({type(error).__name__}: {reason}).\n"
        f"Wanted: {', '.join(parts)}. "
        f"Accept its licence at https://huggingface.co/{repo}, then run `hf auth login` with a read token or "
        "set HF_TOKEN;\nor point at files that are there already: --model FILE or FOLDER, "
        f"{', '.join(OPTIONS.values())} (see --help);\n"
        "or try everything on the small model that comes along: --model tiny"
    )


def hub_file(repo: str, file: str, revision: str | None = None) -> Path:
    """Return a file from the hub's cache, or download it.

    Raises OSError within seconds when there is no network, and ValueError when the hub has another hash for
    what came; that file is not kept.
    """
    found = try_to_load_from_cache(repo, file, revision=revision)
    if isinstance(found, str):
        return Path(found)
    try:
        # Asked first because a download would keep trying.
        metadata = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=TIMEOUT)
        print(f"downloading {file} of {repo}, {(metadata.size or 0) / 1e6:,.1f} MB")
        path = Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # the network's errors have other types in every version of huggingface_hub
        raise OSError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
    if re.fullmatch("[0-9a-f]{64}", metadata.etag or ""):  # of large files it is the SHA-256
        try:
            check_sha256(path, metadata.etag)
        except ValueError:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise
    return path


def check_parts(files: ModelFiles) -> None:
    """Raise ValueError when a part's header is not what its model needs, or the parts belong to several."""
    sizes = {part: loader(getattr(files, part), "meta").sizes for part, loader in LOADERS.items()}
    flux, autoencoder, clip, t5 = sizes.values()
    problems = [
        f"{theirs} has {number} {what}, {files.transformer} wants {wanted}"
        for theirs, number, what, wanted in (
            (files.autoencoder, 4 * autoencoder.z_channels, "channels in 2 x 2 latents", flux.in_channels),
            (files.clip, clip.hidden_size, "channels", flux.pooled_size),
            (files.t5, t5.hidden_size, "channels", flux.txt_size),
        )
        if number != wanted
    ]
    if problems:
        raise ValueError("\n".join(problems))


def load_flux(path: Path | str, device="cpu", dtype=torch.bfloat16) -> Flux:
    """Load the transformer from a file, or a folder of shards; frozen.

    On the CPU it stays on the disk, in whatever layout: weights that diffusers splits are joined in temporary
    files, 7.2 GB for FLUX.1-dev, and so are those of another dtype; see `flux.checkpoint.empty`.
    """
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
    files: ModelFiles | Path,
    device="cpu",
    dtype=torch.bfloat16,
    t5_length: int | None = None,
    vram: float | None = None,
) -> Conditioner:
    """Load both text encoders and their tokenizers, of a model's files or folder.

    T5 is streamed to a GPU that has no room for it; vram: GiB to stay within, None for what there is.
    """
    if isinstance(files, Path):
        places = files / "text_encoder_2", files / "text_encoder", files
    else:
        places = files.t5, files.clip, files.tokenizers
    room = 0.8 * (vram * 2**30 if vram else device_memory(torch.device(device)))
    streamed = weight_bytes(load_t5(places[0], "meta", dtype)) > room
    t5, clip = load_t5(places[0], "cpu" if streamed else device, dtype), load_clip(places[1], device, dtype)
    if streamed:
        Stream(list(t5.encoder.block), device)
    return Conditioner(t5.to(device), clip, load_tokenizers(places[2], t5_length))


KINDS = {"autoencoder": AutoEncoder, "clip": CLIPText, "t5": T5}  # what ComfyUI puts beside a transformer
LOADERS = {"transformer": load_flux, "autoencoder": load_autoencoder, "clip": load_clip, "t5": load_t5}


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
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{path}: {error}") from error
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
    side = read_json(config).get("sample_size", 1024) if config.is_file() else 1024
    if type(side) is not int or side < 1:
        raise ValueError(f"{config}: sample_size {side!r}, must be a number of pixels")
    return side


def fingerprint(*paths: Path) -> str:
    """Tell weights apart without reading gigabytes: a hash of each file's size, first and last MiB."""
    digest = hashlib.sha256()
    for path in paths:
        for file in shards(path):
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
        raise ValueError(f"--device {args.device}: {reason}; this machine has {default}") from error
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(args.dtype)
    of_a_card = getattr(args, "plan", False) and args.vram  # that may be elsewhere
    exact = device.type == "cpu" and not of_a_card
    return device, dtype or (torch.float32 if exact else torch.bfloat16)


def run_script(main: Callable[[], None], stopped: str = "stopped") -> None:
    """Run a script's main; what its user can mend ends with one message instead of a traceback.

    SIGTERM ends it as Ctrl-C does, so that no half file stays. What is printed can steer no terminal.
    """
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"  # a line, without the code that warns
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with redirect_stdout(Shown(sys.stdout)), redirect_stderr(Shown(sys.stderr, bars=True)):
            main()
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", reason):
            raise
        sys.exit(
            printable_lines(
                f"{Path(sys.argv[0]).name}: out of memory ({reason}); a lower --vram makes another plan"
            )
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(printable_lines(f"{Path(sys.argv[0]).name}: {error}"))
    except KeyboardInterrupt:
        sys.exit(f"\n{stopped}")
