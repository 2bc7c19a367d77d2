"""Many processes train as one: the ranks that torchrun starts, on torch.distributed.

Of a bucket's people rank r has every size-th, from the r-th on, with their mid, up and optimiser, in slots of
its own. All ranks have the same meta_down, and add up its gradient. What lies on disk does not depend on the
number of ranks: rank 0 gathers and writes it. The folders of a run must be the same for all, also on several
nodes.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from flux.errors import UserError
from flux.memory import blocks_of
from flux.model import Flux

PATIENCE = timedelta(hours=6)  # the others wait while rank 0 looks at all photos, or draws pictures
CHUNK = 2**26  # numbers that are summed at once, 256 MB


class Ranks:
    """The ranks of a run. Without torchrun there is one, and every method gives back what it is given."""

    def __init__(self):
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        numbers = (int(os.environ.get(name, default)) for name, default in names.items())
        self.rank, self.size, self.local_rank, self.local_size = numbers
        self.leads = self.rank == 0  # it writes and speaks for all
        if self.size > 1 and torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())  # nobody else's is touched

    def device(self, device: torch.device) -> torch.device:
        """Return this rank's own device; ValueError when there is none of its kind left."""
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise UserError(f"--device {device}: {self.size} ranks need --device cuda, a card each, or cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(f"{self.local_size} ranks on a node with {torch.cuda.device_count()} cards")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    @property
    def command(self) -> str:
        """How a script is started on this node."""
        nodes = f"--nnodes {self.size // self.local_size} ... " if self.size > self.local_size else ""
        return f"torchrun {nodes}--nproc-per-node {self.local_size}" if self.size > 1 else "python"

    @contextmanager
    def together(self, device: torch.device) -> Iterator[None]:
        """Meet the other ranks, and part from them when all have come to the end of the block.

        Tensors on GPUs are added up over nccl; all else goes through host memory over gloo.
        """
        if self.size == 1:
            yield
            return
        self._call(dist.init_process_group, "nccl" if device.type == "cuda" else "gloo")
        # On the class, to live as long as the process: in torch 2.6 a gloo group can hang when it is deleted.
        Ranks.hosts = self._call(dist.new_group, backend="gloo", timeout=PATIENCE)
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if self.leads else nowhere):
            yield
            self.wait()
        if device.type == "cuda":
            dist.destroy_process_group()

    def _call(self, collective: Callable, *args, **kwargs) -> Any:
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConnectionError(
                f"rank {self.rank} of {self.size} cannot reach another rank, which has probably failed: see "
                f"the message of that one ({reason})"
            ) from error

    # Agreement

    def wait(self) -> None:
        """Return when all ranks have called this."""
        self.sum(0)

    def any(self, flag: bool) -> bool:
        """Say whether the flag is set on any rank."""
        return self.sum(int(flag)) > 0

    def sum(self, number: float | Tensor) -> float | Tensor:
        """Return the sum over all ranks; of a tensor as a tensor, without a gradient."""
        if self.size == 1:
            return number
        if not isinstance(number, Tensor):
            return self.sum(torch.tensor(number)).item()
        total = number.detach().cpu().clone()
        self._call(dist.all_reduce, total, group=self.hosts)
        return total.to(number.device)

    def norm(self, norm: Tensor) -> Tensor:
        """Return the norm of what has this norm on each rank."""
        return norm if self.size == 1 else self.sum(norm.double().square()).sqrt().to(norm.dtype)

    def once(self, function: Callable[[], Any]) -> Any:
        """Call a function on rank 0 and return its result on all; if it fails there, the others end too."""
        if self.size == 1:
            return function()
        answer = [None, False]
        tell = lambda: self._call(dist.broadcast_object_list, answer, 0, self.hosts)
        if self.leads:
            try:
                answer[:] = function(), True
            except Exception:
                tell()
                raise
        tell()
        if not answer[1]:
            with suppress(ConnectionError):
                self.wait()  # until rank 0 has said why and is gone: the first to go takes the others along
            sys.exit(1)
        return answer[0]

    @contextmanager
    def lead_first(self) -> Iterator[None]:
        """Let the others into the block when rank 0 has left it."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    # Who has what

    def parts(self, people: Sequence) -> list[Sequence]:
        """Deal a bucket to the ranks; ValueError when there are more ranks than people."""
        if len(people) < self.size:
            raise UserError(f"a bucket of {len(people)} people is too small for {self.size} ranks")
        return [people[rank :: self.size] for rank in range(self.size)]

    def mine(self, people: Sequence) -> Sequence:
        """Return this rank's part."""
        return self.parts(people)[self.rank]

    def own(self, state: Any) -> Any:
        """Take this rank's rows of the tensors of a bucket, (people, ...); filled up with zeros."""
        if self.size == 1:
            return state
        if isinstance(state, dict):
            return {key: self.own(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.own(value) for value in state]
        lacking = state.new_zeros(-len(state) % self.size, *state.shape[1:])
        return torch.cat([state, lacking])[self.rank :: self.size].clone()

    def gather(self, state: Any, people: int) -> Any:
        """Undo `own`: return on rank 0 the rows of all ranks, in host memory; elsewhere nothing of use."""
        if self.size == 1:
            return state
        if isinstance(state, dict):
            return {key: self.gather(value, people) for key, value in state.items()}
        if isinstance(state, list):
            return [self.gather(value, people) for value in state]
        rows = state.detach().cpu().contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.size)] if self.leads else None
        self._call(dist.gather, rows, parts, dst=0, group=self.hosts)
        return torch.stack(parts, dim=1).flatten(0, 1)[:people].clone() if self.leads else None

    def joined(self, items: list) -> list:
        """Return the lists of all ranks, one after the other."""
        if self.size == 1:
            return items
        lists = [None] * self.size
        self._call(dist.all_gather_object, lists, items, group=self.hosts)
        return [item for part in lists for item in part]

    def makes(self, key: str) -> bool:
        """Say whether an entry of the cache, named by a hash, is for this rank to make."""
        return int(key[:8], 16) % self.size == self.rank

    # The gradient

    def sum_gradients(self, params: Sequence[Tensor]) -> None:
        """Put into the gradient of each parameter its sum over all ranks; the same on all, bit by bit."""
        gradients = [p.grad for p in params] if self.size > 1 else []
        while gradients:
            count, size = 0, 0
            while count < len(gradients) and (not count or size + gradients[count].numel() <= CHUNK):
                size, count = size + gradients[count].numel(), count + 1
            chunk, gradients = gradients[:count], gradients[count:]
            flat = torch.cat([gradient.flatten() for gradient in chunk])
            self._call(dist.all_reduce, flat)
            for gradient, part in zip(chunk, flat.split([gradient.numel() for gradient in chunk])):
                gradient.copy_(part.view_as(gradient))


def shard(model: Flux, ranks: Ranks, device: torch.device) -> Flux:
    """Leave every rank its part of a frozen model, in place; a block is whole while it runs (FSDP2).

    Given a model on the CPU, mapped to its file, the device never holds more than a block beside its part. It
    comes before `inject`: the factors, added later, stay whole, and each rank's own.
    """
    from torch.distributed.fsdp import fully_shard  # takes a second, which only this run should pay

    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)
