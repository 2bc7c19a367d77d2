"""A card's ceilings, and the time of what a single block of FLUX.1 is made of, each kernel alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.device import timed
from flux.errors import first_line
from flux.model import FluxSizes
from flux.streaming import FP8, quantize_rows

BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")


def ceilings(device: torch.device) -> dict[str, float]:
    """Return the speed of a large matrix product, and of copies: on the card, and to it from the host."""
    cuda = device.type == "cuda"
    side, size = (8192, 2**30) if cuda else (256, 2**20)
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    here, there = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.ones(size, dtype=torch.uint8)
    pinned = host.pin_memory() if cuda else host
    speeds = {
        "product_tflop_s": 2 * side**3 / timed(lambda: square @ square, device, 3, 10) / 1e12,
        "copy_tb_s": 2 * size / timed(lambda: there.copy_(here), device, 2, 5) / 1e12,  # read and written
        "pinned_gb_s": size / timed(lambda: here.copy_(pinned, non_blocking=True), device, 1, 3) / 1e9,
        "pageable_gb_s": size / timed(lambda: here.copy_(host), device, 1, 3) / 1e9,
    }
    return {name: round(speed, 3) for name, speed in speeds.items()}


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int = 20) -> float | str:
    """Return the time of a kernel, or why it does not run here."""
    try:
        return round(1e3 * timed(function, device, 3, repeats), 4)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"does not run: {first_line(error)[:100]}"


def kernels(device: torch.device, sizes: FluxSizes, tokens: int) -> dict[str, float | str]:
    """Return the milliseconds of the kernels of a single block for so many tokens, in bfloat16."""
    d, out = sizes.hidden_size, 3 * sizes.hidden_size + sizes.mlp_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, grad, weight, bias = draw(tokens, d), draw(tokens, out), draw(out, d) / d**0.5, draw(out)
    down, up, z, h = draw(4, d), draw(4, out), draw(tokens, 4), draw(tokens, out)
    work = {
        "linear1": lambda: F.linear(x, weight, bias),
        "linear1, gradient of its input": lambda: grad @ weight,
        "rank 4: down": lambda: x @ down.mT,
        "rank 4: up, added in place": lambda: h.addmm_(z, up),
    }
    heads = (1, sizes.num_heads, tokens, sizes.head_dim)
    q, k, v, one = draw(*heads), draw(*heads), draw(*heads), draw(*heads)
    angles = torch.rand(tokens, sizes.head_dim // 2, device=device)
    cos, sin, turn = angles.cos(), angles.sin(), torch.polar(torch.ones_like(angles), angles)
    work |= {
        "rotation, complex": lambda: rotate_complex(q, turn),
        "rotation, real": lambda: rotate_real(q, cos, sin),
    }
    error = (rotate_complex(q.float(), turn) - rotate_real(q.float(), cos, sin)).abs().max().item()
    found = {"rotation, real minus complex in float32": f"{error:.1e}"}
    found |= {name: milliseconds(function, device) for name, function in work.items()}

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(*(part.requires_grad_() for part in (q, k, v)))

    def both_ways() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(), (q, k, v), one)

    for name, function in {"attention": attend, "attention, both ways": both_ways}.items():
        found[name] = milliseconds(function, device, 5)
        for backend in BACKENDS:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                found[f"{name}, {backend.lower()}"] = milliseconds(function, device, 5)

    rows, scale = quantize_rows(weight)
    columns = scale.float().T.contiguous()

    def product() -> Tensor:
        top = x.abs().amax(1, keepdim=True).float() / torch.finfo(FP8).max
        return torch._scaled_mm((x / top).to(FP8), rows.T, top, columns, out_dtype=x.dtype)

    found["8 bits: a weight to bfloat16"] = milliseconds(lambda: rows.to(x.dtype).mul_(scale), device)
    found["8 bits: _scaled_mm, x rounded first"] = time = milliseconds(product, device)
    if isinstance(time, float):
        exact = F.linear(x, weight)
        error = (product() - exact).norm() / exact.norm()
        found["8 bits: _scaled_mm, relative error"] = round(error.item(), 4)
    return found


def rotate_complex(x: Tensor, turn: Tensor) -> Tensor:
    """Turn pairs of channels by complex numbers of length 1; x (..., l, d), turn (l, d / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


def rotate_real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Do the same in real numbers."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)
