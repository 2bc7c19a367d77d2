"""The order of stage 1 (paper, Algorithm 1): people dealt into buckets, their photos into batches."""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from flux.errors import UserError
from people.photos import Size

# The order of training


def deal_buckets(people: Sequence, bucket_ids: int, generator: torch.Generator) -> list[list]:
    """Deal people at random into the fewest buckets of at most `bucket_ids`, of equal size give or take one.

    Cutting 51 people after 50 would leave a bucket that moves meta_down for one person; so it is 26 and 25.
    """
    if not people or bucket_ids < 1:
        raise UserError(f"cannot deal {len(people)} people into buckets of {bucket_ids}")
    order = torch.randperm(len(people), generator=generator).tolist()
    count = math.ceil(len(people) / bucket_ids)
    return [[people[i] for i in order[start::count]] for start in range(count)]


def deal_batches(
    shapes: Sequence[Size], uses: int, batch: int, generator: torch.Generator
) -> list[list[int]]:
    """Return a bucket's batches, lists of positions in `shapes`; their number is the paper's q_bucket.

    Every image comes `uses` times, again only after all others of its shape have come. A batch has one
    shape; only the last of a shape may have fewer than `batch` images. Shapes alternate at random.
    """
    queues: dict[Size, list[list[int]]] = {}
    for shape in dict.fromkeys(shapes):
        members = torch.tensor([k for k, other in enumerate(shapes) if other == shape])
        passes = [members[torch.randperm(len(members), generator=generator)] for _ in range(uses)]
        queues[shape] = [part.tolist() for part in torch.cat(passes).split(batch)]
    turns = [shape for shape, queue in queues.items() for _ in queue]
    order = torch.randperm(len(turns), generator=generator).tolist()
    remaining = {shape: iter(queue) for shape, queue in queues.items()}
    return [next(remaining[turns[turn]]) for turn in order]


def count_batches(shapes: Sequence[Size], uses: int, batch: int) -> int:
    """Return how many batches `deal_batches` deals."""
    return sum(-(-count * uses // batch) for count in Counter(shapes).values())
