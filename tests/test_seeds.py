"""Streams of random numbers: none is another's, and each is always the same."""

import itertools

import torch

from run.seeds import generator_for


def draw(*place) -> list[float]:
    return torch.rand(4, generator=generator_for(*place)).tolist()


def test_purposes_seeds_steps_and_ranks_have_streams_of_their_own():
    purposes = ["meta_down", "buckets", "bucket", "order", "noise"]
    places = [*itertools.product(purposes, range(3), range(5), range(3))]
    places += [*itertools.product(purposes, range(3), range(5)), *itertools.product(purposes, range(3))]
    assert len({tuple(draw(*place)) for place in places}) == len(places)


def test_a_stream_is_the_same_every_time():
    """Also on another machine and in a later version: a run that goes on depends on it."""
    assert draw("noise", 0, 7, 1) == draw("noise", 0, 7, 1)
    assert generator_for("noise", 0, 7, 1).initial_seed() == 815870537
