"""FLUX.1 and FLUX.2 klein in plain PyTorch: transformer, autoencoder, text encoders, tokenizers, sampler.

Weights are read from the original safetensors files. Nothing here knows of adapters or of command lines.
"""

from flux.autoencoder import AutoEncoder
from flux.chat import ChatConditioner
from flux.clip import CLIPText
from flux.conditioner import Conditioner, load_tokenizers
from flux.finding import find_files
from flux.flux2 import Flux2
from flux.loading import (
    ModelFiles,
    default_sampler,
    load_autoencoder,
    load_clip,
    load_conditioner,
    load_qwen3,
    load_t5,
    load_transformer,
    text_length,
)
from flux.model import Flux
from flux.qwen3 import Qwen3
from flux.t5 import T5

__all__ = [
    "AutoEncoder",
    "CLIPText",
    "ChatConditioner",
    "Conditioner",
    "Flux",
    "Flux2",
    "ModelFiles",
    "Qwen3",
    "T5",
    "default_sampler",
    "find_files",
    "load_autoencoder",
    "load_clip",
    "load_conditioner",
    "load_qwen3",
    "load_t5",
    "load_tokenizers",
    "load_transformer",
    "text_length",
]
