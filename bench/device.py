"""Work on a device: make modules there, time it, see and limit the memory that it takes."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from run.costs import GIB


def describe(device: torch.device) -> dict[str, object]:
    """Return what the machine is: the card's name, its memory, and the versions of what drives it."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    about = {"card": platform.machine(), "cpus": os.cpu_count(), "host_gib": round(pages / GIB, 1)}
    about |= {"python": platform.python_version(), "torch": torch.__version__}
    if device.type != "cuda":
        return about
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError) as error:
        driver = f"unknown ({error})"
    about |= {"card": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    about |= {"cudnn": torch.backends.cudnn.version(), "driver, power limit": driver}
    about |= {"capability": list(torch.cuda.get_device_capability(device))}
    total = torch.cuda.mem_get_info(device)[1]
    return about | {"card_gib": round(total / GIB, 2), "context_gib": round(context(device) / GIB, 3)}


def context(device: torch.device) -> int:
    """Return the bytes on a card that the allocator does not hold, if no other program uses the card."""
    torch.zeros(1, 1, device=device).mm(torch.zeros(1, 1, device=device))  # CUDA and cuBLAS have begun
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Make modules on a device in a dtype, with the random weights of PyTorch's own initialization."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, float]:
    """Return the peaks of a card's memory since `reset_peaks` in GiB; empty for a CPU.

    allocated: in tensors; reserved: by the allocator; used: with the context, as nvidia-smi shows it.
    """
    if device.type != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    sizes = {"allocated": allocated, "reserved": reserved, "used": reserved + context(device)}
    return {f"{name}_gib": round(size / GIB, 3) for name, size in sizes.items()}


def timed(step: Callable[[], object], device: torch.device, warm: int = 1, repeats: int = 4) -> float:
    """Return the mean seconds of a call after `warm` calls; the card's peaks are those of the timed ones."""
    for _ in range(warm):
        step()
    synchronize(device)
    reset_peaks(device)
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


@contextmanager
def limited(device: torch.device, budget: float) -> Iterator[None]:
    """Let the allocator have what a card of so many GiB would leave it; do nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    # Of the current device: the function takes no torch.device("cuda") without a number.
    share = (budget * GIB - context(device)) / torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
