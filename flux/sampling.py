"""Rectified flow on packed latents: noise, times, the Euler loop, pixels.

x_t = (1 - t) latents + t noise, so t = 1 is noise and t = 0 the image; the model predicts noise - latents.
Matches black-forest-labs/flux `src/flux/sampling.py` and, where names begin with `flux2_`, flux2
`src/flux2/sampling.py`, with the state kept in float32 as in diffusers' `FlowMatchEulerDiscreteScheduler`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from flux.autoencoder import AutoEncoder
from flux.errors import UserError
from flux.model import Flux


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
    model: Flux,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    txt: Tensor,
    pooled: Tensor,
    guidance: float,
    reduction: str = "mean",
) -> Tensor:
    """Return the mean squared error of the predicted velocity, a float32 scalar (L_diff of the paper).

    latents and noise (b, c, h, w) and t (b,) float32, txt (b, l, d) and pooled (b, d) in the model's dtype.
    reduction: "none" for the squared errors themselves, of image tokens (b, h/2 * w/2, 4 c).
    """
    b, _, h, w = latents.shape
    img_ids, txt_ids = position_ids(b, h, w, txt.shape[1], latents.device)
    img = pack(add_noise(latents, noise, t)).to(txt.dtype)
    guided = torch.full((b,), guidance, device=latents.device)
    velocity = model(img, img_ids, txt, txt_ids, t, pooled, guided)
    target = pack(velocity_target(latents, noise))
    return F.mse_loss(velocity.float(), target, reduction=reduction)


def euler_step(x: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """Move x along the velocity from time t to t_next < t."""
    return x + (t_next - t) * velocity.float()


def pack(latents: Tensor) -> Tensor:
    """Latents (b, c, h, w) -> image tokens (b, h/2 * w/2, 4 c), row by row; h and w even."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(img: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack`: image tokens -> latents (b, c, height, width), sizes in latent pixels."""
    return rearrange(img, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height // 2, w=width // 2, ph=2, pw=2)


def position_ids(
    batch: int, height: int, width: int, txt_length: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return the positions of latents of height x width and of the text.

    img_ids (b, height/2 * width/2, 3): 0, row, column; txt_ids (b, txt_length, 3): zeros.
    """
    sides = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    txt_ids = torch.zeros(batch, txt_length, 3, dtype=img_ids.dtype, device=device)
    return img_ids.expand(batch, -1, -1), txt_ids


def flux2_position_ids(
    batch: int, height: int, width: int, txt_length: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return the positions of FLUX.2's latents of height x width, a token each, and of the text.

    img_ids (b, height * width, 4): 0, row, column, 0; txt_ids (b, txt_length, 4): 0, 0, 0, position.
    """
    zero, rows, columns, places = (torch.arange(n, device=device) for n in (1, height, width, txt_length))
    img_ids = torch.cartesian_prod(zero, rows, columns, zero)
    txt_ids = torch.cartesian_prod(zero, zero, zero, places)
    return img_ids.expand(batch, -1, -1), txt_ids.expand(batch, -1, -1)


def draw_noise(seeds: list[int], channels: int, height: int, width: int) -> Tensor:
    """Draw one picture's noise per seed, float32 (b, channels, height, width) on the CPU.

    A seed therefore gives the same picture on every device and in any batch.
    """
    shape = (1, channels, height, width)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def schedule(steps: int, image_tokens: int, shifted: bool = True) -> list[float]:
    """Return the `steps` + 1 times from 1 to 0.

    Shifted towards the noise by mu, which grows linearly from 0.5 at 256 image tokens to 1.15 at 4,096 (dev);
    evenly spaced when not `shifted` (schnell).
    """
    if not shifted:
        return torch.linspace(1, 0, steps + 1).tolist()
    return shifted_times(steps, 0.5 + (1.15 - 0.5) * (image_tokens - 256) / (4096 - 256))


def flux2_schedule(steps: int, image_tokens: int) -> list[float]:
    """Return the `steps` + 1 times of FLUX.2 from 1 to 0.

    Up to 4,300 image tokens mu is linear in the steps, from a value of its own at 10 to FLUX.1's at 200, both
    linear in the tokens; beyond, it is FLUX.1's (flux2 `src/flux2/sampling.py: compute_empirical_mu`).
    """
    mu10 = 8.73809524e-05 * image_tokens + 1.89833333
    mu200 = 1.6927e-4 * image_tokens + 0.45666666
    mu = mu200 if image_tokens > 4300 else mu10 + (mu200 - mu10) * (steps - 10) / (200 - 10)
    return shifted_times(steps, mu)


def shifted_times(steps: int, mu: float) -> list[float]:
    """Return `steps` + 1 times from 1 to 0, evenly spaced and then shifted towards the noise by mu."""
    t = torch.linspace(1, 0, steps + 1)
    return (math.exp(mu) / (math.exp(mu) + (1 / t - 1))).tolist()


@torch.inference_mode()
def denoise(
    model: Flux,
    noise: Tensor,
    txt: Tensor,
    pooled: Tensor,
    steps: int = 30,
    guidance: float = 3.5,
    cfg: float = 1.0,
    negative: tuple[Tensor, Tensor] | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Integrate from noise (b, c, h, w) to latents of the same shape, float32, on the model's device.

    txt (b, l, d), pooled (b, d). With cfg > 1 every step also runs the `negative` (txt, pooled) and the
    velocity becomes negative + cfg * (positive - negative); UserError when there is no negative. The times
    are shifted if the model has a guidance input (dev), else even (schnell). `progress` is called with
    the number of steps done.
    """
    batch, _, height, width = noise.shape
    device, dtype = model.img_in.weight.device, model.img_in.weight.dtype
    img_ids, txt_ids = position_ids(batch, height, width, txt.shape[1], device)
    guided = torch.full((batch,), guidance, device=device)

    def velocity(img: Tensor, t: Tensor, txt: Tensor, pooled: Tensor) -> Tensor:
        return model(img, img_ids, txt, txt_ids, t, pooled, guided)

    img = pack(noise).to(device)
    times = schedule(steps, img.shape[1], shifted=model.sizes.guidance)
    img = integrate(velocity, img, times, (txt, pooled), cfg, negative, dtype, progress)
    return unpack(img, height, width)


@torch.inference_mode()
def flux2_denoise(
    model: nn.Module,
    noise: Tensor,
    txt: Tensor,
    steps: int = 50,
    cfg: float = 4.0,
    negative: tuple[Tensor] | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Integrate as `denoise` does, with FLUX.2 klein: a token is a pixel of noise (b, c, h, w).

    model: called with img, img_ids, txt, txt_ids, t. txt (b, l, d); negative: (txt,), in the original that of
    "". The defaults are for klein base; the distilled one takes 4 steps and cfg 1.
    """
    batch, _, height, width = noise.shape
    device, dtype = model.img_in.weight.device, model.img_in.weight.dtype
    img_ids, txt_ids = flux2_position_ids(batch, height, width, txt.shape[1], device)

    def velocity(img: Tensor, t: Tensor, txt: Tensor) -> Tensor:
        return model(img, img_ids, txt, txt_ids, t)

    img = rearrange(noise, "b c h w -> b (h w) c").to(device)
    times = flux2_schedule(steps, img.shape[1])
    img = integrate(velocity, img, times, (txt,), cfg, negative, dtype, progress)
    return rearrange(img, "b (h w) c -> b c h w", h=height)


def integrate(
    velocity: Callable[..., Tensor],
    img: Tensor,
    times: list[float],
    prompt: tuple[Tensor, ...],
    cfg: float,
    negative: tuple[Tensor, ...] | None,
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> Tensor:
    """Move img (b, l, c) from the first of the times to the last; the rest is as for `denoise`.

    velocity: called with img, t (b,) float32 and the parts of a prompt, the tensors of the prompts and img in
    `dtype`, on img's device.
    """
    if cfg > 1 and negative is None:
        raise UserError(f"cfg {cfg} needs a negative prompt; 1 turns it off")
    prompts = [prompt, negative] if cfg > 1 else [prompt]
    prompts = [[part.to(img.device, dtype) for part in prompt] for prompt in prompts]
    for step, (t, t_next) in enumerate(zip(times, times[1:]), 1):
        t_batch = torch.full((len(img),), t, device=img.device)
        velocities = [velocity(img.to(dtype), t_batch, *prompt) for prompt in prompts]
        change = velocities[0]
        if cfg > 1:
            change = velocities[1] + cfg * (change - velocities[1])
        img = euler_step(img, change, t, t_next)
        progress(step)
    return img


@torch.inference_mode()
def generate(
    model: Flux,
    autoencoder: AutoEncoder,
    prompt: tuple[Tensor, Tensor],
    seeds: list[int],
    size: tuple[int, int],
    tile: int | None = None,
    **settings,
) -> list[Image.Image]:
    """Make one picture of `size` (height, width) per seed, all in one batch.

    prompt: txt (b, l, d) and pooled (b, d), of each seed, or (1, ...) of all; tile: as for
    `AutoEncoder.decode`; settings: those of `denoise`.
    Both sides are multiples of the pixels per image token, twice the autoencoder's reduction.
    """
    height, width = (side // autoencoder.sizes.reduction for side in size)
    noise = draw_noise(seeds, autoencoder.sizes.z_channels, height, width)
    txt, pooled = (part.expand(len(seeds), *part.shape[1:]) for part in prompt)
    latents = denoise(model, noise, txt, pooled, **settings)
    # One after the other, because a picture takes more memory in the autoencoder than in the transformer.
    pixels = [to_pixels(autoencoder.decode(one, tile))[0] for one in latents.split(1)]
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def to_pixels(image: Tensor) -> Tensor:
    """Images (b, 3, h, w) in [-1, 1] -> uint8 (b, h, w, 3) on the CPU, rounded as diffusers does."""
    image = (image.float() / 2 + 0.5).clamp(0, 1)
    return rearrange((image * 255).round().byte().cpu(), "b c h w -> b h w c")
