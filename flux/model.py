"""The FLUX.1 transformer, under the names of the original checkpoints.

Matches black-forest-labs/flux, `src/flux/model.py`. Sizes come from a checkpoint's header, so relatives of
FLUX.1 with other depths or widths go through the same lines.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.errors import UserError
from flux.layers import (
    DoubleBlock,
    LastLayer,
    MLPEmbedder,
    SingleBlock,
    check_axes,
    rope_table,
    timestep_embedding,
)
from flux.sizes import Shapes, config_axes, config_number, count_names, heads_of, shape_of
from flux.transformer import Transformer, shifted_times


@dataclass(frozen=True)
class FluxSizes:
    """Everything that distinguishes one FLUX.1-shaped transformer from another."""

    in_channels: int
    out_channels: int
    pooled_size: int
    txt_size: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    depth: int
    depth_single: int
    guidance: bool
    axes: tuple[int, ...]
    theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_shapes(cls, shapes: Shapes, config: dict) -> Self:
        """Read the sizes from a checkpoint's header; UserError when it is no FLUX.

        The rotary axes are not in the file: (d/8, 7d/16, 7d/16) of the head size d and theta 10,000, unless
        `config` says otherwise (`axes_dims_rope`, as diffusers spells it, and `theta`).
        """
        hidden_size, in_channels = shape_of(shapes, "img_in.weight", 2)
        num_heads, head_dim = heads_of(shapes, hidden_size)
        return cls(
            in_channels=in_channels,
            out_channels=shape_of(shapes, "final_layer.linear.weight", 2)[0],
            pooled_size=shape_of(shapes, "vector_in.in_layer.weight", 2)[1],
            txt_size=shape_of(shapes, "txt_in.weight", 2)[1],
            hidden_size=hidden_size,
            mlp_size=shape_of(shapes, "double_blocks.0.img_mlp.0.weight", 2)[0],
            num_heads=num_heads,
            depth=count_names(shapes, "double_blocks."),
            depth_single=count_names(shapes, "single_blocks."),
            guidance="guidance_in.in_layer.weight" in shapes,
            axes=config_axes(config, (head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16)),
            theta=config_number(config, "theta", 10_000),
        )


class Flux(Transformer):
    """Predict the velocity, noise - latents, of packed latents at time t."""

    SAMPLER = {"steps": 30, "guidance": 3.5, "cfg": 1.0}  # the paper's

    def __init__(self, sizes: FluxSizes):
        super().__init__()
        check_axes(sizes.axes, sizes.head_dim)
        self.sizes = sizes
        d, block = sizes.hidden_size, (sizes.hidden_size, sizes.head_dim, sizes.mlp_size)
        self.img_in = nn.Linear(sizes.in_channels, d)
        self.txt_in = nn.Linear(sizes.txt_size, d)
        self.time_in = MLPEmbedder(256, d)
        self.vector_in = MLPEmbedder(sizes.pooled_size, d)
        self.guidance_in = MLPEmbedder(256, d) if sizes.guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(*block) for _ in range(sizes.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(*block) for _ in range(sizes.depth_single))
        self.final_layer = LastLayer(d, sizes.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        t: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity of the image tokens.

        img (b, l_img, in_channels), txt (b, l_txt, txt_size), pooled (b, pooled_size) in the weights' dtype;
        img_ids (b, l_img, 3), txt_ids (b, l_txt, 3); t (b,) in [0, 1], guidance (b,), both float32.
        -> (b, l_img, out_channels). Raises UserError when the model wants guidance and gets none.
        """
        vec = self.time_in(timestep_embedding(t)) + self.vector_in(pooled)  # (b, hidden_size)
        if self.guidance_in is not None:
            if guidance is None:
                raise UserError("this model has a guidance input: pass guidance, a (b,) tensor such as 3.5")
            vec = vec + self.guidance_in(timestep_embedding(guidance))
        activated = F.silu(vec)  # here, since the modulation of every block begins with it
        pe = rope_table(torch.cat([txt_ids, img_ids], dim=1), self.sizes.axes, self.sizes.theta)

        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, activated, pe)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, activated, pe)
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def velocity(
        self, latents: Tensor, t: Tensor, guidance: float | Tensor | None, txt: Tensor, pooled: Tensor
    ) -> Tensor:
        """Return the velocity at latents (b, c, h, w), of which 2 x 2 are a token; see `Transformer`."""
        b, _, h, w = latents.shape
        img_ids, txt_ids = position_ids(b, h, w, txt.shape[1], latents.device)
        guided = None if guidance is None else guidance * torch.ones(b, device=latents.device)
        return unpack(self(pack(latents), img_ids, txt, txt_ids, t, pooled, guided), h, w)

    def times(self, steps: int, height: int, width: int) -> list[float]:
        """Return the `steps` + 1 times from 1 to 0.

        Shifted towards the noise by mu, which grows linearly from 0.5 at 256 image tokens to 1.15 at 4,096
        (dev); evenly spaced without a guidance input (schnell). Matches `src/flux/sampling.py`.
        """
        image_tokens = height * width // 4
        if self.guidance_in is None:
            return torch.linspace(1, 0, steps + 1).tolist()
        return shifted_times(steps, 0.5 + (1.15 - 0.5) * (image_tokens - 256) / (4096 - 256))


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
