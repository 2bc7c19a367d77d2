"""CLIP's text encoder (FLUX uses that of ViT-L/14): tokens to one vector per text.

Names are those of `text_encoder/` and of `clip_l.safetensors`; Radford et al. 2021. FLUX takes the vector
before CLIP's text projection, which is therefore left out. `Layer` serves CLIP's vision encoder as well.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.errors import UserError
from flux.sizes import Shapes, config_count, count_names, shape_of


@dataclass(frozen=True)
class CLIPSizes:
    vocab_size: int
    max_length: int
    hidden_size: int
    num_heads: int
    mlp_size: int
    depth: int

    @classmethod
    def from_shapes(cls, shapes: Shapes, config: dict) -> Self:
        """Read the sizes from a checkpoint's header, only from its `text_model.`; UserError if it is no CLIP.

        The header does not tell the heads: they are 64 wide unless `config`, of a text encoder or of a whole
        CLIP, gives `num_attention_heads`.
        """
        vocab_size, hidden_size = shape_of(shapes, "text_model.embeddings.token_embedding.weight", 2)
        config = config.get("text_config", config)
        if not isinstance(config, dict):
            raise UserError(f"its config.json has text_config {config!r}, must be an object")
        num_heads = config_count(config, "num_attention_heads", max(1, hidden_size // 64))
        if hidden_size % num_heads:
            raise UserError(f"its width {hidden_size} is no multiple of {num_heads} attention heads")
        return cls(
            vocab_size=vocab_size,
            max_length=shape_of(shapes, "text_model.embeddings.position_embedding.weight", 2)[0],
            hidden_size=hidden_size,
            num_heads=num_heads,
            mlp_size=shape_of(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
            depth=count_names(shapes, "text_model.encoder.layers."),
        )


class CLIPText(nn.Module):
    IGNORED = ("text_model.embeddings.position_ids",)  # 0 .. 76, in older files

    def __init__(self, sizes: CLIPSizes):
        super().__init__()
        self.sizes = sizes
        self.text_model = TextModel(sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (b, l) -> pooled (b, hidden_size); UserError when l exceeds the learned positions."""
        return self.text_model(tokens)


class TextModel(nn.Module):
    def __init__(self, sizes: CLIPSizes):
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.token_embedding = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.embeddings.position_embedding = nn.Embedding(sizes.max_length, sizes.hidden_size)
        self.encoder.layers = nn.ModuleList(
            Layer(sizes.hidden_size, sizes.num_heads, sizes.mlp_size) for _ in range(sizes.depth)
        )
        self.final_layer_norm = nn.LayerNorm(sizes.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.embeddings.position_embedding.weight  # (max_length, d)
        if tokens.shape[1] > len(positions):
            raise UserError(f"{tokens.shape[1]} tokens given, CLIP takes at most {len(positions)}")
        x = self.embeddings.token_embedding(tokens) + positions[: tokens.shape[1]]
        for layer in self.encoder.layers:
            x = layer(x, causal=True)
        # The end token is the last of the vocabulary and the padding too; argmax finds the first of them.
        end = tokens.argmax(dim=1)
        return self.final_layer_norm(x[torch.arange(len(x), device=x.device), end])


class Layer(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(hidden_size)
        self.self_attn = SelfAttention(hidden_size, num_heads)
        self.layer_norm2 = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size, mlp_size)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """x: (b, l, d) -> (b, l, d)."""
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b h l d", h=self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(rearrange(x, "b h l d -> b l (h d)"))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # OpenAI's approximation of GELU
