"""Find the files of a model: on the disk, in the hub's cache, or on the hub.

A model is a folder, here or on the hub, in diffusers' layout (`transformer/`, `vae/`, `text_encoder/`,
`text_encoder_2/`, `tokenizer/`, `tokenizer_2/`) or in black-forest-labs', whose `flux1-*.safetensors` and
`ae.safetensors` stand for the first two; or it is a transformer's file, and the other parts are elsewhere.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants

from flux.autoencoder import AutoEncoder
from flux.checkpoint import opened, shards
from flux.clip import CLIPText
from flux.errors import UserError, listed
from flux.formats import kinds_inside
from flux.hub import hub_file, hub_listing
from flux.loading import LOADERS, ModelFiles, folder_around
from flux.t5 import T5

HUB_MODELS = {
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux-krea-dev": "black-forest-labs/FLUX.1-Krea-dev",
}
# Where a part lies in a model's folder, the best place first. A name without a dot is a folder, which may
# hold shards.
PLACES = {
    "transformer": ("flux1-*.safetensors", "flux1-*.sft", "transformer", "flux*.safetensors"),
    "autoencoder": ("ae.safetensors", "ae.sft", "vae"),
    "clip": ("text_encoder",),
    "t5": ("text_encoder_2",),
    "tokenizers": ("tokenizer", "tokenizer_2"),  # both
}
PARTS = tuple(PLACES)
BESIDE = ("autoencoder", "clip", "t5", "tokenizers")  # what lies beside a transformer
SHARED = ("autoencoder", "clip", "t5")  # the same in all HUB_MODELS
INSIDE = {"autoencoder": AutoEncoder, "clip": CLIPText, "t5": T5}  # what ComfyUI puts into one file with it
VARIABLES = {  # of the environment
    "autoencoder": "FLUX_AE",
    "clip": "FLUX_CLIP_L",
    "t5": "FLUX_T5",
    "tokenizers": "FLUX_TOKENIZERS",
}
TOKENIZER_FILES = (
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer_config.json",
)
T5_TOKENIZERS = ("tokenizer_2/tokenizer.json", "tokenizer_2/spiece.model")  # one of them is enough
# Free repositories with the same tokenizers, for who has the weights as single files: CLIP's, and T5's.
FREE_TOKENIZERS = {
    "openai/clip-vit-large-patch14": ("vocab.json", "merges.txt", "tokenizer_config.json"),
    "google/t5-v1_1-xxl": ("spiece.model", "tokenizer_config.json"),
}
HUB_WEIGHTS = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|config\.json"


class UnknownModel(FileNotFoundError):
    """A name is no file, no folder, no known model and no repository."""


class NotOnHub(FileNotFoundError):
    """A part of a model is neither on this machine nor to be downloaded; the message says what to do."""


def find_files(model: str, given: dict[str, Path] | None = None) -> ModelFiles:
    """Find every part of a model; only headers of the files are read.

    model: a name in HUB_MODELS, a repository on the hub, a folder, or a transformer's file.
    given: parts that lie elsewhere, by their names in `ModelFiles`.

    A part is looked for in this order: given, what the model is on disk, its environment variable, the hub's
    cache, the hub. What the model itself lacks is taken from FLUX.1-dev. Raises FileNotFoundError that says
    what to do, and UserError when a file does not fit its part, or the parts do not fit each other.
    """
    parts = dict(given or {})
    path, repo = find_named(model)
    if path:
        parts = local_parts(path) | parts
    for part, variable in VARIABLES.items():
        if part not in parts and os.environ.get(variable):
            parts[part] = existing(Path(os.environ[variable]), variable)

    if repo:
        parts |= cached_parts(repo, missing(parts))
        if repo in HUB_MODELS.values():
            for sibling in HUB_MODELS.values():
                parts |= cached_parts(sibling, missing(parts, SHARED))
        parts = parts_inside(parts) | parts
        if missing(parts):
            parts |= download_parts(repo, missing(parts))
            parts = parts_inside(parts) | parts
    for other in HUB_MODELS.values():
        parts |= cached_parts(other, missing(parts))
    if missing(parts) == ["tokenizers"]:
        parts |= free_tokenizers()
    if missing(parts):
        parts |= download_parts(HUB_MODELS["flux-dev"], missing(parts))
    files = ModelFiles(**parts)
    check_parts(files)
    return files


def missing(parts: dict[str, Path], wanted: Sequence[str] = PARTS) -> list[str]:
    """Return those of the wanted parts that have no place yet."""
    return [part for part in wanted if part not in parts]


def find_named(name: str) -> tuple[Path | None, str | None]:
    """Return the file or folder that a model's name means, or else the repository on the hub."""
    if name in HUB_MODELS:
        variable = name.upper().replace("-", "_")  # FLUX_DEV, as black-forest-labs' own code
        place = os.environ.get(variable)
        return (existing(Path(place), variable), None) if place else (None, HUB_MODELS[name])
    path = Path(name)
    if name and path.exists():
        return path, None
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix not in (".safetensors", ".sft"):
        return None, name
    known = ", ".join(HUB_MODELS)
    raise UnknownModel(f"{name}: neither a folder nor a file nor one of the known models ({known})")


def existing(path: Path, origin: str) -> Path:
    """Return a path that is there; FileNotFoundError, which says where it came from, when it is not."""
    if not path.exists():
        raise FileNotFoundError(f"{origin} {path}: no such file or folder")
    return path


# --- On the disk -------------------------------------------------------------------------------------------


def local_parts(path: Path) -> dict[str, Path]:
    """Return the parts in a model's folder, or those inside a transformer's file and around it."""
    if path.is_dir():
        parts = parts_in(path, PARTS)
        if "transformer" not in parts:
            pattern = PLACES["transformer"][0]
            raise FileNotFoundError(f"{path} must hold exactly one {pattern}, or a transformer/; found none")
    else:
        parts = {"transformer": path} | parts_in(folder_around(path), BESIDE)
    return parts | parts_inside(parts)


def parts_in(folder: Path, wanted: Sequence[str]) -> dict[str, Path]:
    """Return those of the wanted parts that a model's folder has."""
    places = {part: part_in(folder, part) for part in wanted}
    return {part: place for part, place in places.items() if place}


def part_in(folder: Path, part: str) -> Path | None:
    """Return where a part lies in a model's folder; FileNotFoundError when some of its files are missing."""
    if part == "tokenizers":
        has_common = all((folder / file).is_file() for file in TOKENIZER_FILES)
        has_t5 = any((folder / file).is_file() for file in T5_TOKENIZERS)
        return folder if has_common and has_t5 else None
    for pattern in PLACES[part]:
        places = sorted(folder.glob(pattern))
        if len(places) > 1:
            names = listed(place.name for place in places)
            raise FileNotFoundError(f"{folder} must hold exactly one {pattern}; found {names}")
        if places:
            shards(places[0])  # raises when one of them is missing
            return places[0]
    return None


def parts_inside(parts: dict[str, Path]) -> dict[str, Path]:
    """Return the other parts that a ComfyUI checkpoint holds beside the transformer."""
    file = parts.get("transformer")
    if file is None or file.is_dir():
        return {}
    with opened(file) as f:
        kinds = kinds_inside(list(f.keys()))
    return {part: file for part, kind in INSIDE.items() if kind in kinds}


# --- The hub -----------------------------------------------------------------------------------------------


def cached_parts(repo: str, wanted: Sequence[str]) -> dict[str, Path]:
    """Return those of the parts that are whole in the hub's cache, in any snapshot, the latest first."""
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    main = storage / "refs" / "main"
    latest = main.read_text() if main.is_file() else ""
    snapshots = sorted(storage.glob("snapshots/*"), key=lambda folder: folder.name != latest)
    parts = {}
    for snapshot in snapshots:
        for part in missing(parts, wanted):
            with suppress(FileNotFoundError):  # some of its files are missing: they will be downloaded
                place = part_in(snapshot, part)
                if place:
                    parts[part] = place
    return parts


def free_tokenizers() -> dict[str, tuple[Path, Path]]:
    """Return the tokenizers of two free repositories, cached or downloaded; nothing where that fails."""
    folders = []
    try:
        for repo, files in FREE_TOKENIZERS.items():
            folders.append([hub_file(repo, file).parent for file in files][0])
    except OSError:
        return {}
    return {"tokenizers": tuple(folders)}


def download_parts(repo: str, wanted: Sequence[str]) -> dict[str, Path]:
    """Download those of the parts that a repository on the hub has.

    Raises NotOnHub that says what to do. When only other parts than the transformer are wanted of a
    repository that is not one of HUB_MODELS, they can come from FLUX.1-dev: then it prints why and returns
    nothing.
    """
    folders = set()
    try:
        names = hub_listing(repo)
        for part in wanted:
            for file in hub_names(repo, names, part):
                folders.add(hub_file(repo, file).parents[file.count("/")])
    except OSError as error:
        if "transformer" not in wanted and repo not in HUB_MODELS.values():
            print(f"cannot ask {repo} for {', '.join(wanted)} ({error})")
            return {}
        raise NotOnHub(
            f"{repo} is not whole in the hub cache and cannot be downloaded ({error}).\n"
            f"Wanted: {', '.join(wanted)}. Accept its licence at https://huggingface.co/{repo}, then run "
            "`hf auth login` with a read token or set HF_TOKEN"
        ) from error
    parts = {}
    for folder in folders:
        parts |= parts_in(folder, wanted)
    if "transformer" in wanted and "transformer" not in parts:
        raise FileNotFoundError(f"https://huggingface.co/{repo} has no FLUX.1 transformer in safetensors")
    return parts


def hub_names(repo: str, names: list[str], part: str) -> list[str]:
    """Choose the files of a part from all of a repository's; UserError when it has several transformers."""
    if part == "tokenizers":
        return [name for name in names if name in (*TOKENIZER_FILES, *T5_TOKENIZERS)]
    for place in PLACES[part]:
        if "." in place:
            chosen = [name for name in names if fnmatch(name, place) and "/" not in name]
        else:
            chosen = [name for name in names if re.fullmatch(f"{place}/({HUB_WEIGHTS})", name)]
        if "." in place and len(chosen) > 1:
            raise UserError(f"{repo} has several models, {listed(chosen)}: download one and name its file")
        if chosen:
            return chosen
    return []


# --- Do the parts fit? -------------------------------------------------------------------------------------


def check_parts(files: ModelFiles) -> None:
    """Raise UserError when a file's header is not what its part needs, or the parts are of several models."""
    sizes = {part: load(getattr(files, part), "meta").sizes for part, load in LOADERS.items()}
    flux, autoencoder, clip, t5 = sizes.values()
    problems = [
        f"{file} has {number} {unit}, {files.transformer} wants {wanted}"
        for file, number, unit, wanted in (
            (files.autoencoder, 4 * autoencoder.z_channels, "channels in 2 x 2 latents", flux.in_channels),
            (files.clip, clip.hidden_size, "channels", flux.pooled_size),
            (files.t5, t5.hidden_size, "channels", flux.txt_size),
        )
        if number != wanted
    ]
    if problems:
        raise UserError("\n".join(problems))
