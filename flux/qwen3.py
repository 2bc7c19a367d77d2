"""The lower layers of a Qwen3 (FLUX.2 klein uses those of 4B and 8B): tokens to a sequence of text features.

Names are those of `text_encoder/` and of Qwen's own files; Yang et al. 2025, "Qwen3 Technical Report". Left
out: the layers above those that FLUX.2 looks at, the last norm, the output head, the cache.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.errors import UserError
from flux.layers import rope_table
from flux.sizes import Shapes, config_number, shape_of
from flux.t5 import RMSNorm

LAYERS = (9, 18, 27)  # after which FLUX.2 klein takes the hidden states; 0 would be the embeddings


@dataclass(frozen=True)
class Qwen3Sizes:
    vocab_size: int
    hidden_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    theta: float
    eps: float
    layers: tuple[int, ...] = LAYERS  # rising; no layer above the last of them is built

    @classmethod
    def from_shapes(cls, shapes: Shapes, config: dict) -> Self:
        """Read the sizes from a checkpoint's header; UserError when it is no Qwen3.

        Not in the header are the rotary base, 1,000,000 unless `config` has `rope_theta`, there or in
        `rope_parameters` as transformers 5 writes it, and the norms' `rms_norm_eps`, 1e-6.
        """
        vocab_size, hidden_size = shape_of(shapes, "model.embed_tokens.weight", 2)
        attention = "model.layers.0.self_attn"
        (head_dim,) = shape_of(shapes, f"{attention}.q_norm.weight", 1)
        rows = {x: shape_of(shapes, f"{attention}.{x}_proj.weight", 2)[0] for x in "qk"}
        if head_dim % 2 or rows["k"] % head_dim or rows["q"] % rows["k"]:
            raise UserError(f"its q and k of {rows['q']} and {rows['k']} rows do not divide into {head_dim}")
        rope = config.get("rope_parameters", config)
        if not isinstance(rope, dict):
            raise UserError(f"its config.json has rope_parameters {rope!r}, must be an object")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            head_dim=head_dim,
            num_heads=rows["q"] // head_dim,
            num_kv_heads=rows["k"] // head_dim,
            mlp_size=shape_of(shapes, "model.layers.0.mlp.gate_proj.weight", 2)[0],
            theta=config_number(rope, "rope_theta", 1_000_000),
            eps=config_number(config, "rms_norm_eps", 1e-6),
        )


class Qwen3(nn.Module):
    def __init__(self, sizes: Qwen3Sizes):
        super().__init__()
        self.sizes = sizes
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.model.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers[-1]))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the hidden states after `sizes.layers`, joined along the channels, the lowest layer first.

        tokens (b, l), padded on the right; mask (b, l), True or 1 where a token is no padding
        -> (b, l, layers * hidden_size). Padding sees its prompt, and nothing sees padding.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        pe = rope_table(places[None, :, None], (self.sizes.head_dim,), self.sizes.theta)
        seen = (places[:, None] >= places) & mask.bool()[:, None, None]  # (b, 1, query, key)
        x, states = self.model.embed_tokens(tokens), []
        for number, layer in enumerate(self.model.layers, 1):
            x = layer(x, pe, seen)
            if number in self.sizes.layers:
                states.append(x)
        return torch.cat(states, dim=-1)


class Layer(nn.Module):
    def __init__(self, sizes: Qwen3Sizes):
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.eps)
        self.self_attn = SelfAttention(sizes)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.eps)
        self.mlp = GatedMLP(sizes.hidden_size, sizes.mlp_size)

    def forward(self, x: Tensor, pe: Tensor, seen: Tensor) -> Tensor:
        """x: (b, l, d) -> (b, l, d)."""
        x = x + self.self_attn(self.input_layernorm(x), pe, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class SelfAttention(nn.Module):
    """Grouped-query attention: several heads of q share one head of k and v."""

    def __init__(self, sizes: Qwen3Sizes):
        super().__init__()
        d_q, d_kv = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden_size, d_q, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(sizes.hidden_size, d_kv, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(d_q, sizes.hidden_size, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(sizes.head_dim, sizes.eps) for _ in range(2))

    def forward(self, x: Tensor, pe: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b l h d", d=self.q_norm.weight.numel())
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_halves(self.q_norm(q), pe), rotate_halves(self.k_norm(k), pe)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b, h, l, d)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.o_proj(rearrange(x, "b h l d -> b l (h d)"))


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden_size, mlp_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate_halves(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate channel k of x (b, l, heads, head_dim) with channel k + head_dim / 2 by pe, in float32."""
    (first, second), (cos, sin) = x.float().chunk(2, dim=-1), pe.unbind(-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)
