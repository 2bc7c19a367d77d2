"""How a frozen transformer is made to fit a GPU, from outside: the model does not know of it.

Three ways, alone or together: recompute blocks in the backward pass (activation checkpointing), stream the
weights of blocks from host memory or store them in 8 bits (`flux/streaming.py`). `run/plan.py` chooses among
them. Blocks can be compiled here, too.
"""

import gc
import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flux.errors import UserError
from flux.pages import available_memory
from flux.streaming import FrozenLinear, Stream, freeze, quantize, spread
from flux.transformer import Transformer


def blocks_of(model: Transformer) -> list[nn.Module]:
    """Return all blocks in the order in which they run."""
    return [*model.double_blocks, *model.single_blocks]


# --- Activation checkpointing -------------------------------------------------------------------------------


def checkpoint_blocks(model: Transformer, what: str | int = "all") -> None:
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

GRAPHS = 32  # that a kind of block may have; torch's own limit is 8, and beyond it a block runs uncompiled


def compile_blocks(model: Transformer) -> None:
    """Compile every block with torch.compile; blocks of the same kind share the result.

    It is made for the first number of tokens alone, and on the second one for any number; anew for batches of
    one and of more samples, and for passes with and without gradients. Call it after `checkpoint_blocks`,
    which would undo it; recomputation is then compiled as well. Raises UserError for streamed blocks, whose
    weights move, and for blocks that keep their attention, within whose contexts torch would compile nothing.
    """
    if any(getattr(layer, "stream", None) for layer in model.modules()):
        raise UserError("streamed blocks cannot be compiled: compile or stream them, not both")
    forwards = [block.forward for block in blocks_of(model)]
    if any(isinstance(forward, partial) and "context_fn" in forward.keywords for forward in forwards):
        raise UserError("blocks that keep their attention cannot be compiled: recompute attention too")
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, GRAPHS)  # recompile_limit, from torch 2.7 on
    for block, forward in zip(blocks_of(model), forwards):
        if isinstance(forward, partial):  # checkpointed
            compiled = torch.compile(*forward.args)
            block.forward = partial(forward.func, compiled, **forward.keywords)
        else:
            block.forward = torch.compile(forward)


# --- All together -------------------------------------------------------------------------------------------


def arrange(
    model: Transformer,
    device: torch.device | str,
    checkpoint: str | int = "none",
    stream: int = 0,
    fp8: bool = False,
    compiled: bool = False,
) -> Transformer:
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
    """Free what a model took on a device, after the caller has dropped its last reference to the model.

    The peak is counted anew from here on, so that of training leaves the encoders out.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):  # frees pinned memory; torch has no public function for it
            torch._C._host_emptyCache()
        torch.cuda.reset_peak_memory_stats(device)


def device_memory(device: torch.device) -> float:
    """Return the bytes that this process can have on a device; infinity if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return available_memory() or float("inf")


def peak_memory(device: torch.device | str) -> float:
    """Return the peak of memory in GiB: of the GPU's allocator since `release`, or of the process so far.

    NaN if unknown.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
