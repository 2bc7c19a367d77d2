"""Find the files of a model, and load each part.

A model is a folder, here or on the hub, in diffusers' layout (`transformer/`, `vae/`, `text_encoder/`,
`text_encoder_2/`, `tokenizer/`, `tokenizer_2/`) or in black-forest-labs', whose `flux1-*.safetensors` and
`ae.safetensors` stand for the first two; or it is a transformer's file, and the other parts are elsewhere.
"""

import os
import re
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants

from flux.autoencoder import AutoEncoder
from flux.checkpoint import opened, shards
from flux.clip import CLIPText
from flux.errors import UserError
from flux.formats import kinds_inside
from flux.hub import TIMEOUT, hub_file
from flux.loading import LOADERS, ModelFiles, folder_around
from flux.t5 import T5

HUB_MODELS = {
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux-krea-dev": "black-forest-labs/FLUX.1-Krea-dev",
}
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
VARIABLES = {
    "autoencoder": "FLUX_AE",
    "clip": "FLUX_CLIP_L",
    "t5": "FLUX_T5",
    "tokenizers": "FLUX_TOKENIZERS",
}
BESIDE = ("autoencoder", "clip", "t5", "tokenizers")  # the transformer
SHARED = ("autoencoder", "clip", "t5")  # the same in all HUB_MODELS


class NotOnHub(FileNotFoundError):
    """What a model lacks is neither here nor to be downloaded; the message says what to do."""


def find_files(model: str, given: dict[str, Path] | None = None) -> ModelFiles:
    """Find every part of a model; of what is there only headers are read.

    model: a name in HUB_MODELS, a repository on the hub, a folder or a transformer's file; given: parts that
    lie elsewhere. A part is looked for in this order: given, what the model is on disk, its environment
    variable, the hub's cache, the hub. What the model itself lacks is taken from FLUX.1-dev. Raises
    FileNotFoundError that says what to do, and UserError when a file does not fit its part, or the parts not
    each other.
    """
    found = dict(given or {})
    path, repo = find_named(model)
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
    path = Path(name)
    if name and path.exists():
        return path, None
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix not in (".safetensors", ".sft"):
        return None, name
    known = ", ".join(HUB_MODELS)
    raise FileNotFoundError(
        f"--model {name}: neither a folder nor a file nor one of the known models ({known})"
    )


def existing(path: Path, what: str) -> Path:
    """Return a path that is there; FileNotFoundError, which says what named it, when it is not."""
    if not path.exists():
        raise FileNotFoundError(f"{what} {path}: no such file or folder")
    return path


def local_parts(path: Path) -> dict[str, Path]:
    """Return the parts in a model's folder, or those inside a transformer's file and around it."""
    folder, parts = (path, PLACES) if path.is_dir() else (folder_around(path), BESIDE)
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
        raise NotOnHub(refusal(repo, parts, error)) from error
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
                raise UserError(
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
        "set HF_TOKEN"
    )


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
        raise UserError("\n".join(problems))


KINDS = {"autoencoder": AutoEncoder, "clip": CLIPText, "t5": T5}  # what ComfyUI puts beside a transformer
