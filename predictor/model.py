"""The map from a face's embedding to a person's mid and up, and its file, `predictor.safetensors`."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.checkpoint import read_tensors
from flux.errors import UserError
from flux.transformer import Transformer
from lora.fitting import clean, refuse
from lora.writing import write_tensors
from metalora import TARGETS, Prior, inject

NEEDED = ("r1", "r2", "targets", "eye", "eye_weights")  # in the header


class Predictor(nn.Module):
    """Predict an identity, a row of `Factors.personal`, from the embedding e of a face.

        row = table[0] + sum_k code_k table[k]      code = A e, or A e + C gelu(B e)

    e is the embedding in coordinates by which people differ: minus `mean`, times `traits` of `find_traits`.
    """

    def __init__(self, width: int, codes: int, size: int, hidden: int = 0):
        """width: of an embedding; size: of a row; hidden: of the second layer, 0 for none."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("traits", torch.eye(width))
        self.a = nn.Linear(width, codes, bias=False)
        nn.init.orthogonal_(self.a.weight)
        self.b, self.c = (nn.Linear(width, hidden), nn.Linear(hidden, codes)) if hidden else (None, None)
        self.table = nn.Parameter(torch.zeros(1 + codes, size))

    def forward(self, faces: Tensor) -> Tensor:
        """faces (b, width) -> rows (b, size)"""
        e = (faces - self.mean) @ self.traits
        code = self.a(e)
        if self.b is not None:
            code = code + self.c(F.gelu(self.b(e)))
        return torch.addmm(self.table[0], code, self.table[1:])


def find_traits(faces: Tensor, people: Tensor) -> Tensor:
    """Return the discriminants (Fisher 1936) of embeddings (n, width), as columns (width, width).

    people: (n,), whose each is. Embeddings times the columns are uncorrelated numbers, and the variance of
    each is the part of it that is between people and not between photos of one person. Directions with less
    than a thousandth of the largest variance stay smaller and correlated: few photos tell nothing of them.
    """
    faces = (faces - faces.mean(dim=0)).double()
    _, people, counts = people.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), faces.shape[1], dtype=faces.dtype).index_add_(0, people, faces)
    within = faces - (means / counts[:, None])[people]
    variances, axes = torch.linalg.eigh(faces.mT @ faces / len(faces))
    white = axes * variances.clamp(min=1e-3 * variances.max()).rsqrt()
    inside = within.mT @ within / max(1, len(faces) - len(counts))
    noise, axes = torch.linalg.eigh(white.mT @ inside @ white)
    return (white @ axes * (1 - noise).clamp(min=0).sqrt()).float()


@dataclass(frozen=True)
class Trained:
    """What a file holds: the map, the meta_down that was trained with it, and which eye it needs."""

    predictor: Predictor
    prior: Prior

    @property
    def r2(self) -> int:
        return int(self.prior.metadata["r2"])


def save_predictor(model: Transformer, predictor: Predictor, path: Path, metadata: dict) -> None:
    """Write a predictor and the model's meta_down, in float16.

    Tensors are `<layer>.meta_down`, the table as `<layer>.mid` (1 + codes, parts, r2, r1) and `<layer>.up`
    (1 + codes, d_out, r2), and the others as `predictor.<name>`. The metadata must hold NEEDED.
    """
    tensors = {}
    for layer, factors in model.factors.by_layer(predictor.table.data).items():
        tensors |= {f"{layer}.{name}": x for name, x in zip(("meta_down", "mid", "up"), factors)}
    tensors |= {f"predictor.{name}": x for name, x in predictor.state_dict().items() if name != "table"}
    write_tensors({name: x.half().cpu().contiguous() for name, x in tensors.items()}, path, metadata)


def load_predictor(path: Path, model: Transformer) -> Trained:
    """Read a predictor for a model on the meta device, into which adapters are injected.

    Raises UserError when the file is something else, or does not fit the model.
    """
    tensors, metadata = read_tensors(path)
    if not {"predictor.a.weight", "predictor.mean"} <= tensors.keys() or not metadata.keys() >= {*NEEDED}:
        raise UserError(f"{path} is no predictor (python -m predictor writes it as predictor.safetensors)")
    if metadata["targets"] not in TARGETS:
        raise UserError(f"{path}: targets {clean(metadata['targets'])}, must be one of {', '.join(TARGETS)}")
    if not (
        metadata["r1"].isdecimal() and metadata["r2"].isdecimal() and tensors["predictor.a.weight"].ndim == 2
    ):
        raise UserError(f"{path} is damaged: r1 and r2 must be numbers, predictor.a.weight a matrix")
    broken = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    refuse(path, [f"{name} is not finite" for name in broken], "is damaged")

    codes, width = tensors["predictor.a.weight"].shape
    hidden = len(tensors.get("predictor.b.weight", ()))
    inject(model, int(metadata["r1"]), int(metadata["r2"]), 1, metadata["targets"], reset=False)
    predictor = Predictor(width, codes, model.factors.personal.shape[1], hidden)
    views, state = {}, predictor.state_dict()
    for layer, factors in model.factors.by_layer(state.pop("table")).items():
        views |= {f"{layer}.{name}": view for name, view in zip(("meta_down", "mid", "up"), factors)}
    views |= {f"predictor.{name}": tensor for name, tensor in state.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    needed = {name: tuple(view.shape) for name, view in views.items()}
    names = sorted(name for name in given | needed if given.get(name) != needed.get(name))
    refuse(path, [f"{name} is {given.get(name)}, must be {needed.get(name)}" for name in names])
    downs = {name: tensor for name, tensor in tensors.items() if name.endswith(".meta_down")}
    for name in views.keys() - downs.keys():
        views[name].copy_(tensors[name])
    return Trained(predictor, Prior(path, downs, metadata))
