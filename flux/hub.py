"""Files from the Hugging Face hub: from its cache, or downloaded and checked by their hash."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from flux.errors import UserError

TIMEOUT = 10  # seconds for the hub's first answer


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


def check_sha256(file: Path, pinned: str) -> Path:
    """Return a downloaded file; ValueError when it is not the one whose hash we know."""
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != pinned:
        raise UserError(f"{file} has SHA-256 {digest}, not {pinned}: delete it and try again")
    return file
