"""Deal people into buckets and their photos into batches (paper, Algorithm 1)."""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from flux.errors import UserError
from people.photos import Size


def deal_buckets(people: Sequence, bucket_ids: int, generator: torch.Generator) -> list[list]:
    """Deal people at random into as few buckets of at most `bucket_ids` people as possible.

    The sizes of the buckets differ by one at most: 51 people make 26 and 25. With 50 and 1, one person alone
    would train meta_down.
    """
    if not people or bucket_ids < 1:
        raise UserError(f"cannot deal {len(people)} people into buckets of {bucket_ids}")
    order = torch.randperm(len(people), generator=generator).tolist()
    count = math.ceil(len(people) / bucket_ids)
    return [[people[i] for i in order[start::count]] for start in range(count)]


def deal_batches(
    shapes: Sequence[Size], uses: int, batch: int, generator: torch.Generator
) -> list[list[int]]:
    """Return the batches of a bucket as lists of positions in `shapes`. Their number is the paper's q_bucket.

    shapes: of each image of the bucket. All images of a batch have the same shape. Each image is used `uses`
    times, and comes again only after all others of its shape. The last batch of a shape may be smaller than
    `batch`. The batches of different shapes are mixed at random.
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
