"""Memory, moved in the open and from outside: models do not know that they are checkpointed or let go."""

import gc
import sys
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from flux.model import Flux


def checkpoint_blocks(model: Flux) -> None:
    """Keep only each block's input; the backward pass runs the block forward again (Chen et al. 2016)."""
    for block in (*model.double_blocks, *model.single_blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def release(device: torch.device | str) -> None:
    """Give freed memory back, after the caller has dropped its last reference to a model."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def memory_in_use(device: torch.device | str) -> str:
    """Return the peak so far, as "12.3 GB": of the GPU's allocator, or of the whole process on a CPU."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
    try:
        import resource
    except ImportError:  # Windows
        return "not known"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"
