"""A step dispatches few operations: a fast GPU would wait for the host."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from bench.launches import SIZES, operations, stage1_updates, stage2_step
from metalora import _AdaptedLinear

LAYERS = 13  # of a double and a single block


def sized(depth: int, recomputed: str = "none") -> Namespace:
    return Namespace(**SIZES | {"depth": depth, "depth_single": depth}, recomputed=recomputed)


def added_by_a_layer(recomputed: str) -> float:
    """Return how many operations every further adapter adds to a step of stage 2."""
    counts = []
    for depth in (1, 2):
        step = sized(depth, recomputed)
        counts.append(operations(stage2_step(step)) - operations(stage2_step(step, adapted=False)))
    return (counts[1] - counts[0]) / LAYERS


@pytest.mark.parametrize("recomputed, most", [("none", 9), ("all", 11)])
def test_an_adapter_adds_few_operations(monkeypatch, recomputed, most):
    """Two forward and four backward, the gradients of modulation, a few for all products."""
    assert 6 < added_by_a_layer(recomputed) < most

    def by_autograd(x, base, down, up):
        h = nn.functional.linear(x.flatten(0, 1), base.weight, base.bias).unflatten(0, x.shape[:2])
        return torch.baddbmm(h, x @ down.mT, up)

    monkeypatch.setattr(_AdaptedLinear, "apply", by_autograd)
    assert added_by_a_layer(recomputed) > most


def test_the_optimizers_take_as_many_for_any_number_of_layers():
    assert operations(stage1_updates(sized(1))) == operations(stage1_updates(sized(2))) < 100
