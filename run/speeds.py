"""How fast a device multiplies matrices and copies from the host: measured, or of a card that is known."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flux.memory import release

PEAKS = {"A6000": 155e12, "H100": 989e12}  # dense bf16 FLOP/s, by their makers
SHARE = 0.6  # fraction of its peak that a GPU reaches in a step
BUS = 25e9  # bytes that reach a GPU over PCIe 4 x16 in a second
MEASURED_SHARE = 0.7  # fraction of the measured speed of products that a step reaches; a cautious guess

PRODUCT = (4608, 3072, 12288)  # tokens, inputs, outputs: an MLP of FLUX.1 at 1024x1024
COPY = 2**26  # bytes
PATIENCE = 0.01  # seconds for which each of the two is repeated, and before that to warm up


@dataclass(frozen=True)
class Speeds:
    """What a step can expect, and how that is known."""

    flops: float  # per second
    bus: float  # bytes per second from the host to the device
    source: str


def speeds_of(card: str) -> Speeds:
    """Return the speeds of one of PEAKS."""
    return Speeds(SHARE * PEAKS[card], BUS, f"at {SHARE:.0%} of an {card}'s peak")


def measure(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Speeds | None:
    """Time a matrix product and a copy; None when the device has no bfloat16 or too little memory."""
    try:
        flops, bus = product_and_copy(device, clock)
    except RuntimeError:
        return None
    finally:
        release(device)
    about = f"at {MEASURED_SHARE:.0%} of the {flops / 1e12:.3g} TFLOP/s that were measured just now"
    return Speeds(MEASURED_SHARE * flops, bus, f"{about}, {bus / 1e9:.3g} GB/s from the host")


def product_and_copy(device: torch.device, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the FLOPs of a product and the bytes of a copy from pinned memory, each in a second."""
    on_gpu = device.type == "cuda"
    tokens, inputs, outputs = PRODUCT
    x, weight = (torch.randn(n, inputs, device=device, dtype=torch.bfloat16) for n in (tokens, outputs))
    host = torch.zeros(COPY, dtype=torch.uint8, pin_memory=on_gpu)
    copied = torch.empty(COPY, dtype=torch.uint8, device=device)

    def seconds(work: Callable[[], object]) -> float:
        """Return the time of a call, when the device has been awake for a while."""
        for _ in range(2):
            calls, start, passed = 0, clock(), 0.0
            while not calls or passed < PATIENCE:
                work()
                if on_gpu:
                    torch.cuda.synchronize(device)
                calls, passed = calls + 1, clock() - start
        return passed / calls

    flops = 2 * tokens * inputs * outputs / seconds(lambda: x @ weight.mT)
    return flops, COPY / seconds(lambda: copied.copy_(host, non_blocking=True))
