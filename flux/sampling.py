"""Rectified flow on latents: noise, times, the Euler loop, pixels.

x_t = (1 - t) latents + t noise, so t = 1 is noise and t = 0 the image; the model predicts noise - latents.
Matches black-forest-labs/flux `src/flux/sampling.py` and flux2 `src/flux2/sampling.py`, with the state kept
in float32 as in diffusers' `FlowMatchEulerDiscreteScheduler`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux.autoencoder import AutoEncoder
from flux.errors import UserError
from flux.transformer import Prompt, Transformer


def add_noise(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Interpolate: latents and noise (b, ...), t (b,) -> x_t."""
    t = t.view(-1, *[1] * (latents.dim() - 1))
    return (1 - t) * latents + t * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the derivative of x_t by t, which the model learns."""
    return noise - latents


def draw_times(n: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Draw training times, logit-normal (Esser et al. 2024): (n,) in (0, 1), on the CPU."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def spread_times(n: int, start: float, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return stratified times of the same distribution: (n,); the first k of them cover it evenly for any k.

    They are multiples of the golden ratio modulo 1, shifted by `start` in [0, 1), put through the
    distribution's quantile function.
    """
    even = (start + torch.arange(1, n + 1, dtype=torch.float64) * (math.sqrt(5) - 1) / 2) % 1
    return torch.sigmoid(mean + std * torch.special.ndtri(even.clamp(1e-6, 1 - 1e-6))).float()


def flow_loss(
    model: Transformer,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    guidance: float,
    reduction: str = "mean",
    **prompt: Tensor,
) -> Tensor:
    """Return the mean squared error of the predicted velocity, a float32 scalar (L_diff of the paper).

    latents and noise (b, c, h, w) and t (b,) float32, the prompt in the model's dtype.
    reduction: "none" for the squared errors themselves, (b, c, h, w).
    """
    noisy = add_noise(latents, noise, t).to(prompt["txt"].dtype)
    velocity = model.velocity(noisy, t, guidance, **prompt)
    return F.mse_loss(velocity.float(), velocity_target(latents, noise), reduction=reduction)


def euler_step(x: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """Move x along the velocity from time t to t_next < t."""
    return x + (t_next - t) * velocity.float()


def draw_noise(seeds: list[int], channels: int, height: int, width: int) -> Tensor:
    """Draw one picture's noise per seed, float32 (b, channels, height, width) on the CPU.

    A seed therefore gives the same picture on every device and in any batch.
    """
    shape = (1, channels, height, width)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def denoise(
    model: Transformer,
    noise: Tensor,
    prompt: Prompt,
    steps: int = 30,
    guidance: float = 3.5,
    cfg: float = 1.0,
    negative: Prompt | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Integrate from noise (b, c, h, w) to latents of the same shape, float32, on the model's device.

    prompt: of each sample, or (1, ...) of all. With cfg > 1 every step also runs the `negative` prompt and
    the velocity becomes negative + cfg * (positive - negative); UserError when there is none. `progress` is
    called with the number of steps done.
    """
    if cfg > 1 and negative is None:
        raise UserError(f"cfg {cfg} needs a negative prompt; 1 turns it off")
    device, dtype = model.img_in.weight.device, model.img_in.weight.dtype
    prompts = [prompt, negative] if cfg > 1 else [prompt]
    expand = lambda part: part.to(device, dtype).expand(len(noise), *part.shape[1:])
    prompts = [{name: expand(part) for name, part in one.items()} for one in prompts]
    x, times = noise.to(device), model.times(steps, *noise.shape[2:])
    for step, (t, t_next) in enumerate(zip(times, times[1:]), 1):
        t_batch = torch.full((len(x),), t, device=device)
        velocities = [model.velocity(x.to(dtype), t_batch, guidance, **one) for one in prompts]
        change = velocities[0]
        if cfg > 1:
            change = velocities[1] + cfg * (change - velocities[1])
        x = euler_step(x, change, t, t_next)
        progress(step)
    return x


@torch.inference_mode()
def generate(
    model: Transformer,
    autoencoder: AutoEncoder,
    prompt: Prompt,
    seeds: list[int],
    size: tuple[int, int],
    tile: int | None = None,
    **settings,
) -> list[Image.Image]:
    """Make one picture of `size` (height, width) per seed, all in one batch.

    tile: as for `AutoEncoder.decode`; settings: those of `denoise`.
    Both sides are multiples of `token_pixels` of the autoencoder's sizes.
    """
    height, width = (side // autoencoder.sizes.reduction for side in size)
    noise = draw_noise(seeds, autoencoder.sizes.latent_channels, height, width)
    latents = denoise(model, noise, prompt, **settings)
    # One after the other, because a picture takes more memory in the autoencoder than in the transformer.
    pixels = [to_pixels(autoencoder.decode(one, tile))[0] for one in latents.split(1)]
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def to_pixels(image: Tensor) -> Tensor:
    """Images (b, 3, h, w) in [-1, 1] -> uint8 (b, h, w, 3) on the CPU, rounded as diffusers does."""
    image = (image.float() / 2 + 0.5).clamp(0, 1)
    return rearrange((image * 255).round().byte().cpu(), "b c h w -> b h w c")
