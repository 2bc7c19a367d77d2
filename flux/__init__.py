"""FLUX.1 in plain PyTorch: transformer, autoencoder, text encoders, tokenizers, sampler; FLUX.2's networks.

Weights are read from the original safetensors files. Nothing here knows of adapters or of command lines.
"""

from flux.autoencoder import AutoEncoder
from flux.clip import CLIPText
from flux.conditioner import Conditioner, load_tokenizers
from flux.finding import find_files
from flux.flux2 import Flux2
from flux.loading import (
    ModelFiles,
    load_autoencoder,
    load_clip,
    load_conditioner,
    load_flux,
    load_t5,
    load_transformer,
)
from flux.model import Flux
from flux.t5 import T5

__all__ = [
    "AutoEncoder",
    "CLIPText",
    "Conditioner",
    "Flux",
    "Flux2",
    "ModelFiles",
    "T5",
    "find_files",
    "load_autoencoder",
    "load_clip",
    "load_conditioner",
    "load_flux",
    "load_t5",
    "load_tokenizers",
    "load_transformer",
]
