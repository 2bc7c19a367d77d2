"""What a predictor sees in photos: the LoRA that training starts from, or that is written at once."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from PIL import Image
from torch import Tensor

import flux
from flux.errors import UserError
from flux.loading import ModelFiles, folder_around
from flux.transformer import Transformer
from metalora import export_lora, inject
from people.faces import clip_face, find_face
from people.photos import Box
from predictor.eyes import Eye, find_eye
from predictor.model import Trained, load_predictor


def find_predictor(path: Path | None, files: ModelFiles) -> Trained:
    """Load a predictor, or the one beside a model's weights; this reads no weights of the model.

    Raises FileNotFoundError, saying how to get one, when there is none.
    """
    path = path or folder_around(files.transformer) / "predictor.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no predictor at {path}. Train one (python -m predictor --data PEOPLE, which ends with "
            "predictor.safetensors) and pass it as --predictor FILE"
        )
    return load_predictor(path, flux.load_transformer(files.transformer, "meta"))


def eye_of(
    trained: Trained,
    weights: Path | None,
    files: ModelFiles,
    device: torch.device,
    detector: Path | None = None,
) -> Eye:
    """Return the eye that a predictor was trained with; UserError when the weights are others."""
    about = trained.prior.metadata
    eye = find_eye(about["eye"], weights, files, device, detector)
    if eye.weights != about["eye_weights"]:
        raise UserError(
            f"{trained.prior.path} was trained with other weights of the eye {eye.name} than "
            f"{weights or 'the default ones'}: pass those as --eye-weights FILE"
        )
    return eye


@torch.no_grad()
def predict(
    trained: Trained,
    eye: Eye,
    photos: Mapping[Path, Image.Image],
    transformer: Path,
    known: Mapping[Path, Box | None] = MappingProxyType({}),
    advice: str = "say where it is: --face x0,y0,x1,y1",
) -> Tensor:
    """Return the LoRA of the person on the photos, a row of `Factors.personal` without meta_down: (size,).

    transformer: the base's file, of which only the header is read. known: boxes of faces, for
    an eye that looks for them; it detects the others. Of several photos the embeddings are averaged. Raises
    UserError, with the advice, for a photo without a face or with several.
    """
    faces = []
    for path, photo in photos.items():
        box = known.get(path) if eye.detector else None
        if box:
            box = clip_face(path, photo, box)
        elif eye.detector:
            box = find_face(path, photo, eye.detector, advice)
        faces.append(eye.embed_file(path, photo, box))
    row = trained.predictor(torch.stack(faces).mean(dim=0, keepdim=True))
    # Multiplied out: trained on as a plain LoRA, it keeps its lead better than mid and up alone do.
    base, targets = flux.load_transformer(transformer, "meta"), trained.prior.targets
    inject(base, trained.prior.r1, trained.r2, 1, targets, reset=False)
    plain = empty_factors(transformer, trained.r2, targets).factors
    predicted = base.factors.by_layer(row)
    for layer, (_, lora_a, lora_b) in plain.by_layer().items():
        _, mid, up = predicted[layer]
        lora_a.copy_(mid @ trained.prior.tensors[f"{layer}.meta_down"].float())
        lora_b.copy_(up)
    return plain.personal.data[0]


def empty_factors(transformer: Path, rank: int, targets: str) -> Transformer:
    """Return a model on the meta device with the factors of a plain LoRA on the CPU, to be filled."""
    model = inject(flux.load_transformer(transformer, "meta"), None, rank, 1, targets, reset=False)
    model.factors.to_empty(device="cpu")
    return model


def export_row(
    transformer: Path, targets: str, rank: int, row: Tensor, path: Path, metadata: dict, form: str
) -> None:
    """Write what `predict` has returned as a LoRA file, see `export_lora`, without the model's weights."""
    model = empty_factors(transformer, rank, targets)
    model.factors.personal.data[0] = row
    export_lora(model, path, metadata, form=form)
