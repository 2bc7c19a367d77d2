"""Frozen weights that are whole on the device only while used: streamed from the host, or in 8 bits."""

import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.pages import advise, available_memory, drop_pages, file_ranges, host_slab, pin, unpin

FP8 = torch.float8_e4m3fn
LINE = 256  # bytes: in a buffer weights begin at multiples of it, as the GPU's allocator would place them


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
        return self.weight_for(self.in_features)[0]

    def weight_for(self, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Return `weight`; or, for few tokens, without its scale, and the scale (d_out,) of the outputs.

        What has fewer numbers is scaled, the weight or the outputs: that moves 4 bytes for each of them, and
        converting the weight from 8 bits moves 3.
        """
        stored = self.places[self.stream.use(self.block)] if self.stream else self.stored
        if self.scale is None:
            return stored, None
        converted = stored.to(self.scale.dtype)
        if tokens < self.in_features:
            return converted, self.scale[:, 0]
        return converted.mul_(self.scale), None

    def forward(self, x: Tensor) -> Tensor:
        bring(self)
        return _FrozenLinear.apply(x, self)


class _FrozenLinear(torch.autograd.Function):
    """F.linear with a frozen weight, which the backward pass asks for again instead of saving it."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return multiply(layer, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return multiply_back(ctx.layer, grad), None


# What an autograd function of a frozen layer is made of, whether its weight is plain, streamed or in 8 bits.


def bring(layer: nn.Linear | FrozenLinear) -> None:
    """Begin to use a layer, while autograd still says whether a backward pass will follow."""
    if isinstance(layer, FrozenLinear) and layer.stream:
        layer.stream.use(layer.block)


def multiply(layer: nn.Linear | FrozenLinear, x: Tensor) -> Tensor:
    """Return W0 x and the bias: x (..., d_in) -> (..., d_out)."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, layer.bias)
    weight, scale = layer.weight_for(x.shape[:-1].numel())
    if scale is None:
        return F.linear(x, weight, layer.bias)
    y = F.linear(x, weight)
    return y.mul_(scale) if layer.bias is None else torch.addcmul(layer.bias, y, scale, out=y)


def multiply_back(layer: nn.Linear | FrozenLinear, grad: Tensor) -> Tensor:
    """Return the gradient of x from that of `multiply`: (..., d_out) -> (..., d_in)."""
    if isinstance(layer, nn.Linear):
        return grad @ layer.weight
    weight, scale = layer.weight_for(grad.shape[:-1].numel())
    return (grad if scale is None else grad * scale) @ weight


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
    while the GPU computes with the other. In host memory a block's weights lie in a slab, placed as in the
    buffer, so that one copy brings them all. Each layer asks for its block when it runs. Blocks may run in
    any order; it only changes which block is prefetched. A block's recomputation and backward pass share one
    copy. On a CPU weights are used where they are, and the pages of a memory-mapped file are dropped after
    use.
    """

    COPY = False  # whether to copy on a CPU as well: for tests

    def __init__(self, blocks: list[nn.Module], device: torch.device | str):
        self.device = torch.device(device)
        self.copy = self.COPY or self.device.type != "cpu"
        self.blocks = [freeze(block) for block in blocks]
        self.sizes = [sum(whole_lines(layer.stored) for layer in block) for block in self.blocks]
        self.files = file_ranges()
        self.held_blocks: list[int | None] = [None, None]  # the block in each buffer
        self.copied_events = [None, None]  # CUDA events: the copy to the buffer is complete
        self.current_block: int | None = None  # the block in use
        self.copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.buffers = []
        if self.copy:
            place = {"dtype": torch.uint8, "device": self.device}
            self.buffers = [torch.empty(max(self.sizes), **place) for _ in range(2)]
            self._fill_slabs()
        for number, block in enumerate(self.blocks):
            held = [places(buffer, block) for buffer in self.buffers]
            for k, layer in enumerate(block):
                layer.stream, layer.block = self, number
                layer.places = [parts[k] for parts in held] or [layer.stored] * 2

    def _fill_slabs(self) -> None:
        """Gather each block's weights in a slab of pinned host memory, as long as there is enough of it.

        A block without a slab stays where it is, as a rule mapped to its file. Whenever it is used, the host
        gathers it in the slab that is kept for the buffer.
        """
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's ranks on this host pin as much each
        # On Apple's GPUs, which share the host's memory, a slab would only be one more copy.
        room = 0.7 * available_memory() / ranks if self.copy_stream or self.COPY else 0
        self.slabs: list[Tensor | None] = []
        for block, size in zip(self.blocks, self.sizes):
            slab = host_slab(size) if size <= room else None
            if slab is not None and self._pin(slab):
                room -= size
                self._gather(block, slab)
                for layer, place in zip(block, places(slab, block)):
                    layer.stored = place
            else:
                slab, room = None, 0  # what was refused once is not asked for again
                for layer in block:
                    layer.stored = layer.stored.cpu()
            self.slabs.append(slab)
        left = sum(size for slab, size in zip(self.slabs, self.sizes) if slab is None)
        self.buffer_slabs = [host_slab(max(self.sizes)) for buffer in self.buffers if left]
        for slab in self.buffer_slabs:
            self._pin(slab)  # works without, but the GPU waits
        if left and self.copy_stream:
            warnings.warn(
                f"{left / 2**30:.1f} of {sum(self.sizes) / 2**30:.1f} GiB of streamed weights find no "
                "room in pinned memory of the host, which copies them again for each use",
                stacklevel=2,
            )

    def _pin(self, slab: Tensor) -> bool:
        """Pin a slab until this stream is gone, if it copies to a GPU; return False if CUDA refuses it."""
        if self.copy_stream:
            if not pin(slab, self.device):
                return False
            weakref.finalize(self, unpin, slab, self.copy_stream).atexit = False
        return True

    def _gather(self, block: list[FrozenLinear], slab: Tensor) -> None:
        """Copy a block's weights to a slab."""
        for layer, place in zip(block, places(slab, block)):
            place.copy_(layer.stored)
            drop_pages(layer.stored, self.files)

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
            slab, size = self.slabs[number], self.sizes[number]
            if slab is None:
                slab = self.buffer_slabs[buffer][:size]
                if self.copied_events[buffer]:
                    self.copied_events[buffer].synchronize()  # what was in the slab has been copied
                self._gather(self.blocks[number], slab)
            self.buffers[buffer][:size].copy_(slab, non_blocking=self.copy_stream is not None)
            if self.copy_stream:
                self.copied_events[buffer] = self.copy_stream.record_event()


def places(slab: Tensor, block: list[FrozenLinear]) -> list[Tensor]:
    """Return where the weights of a block lie in a slab or a buffer of bytes, one after the other."""
    start, found = 0, []
    for stored in (layer.stored for layer in block):
        found.append(slab[start : start + stored.nbytes].view(stored.dtype).view(stored.shape))
        start += whole_lines(stored)
    return found


def whole_lines(tensor: Tensor) -> int:
    """Return a tensor's bytes, rounded up to a multiple of LINE."""
    return -(-tensor.nbytes // LINE) * LINE


def spread(count: int, total: int) -> list[int]:
    """Return `count` numbers below `total`, evenly spread: the blocks between them hide the copying."""
    return [(2 * k + 1) * total // (2 * count) for k in range(count)]
