"""Files from the Hugging Face hub: from its cache, or downloaded and checked by their hash."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from flux.errors import UserError, first_line
from flux.hashes import sha256

TIMEOUT = 10  # seconds for the hub's first answer


def hub_listing(repo: str) -> list[str]:
    """Return the names of a repository's files; OSError within seconds when the hub does not tell them."""
    with requests_to_hub():
        return [file.rfilename for file in HfApi().model_info(repo, timeout=TIMEOUT).siblings]


def hub_file(repo: str, file: str, revision: str | None = None) -> Path:
    """Return a file from the hub's cache, or download it.

    Raises OSError within seconds when there is no network, and UserError when the hub has another hash for
    what came; that file is not kept.
    """
    cached = try_to_load_from_cache(repo, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    with requests_to_hub():
        # Asked first because a download would keep trying.
        metadata = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=TIMEOUT)
        print(f"downloading {file} of {repo}, {(metadata.size or 0) / 1e6:,.1f} MB")
        path = Path(hf_hub_download(repo, file, revision=revision))
    if re.fullmatch("[0-9a-f]{64}", metadata.etag or ""):  # of large files it is the SHA-256
        try:
            check_sha256(path, metadata.etag)
        except UserError:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise
    return path


@contextmanager
def requests_to_hub() -> Iterator[None]:
    """Raise OSError with the type and first line of whatever error a request ends with."""
    try:
        yield
    # Its types differ between the versions of huggingface_hub: requests', httpx', hf_xet's or its own, and
    # they have no common base.
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error


def check_sha256(file: Path, pinned: str) -> Path:
    """Return a downloaded file; UserError when it is not the one whose hash we know."""
    digest = sha256(file)
    if digest != pinned:
        raise UserError(f"{file} has SHA-256 {digest}, not {pinned}: delete it and try again")
    return file
