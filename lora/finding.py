"""Find the LoRA file that a name means: a file, a folder that holds one, or a repository on the hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from flux.errors import UserError, listed
from flux.hub import hub_file, hub_listing

SUFFIX = ".safetensors"
HUB = re.compile(r"(?:https?:/+huggingface\.co/)?([\w-][\w.-]*/[\w.-]+)(?:/(?:(?:blob|resolve)/main/)?(.+))?")


def find_lora(name: Path) -> Path:
    """Return the file that a name means; one on the hub (owner/name, or owner/name/file) is downloaded.

    Raises FileNotFoundError, which says what is there instead, and UserError where there is none, or several.
    """
    if name.is_dir():
        return name / only_one(name, sorted(path.name for path in name.glob(f"[!.]*{SUFFIX}")))
    for path in (name, name.with_name(name.name + SUFFIX)):
        if path.is_file():
            return path
    folder, on_hub = name.parent, HUB.fullmatch(name.as_posix())
    if on_hub and not folder.exists() and (on_hub[2] or name.suffix != SUFFIX):
        return find_on_hub(*on_hub.groups())
    there = sorted(path.name for path in folder.glob(f"[!.]*{SUFFIX}"))
    raise FileNotFoundError(f"{name}: no such file" + (f"; in {folder} are {listed(there)}" if there else ""))


def find_on_hub(repo: str, file: str | None) -> Path:
    """Return a repository's only safetensors file, or the named one; from the cache if it is there."""
    try:
        return hub_file(repo, file or only_one(repo, names_on_hub(repo)))
    except OSError as error:
        name = f"{repo}/{file}" if file else repo
        raise FileNotFoundError(f"{name}: not on this disk, nor to be had from the hub ({error})") from error


def names_on_hub(repo: str) -> list[str]:
    """Return the safetensors files of a repository; those in the cache when the hub does not answer."""
    try:
        return sorted(name for name in hub_listing(repo) if name.endswith(SUFFIX))
    except OSError:
        snapshots = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots")
        names = {path.name for path in snapshots.glob(f"*/*{SUFFIX}")}
        if not names:
            raise
        return sorted(names)


def only_one(place: Path | str, names: Sequence[str]) -> str:
    """Return the only name; UserError when there is none, or several."""
    if not names:
        raise UserError(f"{place} holds no {SUFFIX} file")
    if len(names) > 1:
        raise UserError(f"{place} holds several LoRAs, {listed(names)}: name one, as {place}/{names[0]}")
    return names[0]
