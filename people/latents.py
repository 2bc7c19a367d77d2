"""Photos and prompts encoded once, and batches made of them."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flux.sampling import draw_times
from people.cache import TensorCache, content_key
from people.crops import to_tensor
from people.photos import Box, Size, read_photo

CACHE_VERSION = 1  # raise it whenever `to_tensor` changes a pixel: latents made before are then encoded anew


def make_batch(
    entries: Sequence[tuple[dict, dict]], generator: torch.Generator, args: argparse.Namespace, device, dtype
) -> dict[str, Tensor]:
    """Stack cached (posterior, prompt) pairs and draw noise and times: the arguments of `flow_loss`."""
    posteriors, prompts = zip(*entries)
    latents = torch.stack([entry["mean"] for entry in posteriors]).float()  # (b, z, h, w)
    if args.latents == "sample":
        std = torch.stack([entry["std"] for entry in posteriors]).float()
        latents = latents + std * torch.randn(std.shape, generator=generator)
    return {
        "latents": latents.to(device),
        "noise": torch.randn(latents.shape, generator=generator).to(device),
        "t": draw_times(len(latents), generator, args.t_mean, args.t_std).to(device),
        "txt": torch.stack([prompt["txt"] for prompt in prompts]).to(device, dtype),
        "pooled": torch.stack([prompt["pooled"] for prompt in prompts]).to(device, dtype),
    }


@dataclass(frozen=True)
class Picture:
    """What the trainer sees once in a while: a photo, or a box of it, in the shape it is trained in."""

    path: Path
    shape: Size
    box: Box | None = None
    flip: bool = False
    digest: str | None = None  # SHA-256 of the photo's file, if known

    def key(self, encoder: str) -> str:
        """Name its latents. encoder: whatever identifies the autoencoder."""
        digest = self.digest or hashlib.sha256(self.path.read_bytes()).hexdigest()
        return content_key(CACHE_VERSION, digest, self.shape, self.box, self.flip, encoder)


@torch.no_grad()
def encode_pictures(pictures: Sequence[Picture], autoencoder, encoder: str, cache: TensorCache) -> list[str]:
    """Put the posterior of every picture in the cache and return the keys, in order.

    An entry holds mean and std (z, h, w) in float16, scaled as latents: 1 MB at 1024 x 1024. Pictures that
    are there already are not encoded again. autoencoder: a `flux.AutoEncoder`, called one picture at a time.
    """
    keys, read = [], lru_cache(maxsize=1)(read_photo)  # crops of one photo follow each other
    device = next(autoencoder.parameters()).device
    for picture in tqdm(pictures, "latents", disable=len(pictures) < 50):
        keys.append(key := picture.key(encoder))
        if key not in cache:
            image = to_tensor(read(picture.path), picture.shape, picture.box, picture.flip)
            mean, std = autoencoder.encode_moments(image[None].to(device))
            cache.put(key, {"mean": mean[0].half(), "std": std[0].half()})
    return keys


@torch.no_grad()
def encode_prompts(prompts: Sequence[str], conditioner, encoder: str, cache: TensorCache) -> list[str]:
    """Put txt (l, d) and pooled (d,) of every prompt in the cache and return the keys, in order."""
    keys = []
    for prompt in tqdm(prompts, "prompts", disable=len(prompts) < 50):
        keys.append(key := content_key(prompt, encoder))
        if key not in cache:
            txt, pooled = conditioner.encode([prompt])
            cache.put(key, {"txt": txt[0], "pooled": pooled[0]})
    return keys
