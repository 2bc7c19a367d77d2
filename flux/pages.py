"""The host's memory: pages that are mapped to files, pages that are pinned, and how much is free."""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
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


def host_slab(size: int) -> Tensor:
    """Return (size,) bytes of host memory, which share no page with anything else."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def pin(slab: Tensor, device: torch.device) -> bool:
    """Pin memory, so that a GPU copies from it by itself; return whether CUDA has done so.

    torch's own pinned tensors take the next power of two of their size.
    """
    with torch.cuda.device(device):
        refused = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)) != 0
        if refused:
            with suppress(RuntimeError):  # CUDA keeps the error, which the next kernel would raise
                torch.ones(1, device=device).add_(1)
    return not refused


def unpin(slab: Tensor, stream: torch.cuda.Stream) -> None:
    """Undo `pin`, after the copies of a stream."""
    stream.synchronize()
    with torch.cuda.device(stream.device):
        torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that are free or can be freed; 0 if unknown.

    In a container it is what the container may still take. root: where /proc and /sys are.
    """
    info = root / "proc/meminfo"
    lines = info.read_text().splitlines() if info.exists() else []
    host = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    return min([host, *memory_of_groups(root)])


def memory_of_groups(root: Path) -> Iterator[int]:
    """Yield what is left of the memory of each control group with a limit that this process is in.

    Both versions of the kernel's interface are read. Cached files can be freed, and count as left.
    """
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, total = "", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, usage, total = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        path = Path(path.lstrip("/"))
        for folder in (root / "sys/fs/cgroup" / top / group for group in (path, *path.parents)):
            files = [folder / name for name in (limit, usage, "memory.stat")]
            if all(file.exists() for file in files):  # not of the root, and a container may see its own alone
                most, used, stat = (file.read_text() for file in files)
                stat = dict(line.split() for line in stat.splitlines())
                cached = sum(int(stat.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))
                if most.strip() != "max":
                    yield max(0, int(most) - int(used) + cached)
