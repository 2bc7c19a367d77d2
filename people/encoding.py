"""Encode pictures and prompts for a base model, and make training batches of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flux.autoencoder import AutoEncoder
from flux.sampling import draw_times
from flux.transformer import Prompt
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
def encode_prompt(prompt: str, conditioner: nn.Module) -> Prompt:
    """Encode a prompt; return txt (l, d) and, of FLUX.1, pooled (d,) on the CPU."""
    return {name: part[0].cpu() for name, part in conditioner.encode([prompt]).items()}


def encode_negative(cfg: float, conditioner: nn.Module) -> Prompt | None:
    """Encode the empty prompt that classifier-free guidance leads away from, (1, l, d); None without it."""
    return stack_prompts([encode_prompt("", conditioner)]) if cfg > 1 else None


def stack_prompts(prompts: Sequence[Prompt]) -> Prompt:
    """Return encoded prompts as a batch: txt (b, l, d) and so on."""
    return {name: torch.stack([prompt[name] for prompt in prompts]) for name in prompts[0]}


def make_batch(
    entries: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]],
    generator: torch.Generator,
    training: Training,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Stack (posterior, prompt) pairs, draw noise and times, and return the arguments of `flow_loss`.

    The pairs may be on the device already. Random numbers are drawn on the CPU, so that a seed gives the same
    on every device. The host does not wait for the device.
    """
    posteriors, prompts = zip(*entries)
    mean, std = (torch.stack([entry[name] for entry in posteriors]) for name in ("mean", "std"))
    prompt = {name: part.to(dtype) for name, part in stack_prompts(prompts).items()}
    deviation = torch.zeros(mean.shape)  # of the sample from its mean, in standard deviations
    if training.latents == "sample":
        deviation.normal_(generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    t = draw_times(len(mean), generator, training.t_mean, training.t_std)

    (mean, std), parts = send([mean, std], device), send([*prompt.values()], device)
    deviation, noise, t = send([deviation, noise, t], device)
    latents = mean.float() + std.float() * deviation  # (b, z, h, w)
    return {"latents": latents, "noise": noise, "t": t, **dict(zip(prompt, parts))}


def send(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Copy tensors of one dtype to the device, in one piece and without waiting, unless they are there."""
    if tensors[0].device.type == device.type:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":  # only a copy from pinned memory does not wait
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.to(device).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
