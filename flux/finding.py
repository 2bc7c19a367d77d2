"""Find the files of a model: on the disk, in the hub's cache, or on the hub.

A model is a folder, here or on the hub, in diffusers' layout (`transformer/`, `vae/`, `text_encoder/` and so
on) or in black-forest-labs', where files such as `flux1-*.safetensors` and `ae.safetensors` stand for the
first two (`Base.places` has all); or it is a transformer's file, and the other parts are elsewhere.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants

from flux.autoencoder import AutoEncoder
from flux.bases import BASES, FLUX1, Base, base_of
from flux.checkpoint import opened, shards
from flux.clip import CLIPText
from flux.errors import UserError, listed
from flux.formats import kinds_inside
from flux.hub import hub_file, hub_listing
from flux.loading import LOADERS, ModelFiles, folder_around, load_autoencoder, load_transformer
from flux.qwen3 import Qwen3
from flux.t5 import T5

GROUPS = [(base, group) for base in BASES.values() for group in base.models.values()]
HUB_MODELS = {name: repo for _, group in GROUPS for name, repo in group.items()}
BASE_OF_REPO = {repo: base for base, group in GROUPS for repo in group.values()}
INSIDE = {"autoencoder": AutoEncoder, "clip": CLIPText, "t5": T5, "qwen3": Qwen3}  # a checkpoint of ComfyUI's
# How wide the text of an encoder is, and how the transformer's sizes call that.
WIDTHS = {
    "clip": (lambda sizes: sizes.hidden_size, "pooled_size"),
    "t5": (lambda sizes: sizes.hidden_size, "txt_size"),
    "qwen3": (lambda sizes: len(sizes.layers) * sizes.hidden_size, "txt_size"),
}
LATENTS = {False: "channels in 2 x 2 latents", True: "channels in packed latents"}
HUB_WEIGHTS = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|config\.json"


class UnknownModel(FileNotFoundError):
    """A name is no file, no folder, no known model and no repository."""


class NoSuchPart(UserError):
    """A part is given that the model's base does not have; `part` is its name."""

    def __init__(self, part: str, base: Base, model: str):
        super().__init__(f"{model} is {base.name}, which has no {part} but {' and '.join(base.encoders)}")
        self.part = part


class NotOnHub(FileNotFoundError):
    """A part of a model is neither on this machine nor to be downloaded; the message says what to do."""


def find_files(model: str, given: dict[str, Path] | None = None) -> ModelFiles:
    """Find every part of a model; only headers of the files are read.

    model: a name in HUB_MODELS, a repository on the hub, a folder, or a transformer's file.
    given: parts that lie elsewhere, by their names in `Base.places`.

    A part is looked for in this order: given, what the model is on disk, its environment variable, the hub's
    cache, the hub. What the model itself lacks is taken from a repository of the same base, such as FLUX.1-
    dev. Raises FileNotFoundError that says what to do, NoSuchPart, and UserError when a file does not fit its
    part, or the parts do not fit each other.
    """
    parts = dict(given or {})
    path, repo = find_named(model)
    base = BASE_OF_REPO.get(repo)
    if path:
        parts = local_parts(path) | parts
    elif base is None:  # the transformer tells
        parts |= cached_parts(FLUX1, repo, ["transformer"]) or download_parts(FLUX1, repo, ["transformer"])
    if base is None:
        base = base_of(parts["transformer"])
        relatives = base.relatives(load_transformer(parts["transformer"], "meta").sizes.txt_size)
    else:
        relatives = base.relatives(repo)
    for part in parts:
        if part not in base.parts:
            raise NoSuchPart(part, base, model)
    for part, variable in base.variables.items():
        if part not in parts and os.environ.get(variable):
            parts[part] = existing(Path(os.environ[variable]), variable)

    if repo:
        parts |= cached_parts(base, repo, missing(parts, base.parts))
        if repo in relatives:
            for sibling in relatives:
                parts |= cached_parts(base, sibling, missing(parts, ["autoencoder", *base.encoders]))
        parts = parts_inside(base, parts) | parts
        if missing(parts, base.parts):
            parts |= download_parts(base, repo, missing(parts, base.parts))
            parts = parts_inside(base, parts) | parts
    for other in relatives:
        parts |= cached_parts(base, other, missing(parts, base.parts))
    if missing(parts, base.parts) == ["tokenizers"]:
        parts |= free_tokenizers(base)
    if missing(parts, base.parts):
        wanted = missing(parts, base.parts)
        if not relatives:
            raise NotOnHub(f"{model} lacks {', '.join(wanted)}, and no known {base.name} has the same")
        parts |= download_parts(base, relatives[0], wanted)
    encoders = {part: parts.pop(part) for part in base.encoders}
    files = ModelFiles(base, encoders=encoders, **parts)
    check_parts(files)
    return files


def missing(parts: dict[str, Path], wanted: Sequence[str]) -> list[str]:
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
        folder, transformer = path, part_in(FLUX1, path, "transformer")  # where it lies for every base
        if transformer is None:
            patterns = ", ".join(FLUX1.places["transformer"])
            raise FileNotFoundError(f"{path} holds no transformer, which would be one of {patterns}")
    else:
        folder, transformer = folder_around(path), path
    base = base_of(transformer)
    parts = {"transformer": transformer}
    parts |= parts_in(base, folder, missing(parts, base.parts))
    return parts | parts_inside(base, parts)


def parts_in(base: Base, folder: Path, wanted: Sequence[str]) -> dict[str, Path]:
    """Return those of the wanted parts that a model's folder has."""
    places = {part: part_in(base, folder, part) for part in wanted}
    return {part: place for part, place in places.items() if place}


def part_in(base: Base, folder: Path, part: str) -> Path | None:
    """Return where a part lies in a model's folder; FileNotFoundError when some of its files are missing."""
    if part == "tokenizers":
        whole = all(any((folder / file).is_file() for file in group) for group in base.tokenizer_files)
        return folder if whole else None
    for pattern in base.places[part]:
        places = sorted(place for place in folder.glob(pattern) if fits(part, place.name))
        if len(places) > 1:
            names = listed(place.name for place in places)
            raise FileNotFoundError(f"{folder} must hold exactly one {pattern}; found {names}")
        if places:
            shards(places[0])  # raises when one of them is missing
            return places[0]
    return None


def parts_inside(base: Base, parts: dict[str, Path]) -> dict[str, Path]:
    """Return the other parts that a ComfyUI checkpoint holds beside the transformer."""
    file = parts.get("transformer")
    if file is None or file.is_dir():
        return {}
    with opened(file) as f:
        kinds = kinds_inside(list(f.keys()))
    return {part: file for part in base.places if INSIDE.get(part) in kinds}


# --- The hub -----------------------------------------------------------------------------------------------


def cached_parts(base: Base, repo: str, wanted: Sequence[str]) -> dict[str, Path]:
    """Return those of the parts that are whole in the hub's cache, in any snapshot, the latest first."""
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    main = storage / "refs" / "main"
    latest = main.read_text() if main.is_file() else ""
    snapshots = sorted(storage.glob("snapshots/*"), key=lambda folder: folder.name != latest)
    parts = {}
    for snapshot in snapshots:
        for part in missing(parts, wanted):
            with suppress(FileNotFoundError):  # some of its files are missing: they will be downloaded
                place = part_in(base, snapshot, part)
                if place:
                    parts[part] = place
    return parts


def free_tokenizers(base: Base) -> dict[str, tuple[Path, ...]]:
    """Return the tokenizers of free repositories, cached or downloaded; nothing where that fails."""
    folders = []
    try:
        for repo, files in base.free_tokenizers.items():
            folders.append([hub_file(repo, file).parent for file in files][0])
    except OSError:
        return {}
    return {"tokenizers": tuple(folders)}


def download_parts(base: Base, repo: str, wanted: Sequence[str]) -> dict[str, Path]:
    """Download those of the parts that a repository on the hub has.

    Raises NotOnHub that says what to do. When only other parts than the transformer are wanted of a
    repository that is not one of HUB_MODELS, they can come from one that is: then it prints why and returns
    nothing.
    """
    folders = set()
    try:
        names = hub_listing(repo)
        for part in wanted:
            for file in hub_names(base, repo, names, part):
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
        parts |= parts_in(base, folder, wanted)
    if "transformer" in wanted and "transformer" not in parts:
        raise FileNotFoundError(f"https://huggingface.co/{repo} has no FLUX transformer in safetensors")
    return parts


def fits(part: str, name: str) -> bool:
    """Tell whether a file can be the part: flux2-vae.safetensors is no transformer."""
    return part != "transformer" or "vae" not in name


def hub_names(base: Base, repo: str, names: list[str], part: str) -> list[str]:
    """Choose the files of a part from all of a repository's; UserError when it has several transformers."""
    if part == "tokenizers":
        return [name for name in names if any(name in group for group in base.tokenizer_files)]
    for place in base.places[part]:
        if "." in place:
            chosen = [name for name in names if fnmatch(name, place) and "/" not in name and fits(part, name)]
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
    flux = load_transformer(files.transformer, "meta").sizes
    autoencoder = load_autoencoder(files.autoencoder, "meta").sizes
    facts = [  # file, what it has, what the transformer wants
        (
            files.autoencoder,
            f"{4 * autoencoder.z_channels} {LATENTS[autoencoder.packed]}",
            f"{flux.in_channels} {LATENTS[files.base.packed]}",
        )
    ]
    for part, file in files.encoders.items():
        width, name = WIDTHS[part]
        sizes = LOADERS[part](file, "meta").sizes
        facts.append((file, f"{width(sizes)} channels of text", f"{getattr(flux, name)} channels of text"))
    problems = [f"{file} has {x}, {files.transformer} wants {y}" for file, x, y in facts if x != y]
    if problems:
        raise UserError("\n".join(problems))
