"""The T5-v1.1 encoder (FLUX uses T5-XXL): tokens to a sequence of text features.

Names are those of `text_encoder_2/` and of `t5xxl_*.safetensors`; Raffel et al. 2020, with the gated GELU of
Shazeer 2020. Left out: the decoder, dropout and attention masks (FLUX was trained on unmasked padding).
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.sizes import Shapes, count_names, shape_of

BUCKETS, EXACT, MAX_DISTANCE = 32, 8, 128  # the same in every T5


@dataclass(frozen=True)
class T5Sizes:
    vocab_size: int
    hidden_size: int
    head_dim: int
    num_heads: int
    mlp_size: int
    depth: int

    @classmethod
    def from_shapes(cls, shapes: Shapes, config: dict) -> Self:
        """Read the sizes from a checkpoint's header, which tells all of them; UserError when it is no T5."""
        vocab_size, hidden_size = shape_of(shapes, "shared.weight", 2)
        attention = "encoder.block.0.layer.0.SelfAttention"
        _, num_heads = shape_of(shapes, f"{attention}.relative_attention_bias.weight", 2)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            head_dim=shape_of(shapes, f"{attention}.q.weight", 2)[0] // num_heads,
            num_heads=num_heads,
            mlp_size=shape_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
            depth=count_names(shapes, "encoder.block."),
        )


class T5(nn.Module):
    """Use bfloat16 or float32: the feed-forward layers of T5-XXL overflow float16."""

    IGNORED = ("encoder.embed_tokens.weight",)  # a copy of shared.weight in some files

    def __init__(self, sizes: T5Sizes):
        super().__init__()
        self.sizes = sizes
        self.shared = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(Block(sizes, has_bias_table=i == 0) for i in range(sizes.depth))
        self.encoder.final_layer_norm = RMSNorm(sizes.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (b, l) -> (b, l, hidden_size)."""
        bias = self.encoder.block[0].layer[0].SelfAttention.position_bias(tokens.shape[1])
        x = self.shared(tokens)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


class Block(nn.Module):
    def __init__(self, sizes: T5Sizes, has_bias_table: bool):
        super().__init__()
        attention, mlp = nn.Module(), nn.Module()  # bare holders, for the sake of the checkpoint's names
        attention.layer_norm = RMSNorm(sizes.hidden_size)
        attention.SelfAttention = SelfAttention(sizes, has_bias_table)
        mlp.layer_norm = RMSNorm(sizes.hidden_size)
        mlp.DenseReluDense = GatedMLP(sizes)
        self.layer = nn.ModuleList([attention, mlp])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, mlp = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias)
        return x + mlp.DenseReluDense(mlp.layer_norm(x))


class SelfAttention(nn.Module):
    def __init__(self, sizes: T5Sizes, has_bias_table: bool):
        super().__init__()
        self.num_heads = sizes.num_heads
        d_attention = sizes.num_heads * sizes.head_dim
        self.q, self.k, self.v = (nn.Linear(sizes.hidden_size, d_attention, bias=False) for _ in range(3))
        self.o = nn.Linear(d_attention, sizes.hidden_size, bias=False)
        if has_bias_table:  # only the first block has one, all blocks use it
            self.relative_attention_bias = nn.Embedding(BUCKETS, sizes.num_heads)

    def position_bias(self, length: int) -> Tensor:
        """Return what every head adds to its scores, (1, heads, query, key)."""
        buckets = relative_buckets(length, self.relative_attention_bias.weight.device)
        return rearrange(self.relative_attention_bias(buckets), "query key heads -> 1 heads query key")

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b h l d", h=self.num_heads)
            for project in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # not divided by sqrt(d)
        return self.o(rearrange(x, "b h l d -> b l (h d)"))


class GatedMLP(nn.Module):
    def __init__(self, sizes: T5Sizes):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(sizes.hidden_size, sizes.mlp_size, bias=False) for _ in range(2))
        self.wo = nn.Linear(sizes.mlp_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


@cache
@torch.inference_mode(False)  # in training, autograd refuses what inference has made
def relative_buckets(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the row of the bias table for each pair of positions, (query, key); it is made once and shared.

    Keys behind the query have rows 0 .. 15, keys ahead of it 16 .. 31; in both halves the first 8 are for
    exact distances and the others grow logarithmically up to a distance of 128.
    """
    # On the CPU whatever the device: distance 16 lies on an edge, log(2) / log(16) * 8, and must not fall.
    position = torch.arange(length, device="cpu")
    offset = position[None, :] - position[:, None]
    distance = offset.abs()
    half = BUCKETS // 2
    log_ratio = torch.log(distance.clamp(min=EXACT) / EXACT) / math.log(MAX_DISTANCE / EXACT)  # 0 .. 1
    far = (EXACT + (log_ratio * (half - EXACT)).long()).clamp(max=half - 1)
    return (torch.where(distance < EXACT, distance, far) + half * (offset > 0)).to(device)
