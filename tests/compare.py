"""What tests use to compare a model with another implementation, or with a published checkpoint's header."""

import gzip
import json
from pathlib import Path

import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


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


def factors(model: nn.Module, *names: str) -> list[Tensor]:
    """Return the factors called `names` of all layers, layer by layer: what is written to them counts."""
    by_layer = model.factors.by_layer().values()
    layers = (dict(zip(("meta_down", "mid", "up"), layer)) for layer in by_layer)
    return [layer[name] for layer in layers for name in names if layer[name] is not None]


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def reference(name: str) -> dict:
    """Read a table from tests/data, whose README.md says where each one is from."""
    with gzip.open(DATA / f"{name}.json.gz") as file:
        return json.load(file)


def header(name: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a published checkpoint's tensors."""
    return {key: tuple(shape) for key, (shape, _dtype) in reference(f"{name}.keys").items()}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
