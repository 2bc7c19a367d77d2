"""Shared by the tests that hold a model of ours against another implementation of it."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, norms too: with weights of one and biases of zero a mixed-up norm goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
        parameter.data = noise / fan_in**0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith(("weight", "scale")):
            parameter.data += 1
    return model.eval()


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def header(name: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a published checkpoint, or skip where its reference file is missing."""
    path = REFERENCE / f"{name}.keys.json"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return {key: tuple(shape) for key, (shape, _dtype) in json.loads(path.read_text()).items()}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
