"""Encode pictures and prompts for FLUX.1, and make training batches of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flux.autoencoder import AutoEncoder
from flux.conditioner import Conditioner
from flux.sampling import draw_times
from run.settings import Training


@torch.no_grad()
def encode_picture(picture: Tensor, autoencoder: AutoEncoder) -> dict[str, Tensor]:
    """Encode a picture (3, h, w) in [-1, 1]; return its posterior: mean and std, (z, h/8, w/8) on the CPU.

    Both are shifted and scaled as latents are, in float16: 1 MB at 1024 x 1024.
    """
    device = next(autoencoder.parameters()).device
    mean, std = autoencoder.encode_moments(picture[None].to(device))
    return {"mean": mean[0].half().cpu(), "std": std[0].half().cpu()}


@torch.no_grad()
def encode_prompt(prompt: str, conditioner: Conditioner) -> dict[str, Tensor]:
    """Encode a prompt; return txt (l, d) and pooled (d,) on the CPU."""
    txt, pooled = conditioner.encode([prompt])
    return {"txt": txt[0].cpu(), "pooled": pooled[0].cpu()}


def make_batch(
    entries: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]],
    generator: torch.Generator,
    training: Training,
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Stack (posterior, prompt) pairs, draw noise and times, and return the arguments of `flow_loss`."""
    posteriors, prompts = zip(*entries)
    latents = torch.stack([entry["mean"] for entry in posteriors]).float()  # (b, z, h, w)
    if training.latents == "sample":
        std = torch.stack([entry["std"] for entry in posteriors]).float()
        latents = latents + std * torch.randn(std.shape, generator=generator)
    return {
        "latents": latents.to(device),
        "noise": torch.randn(latents.shape, generator=generator).to(device),
        "t": draw_times(len(latents), generator, training.t_mean, training.t_std).to(device),
        "txt": torch.stack([prompt["txt"] for prompt in prompts]).to(device, dtype),
        "pooled": torch.stack([prompt["pooled"] for prompt in prompts]).to(device, dtype),
    }
