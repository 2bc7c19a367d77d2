"""People are dealt into buckets and photos into batches as Algorithm 1 says."""

import random
from collections import Counter

import pytest
import torch

from people.buckets import deal_batches, deal_buckets
from people.folders import Person


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "count, sizes", [(100, [50, 50]), (51, [26, 25]), (50, [50]), (3, [3]), (101, [34, 34, 33])]
)
def test_buckets_are_even_and_hold_everyone_once(count, sizes):
    people = [Person(pid, str(pid), ()) for pid in range(count)]
    buckets = deal_buckets(people, 50, generator())
    assert [len(bucket) for bucket in buckets] == sizes
    assert sorted(person.pid for bucket in buckets for person in bucket) == list(range(count))
    assert buckets == deal_buckets(people, 50, generator())
    assert buckets != deal_buckets(people, 50, generator(1))


def test_nobody_cannot_be_dealt():
    with pytest.raises(ValueError, match="0 people into buckets of 50"):
        deal_buckets([], 50, generator())


def test_batches_of_the_paper():
    batches = deal_batches([(1024, 1024)] * 1000, uses=10, batch=4, generator=generator())
    assert len(batches) == 2500 and {len(batch) for batch in batches} == {4}
    for first in range(0, 2500, 250):  # 1,000 images are 250 batches, so passes are visible
        assert sorted(sum(batches[first : first + 250], [])) == list(range(1000))


def test_batches_of_many_shapes():
    draw = random.Random(0)
    for seed in range(50):
        shapes = [draw.choice([(8, 8), (8, 16), (16, 8)]) for _ in range(draw.randint(1, 40))]
        uses, batch = draw.randint(1, 5), draw.randint(1, 6)
        batches = deal_batches(shapes, uses, batch, generator(seed))
        assert Counter(sum(batches, [])) == dict.fromkeys(range(len(shapes)), uses)
        assert all(len({shapes[index] for index in indices}) == 1 for indices in batches)
        for shape in set(shapes):
            own = [indices for indices in batches if shapes[indices[0]] == shape]
            assert [len(indices) for indices in own[:-1]] == [batch] * (len(own) - 1) and len(
                own[-1]
            ) <= batch
            flat, members = sum(own, []), shapes.count(shape)
            for start in range(0, len(flat), members):
                assert len(set(flat[start : start + members])) == members
        assert batches == deal_batches(shapes, uses, batch, generator(seed))


def test_shapes_alternate():
    batches = deal_batches([(8, 8)] * 20 + [(8, 16)] * 20, uses=10, batch=4, generator=generator())
    switches = sum((a[0] < 20) != (b[0] < 20) for a, b in zip(batches, batches[1:], strict=False))
    assert 30 < switches < 70  # of 99; independent tosses of a coin give 50 +- 5
