"""Ranks: the processes that torchrun starts, which train as one through torch.distributed.

A bucket's people are divided among the ranks: with N ranks, rank r takes persons r, r+N, r+2N, ... and keeps
their mid, up and optimizer state in its slots. All ranks have the same meta_down and sum its gradient. What
lies on disk does not depend on the number of ranks: rank 0 gathers it and writes it. All ranks, also those on
other nodes, must see the same folders.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from flux.errors import UserError, first_line
from flux.memory import blocks_of
from flux.transformer import Transformer

PATIENCE = timedelta(hours=6)  # the others wait this long while rank 0 reads all photos, or samples
CHUNK = 2**26  # numbers in one all-reduce, 0.25 GiB


class Ranks:
    """The ranks of a run. Without torchrun there is one, and every method returns what it is given."""

    def __init__(self):
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        numbers = (int(os.environ.get(name, default)) for name, default in names.items())
        self.rank, self.size, self.local_rank, self.local_size = numbers
        self.leads = self.rank == 0  # rank 0 alone prints, and writes files
        if self.size > 1 and torch.cuda.is_available():
            # Before anything else uses CUDA, or every rank would put a context on the first GPU.
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this rank; UserError when there are more ranks than devices."""
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise UserError(
                f"--device {device}: {self.size} ranks need --device cuda, a GPU for each, or --device cpu"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{self.local_size} ranks were started on a node with {torch.cuda.device_count()} GPUs"
            )
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
        """Join the process group of all ranks for a block, and leave it when all ranks have left the block.

        Tensors on GPUs are summed over nccl; everything else goes through host memory over gloo.
        """
        if self.size == 1:
            yield
            return
        self._call(dist.init_process_group, "nccl" if device.type == "cuda" else "gloo")
        # Stored on the class, so that it is never deleted: in torch 2.6 that can hang for a gloo group.
        Ranks.hosts = self._call(dist.new_group, backend="gloo", timeout=PATIENCE)
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if self.leads else nowhere):
            yield
            self.wait()
        if device.type == "cuda":
            dist.destroy_process_group()

    def _call(self, collective: Callable, *args, **kwargs) -> Any:
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:  # gloo has no narrower type for a lost connection
            raise ConnectionError(
                f"rank {self.rank} of {self.size} cannot reach another rank, which has probably failed: see "
                f"the message of that rank ({first_line(error)})"
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
        if isinstance(number, Tensor):  # as gradients are, so that the host need not wait for the device
            total = number.detach().clone()
            self._call(dist.all_reduce, total)
            return total
        total = torch.tensor(number)
        self._call(dist.all_reduce, total, group=self.hosts)
        return total.item()

    def norm(self, norm: Tensor) -> Tensor:
        """Return the norm over all ranks, given the norm of this rank's part."""
        return norm if self.size == 1 else self.sum(norm.double().square()).sqrt().to(norm.dtype)

    def once(self, function: Callable[[], Any]) -> Any:
        """Call a function on rank 0 and return its result on all ranks; if it fails, all ranks end."""
        if self.size == 1:
            return function()
        answer = [None, False]  # the result, and whether there is one

        def broadcast() -> None:
            self._call(dist.broadcast_object_list, answer, 0, self.hosts)

        if self.leads:
            try:
                answer[:] = function(), True
            except Exception:  # whatever it is, the others must not go on waiting; then it is raised
                broadcast()
                raise
        broadcast()
        if not answer[1]:
            # torchrun ends all ranks as soon as one has ended: let rank 0 print its message first.
            with suppress(ConnectionError):
                self.wait()
            sys.exit(1)
        return answer[0]

    @contextmanager
    def lead_first(self) -> Iterator[None]:
        """Run a block on rank 0, then on the others."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    # What belongs to which rank

    def parts(self, people: Sequence) -> list[Sequence]:
        """Deal a bucket's people to the ranks; UserError when there are fewer people than ranks."""
        if len(people) < self.size:
            raise UserError(f"a bucket of {len(people)} people is too small for {self.size} ranks")
        return [people[rank :: self.size] for rank in range(self.size)]

    def mine(self, people: Sequence) -> Sequence:
        """Return this rank's people of a bucket."""
        return self.parts(people)[self.rank]

    def take_rows(self, state: Any) -> Any:
        """Return this rank's rows of a bucket's tensors (people, ...), in nested dictionaries and lists.

        All ranks get equally many rows; the last rows are zero if the people do not divide evenly.
        """
        if self.size == 1:
            return state
        if isinstance(state, dict):
            return {key: self.take_rows(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.take_rows(value) for value in state]
        missing = state.new_zeros(-len(state) % self.size, *state.shape[1:])
        return torch.cat([state, missing])[self.rank :: self.size].clone()

    def gather_rows(self, state: Any, people: int) -> Any:
        """Undo `take_rows`: return on rank 0 the rows of all ranks, in host memory; elsewhere only None."""
        if self.size == 1:
            return state
        if isinstance(state, dict):
            return {key: self.gather_rows(value, people) for key, value in state.items()}
        if isinstance(state, list):
            return [self.gather_rows(value, people) for value in state]
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
        """Return whether this rank has to make this cache entry; the hash decides."""
        return int(key[:8], 16) % self.size == self.rank

    # The gradient

    def sum_gradients(self, params: Sequence[Tensor]) -> None:
        """Replace the gradient of each parameter by its sum over all ranks, bit for bit the same on all."""
        if self.size == 1:
            return
        for gradients in chunks([p.grad for p in params]):
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._call(dist.all_reduce, flat)
            sums = flat.split([gradient.numel() for gradient in gradients])
            for gradient, total in zip(gradients, sums, strict=True):
                gradient.copy_(total.view_as(gradient))


def chunks(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in lists of at most CHUNK numbers; a larger tensor has a list for itself."""
    chunk, size = [], 0
    for tensor in tensors:
        if chunk and size + tensor.numel() > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(tensor)
        size += tensor.numel()
    if chunk:
        yield chunk


def shard(model: Transformer, ranks: Ranks, device: torch.device) -> Transformer:
    """Spread a frozen model's weights over the ranks with FSDP2, in place; a block is whole while it runs.

    If the model is on the CPU, mapped to its file, the device never holds more than its part and one block.
    Call it before `inject`: the factors, which are added later, are then not spread.
    """
    from torch.distributed.fsdp import fully_shard  # importing it takes a second: only for runs that use it

    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)
