"""FLUX's autoencoder: an image to latents and back.

Layers, numbers and tensor names follow black-forest-labs/flux `src/flux/modules/autoencoder.py` (the file
`ae.safetensors`); what FLUX.2 adds follows black-forest-labs/flux2 `src/flux2/autoencoder.py`. Sizes are read
from the file's header, so a smaller autoencoder of the kind loads as well.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import product
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn

from flux.errors import UserError
from flux.sizes import Shapes, config_number, count_names, shape_of

GROUPS = 32  # of every norm


@dataclass(frozen=True)
class AutoEncoderSizes:
    """The defaults are FLUX.1's; latents = scale_factor * (z - shift_factor) have about unit variance.

    FLUX.2's have neither factor: they are packed and normalised, see `PackedNorm`.
    """

    in_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)  # level i has ch * ch_mult[i] channels at 1 / 2**i of the side
    encoder_blocks: int = 2  # residual blocks per level
    decoder_blocks: int = 3
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    packed: bool = False

    def __post_init__(self):
        if self.encoder_blocks == 0 and set(self.ch_mult) != {1}:
            raise UserError(f"only residual blocks can widen: encoder_blocks 0 with ch_mult {self.ch_mult}")
        if self.ch % GROUPS or 0 in self.ch_mult:
            raise UserError(f"{self.ch} channels times {self.ch_mult} are no multiples of {GROUPS}")

    @property
    def reduction(self) -> int:
        """Return the pixels per latent along one side."""
        return self.token_pixels if self.packed else self.token_pixels // 2

    @property
    def token_pixels(self) -> int:
        """Return the pixels per image token along one side: a token is 2 x 2 latents, or a packed one."""
        return 2 ** len(self.ch_mult)

    @property
    def latent_channels(self) -> int:
        return 4 * self.z_channels if self.packed else self.z_channels

    @classmethod
    def from_shapes(cls, shapes: Shapes, config: dict) -> Self:
        """Read the sizes from a checkpoint's header; `config` may give scaling_factor and shift_factor.

        Raises UserError when the tensor names are not those of `ae.safetensors`.
        """
        levels = count_names(shapes, "decoder.up.")  # not the encoder's, which may have no blocks
        if levels == 0 or "encoder.conv_in.weight" not in shapes:
            raise UserError("not a FLUX autoencoder: encoder.conv_in or decoder.up.0.block.0 is missing")
        ch, in_channels, _, _ = shape_of(shapes, "encoder.conv_in.weight", 4)
        widths = [shape_of(shapes, f"decoder.up.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
        return cls(
            in_channels=in_channels,
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            encoder_blocks=count_names(shapes, "encoder.down.0.block."),
            decoder_blocks=count_names(shapes, "decoder.up.0.block."),
            z_channels=shape_of(shapes, "decoder.conv_in.weight", 4)[1],
            scale_factor=config_number(config, "scaling_factor", cls.scale_factor),  # diffusers' names
            shift_factor=config_number(config, "shift_factor", cls.shift_factor),
            packed="bn.running_mean" in shapes,
        )


class AutoEncoder(nn.Module):
    """Image (b, 3, h, w) in [-1, 1] <-> latents (b, c, h / reduction, w / reduction), float32 outside."""

    def __init__(self, sizes: AutoEncoderSizes):
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes)
        self.decoder = Decoder(sizes)
        self.bn = PackedNorm(sizes.z_channels) if sizes.packed else None

    def encode(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the posterior's mean, or with a (CPU) generator a sample of it; see `encode_moments`."""
        mean, std = self.encode_moments(image)
        if generator is None:
            return mean
        # Drawn on the CPU in float32: the same seed then gives the same latents on every device.
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)

    def encode_moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the posterior, already shifted and scaled like latents.

        FLUX.2's latents are the mean itself, packed and normalised: their deviation is 0. Raises UserError
        when a side of the image is not a multiple of the reduction.
        """
        h, w = image.shape[-2:]
        if h % self.sizes.reduction or w % self.sizes.reduction:
            raise UserError(f"image is {h}x{w}, both sides must be multiples of {self.sizes.reduction}")
        mean, logvar = self.encoder(image.to(self.encoder.conv_in.weight.dtype)).float().chunk(2, dim=1)
        if self.bn is not None:
            mean = self.bn(mean)
            return mean, torch.zeros_like(mean)
        std = torch.exp(0.5 * logvar.clamp(-30, 20))  # the clamp is diffusers'; upstream has none
        return self.sizes.scale_factor * (mean - self.sizes.shift_factor), self.sizes.scale_factor * std

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Return the image, clamped to [-1, 1]; to train the decoder call `decoder`, which does not clamp.

        tile: side in unpacked latent pixels of square tiles, which are decoded one by one and blended. Memory
        is then that for decoding one tile and, for each pixel of the image, 4 float32 numbers. The image
        differs a little, since norms and attention see one tile instead of all. Raises UserError when it is
        below 4.
        """
        if self.bn is not None:
            z = self.bn.undo(latents)
        else:
            z = latents / self.sizes.scale_factor + self.sizes.shift_factor
        z = z.to(self.decoder.conv_in.weight.dtype)
        if tile is not None:
            return self._decode_tiles(z, tile)
        return self.decoder(z).float().clamp(-1, 1)

    def _decode_tiles(self, z: Tensor, tile: int) -> Tensor:
        """Decode tiles that overlap by a quarter at least, and average them with weights that fade there."""
        if tile < 4:
            raise UserError(f"tiles of {tile} latent pixels, must be 4 or more")
        b, _, h, w = z.shape
        r, (th, tw) = self.sizes.token_pixels // 2, (min(tile, h), min(tile, w))
        # Positive everywhere, so that the sum of weights is nowhere 0.
        fade = [torch.arange(0.5, n * r, device=z.device) for n in (th, tw)]
        fade = [torch.minimum(x, x.flip(0)).clamp(max=tile * r / 4) for x in fade]
        weight = fade[0][:, None] * fade[1]  # (th r, tw r)
        image = torch.zeros(b, self.sizes.in_channels, h * r, w * r, device=z.device)
        total = torch.zeros(h * r, w * r, device=z.device)
        for y, x in product(starts(h, th), starts(w, tw)):
            part = self.decoder(z[:, :, y : y + th, x : x + tw]).float().clamp(-1, 1)
            place = (..., slice(y * r, (y + th) * r), slice(x * r, (x + tw) * r))
            image[place].add_(part.mul_(weight))
            total[place].add_(weight)
        return image.div_(total)


def starts(length: int, tile: int) -> list[int]:
    """Return where tiles start that cover `length`, evenly, neighbours overlapping by a quarter or more."""
    steps = -(-(length - tile) // max(1, tile - -(-tile // 4)))
    return [round(i * (length - tile) / max(steps, 1)) for i in range(steps + 1)]


class Encoder(nn.Module):
    def __init__(self, sizes: AutoEncoderSizes):
        super().__init__()
        self.conv_in = nn.Conv2d(sizes.in_channels, sizes.ch, 3, padding=1)
        self.down = nn.Sequential()
        d = sizes.ch
        for i, mult in enumerate(sizes.ch_mult):
            level = OrderedDict(block=res_blocks(d, sizes.ch * mult, sizes.encoder_blocks))
            d = sizes.ch * mult
            if i < len(sizes.ch_mult) - 1:
                level["downsample"] = Downsample(d)
            self.down.append(nn.Sequential(level))
        self.mid = mid_blocks(d)
        self.norm_out = group_norm(d)
        z2 = 2 * sizes.z_channels
        self.conv_out = nn.Conv2d(d, z2, 3, padding=1)
        self.quant_conv = nn.Conv2d(z2, z2, 1) if sizes.packed else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """image: (b, 3, h, w) -> mean and log variance (b, 2 z, ...) of unpacked latents, unscaled."""
        x = self.mid(self.down(self.conv_in(image)))
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class Decoder(nn.Module):
    def __init__(self, sizes: AutoEncoderSizes):
        super().__init__()
        widths = [sizes.ch * mult for mult in sizes.ch_mult]
        z = sizes.z_channels
        self.post_quant_conv = nn.Conv2d(z, z, 1) if sizes.packed else nn.Identity()
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = mid_blocks(widths[-1])
        self.up = nn.ModuleList()
        for i, d in enumerate(widths):
            wider = widths[min(i + 1, len(widths) - 1)]
            level = OrderedDict(block=res_blocks(wider, d, sizes.decoder_blocks))
            if i > 0:
                level["upsample"] = Upsample(d)
            self.up.append(nn.Sequential(level))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], sizes.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z: (b, z, ...), unpacked and unscaled latents -> image (b, 3, h, w), not clamped."""
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):  # stored by resolution, finest first
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PackedNorm(nn.BatchNorm2d):
    """Pack 2 x 2 latents into channels, as `flux.model.pack` does, and normalise these: FLUX.2's latents.

    A batch norm by its names only: it normalises by the stored statistics, always.
    """

    def __init__(self, z_channels: int):
        super().__init__(4 * z_channels, eps=1e-4, affine=False)

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, (4 z, 1, 1) float32."""
        mean, variance = (x.float()[:, None, None] for x in (self.running_mean, self.running_var))
        return mean, torch.sqrt(variance + self.eps)

    def forward(self, z: Tensor) -> Tensor:
        """z: (b, z, h, w), both sides even -> latents (b, 4 z, h / 2, w / 2)."""
        mean, std = self.statistics
        return (F.pixel_unshuffle(z, 2) - mean) / std  # channels (c ph pw)

    def undo(self, latents: Tensor) -> Tensor:
        mean, std = self.statistics
        return F.pixel_shuffle(latents * std + mean, 2)


def group_norm(d: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, d, eps=1e-6)


def res_blocks(d_in: int, d_out: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(d_in if j == 0 else d_out, d_out) for j in range(count)))


def mid_blocks(d: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(block_1=ResBlock(d, d), attn_1=Attention(d), block_2=ResBlock(d, d)))


class ResBlock(nn.Module):
    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.norm1 = group_norm(d_in)
        self.conv1 = nn.Conv2d(d_in, d_out, 3, padding=1)
        self.norm2 = group_norm(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(d_in, d_out, 1) if d_in != d_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Every position attends to every other one, with a single head as wide as the features."""

    def __init__(self, d: int):
        super().__init__()
        self.norm = group_norm(d)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(d, d, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        tokens = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        # Fused kernels want the channels of a position side by side in memory.
        h = F.scaled_dot_product_attention(*(part.contiguous() for part in tokens))
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.conv = nn.Conv2d(d, d, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and below only


class Upsample(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.conv = nn.Conv2d(d, d, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
