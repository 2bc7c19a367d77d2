"""The pieces of `Flux` and `Flux2`: embeddings, rotary attention, the two kinds of blocks, the output layer.

Modules carry the names of the original checkpoints (black-forest-labs/flux, `src/flux/modules/layers.py`,
whose behaviour is matched). Nothing here knows about adapters, checkpointing or devices.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.errors import UserError


def timestep_embedding(t: Tensor, channels: int = 256) -> Tensor:
    """Embed times: (b,) in [0, 1] -> (b, channels) float32, cosines first.

    Computed in float32 whatever comes in: rounding 1000 t to bfloat16, as the original code does when it
    is handed bfloat16 times, moves the embedding by more than 1 (at t = 0.7373).
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10_000) / half * steps)
    angles = 1000 * t.float()[:, None] * frequencies  # (b, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(ids: Tensor, axes: tuple[int, ...], theta: float) -> Tensor:
    """Turn positions into rotations: ids (b, l, axes) -> float32 (b, l, 1, head_dim / 2, 2), cos and sin.

    Axis n owns `axes[n]` channels of a head. Angles are computed in float64, as diffusers does.
    """
    wide = torch.float32 if ids.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    angles = []
    for axis, channels in enumerate(axes):
        omega = theta ** -(torch.arange(0, channels, 2, dtype=wide, device=ids.device) / channels)
        angles.append(ids[..., axis, None].to(wide) * omega)
    angles = torch.cat(angles, dim=-1)[:, :, None]  # (b, l, 1, head_dim / 2): one axis for the heads
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def check_axes(axes: tuple[int, ...], head_dim: int) -> None:
    """Raise UserError when `rope_table` cannot rotate all channels of a head."""
    if sum(axes) != head_dim:
        raise UserError(f"rotary axes {axes} add up to {sum(axes)}, the head size is {head_dim}")
    if any(channels % 2 for channels in axes):
        raise UserError(f"rotary axes {axes} must be even: channels are rotated in pairs")


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate adjacent channel pairs (2k, 2k + 1) of x (b, l, heads, head_dim) by pe, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # it fuses real numbers with what is around them, but not complex ones
        (even, odd), (cos, sin) = pairs.unbind(-1), pe.unbind(-1)
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:  # a rotation is one complex product
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(pe))
    return pairs.flatten(-2).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """Attend with rotary positions and no mask: three (b, l, heads, head_dim) -> (b, l, heads * head_dim).

    The heads' axis changes its place as a view: fused kernels take that, and lay out their result like q.
    """
    q, k, v = (x.transpose(1, 2) for x in (rotate(q, pe), rotate(k, pe), v))
    x = F.scaled_dot_product_attention(q, k, v)
    return rearrange(x, "b h l d -> b l (h d)")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise the last axis of x (b, l, d), then scale and shift it; shift and scale are (b, 1, d)."""
    if len(x) == 1:  # as its weight and bias: one kernel does all, forward and backward
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps=1e-6)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: (b, d_in) -> (b, hidden_size)."""

    def __init__(self, d_in: int, hidden_size: int, bias: bool = True):
        super().__init__()
        self.in_layer = nn.Linear(d_in, hidden_size, bias)
        self.out_layer = nn.Linear(hidden_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))


class RMSNorm(nn.Module):
    """Root-mean-square norm over a head's channels, under the checkpoint's name `scale`."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale.type_as(x), eps=1e-6)


class QKNorm(nn.Module):
    """Separate norms for queries and keys."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split into heads and norm: three (b, l, heads * head_dim) -> (b, l, heads, head_dim)."""
        head_dim = self.query_norm.scale.numel()
        q, k, v = (rearrange(x, "b l (h d) -> b l h d", d=head_dim) for x in (q, k, v))
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """The projections of one stream of a double block; the attention itself spans both streams."""

    def __init__(self, hidden_size: int, head_dim: int, bias: bool = True):
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias)
        self.norm = QKNorm(head_dim)
        self.proj = nn.Linear(hidden_size, hidden_size, bias)


class Modulation(nn.Module):
    """AdaLN: activated (b, d) -> `chunks` tensors (b, 1, d): shift, scale, gate, perhaps all again."""

    def __init__(self, hidden_size: int, chunks: int, bias: bool = True):
        super().__init__()
        self.chunks = chunks
        self.lin = nn.Linear(hidden_size, chunks * hidden_size, bias)

    def forward(self, activated: Tensor) -> tuple[Tensor, ...]:
        return self.lin(activated)[:, None].chunk(self.chunks, dim=-1)


class DoubleStream(nn.Module):
    """Image and text streams with weights of their own, and one attention over both.

    What is alike in FLUX.1 and FLUX.2. The block of each makes the layers: `img_attn`, `img_mlp`, `txt_attn`,
    `txt_mlp`.
    """

    def forward(
        self, img: Tensor, txt: Tensor, img_mod: tuple[Tensor, ...], txt_mod: tuple[Tensor, ...], pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """img (b, l_img, d), txt (b, l_txt, d), six chunks of modulation (b, 1, d) for each -> img, txt."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod

        img_qkv = self.img_attn.qkv(modulate(img, img_shift1, img_scale1)).chunk(3, dim=-1)
        txt_qkv = self.txt_attn.qkv(modulate(txt, txt_shift1, txt_scale1)).chunk(3, dim=-1)
        pairs = zip(self.txt_attn.norm(*txt_qkv), self.img_attn.norm(*img_qkv))
        q, k, v = (torch.cat(pair, dim=1) for pair in pairs)  # (b, l, heads, head_dim)
        txt_attn, img_attn = attention(q, k, v, pe).split([txt.shape[1], img.shape[1]], dim=1)

        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_attn))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulate(img, img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_attn))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
        return img, txt


class SingleStream(nn.Module):
    """One stream; attention and MLP side by side between two fused linear layers.

    What is alike in FLUX.1 and FLUX.2. The block of each makes the layers, `linear1`, `linear2`, `norm` and
    `mlp_act`, and says in `split` how many channels of q, k, v and the MLP leave the first one.
    """

    def forward(self, x: Tensor, mod: tuple[Tensor, ...], pe: Tensor) -> Tensor:
        """x (b, l, d), text before image; three chunks of modulation (b, 1, d) -> (b, l, d)."""
        shift, scale, gate = mod
        q, k, v, mlp = self.linear1(modulate(x, shift, scale)).split(self.split, dim=-1)
        attn = attention(*self.norm(q, k, v), pe)
        both = torch.cat([attn, self.mlp_act(mlp)], dim=-1)  # (b, l, d + mlp_size)
        return torch.addcmul(x, gate, self.linear2(both))


class DoubleBlock(DoubleStream):
    """FLUX.1's, with modulation and MLPs of its own."""

    def __init__(self, hidden_size: int, head_dim: int, mlp_size: int):
        super().__init__()
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(hidden_size, chunks=6))
            self.add_module(f"{stream}_attn", SelfAttention(hidden_size, head_dim))
            mlp = nn.Sequential(
                nn.Linear(hidden_size, mlp_size),
                nn.GELU(approximate="tanh"),
                nn.Linear(mlp_size, hidden_size),
            )
            self.add_module(f"{stream}_mlp", mlp)

    def forward(self, img: Tensor, txt: Tensor, activated: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """img (b, l_img, d), txt (b, l_txt, d), activated (b, d) -> img, txt."""
        return super().forward(img, txt, self.img_mod(activated), self.txt_mod(activated), pe)


class SingleBlock(SingleStream):
    """FLUX.1's, with a modulation of its own."""

    def __init__(self, hidden_size: int, head_dim: int, mlp_size: int):
        super().__init__()
        self.split = [hidden_size] * 3 + [mlp_size]
        self.linear1 = nn.Linear(hidden_size, sum(self.split))
        self.linear2 = nn.Linear(hidden_size + mlp_size, hidden_size)
        self.norm = QKNorm(head_dim)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(hidden_size, chunks=3)

    def forward(self, x: Tensor, activated: Tensor, pe: Tensor) -> Tensor:
        """x (b, l, d), text before image; activated (b, d) -> (b, l, d)."""
        return super().forward(x, self.modulation(activated), pe)


class LastLayer(nn.Module):
    """Adaptive norm and projection of the image tokens to velocities."""

    def __init__(self, hidden_size: int, out_channels: int, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels, bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size, bias))

    def forward(self, img: Tensor, vec: Tensor) -> Tensor:
        """img (b, l_img, d), vec (b, d) -> (b, l_img, out_channels)."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(img, shift, scale))
