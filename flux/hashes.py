"""Hashes of files: the whole SHA-256, and a quick fingerprint of weights."""

import hashlib
import os
from pathlib import Path

from flux.checkpoint import shards


def sha256(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*paths: Path) -> str:
    """Return a quick fingerprint: a hash of each file's size and of its first and last MiB.

    Two files that differ only in between have the same fingerprint.
    """
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
