"""The host's memory: pages that are mapped to files, and how much is free."""

import ctypes
import mmap
from pathlib import Path

from torch import Tensor


def file_ranges() -> list[tuple[int, int]]:
    """Return the address ranges of this process that are mapped to files; none where there is no /proc."""
    maps = Path("/proc/self/maps")
    ranges = []
    for line in maps.read_text().splitlines() if maps.exists() else ():
        addresses, _, _, _, inode, *path = line.split()
        if inode != "0" and not path[0].startswith("/dev/"):
            start, end = addresses.split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def advise(tensor: Tensor, advice: str, files: list[tuple[int, int]]) -> None:
    """Call madvise on the pages that lie within a tensor, if it is mapped to one of the files."""
    if not files or tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end and any(first <= start and end <= last for first, last in files):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, advice))


def drop_pages(tensor: Tensor, files: list[tuple[int, int]]) -> None:
    """Drop a tensor's pages from memory; they are read again from the file when needed.

    Memory that is not mapped to a file is left alone: dropped, it would come back as zeros.
    """
    advise(tensor, "MADV_DONTNEED", files)


def available_memory() -> int:
    """Return the bytes of host memory that are free or can be freed; 0 if unknown."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
