"""The FLUX.2 transformer, under the names of the original checkpoints.

Matches black-forest-labs/flux2, `src/flux2/model.py`; sizes come from a checkpoint's header, as in
`flux/model.py`. Unlike FLUX.1 it has no biases, one modulation for all blocks of a kind, gated MLPs and four
axes of positions. Reference images, which FLUX.2 can take beside the text, are left out.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.errors import UserError
from flux.layers import (
    DoubleStream,
    LastLayer,
    MLPEmbedder,
    Modulation,
    QKNorm,
    SelfAttention,
    SingleStream,
    check_axes,
    rope_table,
    timestep_embedding,
)
from flux.sizes import Shapes, config_axes, config_number, count_names, heads_of, shape_of
from flux.transformer import Transformer, shifted_times


@dataclass(frozen=True)
class Flux2Sizes:
    """Everything that distinguishes one FLUX.2-shaped transformer from another."""

    in_channels: int
    out_channels: int
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
        """Read the sizes from a checkpoint's header; UserError when it is no FLUX.2.

        The rotary axes are not in the file: four quarters of the head size and theta 2,000, unless `config`
        says otherwise (`axes_dims_rope` and `rope_theta`, as diffusers spells them).
        """
        shape_of(shapes, "double_stream_modulation_img.lin.weight", 2)  # FLUX.1 has all the others
        hidden_size, in_channels = shape_of(shapes, "img_in.weight", 2)
        num_heads, head_dim = heads_of(shapes, hidden_size)
        return cls(
            in_channels=in_channels,
            out_channels=shape_of(shapes, "final_layer.linear.weight", 2)[0],
            txt_size=shape_of(shapes, "txt_in.weight", 2)[1],
            hidden_size=hidden_size,
            mlp_size=shape_of(shapes, "double_blocks.0.img_mlp.2.weight", 2)[1],
            num_heads=num_heads,
            depth=count_names(shapes, "double_blocks."),
            depth_single=count_names(shapes, "single_blocks."),
            guidance="guidance_in.in_layer.weight" in shapes,
            axes=config_axes(config, (head_dim // 4,) * 4),
            theta=config_number(config, "rope_theta", 2000),
        )


class SwiGLU(nn.Module):
    """Multiply one half of the channels by the other (Shazeer 2020): (..., 2 d) -> (..., d), gates first."""

    def forward(self, x: Tensor) -> Tensor:
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class Flux2DoubleBlock(DoubleStream):
    """Both streams with a gated MLP; their modulation is given."""

    def __init__(self, hidden_size: int, head_dim: int, mlp_size: int):
        super().__init__()
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_attn", SelfAttention(hidden_size, head_dim, bias=False))
            mlp = nn.Sequential(
                nn.Linear(hidden_size, 2 * mlp_size, bias=False),
                SwiGLU(),
                nn.Linear(mlp_size, hidden_size, bias=False),
            )
            self.add_module(f"{stream}_mlp", mlp)


class Flux2SingleBlock(SingleStream):
    """Attention beside a gated MLP; the modulation is given."""

    def __init__(self, hidden_size: int, head_dim: int, mlp_size: int):
        super().__init__()
        self.split = [hidden_size] * 3 + [2 * mlp_size]
        self.linear1 = nn.Linear(hidden_size, sum(self.split), bias=False)
        self.linear2 = nn.Linear(hidden_size + mlp_size, hidden_size, bias=False)
        self.norm = QKNorm(head_dim)
        self.mlp_act = SwiGLU()


class Flux2(Transformer):
    """Predict the velocity, noise - latents, of packed latents at time t."""

    SAMPLER = {"steps": 50, "guidance": 4.0, "cfg": 4.0}  # klein base's; guidance is dev's
    T_MEAN = math.log(3)  # a shift by 3, with which ai-toolkit trains it

    def __init__(self, sizes: Flux2Sizes):
        super().__init__()
        check_axes(sizes.axes, sizes.head_dim)
        self.sizes = sizes
        d, block = sizes.hidden_size, (sizes.hidden_size, sizes.head_dim, sizes.mlp_size)
        self.img_in = nn.Linear(sizes.in_channels, d, bias=False)
        self.txt_in = nn.Linear(sizes.txt_size, d, bias=False)
        self.time_in = MLPEmbedder(256, d, bias=False)
        self.guidance_in = MLPEmbedder(256, d, bias=False) if sizes.guidance else None
        self.double_stream_modulation_img = Modulation(d, chunks=6, bias=False)
        self.double_stream_modulation_txt = Modulation(d, chunks=6, bias=False)
        self.single_stream_modulation = Modulation(d, chunks=3, bias=False)
        self.double_blocks = nn.ModuleList(Flux2DoubleBlock(*block) for _ in range(sizes.depth))
        self.single_blocks = nn.ModuleList(Flux2SingleBlock(*block) for _ in range(sizes.depth_single))
        self.final_layer = LastLayer(d, sizes.out_channels, bias=False)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        t: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity of the image tokens.

        img (b, l_img, in_channels), txt (b, l_txt, txt_size) in the weights' dtype; img_ids (b, l_img, 4):
        0, row, column, 0, and txt_ids (b, l_txt, 4): 0, 0, 0, place; t (b,) in [0, 1], guidance (b,), both
        float32. -> (b, l_img, out_channels). Raises UserError when the model wants guidance and gets none.
        """
        vec = self.time_in(timestep_embedding(t))  # (b, hidden_size)
        if self.guidance_in is not None:
            if guidance is None:
                raise UserError("this model has a guidance input: pass guidance, a (b,) tensor such as 4.0")
            vec = vec + self.guidance_in(timestep_embedding(guidance))
        activated = F.silu(vec)
        img_mod = self.double_stream_modulation_img(activated)
        txt_mod = self.double_stream_modulation_txt(activated)
        mod = self.single_stream_modulation(activated)
        pe = rope_table(torch.cat([txt_ids, img_ids], dim=1), self.sizes.axes, self.sizes.theta)

        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, img_mod, txt_mod, pe)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, mod, pe)
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def velocity(self, latents: Tensor, t: Tensor, guidance: float | Tensor | None, txt: Tensor) -> Tensor:
        """Return the velocity at latents (b, c, h, w), each pixel of which is a token; see `Transformer`."""
        b, _, h, w = latents.shape
        img_ids, txt_ids = position_ids(b, h, w, txt.shape[1], latents.device)
        guided = None if guidance is None else guidance * torch.ones(b, device=latents.device)
        img = self(rearrange(latents, "b c h w -> b (h w) c"), img_ids, txt, txt_ids, t, guided)
        return rearrange(img, "b (h w) c -> b c h w", h=h)

    def times(self, steps: int, height: int, width: int) -> list[float]:
        """Return the `steps` + 1 times from 1 to 0.

        Up to 4,300 image tokens mu is linear in the steps, from a value of its own at 10 to FLUX.1's at 200,
        both linear in the tokens; beyond, it is FLUX.1's (`src/flux2/sampling.py: compute_empirical_mu`).
        """
        image_tokens = height * width
        mu10 = 8.73809524e-05 * image_tokens + 1.89833333
        mu200 = 1.6927e-4 * image_tokens + 0.45666666
        mu = mu200 if image_tokens > 4300 else mu10 + (mu200 - mu10) * (steps - 10) / (200 - 10)
        return shifted_times(steps, mu)


def position_ids(
    batch: int, height: int, width: int, txt_length: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return the positions of latents of height x width, a token each, and of the text.

    img_ids (b, height * width, 4): 0, row, column, 0; txt_ids (b, txt_length, 4): 0, 0, 0, position.
    """
    zero, rows, columns, places = (torch.arange(n, device=device) for n in (1, height, width, txt_length))
    img_ids = torch.cartesian_prod(zero, rows, columns, zero)
    txt_ids = torch.cartesian_prod(zero, zero, zero, places)
    return img_ids.expand(batch, -1, -1), txt_ids.expand(batch, -1, -1)
