"""CLIP (Radford et al. 2021) with both towers: embed images and texts as unit vectors.

Names are those of the hub's `openai/clip-vit-base-patch32`. The text tower is FLUX's, with its projection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor, nn

from flux.checkpoint import load
from flux.clip import CLIPSizes, Layer, TextModel
from flux.errors import UserError
from flux.hub import check_sha256, hub_file
from flux.sizes import Shapes, config_count, count_names, shape_of

REPOSITORY = "openai/clip-vit-base-patch32"
# The repository's main branch has the pickled file only; the other is its conversion by the hub, refs/pr/15.
# Hashes are those that several public projects pin; we have not downloaded either file ourselves.
WEIGHTS = {
    "model.safetensors": (
        "b33cedfd0df4e43b8238760678fcc89e1a0d38b3",
        "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d",
    ),
    "pytorch_model.bin": (
        "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
        "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
    ),
}
# What else is downloaded, into the same folder.
BESIDE = ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json")

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPViTSizes:
    text: CLIPSizes
    hidden_size: int
    num_heads: int
    mlp_size: int
    depth: int
    patch_size: int
    image_size: int
    embedding_size: int

    @classmethod
    def from_shapes(cls, shapes: Shapes, config: dict) -> Self:
        """Read the sizes from a checkpoint's header; heads are 64 wide if `config` does not say."""
        hidden_size, _, patch_size, _ = shape_of(shapes, "vision_model.embeddings.patch_embedding.weight", 4)
        patches = shape_of(shapes, "vision_model.embeddings.position_embedding.weight", 2)[0] - 1
        vision = config.get("vision_config", {})
        if not isinstance(vision, dict):
            raise UserError(f"its config.json has vision_config {vision!r}, must be an object")
        num_heads = config_count(vision, "num_attention_heads", max(1, hidden_size // 64))
        if hidden_size % num_heads:
            raise UserError(f"its width {hidden_size} is no multiple of {num_heads} attention heads")
        return cls(
            text=CLIPSizes.from_shapes(shapes, config),
            hidden_size=hidden_size,
            num_heads=num_heads,
            mlp_size=shape_of(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
            depth=count_names(shapes, "vision_model.encoder.layers."),
            patch_size=patch_size,
            image_size=round(patches**0.5) * patch_size,
            embedding_size=shape_of(shapes, "visual_projection.weight", 2)[0],
        )


class CLIPViT(nn.Module):
    """Both towers; their embeddings of an image and of a text that describes it have a high cosine."""

    # Positions 0, 1, 2 .., and the factor that turned cosines into logits for training.
    IGNORED = (
        "text_model.embeddings.position_ids",
        "vision_model.embeddings.position_ids",
        "logit_scale",
    )

    def __init__(self, sizes: CLIPViTSizes):
        super().__init__()
        self.sizes = sizes
        self.text_model, self.vision_model = TextModel(sizes.text), VisionModel(sizes)
        self.text_projection = nn.Linear(sizes.text.hidden_size, sizes.embedding_size, bias=False)
        self.visual_projection = nn.Linear(sizes.hidden_size, sizes.embedding_size, bias=False)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (n, embedding_size), float32; all images go through as one batch."""
        weight = self.visual_projection.weight
        pixels = torch.stack([preprocess(image, self.sizes.image_size) for image in images])
        return F.normalize(self.visual_projection(self.vision_model(pixels.to(weight))).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Return unit vectors (n, embedding_size), float32; tokens: (n, l) of `flux.conditioner`."""
        weight = self.text_projection.weight
        return F.normalize(self.text_projection(self.text_model(tokens.to(weight.device))).float(), dim=-1)


class VisionModel(nn.Module):
    """The image tower, a vision transformer."""

    def __init__(self, sizes: CLIPViTSizes):
        super().__init__()
        d, patch_size = sizes.hidden_size, sizes.patch_size
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.empty(d))
        self.embeddings.patch_embedding = nn.Conv2d(3, d, patch_size, patch_size, bias=False)
        self.embeddings.position_embedding = nn.Embedding((sizes.image_size // patch_size) ** 2 + 1, d)
        self.pre_layrnorm = nn.LayerNorm(d)  # sic: the file's spelling
        self.encoder.layers = nn.ModuleList(
            Layer(d, sizes.num_heads, sizes.mlp_size) for _ in range(sizes.depth)
        )
        self.post_layernorm = nn.LayerNorm(d)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (b, 3, image_size, image_size), preprocessed -> (b, hidden_size)"""
        patches = rearrange(self.embeddings.patch_embedding(pixels), "b d h w -> b (h w) d")
        start = self.embeddings.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([start, patches], dim=1) + self.embeddings.position_embedding.weight
        x = self.pre_layrnorm(x)
        for layer in self.encoder.layers:
            x = layer(x, causal=False)
        return self.post_layernorm(x[:, 0])


def preprocess(image: Image.Image, size: int = 224) -> Tensor:
    """Scale the short side to `size`, bicubic, cut out the centre and normalise -> (3, size, size) float32.

    For opaque images this equals transformers' CLIPImageProcessor with PIL to the last bit. With torchvision
    it rounds a little differently, and so does openai/CLIP.
    """
    image, short = image.convert("RGB"), min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    pixels = (pixels * (1 / 255)).astype(np.float32)
    pixels = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(rearrange(pixels, "h w c -> c h w"))


def load_clip_vit(
    path: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CLIPViT:
    """Load the weights that `find_clip_vit` finds, frozen; UserError lists all tensors that do not fit."""
    return load(CLIPViT, CLIPViTSizes, find_clip_vit(path), device, dtype)


def find_clip_vit(path: Path | None = None) -> Path:
    """Return the weights file: that of a folder, the file itself, or without a path the hub's ViT-B/32.

    Its config and tokenizer are in the same folder. Raises OSError when there is no file or the download
    fails, and UserError when the hub's file does not have the pinned SHA-256.
    """
    if path is None:
        return _from_hub()
    files = [path / name for name in WEIGHTS] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(f"--clip {path}: no such file, and no folder with {' or '.join(WEIGHTS)}")


def is_cached() -> bool:
    """Tell whether ViT-B/32 is in the hub's cache, with what it needs, so that nothing is downloaded."""
    name = _cached_weights()
    return bool(name) and all(_in_cache(part, WEIGHTS[name][0]) for part in BESIDE)


def _in_cache(file: str, revision: str) -> bool:
    return isinstance(try_to_load_from_cache(REPOSITORY, file, revision=revision), str)


def _cached_weights() -> str | None:
    """Return the name of the weights file that is in the hub's cache."""
    return next((name for name, (revision, _) in WEIGHTS.items() if _in_cache(name, revision)), None)


def _from_hub() -> Path:
    """Return the weights file that is in the hub's cache already, else download one, with what it needs."""
    name = _cached_weights() or next(iter(WEIGHTS))
    revision, sha256 = WEIGHTS[name]
    try:
        file, *_ = [hub_file(REPOSITORY, part, revision) for part in (name, *BESIDE)]
    except OSError as error:
        raise OSError(
            f"could not download CLIP ViT-B/32 ({error}).\n"
            f"Fetch {', '.join((name, *BESIDE))} from\n"
            f"  https://huggingface.co/{REPOSITORY}/tree/{revision}\n"
            "into a folder and pass it as --clip FOLDER"
        ) from error
    return check_sha256(file, sha256)
