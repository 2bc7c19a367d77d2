"""Load the four parts of a model from their files: transformer, autoencoder, T5, CLIP with tokenizers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.checkpoint import Checkpoint, load, read_json
from flux.clip import CLIPSizes, CLIPText
from flux.conditioner import Conditioner, load_tokenizers
from flux.errors import UserError
from flux.flux2 import Flux2, Flux2Sizes
from flux.formats import is_flux2
from flux.memory import device_memory, weight_bytes
from flux.model import Flux, FluxSizes
from flux.qwen3 import Qwen3, Qwen3Sizes
from flux.streaming import Stream
from flux.t5 import T5, T5Sizes


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model lie. Each is a file or a folder of shards, tokenizers a folder."""

    transformer: Path
    autoencoder: Path
    clip: Path
    t5: Path
    tokenizers: Path | tuple[Path, Path]  # holds tokenizer/ and tokenizer_2/; or these are two folders

    @property
    def folder(self) -> Path:
        """Return the model's folder, where its config.json and other files beside the parts lie."""
        return folder_around(self.transformer)


def folder_around(transformer: Path) -> Path:
    """Return the folder of a transformer's file, or in diffusers' layout the folder around `transformer/`."""
    folder = transformer.parent
    return folder.parent if folder.name == "transformer" else folder


def load_flux(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Flux:
    """Load the transformer from a file, or a folder of shards; frozen.

    On the CPU its weights stay on the disk, mapped to memory. Those that diffusers splits (7.2 GB of
    FLUX.1-dev) and those of another dtype are made in temporary files; see `flux.checkpoint.empty`.
    """
    return load(Flux, FluxSizes, path, device, dtype)


def load_transformer(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Flux | Flux2:
    """Load a transformer as `load_flux`, of FLUX.1 or FLUX.2: the names of its tensors tell which."""
    kind = (Flux2, Flux2Sizes) if is_flux2(Checkpoint.open(path).header) else (Flux, FluxSizes)
    return load(*kind, path, device, dtype)


def load_autoencoder(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> AutoEncoder:
    """Load the autoencoder; frozen, its convolutions laid out channels last, which suits their kernels."""
    return load(AutoEncoder, AutoEncoderSizes, path, device, dtype).to(memory_format=torch.channels_last)


def load_t5(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> T5:
    """Load the T5 encoder; frozen."""
    return load(T5, T5Sizes, path, device, dtype)


def load_clip(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> CLIPText:
    """Load the CLIP text encoder; frozen."""
    return load(CLIPText, CLIPSizes, path, device, dtype)


def load_qwen3(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Qwen3:
    """Load the layers of a Qwen3 that FLUX.2 looks at; frozen."""
    return load(Qwen3, Qwen3Sizes, path, device, dtype)


def load_conditioner(
    files: ModelFiles | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    t5_length: int | None = None,
    vram: float | None = None,
) -> Conditioner:
    """Load both text encoders and their tokenizers, of a model's files or folder.

    t5_length: tokens per prompt; None takes the length in the tokenizer's config. vram: GiB of the GPU to
    stay within; None takes all it has. T5 is streamed to a GPU that has no room for it.
    """
    if isinstance(files, Path):
        t5_path, clip_path, tokenizers = files / "text_encoder_2", files / "text_encoder", files
    else:
        t5_path, clip_path, tokenizers = files.t5, files.clip, files.tokenizers
    room = 0.8 * (vram * 2**30 if vram else device_memory(torch.device(device)))
    streamed = weight_bytes(load_t5(t5_path, "meta", dtype)) > room
    t5 = load_t5(t5_path, "cpu" if streamed else device, dtype)
    if streamed:
        Stream(list(t5.encoder.block), device)
    clip = load_clip(clip_path, device, dtype)
    return Conditioner(t5.to(device), clip, load_tokenizers(tokenizers, t5_length))


LOADERS = {"transformer": load_flux, "autoencoder": load_autoencoder, "clip": load_clip, "t5": load_t5}


def native_size(folder: Path) -> int:
    """Return the side in pixels of a model's pictures: `sample_size` of its config, else 1024."""
    config = folder / "config.json"
    side = read_json(config).get("sample_size", 1024) if config.is_file() else 1024
    if type(side) is not int or side < 1:
        raise UserError(f"{config}: sample_size {side!r}, must be a number of pixels")
    return side
