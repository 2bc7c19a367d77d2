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
from flux.sampling import flow_loss
from flux.transformer import Transformer
from metalora import SlotAdamW, clip_slots, use_slots
from people.encoding import send
from run.late import Late
from run.settings import Training


def personalize_together(
    model: Transformer,
    personal: Tensor,
    batches: Sequence[Iterator[dict[str, Tensor]]],
    steps: Sequence[int],
    training: Training,
    device: torch.device,
) -> Iterator[tuple[int, list[int]]]:
    """Train the slot of every person; after each number of updates in `steps` yield it and the slots still
    in training.

    personal: mid and up of all slots, as `personalize.add_adapters` returns it.
    batches: for each slot what `personalize.draw_batches` yields. Each person's come in their order, but only
    people whose next ones have the same shape share a forward pass. So not all are at the same number of
    updates: the next pass is that of the shape whose people have most left to do until all meet at one of
    `steps`.
    A slot whose loss becomes infinite or NaN is dropped, and its factors are of no use from then on. The
    other slots continue; when none is left, the last item has an empty list. Losses are read a pass late,
    except before an item is yielded.
    """
    optimizer = SlotAdamW(personal, training.lr, training.weight_decay)
    slots, done = [*range(len(batches))], [0] * len(batches)
    following: dict[int, dict[str, Tensor]] = {}  # each slot's next batch
    losses: dict[int, float] = {}  # each slot's last one
    unread = []
    bar = tqdm(total=max(steps) * len(slots), desc="personalizing", mininterval=1, dynamic_ncols=True)
    for step in sorted(steps):
        while left := {slot: step - done[slot] for slot in slots if done[slot] < step}:
            following |= {slot: next(batches[slot]) for slot in left if slot not in following}
            by_shape = defaultdict(list)
            for slot in left:
                by_shape[following[slot]["latents"].shape].append(slot)
            together = max(by_shape.values(), key=lambda members: sum(left[slot] for slot in members))
            late = Late(update(model, optimizer, together, [following.pop(s) for s in together], training))
            unread.append((together, late))
            for slot in together:
                done[slot] += 1
            bar.update(len(together))
            while len(unread) > any(done[slot] < step for slot in slots):
                members, late = unread.pop(0)
                losses |= zip(members, late.read())
                for slot in [slot for slot in slots if not math.isfinite(losses.get(slot, 0))]:
                    slots.remove(slot)
                    bar.total -= max(steps) - done[slot]
            known = [losses[slot] for slot in slots if slot in losses]
            mean = sum(known) / max(len(known), 1)
            bar.set_postfix(loss=f"{mean:.3f}", memory=f"{peak_memory(device):.1f} GiB", refresh=False)
        yield step, [*slots]
        if not slots:
            return


def update(
    model: Transformer,
    optimizer: SlotAdamW,
    slots: Sequence[int],
    batches: Sequence[dict[str, Tensor]],
    training: Training,
) -> Tensor:
    """Update each slot with its batch, all of one shape; return the losses, (slots,)."""
    size = len(batches[0]["latents"])
    (slot,) = send([torch.tensor(slots).repeat_interleave(size)], optimizer.personal.device)
    use_slots(model, slot)
    inputs = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    loss = flow_loss(model, **inputs, guidance=training.train_guidance, reduction="none")
    loss = loss.unflatten(0, (len(slots), size)).flatten(1).mean(dim=1)
    loss.sum().backward()
    clip_slots(optimizer.personal, training.clip_grad)
    optimizer.step(slot[::size])  # a slot's NaN stays in that slot: nothing is computed across slots
    optimizer.personal.grad = None
    return loss
