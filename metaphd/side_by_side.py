"""Personalize several people at once, each with the loss, clipping and optimizer they would have alone.

The frozen base is read once for all of them. Algorithm 2 for one person is in `personalize.py`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from flux.memory import peak_memory
from flux.model import Flux
from flux.sampling import flow_loss
from metalora import clip_slots, use_slots
from run.settings import Training


def personalize_together(
    model: Flux,
    personal: Tensor,
    batches: Sequence[Iterator[dict[str, Tensor]]],
    steps: int,
    training: Training,
    device: torch.device | str,
) -> Iterator[tuple[int, list[int]]]:
    """Train the slot of every person; after each update yield its number and the slots still in training.

    personal: mid and up of all slots, as `personalize.add_adapters` returns it.
    batches: for each slot what `personalize.draw_batches` yields.
    A slot whose loss becomes infinite or NaN is dropped, and its factors are of no use from then on. The
    other slots continue; when none is left, the last item has an empty list.
    """
    optimizer = torch.optim.AdamW([personal], training.lr, weight_decay=training.weight_decay, fused=True)
    slots = list(range(len(batches)))
    bar = tqdm(range(1, steps + 1), "personalizing", mininterval=1, dynamic_ncols=True)
    for step in bar:
        current = {slot: next(batches[slot]) for slot in slots}
        losses = backward(model, current, training, device)
        slots = [slot for slot in slots if math.isfinite(losses[slot])]
        if slots:
            clip_slots(personal, training.clip_grad)
            optimizer.step()  # a dropped slot's NaN stays in that slot: nothing is computed across slots
            optimizer.zero_grad()
            mean = sum(losses[slot] for slot in slots) / len(slots)
            bar.set_postfix(loss=f"{mean:.3f}", memory=f"{peak_memory(device):.1f} GiB", refresh=False)
        yield step, slots
        if not slots:
            return


def backward(
    model: Flux, batches: dict[int, dict[str, Tensor]], training: Training, device: torch.device | str
) -> dict[int, float]:
    """Add the gradient of every slot's loss and return the losses by slot.

    Batches of the same shape share a forward pass.
    """
    by_shape = defaultdict(list)
    for slot, batch in batches.items():
        by_shape[batch["latents"].shape].append(slot)
    losses = {}
    for shape, slots in by_shape.items():
        use_slots(model, torch.tensor(slots, device=device).repeat_interleave(shape[0]))
        names = batches[slots[0]]
        inputs = {name: torch.cat([batches[slot][name] for slot in slots]) for name in names}
        loss = flow_loss(model, **inputs, guidance=training.train_guidance, reduction="none")
        loss = loss.unflatten(0, (len(slots), shape[0])).flatten(1).mean(dim=1)  # (slots,)
        loss.sum().backward()
        losses |= dict(zip(slots, loss.tolist()))
    return losses
