"""Several people personalized at once, each with the loss, clipping and optimizer they would have alone.

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
    trained: list[Tensor],
    people: Sequence[Iterator[dict[str, Tensor]]],
    steps: int,
    training: Training,
    device: torch.device,
) -> Iterator[tuple[int, list[int]]]:
    """Train every person's slot and yield, after each update, its number and who is still learning.

    people: what `personalize.draw_batches` yields, of the person in each slot. Whoever's loss is infinite or
    NaN drops out, with a slot that is worth nothing from then on; the others go on.
    """
    optimizer = torch.optim.AdamW(trained, training.lr, weight_decay=training.weight_decay, fused=True)
    learning = list(range(len(people)))
    bar = tqdm(range(1, steps + 1), "personalizing", mininterval=1, dynamic_ncols=True)
    for step in bar:
        groups = defaultdict(list)  # batches of the same shape share a forward pass
        for slot in learning:
            batch = next(people[slot])
            groups[batch["latents"].shape].append((slot, batch))
        losses = {}
        for (size, *_), group in groups.items():
            slots, batches = zip(*group)
            use_slots(model, torch.tensor(slots, device=device).repeat_interleave(size))
            together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            each = flow_loss(model, **together, guidance=training.train_guidance, reduction="none")
            each = each.unflatten(0, (len(group), size)).flatten(1).mean(dim=1)  # a loss per person
            each.sum().backward()
            losses |= dict(zip(slots, each.tolist()))
        learning = [slot for slot in learning if math.isfinite(losses[slot])]
        if not learning:
            return
        clip_slots(trained, training.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        mean = sum(losses[slot] for slot in learning) / len(learning)
        bar.set_postfix(loss=f"{mean:.3f}", memory=f"{peak_memory(device):.1f} GiB", refresh=False)
        yield step, learning
