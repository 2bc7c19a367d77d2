"""A cache of tensors on disk or in memory, named by what they were made from."""

import hashlib
import json
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from run.files import atomic

CHECKSUM = "crc32"  # of an entry of the cache, in its header
SEAL = f'"{CHECKSUM}":"'.encode()


# Files


class TensorCache:
    """Tensors on disk, one file per entry, named by the content they were made from."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Say whether there is a file, whole by its header and length: of thousands none is read."""
        try:
            with safe_open(self.file(key), "pt") as file:
                return CHECKSUM in (file.metadata() or {})
        except (FileNotFoundError, SafetensorError):
            return False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return what was put; None when there is no file, or a bit of it is wrong: then it is deleted."""
        try:
            content = self.file(key).read_bytes()
        except FileNotFoundError:
            return None
        if content == sealed(content):
            return from_bytes(content)
        self.file(key).unlink(missing_ok=True)  # so that `in` says so too, and it is made anew
        return None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        content = sealed(to_bytes(whole, {CHECKSUM: f"{0:08x}"}))
        with atomic(self.file(key)) as path:
            path.write_bytes(content)  # and not save_file, whose error on a full disk is no OSError


def sealed(content: bytes) -> bytes | None:
    """Return a safetensors file with its right checksum, which covers all else; None if it has no place."""
    place = content.find(SEAL) + len(SEAL)
    if place < len(SEAL):
        return None
    blank = content[:place] + b"0" * 8 + content[place + 8 :]
    return content[:place] + b"%08x" % zlib.crc32(blank) + content[place + 8 :]


class MemoryCache(dict):
    """The same without a disk."""

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        self[key] = {name: tensor.cpu() for name, tensor in tensors.items()}


def content_key(*recipe: object) -> str:
    """Hash what an entry of the cache is made from; all of it must survive JSON."""
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
