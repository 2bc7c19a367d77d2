"""How a frozen transformer is made to fit a GPU, from outside: the model does not know of it.

Three ways, alone or together: recompute blocks in the backward pass (activation checkpointing), stream the
weights of blocks from host memory, store weights in 8 bits. `run/plan.py` chooses among them. Blocks can be
compiled here, too.
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
LINE = 256  # bytes: in a buffer weights begin at multiples of it, as the GPU's allocator would place them


def blocks_of(model: Flux) -> list[nn.Module]:
    """Return all blocks in the order in which they run."""
    return [*model.double_blocks, *model.single_blocks]


# --- Activation checkpointing -------------------------------------------------------------------------------


def checkpoint_blocks(model: Flux, what: str | int = "all") -> None:
    """Keep only the input of some blocks, and recompute them in the backward pass (Chen et al. 2016).

    what: "none"; "all"; "attention", which is all, but keeps what attention returns; or a number of blocks
    from the first on, since the backward pass frees the last ones first. A second call replaces the choice of
    the first. Raises UserError when there are fewer blocks.
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
    """Return how many of `total` blocks are recomputed; what: as for `checkpoint_blocks`."""
    return {"none": 0, "all": total, "attention": total}.get(what, what)


def keep_attention() -> tuple["_RecordAttention", "_ReplayAttention"]:
    """Return a context for a block's forward pass, which keeps what attention returns, and one to recompute.

    torch's own contexts for this (`create_selective_checkpoint_contexts`) fail unless both passes do the same
    operations. Those of a streamed block differ: only one of them may have to copy weights.
    """
    kept = []
    return _RecordAttention(kept), _ReplayAttention(kept)


class _RecordAttention(TorchDispatchMode):
    """Keeps what attention returns."""

    def __init__(self, kept: list):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        if "scaled_dot_product" in op.name():
            # Detached, to avoid a reference cycle with the graph.
            self.kept.append([part.detach() if isinstance(part, Tensor) else part for part in result])
        return result


class _ReplayAttention(_RecordAttention):
    """Returns what was kept instead of computing attention; a block may be recomputed more than once."""

    def __enter__(self):
        self.left = iter(self.kept)
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "scaled_dot_product" in op.name():
            return tuple(part.detach() if isinstance(part, Tensor) else part for part in next(self.left))
        return op(*args, **kwargs or {})


# --- Compiling ----------------------------------------------------------------------------------------------

SHAPES = 64  # shapes for which a block is compiled at most; torch's 8 are too few for up to 25 crops


def compile_blocks(model: Flux) -> None:
    """Compile every block with torch.compile, once for each shape; blocks of the same kind share the result.

    Call it after `checkpoint_blocks`, which would undo it; recomputation is then compiled as well. Raises
    UserError for streamed blocks, whose weights move, and for blocks that keep their attention, within whose
    contexts torch would compile nothing.
    """
    if any(getattr(layer, "stream", None) for layer in model.modules()):
        raise UserError("streamed blocks cannot be compiled: compile or stream them, not both")
    forwards = [block.forward for block in blocks_of(model)]
    if any(isinstance(forward, partial) and "context_fn" in forward.keywords for forward in forwards):
        raise UserError("blocks that keep their attention cannot be compiled: recompute attention too")
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, SHAPES)  # recompile_limit, from torch 2.7 on
    for block, forward in zip(blocks_of(model), forwards):
        if isinstance(forward, partial):  # checkpointed
            compiled = torch.compile(*forward.args, dynamic=False)
            block.forward = partial(forward.func, compiled, **forward.keywords)
        else:
            block.forward = torch.compile(forward, dynamic=False)


# --- Weights that are whole on the device only while they are used ------------------------------------------


class FrozenLinear(nn.Module):
    """A frozen linear layer whose weight is streamed, or stored in 8 bits, or both.

    stored: (d_out, d_in)   in the compute dtype, or in float8
    scale:  (d_out, 1)      in the compute dtype, if stored is in float8

    `stored` is neither a parameter nor a buffer, so that `model.to(device)` leaves it in host memory.
    """

    def __init__(self, stored: Tensor, bias: nn.Parameter | None, scale: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.stored, self.bias = stored, bias
        self.register_buffer("scale", scale, persistent=False)
        self.stream, self.block, self.places = None, None, []

    @property
    def weight(self) -> Tensor:
        """The weight (d_out, d_in) on the device in the compute dtype; valid until another block is used."""
        stored = self.places[self.stream.use(self.block)] if self.stream else self.stored
        return stored if self.scale is None else stored.to(self.scale.dtype).mul_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.stream:
            self.stream.use(self.block)  # before autograd is off: `use` asks if a backward pass will follow
        return _FrozenLinear.apply(x, self)


class _FrozenLinear(torch.autograd.Function):
    """F.linear with a frozen weight, which the backward pass asks for again instead of saving it."""

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


# --- 8 bits -------------------------------------------------------------------------------------------------


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (d_out, d_in) to float8_e4m3fn, each row scaled so that its largest value becomes 448.

    Returns the rounded weight and the scale (d_out, 1) in the weight's dtype. The error of a value is at most
    1/16 of it or, for values below 2^-15 of the row's largest, 2^-19 of the row's largest. For Gaussian
    weights the root mean square of the error is 2.6 % of that of the weights.
    """
    largest = torch.finfo(FP8).max
    top = weight.abs().amax(dim=1, keepdim=True).float()
    scale = (top / largest).clamp(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
    scaled = weight.to(torch.float32, copy=True)
    scaled.div_(scale.float())  # the scale as it is stored, so that its own rounding adds no error
    return scaled.clamp_(-largest, largest).to(FP8), scale


def quantize(block: nn.Module, device: torch.device | str) -> None:
    """Store a block's linear layers in 8 bits on the device, in place, one weight after the other.

    So a model that is mapped to its file never takes more memory than its 8 bits and one whole weight.
    """
    files = file_ranges()
    for layer in freeze(block):
        if layer.scale is None:
            whole = layer.stored
            layer.stored, layer.scale = quantize_rows(whole.to(device))
            drop_pages(whole, files)


# --- Streaming ----------------------------------------------------------------------------------------------


class Stream:
    """Copies the weights of blocks to the device one block ahead of their use, forward and backward.

    Two buffers on the device hold the block in use and the next one; a second CUDA stream fills one buffer
    while the GPU computes with the other. Each layer asks for its block when it runs. Blocks may run in any
    order; it only changes which block is prefetched. A block's recomputation and backward pass share one
    copy. On a CPU weights are used where they are, and the pages of a memory-mapped file are dropped after
    use.
    """

    COPY = False  # whether to copy on a CPU as well: for tests

    def __init__(self, blocks: list[nn.Module], device: torch.device | str):
        self.device = torch.device(device)
        self.copy = self.COPY or self.device.type != "cpu"
        self.blocks = [freeze(block) for block in blocks]
        self.files = file_ranges()
        self.held_blocks: list[int | None] = [None, None]  # the block in each buffer
        self.copied_events = [None, None]  # CUDA events: the copy to the buffer is complete
        self.current_block: int | None = None  # the block in use
        self.copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.buffers = []
        if self.copy:
            largest = max(sum(whole_lines(layer.stored) for layer in block) for block in self.blocks)
            self.buffers = [torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(2)]
            self._move_to_host()
        for number, block in enumerate(self.blocks):
            start = 0
            for layer in block:
                size, shape, dtype = layer.stored.nbytes, layer.stored.shape, layer.stored.dtype
                places = [buffer[start : start + size].view(dtype).view(shape) for buffer in self.buffers]
                layer.stream, layer.block, layer.places = self, number, places or [layer.stored] * 2
                start += whole_lines(layer.stored)

    def _move_to_host(self) -> None:
        """Move weights to host memory, and pin them if there is enough; else they stay mapped to files."""
        layers = [layer for block in self.blocks for layer in block]
        # PyTorch pins memory in powers of two.
        needed = sum(1 << (layer.stored.nbytes - 1).bit_length() for layer in layers)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's ranks on this host pin as much each
        pin = self.copy_stream and ranks * needed < 0.7 * available_memory()
        for layer in layers:
            layer.stored = layer.stored.cpu()
            if pin:
                layer.stored = layer.stored.pin_memory()
        if pin:
            self.files = []  # nothing is mapped any more

    def use(self, number: int) -> int:
        """Return which buffer holds the block, ready for the current stream; begin to copy the next block."""
        if number != self.current_block:
            last, forward = len(self.blocks) - 1, self.current_block is None or number > self.current_block
            if number == last:  # the backward pass comes next, or the next forward pass
                ahead = last - 1 if torch.is_grad_enabled() else 0
            else:
                ahead = number + 1 if forward or number == 0 else number - 1
            if not self.copy and self.current_block is not None:
                for layer in self.blocks[self.current_block]:
                    drop_pages(layer.stored, self.files)
            self.current_block = number
            self._bring(number, beside=None)  # does nothing if it was copied ahead
            if self.copy_stream:
                copied = self.copied_events[self.held_blocks.index(number)]
                torch.cuda.current_stream(self.device).wait_event(copied)
            self._bring(max(ahead, 0), beside=number)
        return self.held_blocks.index(number)

    @torch.no_grad()
    def _bring(self, number: int, beside: int | None) -> None:
        """Copy a block to the buffer that does not hold the block `beside`."""
        if number in self.held_blocks:
            return
        buffer = int(beside is not None and self.held_blocks[0] == beside)
        self.held_blocks[buffer] = number
        if not self.copy:
            for layer in self.blocks[number]:
                advise(layer.stored, "MADV_WILLNEED", self.files)
            return
        if self.copy_stream:
            # What is queued may still read the buffer.
            self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copy_stream) if self.copy_stream else nullcontext():
            for layer in self.blocks[number]:
                # A copy is asynchronous only from pinned memory, which torch's allocator uses again.
                source = layer.stored.pin_memory() if self.copy_stream else layer.stored
                layer.places[buffer].copy_(source, non_blocking=True)
                drop_pages(layer.stored, self.files)
            if self.copy_stream:
                self.copied_events[buffer] = self.copy_stream.record_event()


def whole_lines(tensor: Tensor) -> int:
    """Return a tensor's bytes, rounded up to a multiple of LINE."""
    return -(-tensor.nbytes // LINE) * LINE


def spread(count: int, total: int) -> list[int]:
    """Return `count` numbers below `total`, evenly spread: the blocks between them hide the copying."""
    return [(2 * k + 1) * total // (2 * count) for k in range(count)]


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


def device_memory(device: torch.device) -> float:
    """Return the bytes that this process can have on a device; infinity if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return available_memory() or float("inf")


# --- All together -------------------------------------------------------------------------------------------


def arrange(
    model: Flux,
    device: torch.device | str,
    checkpoint: str | int = "none",
    stream: int = 0,
    fp8: bool = False,
    compiled: bool = False,
) -> Flux:
    """Move a frozen model to the device, in place, and return it.

    checkpoint: as for `checkpoint_blocks`. stream: how many blocks stay in host memory. fp8: store the
    blocks' weights in 8 bits. compiled: compile the blocks, none of which may then be streamed.

    If the model is on the CPU, mapped to its file, the device never holds more than what shall stay there.
    Adapters in it go to the device. LoRA files can be merged only into weights that are neither streamed nor
    in 8 bits. Raises UserError when there are fewer blocks than `stream`.
    """
    blocks = blocks_of(model)
    if stream not in range(len(blocks) + 1):
        raise UserError(f"stream {stream}: from 0 to {len(blocks)} blocks")
    streamed = spread(stream, len(blocks)) if stream else []
    for number, block in enumerate(blocks if fp8 else ()):
        quantize(block, device)
        for layer in freeze(block) if number in streamed else ():
            layer.stored = layer.stored.cpu()  # now, since all blocks together may not fit the device
    if stream:
        Stream([blocks[number] for number in streamed], device)
    checkpoint_blocks(model, checkpoint)
    if compiled:
        compile_blocks(model)
    return model.to(device)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights on the model's device; of streamed blocks, those of the buffers."""
    frozen = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    streams = {layer.stream for layer in frozen if layer.stream}
    tensors = [*model.parameters(), *model.buffers(), *(layer.stored for layer in frozen if not layer.stream)]
    tensors += [buffer for stream in streams for buffer in stream.buffers]
    return sum(tensor.nbytes for tensor in tensors)


def release(device: torch.device | str) -> None:
    """Free what a model took on a device, after the caller has dropped its last reference to the model."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):  # frees pinned memory; torch has no public function for it
            torch._C._host_emptyCache()


def peak_memory(device: torch.device | str) -> float:
    """Return the peak of memory so far in GiB: of the GPU's allocator, or of the process; NaN if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
