"""Memory, moved in the open and from outside: models do not know that they are checkpointed or streamed.

Four ways to make a frozen transformer fit, alone or together: recompute blocks in the backward pass, stream
blocks from host memory, store weights in 8 bits, let models go. `plan.py` chooses among them.
"""

import ctypes
import gc
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flux.errors import UserError
from flux.model import Flux

FP8 = torch.float8_e4m3fn
LINE = 256  # bytes; weights begin at multiples of it in a buffer, as the GPU's allocator would place them


def blocks_of(model: Flux) -> list[nn.Module]:
    """Return all blocks in the order in which they run."""
    return [*model.double_blocks, *model.single_blocks]


# --- Checkpointing -----------------------------------------------------------------------------------------


def checkpoint_blocks(model: Flux, what: str | int = "all") -> None:
    """Keep only the input of some blocks; the backward pass runs them forward again (Chen et al. 2016).

    what: "none", "all", "attention" (all, but the attention's output is kept and not computed again), or the
    number of blocks from the first on: the last ones are the first to be freed in the backward pass. Calling
    it again replaces the earlier choice. Raises ValueError when there are not so many blocks.
    """
    blocks = blocks_of(model)
    count = recomputed_blocks(what, len(blocks))
    if count not in range(len(blocks) + 1):
        raise UserError(f"checkpoint {what}: none, all, attention, or from 0 to {len(blocks)} blocks")
    for number, block in enumerate(blocks):
        vars(block).pop("forward", None)
        if number < count:
            # Nothing is random in a block, so the generators need not be set back.
            settings = {"use_reentrant": False, "preserve_rng_state": False}
            settings |= {"context_fn": keep_attention} if what == "attention" else {}
            block.forward = partial(checkpoint, block.forward, **settings)


def recomputed_blocks(what: str | int, total: int) -> int:
    """Return how many of so many blocks `checkpoint_blocks` means by `what`."""
    return {"none": 0, "all": total, "attention": total}.get(what, what)


def keep_attention() -> tuple["_Keep", "_Answer"]:
    """Return the contexts of a block's first pass, which keeps what attention returns, and of its second.

    torch.utils.checkpoint has such contexts, but they want both passes to be the same operation by operation;
    of a streamed block only the second may have to fetch weights.
    """
    kept = []
    return _Keep(kept), _Answer(kept)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: list):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        if "scaled_dot_product" in op.name():
            # Detached, or the kept tensor would hold the graph that holds it.
            self.kept.append([part.detach() if isinstance(part, Tensor) else part for part in result])
        return result


class _Answer(_Keep):
    """Answers with what was kept instead of computing it; the block may be run several times."""

    def __enter__(self):
        self.left = iter(self.kept)
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "scaled_dot_product" in op.name():
            return tuple(part.detach() if isinstance(part, Tensor) else part for part in next(self.left))
        return op(*args, **kwargs or {})


# --- Compiling ---------------------------------------------------------------------------------------------

SHAPES = 64  # of a block's inputs that are compiled; torch stops at 8, and a face has up to 25 crops


def compile_blocks(model: Flux, **options) -> None:
    """Compile every block with torch.compile, anew for each shape; blocks of a kind share what is compiled.

    It comes after `checkpoint_blocks`, which would undo it; what is run again is then compiled as well.
    options: further arguments of torch.compile. Raises ValueError for streamed blocks, whose weights move,
    and for kept attention, within whose contexts torch would compile nothing.
    """
    if any(getattr(layer, "stream", None) for layer in model.modules()):
        raise UserError("streamed blocks cannot be compiled: choose --compile or --stream, not both")
    runs = [block.forward for block in blocks_of(model)]
    if any(isinstance(run, partial) and "context_fn" in run.keywords for run in runs):
        raise UserError("blocks that keep their attention cannot be compiled: take another --checkpoint")
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, SHAPES)  # recompile_limit, from torch 2.7 on
    for block, run in zip(blocks_of(model), runs):
        if isinstance(run, partial):  # checkpointed
            compiled = torch.compile(*run.args, dynamic=False, **options)
            block.forward = partial(run.func, compiled, **run.keywords)
        else:
            block.forward = torch.compile(run, dynamic=False, **options)


# --- Weights that are whole only while they are used -------------------------------------------------------


class FrozenLinear(nn.Module):
    """A frozen linear layer whose weight is streamed, or stored in 8 bits, or both.

    stored: (d_out, d_in) in the compute dtype, or float8 with scale (d_out, 1) in the compute dtype

    `stored` is neither parameter nor buffer: `model.to(device)` must leave what is streamed in host memory.
    """

    def __init__(self, stored: Tensor, bias: nn.Parameter | None, scale: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.stored, self.bias = stored, bias
        self.register_buffer("scale", scale, persistent=False)
        self.stream, self.block, self.places = None, None, []

    @property
    def weight(self) -> Tensor:
        """The weight (d_out, d_in) on the device in the compute dtype; not to be kept after its use."""
        stored = self.places[self.stream.use(self.block)] if self.stream else self.stored
        return stored if self.scale is None else stored.to(self.scale.dtype).mul_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.stream:
            self.stream.use(self.block)  # here it can still be seen whether a backward pass will follow
        return _FrozenLinear.apply(x, self)


class _FrozenLinear(torch.autograd.Function):
    """F.linear by a frozen weight that is asked for again in backward instead of being saved."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight, None


def linears(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield the linear layers of a block, adapted or not, as parent, name in the parent, layer."""
    for parent in list(block.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear | FrozenLinear):
                yield parent, name, layer


def freeze(block: nn.Module) -> list[FrozenLinear]:
    """Make every linear layer of a block a `FrozenLinear`, in place, and return them."""
    for parent, name, layer in linears(block):
        if isinstance(layer, nn.Linear):
            setattr(parent, name, FrozenLinear(layer.weight.detach(), layer.bias))
    return [layer for _, _, layer in linears(block)]


# --- 8 bits ------------------------------------------------------------------------------------------------


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round (d_out, d_in) to float8_e4m3fn, scaled so that each row's largest value is the format's, 448.

    Returns the rounded weight and the scale (d_out, 1) in the weight's dtype. A weight is off by at most
    1/16 of itself, or, below 2^-15 of the row's largest, by 2^-19 of the latter; Gaussian weights by 2.6 % in
    the root mean square.
    """
    largest = torch.finfo(FP8).max
    top = weight.abs().amax(dim=1, keepdim=True).float()
    scale = (top / largest).clamp(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
    scaled = weight.to(torch.float32, copy=True)
    scaled.div_(scale.float())  # by the scale as it is stored: its rounding then costs nothing
    return scaled.clamp_(-largest, largest).to(FP8), scale


def quantize(block: nn.Module, device: torch.device | str) -> None:
    """Store a block's linear layers in 8 bits on the device, in place, one weight after the other.

    A model that is mapped to its file is thus never held whole in more than 8 bits.
    """
    files = file_ranges()
    for layer in freeze(block):
        if layer.scale is None:
            given = layer.stored
            layer.stored, layer.scale = quantize_rows(given.to(device))
            drop_pages(given, files)


# --- Streaming ---------------------------------------------------------------------------------------------


class Stream:
    """Brings the weights of blocks to the device one block ahead of their use, forward and backward.

    Two buffers on the device hold the block in use and the next; a side stream fills one while the other is
    computed with. Each weight asks for its block when it is used, so recomputation and backward pass, which
    follow each other, share one copy, and any order of use is right; order only matters for what is brought
    ahead. On a CPU weights are used where they are, and the pages of a memory-mapped file are dropped behind.
    """

    COPY = False  # to a CPU too, as to a GPU: for tests

    def __init__(self, blocks: list[nn.Module], device: torch.device | str):
        self.device = torch.device(device)
        self.copy = self.COPY or self.device.type != "cpu"
        self.blocks = [freeze(block) for block in blocks]
        self.files = file_ranges()
        self.held: list[int | None] = [None, None]  # the block in each buffer
        self.ready = [None, None]  # CUDA events: the copy to the buffer is complete
        self.now = None  # the block in use
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.buffers = []
        if self.copy:
            most = max(sum(whole_lines(layer.stored) for layer in block) for block in self.blocks)
            self.buffers = [torch.empty(most, dtype=torch.uint8, device=self.device) for _ in range(2)]
            self._move_to_host()
        for number, block in enumerate(self.blocks):
            start = 0
            for layer in block:
                size, shape, dtype = layer.stored.nbytes, layer.stored.shape, layer.stored.dtype
                places = [buffer[start : start + size].view(dtype).view(shape) for buffer in self.buffers]
                layer.stream, layer.block, layer.places = self, number, places or [layer.stored] * 2
                start += whole_lines(layer.stored)

    def _move_to_host(self) -> None:
        """Take weights off the device; pin them if the host's memory allows, else they stay mapped."""
        layers = [layer for block in self.blocks for layer in block]
        # PyTorch pins memory in powers of two.
        needed = sum(1 << (layer.stored.nbytes - 1).bit_length() for layer in layers)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun on this host: all pin at once
        pin = self.side and ranks * needed < 0.7 * available_memory()
        for layer in layers:
            layer.stored = layer.stored.cpu()
            if pin:
                layer.stored = layer.stored.pin_memory()
        if pin:
            self.files = []  # nothing is mapped any more

    def use(self, number: int) -> int:
        """Return the buffer that holds the block, ready for the current stream; begin to bring the next."""
        if number != self.now:
            last, upward = len(self.blocks) - 1, self.now is None or number > self.now
            if number == last:  # the backward pass comes next, or the next forward pass
                ahead = last - 1 if torch.is_grad_enabled() else 0
            else:
                ahead = number + 1 if upward or number == 0 else number - 1
            if not self.copy and self.now is not None:
                for layer in self.blocks[self.now]:
                    drop_pages(layer.stored, self.files)
            self.now = number
            self._bring(number, beside=None)
            if self.side:
                torch.cuda.current_stream(self.device).wait_event(self.ready[self.held.index(number)])
            self._bring(max(ahead, 0), beside=number)
        return self.held.index(number)

    @torch.no_grad()
    def _bring(self, number: int, beside: int | None) -> None:
        """Copy a block to the buffer that does not hold the block `beside`."""
        if number in self.held:
            return
        buffer = int(beside is not None and self.held[0] == beside)
        self.held[buffer] = number
        if not self.copy:
            for layer in self.blocks[number]:
                advise(layer.stored, "MADV_WILLNEED", self.files)
            return
        if self.side:
            self.side.wait_stream(torch.cuda.current_stream(self.device))  # the buffer's last readers
        with torch.cuda.stream(self.side) if self.side else nullcontext():
            for layer in self.blocks[number]:
                # Only from pinned memory a copy is asynchronous; the allocator keeps the pages for the next.
                source = layer.stored.pin_memory() if self.side else layer.stored
                layer.places[buffer].copy_(source, non_blocking=True)
                drop_pages(layer.stored, self.files)
            if self.side:
                self.ready[buffer] = self.side.record_event()


def whole_lines(tensor: Tensor) -> int:
    """Return a tensor's bytes, rounded up to whole lines."""
    return -(-tensor.nbytes // LINE) * LINE


def spread(count: int, total: int) -> list[int]:
    """Return `count` of the numbers below `total`, evenly spread: what lies between hides the copying."""
    return [(2 * k + 1) * total // (2 * count) for k in range(count)]


def file_ranges() -> list[tuple[int, int]]:
    """Return the address ranges of this process that are mapped to files; none where /proc is not there."""
    maps = Path("/proc/self/maps")
    ranges = []
    for line in maps.read_text().splitlines() if maps.exists() else ():
        addresses, _, _, _, inode, *path = line.split()
        if inode != "0" and not path[0].startswith("/dev/"):
            start, end = addresses.split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def advise(tensor: Tensor, advice: str, files: list[tuple[int, int]]) -> None:
    """Give the kernel an advice on the whole pages of a tensor that is mapped to one of the files."""
    if not files or tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end and any(first <= start and end <= last for first, last in files):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, advice))


def drop_pages(tensor: Tensor, files: list[tuple[int, int]]) -> None:
    """Take a tensor's pages out of this process; they are read again from the file when needed.

    Memory that is no file's is left alone: it would come back as zeros.
    """
    advise(tensor, "MADV_DONTNEED", files)


def available_memory() -> int:
    """Return the bytes of host memory that are free or can be freed; 0 where that is not known."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def device_memory(device: torch.device) -> float:
    """Return the bytes that this process can have on a device; infinite where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return available_memory() or float("inf")


# --- All together ------------------------------------------------------------------------------------------


def arrange(
    model: Flux,
    device: torch.device | str,
    checkpoint: str | int = "none",
    stream: int = 0,
    fp8: bool = False,
    compiled: bool = False,
) -> Flux:
    """Bring a frozen model to the device, in place, as a plan says; return it.

    Adapters may be in the model already, and go to the device; given a model on the CPU, mapped to its file,
    the device never holds more than its share. stream: the number of blocks that stay in host memory;
    checkpoint: as in `checkpoint_blocks`; compiled: by `compile_blocks`, if nothing is streamed. LoRA files
    are merged only into what is neither streamed nor in 8 bits.
    """
    blocks = blocks_of(model)
    if stream not in range(len(blocks) + 1):
        raise UserError(f"stream {stream}: from 0 to {len(blocks)} blocks")
    streamed = spread(stream, len(blocks)) if stream else []
    for number, block in enumerate(blocks if fp8 else ()):
        quantize(block, device)
        for layer in freeze(block) if number in streamed else ():
            layer.stored = layer.stored.cpu()  # at once: all blocks together may be too much for the device
    if stream:
        Stream([blocks[number] for number in streamed], device)
    checkpoint_blocks(model, checkpoint)
    if compiled:
        compile_blocks(model)
    return model.to(device)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights on the model's device; of streamed blocks that is what they share."""
    frozen = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    streams = {layer.stream for layer in frozen if layer.stream}
    tensors = [*model.parameters(), *model.buffers(), *(layer.stored for layer in frozen if not layer.stream)]
    tensors += [buffer for stream in streams for buffer in stream.buffers]
    return sum(tensor.nbytes for tensor in tensors)


def release(device: torch.device | str) -> None:
    """Give freed memory back, after the caller has dropped its last reference to a model."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):  # pinned memory, which torch has no public name for
            torch._C._host_emptyCache()


def peak_memory(device: torch.device | str) -> float:
    """Return the peak so far in GiB, of the GPU's allocator or on a CPU of the process; NaN if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
