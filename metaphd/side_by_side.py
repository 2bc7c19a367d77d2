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
from people.encoding import send
from run.late import Late
from run.settings import Training


def personalize_together(
    model: Flux,
    personal: Tensor,
    batches: Sequence[Iterator[dict[str, Tensor]]],
    steps: Sequence[int],
    training: Training,
    device: torch.device,
) -> Iterator[tuple[int, list[int]]]:
    """Train the slot of every person; after each number of updates in `steps` yield it and the slots still
    in training.

    personal: mid and up of all slots, as `personalize.add_adapters` returns it.
    batches: for each slot what `personalize.draw_batches` yields.
    A slot whose loss becomes infinite or NaN is dropped, and its factors are of no use from then on. The
    other slots continue; when none is left, the last item has an empty list. Losses are read a step late,
    except before an item is yielded.
    """
    optimizer = torch.optim.AdamW([personal], training.lr, weight_decay=training.weight_decay, fused=True)
    slots, unread = list(range(len(batches))), []
    bar = tqdm(range(1, max(steps) + 1), "personalizing", mininterval=1, dynamic_ncols=True)
    for step in bar:
        current = {slot: next(batches[slot]) for slot in slots}
        losses = backward(model, current, training, device)
        clip_slots(personal, training.clip_grad)
        optimizer.step()  # a slot's NaN stays in that slot: nothing is computed across slots
        optimizer.zero_grad()
        unread.append((slots, Late(losses)))
        while len(unread) > (step not in steps):
            trained_slots, late = unread.pop(0)
            finite = {slot: loss for slot, loss in zip(trained_slots, late.read()) if math.isfinite(loss)}
            slots = [slot for slot in slots if slot in finite]
            mean = sum(finite.values()) / max(len(finite), 1)
            bar.set_postfix(loss=f"{mean:.3f}", memory=f"{peak_memory(device):.1f} GiB", refresh=False)
        if step in steps or not slots:
            yield step, slots
        if not slots:
            return


def backward(
    model: Flux, batches: dict[int, dict[str, Tensor]], training: Training, device: torch.device
) -> Tensor:
    """Add the gradient of every slot's loss and return the losses, in the order of `batches`.

    Batches of the same shape share a forward pass.
    """
    by_shape = defaultdict(list)
    for slot, batch in batches.items():
        by_shape[batch["latents"].shape].append(slot)
    losses = {}
    for shape, slots in by_shape.items():
        (index,) = send([torch.tensor(slots).repeat_interleave(shape[0])], device)
        use_slots(model, index)
        names = batches[slots[0]]
        inputs = {name: torch.cat([batches[slot][name] for slot in slots]) for name in names}
        loss = flow_loss(model, **inputs, guidance=training.train_guidance, reduction="none")
        loss = loss.unflatten(0, (len(slots), shape[0])).flatten(1).mean(dim=1)  # (slots,)
        loss.sum().backward()
        losses |= dict(zip(slots, loss.detach()))
    return torch.stack([losses[slot] for slot in batches])
