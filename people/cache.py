"""A cache of tensors on disk: each entry is named by a hash of what it was made from."""

import hashlib
import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from run.files import atomic

CHECKSUM = "crc32"  # the tensor in which an entry keeps the checksum of its other tensors


class TensorCache:
    """A folder with one safetensors file per entry."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Say whether there is an entry whose header and length are right; its tensors are not read."""
        try:
            with safe_open(self.file(key), "pt") as file:
                return CHECKSUM in file.keys()
        except (FileNotFoundError, SafetensorError):
            return False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return an entry as it was put; None when there is none. A damaged entry is deleted."""
        try:
            content = self.file(key).read_bytes()
        except FileNotFoundError:
            return None
        try:
            tensors = from_bytes(content)
            if tensors.pop(CHECKSUM).item() == checksum(tensors):
                return tensors
        except (SafetensorError, KeyError):
            pass
        self.file(key).unlink(missing_ok=True)  # so that `key in cache` becomes False
        return None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        content = to_bytes(tensors | {CHECKSUM: torch.tensor(checksum(tensors))})
        with atomic(self.file(key)) as path:
            path.write_bytes(content)  # and not save_file, whose error on a full disk is no OSError


def checksum(tensors: dict[str, Tensor]) -> int:
    """Return the CRC-32 of all names, types, shapes and numbers."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), crc)
    return crc


def content_key(*recipe: object) -> str:
    """Hash what an entry is made from: anything that JSON can hold."""
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
