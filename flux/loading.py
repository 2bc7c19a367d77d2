"""Load the parts of a model from their files: transformer, autoencoder, text encoders with tokenizers."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.bases import Base, base_of
from flux.checkpoint import load, read_json
from flux.clip import CLIPSizes, CLIPText
from flux.errors import UserError
from flux.memory import device_memory, weight_bytes
from flux.qwen3 import Qwen3, Qwen3Sizes
from flux.streaming import Stream
from flux.t5 import T5, T5Sizes
from flux.transformer import Transformer


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model lie. Each is a file or a folder of shards, tokenizers a folder."""

    base: Base
    transformer: Path
    autoencoder: Path
    encoders: dict[str, Path]  # clip and t5, or qwen3
    tokenizers: Path | tuple[Path, ...]  # with tokenizer/ and FLUX.1's tokenizer_2/; or these folders

    @property
    def folder(self) -> Path:
        """Return the model's folder, where its config.json and other files beside the parts lie."""
        return folder_around(self.transformer)


def folder_around(transformer: Path) -> Path:
    """Return the folder of a transformer's file, or in diffusers' layout the folder around `transformer/`."""
    folder = transformer.parent
    return folder.parent if folder.name == "transformer" else folder


def load_transformer(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Transformer:
    """Load the transformer from a file, or a folder of shards; frozen. Its tensors' names tell the base.

    On the CPU its weights stay on the disk, mapped to memory. Those that diffusers splits (7.2 GB of
    FLUX.1-dev) and those of another dtype are made in temporary files; see `flux.checkpoint.empty`.
    """
    base = base_of(path)
    return load(base.kind, base.sizes, path, device, dtype)


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


LOADERS = {
    "transformer": load_transformer,
    "autoencoder": load_autoencoder,
    "clip": load_clip,
    "t5": load_t5,
    "qwen3": load_qwen3,
}
BLOCKS = {"t5": lambda t5: t5.encoder.block, "qwen3": lambda qwen3: qwen3.model.layers}  # to stream


def load_conditioner(
    files: ModelFiles,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    length: int | None = None,
    vram: float | None = None,
) -> nn.Module:
    """Load the text encoders and their tokenizers, see `Base.conditioner`.

    length: tokens per prompt; None takes the usual number. vram: GiB of the GPU to stay within; None takes
    all it has. T5 and Qwen3 are streamed to a GPU that has no room for them.
    """
    base = files.base
    room = 0.8 * (vram * 2**30 if vram else device_memory(torch.device(device)))
    modules = {}
    for part, path in files.encoders.items():
        streamed = part in BLOCKS and weight_bytes(LOADERS[part](path, "meta", dtype)) > room
        encoder = LOADERS[part](path, "cpu" if streamed else device, dtype)
        if streamed:
            Stream(list(BLOCKS[part](encoder)), device)
        modules[part] = encoder.to(device)
    tokenizers = base.load_tokenizers(base.folders(files.tokenizers), length)
    return base.conditioner(**modules, tokenizers=tokenizers)


def text_length(transformer: Path, tokenizers: Path | tuple[Path, ...], length: int | None = None) -> int:
    """Return the tokens of an encoded prompt: `length`, or what is usual for the base and its tokenizer."""
    base = base_of(transformer)
    return base.load_tokenizers(base.folders(tokenizers), length).length


def default_sampler(files: ModelFiles) -> dict[str, float]:
    """Return the model's defaults of `flux.sampling.denoise`: steps, guidance and cfg."""
    few_steps = files.base.few_steps if is_distilled(files) else None
    return files.base.kind.SAMPLER | (few_steps or {})


def is_distilled(files: ModelFiles) -> bool:
    """Tell whether a FLUX.2 klein is distilled: by diffusers' `model_index.json`, else by the names.

    A distilled one is called klein-4b, with or without other words; the one to train, klein-base-4b. The last
    name on the transformer's path that has klein in it counts, be it the file's or the repository's.
    """
    index = files.folder / "model_index.json"
    stated = read_json(index).get("is_distilled") if index.is_file() else None
    names = [name for name in files.transformer.absolute().parts if "klein" in name.lower()]
    by_name = bool(names) and re.search(r"klein[-_. ]?\d+b(?!.*base)", names[-1].lower()) is not None
    return stated if isinstance(stated, bool) else by_name


def native_size(folder: Path) -> int:
    """Return the side in pixels of a model's pictures: `sample_size` of its config, else 1024."""
    config = folder / "config.json"
    side = read_json(config).get("sample_size", 1024) if config.is_file() else 1024
    if type(side) is not int or side < 1:
        raise UserError(f"{config}: sample_size {side!r}, must be a number of pixels")
    return side
