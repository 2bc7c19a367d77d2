"""The loss of a training step, read while the next step is computed, so that no step waits for the host."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise

import torch
from torch import Tensor


class Late:
    """Numbers on the device, to be read later.

    Their copy to the host is queued now. `item()` would queue it when it is called, behind the next step, and
    wait for that as well.
    """

    def __init__(self, numbers: Tensor):
        on_cuda = numbers.is_cuda
        self.numbers = numbers.detach().to("cpu", non_blocking=on_cuda)
        self.copied = torch.cuda.current_stream(numbers.device).record_event() if on_cuda else None

    def read(self) -> float | list[float]:
        if self.copied:
            self.copied.synchronize()
        return self.numbers.tolist()


def read_late(
    steps: Iterable[Tensor], between: Callable[[int], None] | None = None
) -> Iterator[float | list[float]]:
    """Yield the numbers of each step when the next one is queued.

    between: called before the first step and after each, with the number of steps so far.
    """

    def queue() -> Iterator[Late]:
        if between:
            between(0)
        for done, numbers in enumerate(steps, 1):
            yield Late(numbers)
            if between:
                between(done)

    for late, _ in pairwise(chain(queue(), [None])):
        yield late.read()
