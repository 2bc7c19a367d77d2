"""Meta-LoRA: the layer (paper, eq. 1), where it goes in FLUX, the optimizer of an identity, and the files.

Training has three factors per layer: meta_down is shared, mid and up belong to one identity. The end of
stage 2 multiplies them out to an ordinary LoRA. How LoRA files look, ours and those of other programs, is
in `lora/`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flux.checkpoint import read_tensors
from flux.errors import UserError
from flux.model import Flux
from lora.fitting import clean, refuse
from lora.merging import add_up, merge_loras
from lora.names import PARTS, Lora, part_sizes
from lora.reading import read_lora
from lora.writing import model_spec, name_tensors, write_tensors


class MetaLoRALinear(nn.Module):
    """A frozen linear layer with the Meta-LoRA update added (paper, eq. 1).

        h = W0 x + up[i] mid[i] meta_down x        i: the identity slot of each sample

    The layer may be several fused projections of the same input (q, k, v and the single block's MLP). Each of
    these parts has its own three factors and its own rows of the output.

    meta_down: (parts, r1, d_in)         LoMD, shared by all identities
    mid:       (slots, parts, r2, r1)    LoM, one per identity
    up:        (slots, d_out, r2)        LoU, one per identity; zero at the start, so h = W0 x
    slot:      (b,) or (1,) long         the identity of each sample, or one for all; None: slot 0 for all

    With r1 None it is a plain LoRA: there is no meta_down, and mid (slots, parts, r2, d_in) is its lora_A.
    """

    def __init__(self, base: nn.Linear, parts: list[int], r1: int | None, r2: int, slots: int):
        super().__init__()
        assert sum(parts) == base.out_features, (parts, base)
        self.base, self.parts, self.slot = base, parts, None
        # The bias tells the device: the weight may be streamed from another one.
        options = {"device": base.bias.device, "dtype": torch.float32}
        shared = nn.Parameter(torch.empty(len(parts), r1, base.in_features, **options)) if r1 else None
        self.register_parameter("meta_down", shared)
        self.mid = nn.Parameter(torch.empty(slots, len(parts), r2, r1 or base.in_features, **options))
        self.up = nn.Parameter(torch.empty(slots, base.out_features, r2, **options))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Fill meta_down and mid as LoRA does, kaiming-uniform with a = sqrt(5), and up with zeros."""
        if self.meta_down is not None:
            kaiming_(self.meta_down, generator)
        kaiming_(self.mid, generator)
        self.up.data.zero_()

    def down(self, slot: Tensor | slice | int) -> Tensor:
        """Return mid @ meta_down of the given slots, (..., parts, r2, d_in): a plain LoRA's lora_A."""
        if self.meta_down is None:
            return self.mid[slot]
        # einsum, because `@` would copy meta_down and its gradient for each slot.
        return torch.einsum("...pri,pid->...prd", self.mid[slot], self.meta_down)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, ..., d_in) -> (b, ..., d_out); modulation layers have no token axis.

        Raises ValueError when `slot` is neither (b,) nor (1,).
        """
        slot = slice(1) if self.slot is None else self.slot
        if self.slot is not None and slot.shape not in ((1,), x.shape[:1]):
            raise ValueError(f"slots are {tuple(slot.shape)}, must be ({len(x)},), or (1,) for all samples")
        # Multiply the small matrices first, so that no token ever has r1 channels.
        # s: the number of slots, b, or 1 that serves all samples
        down = self.down(slot).flatten(1, 2).to(x.dtype)  # mid meta_down: (s, parts * r2, d_in)
        # Block-diagonal, so that each part's rows of the output see only its own r2 channels.
        ups = [torch.block_diag(*up.split(self.parts, dim=1)) for up in self.up[slot].mT]
        up = torch.stack(ups).to(x.dtype)  # (s, parts * r2, d_out)
        tokens = x.reshape(len(down), -1, x.shape[-1])  # (s, l, d_in)
        h = self.base(tokens.flatten(0, 1))  # W0 x: (s * l, d_out)
        return add_update(h, tokens, down, up).view(*x.shape[:-1], -1)  # W0 x + up (mid meta_down) x


def add_update(h: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return h + x down^T up, slot by slot; h: (s * l, d_out), x: (s, l, d_in), up: (s, r, d_out)."""
    if torch.compiler.is_compiling():  # it does not support mark_dirty, and fuses this by itself
        return torch.baddbmm(h.view(*x.shape[:2], -1), x @ down.mT, up).flatten(0, 1)
    return _AddUpdate.apply(h, x, down, up)


class _AddUpdate(torch.autograd.Function):
    """Compute `add_update` in place; autograd alone would keep copies of h. It has no second derivative."""

    @staticmethod
    def forward(ctx, h: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        z = x @ down.mT  # (s, l, parts * r2)
        ctx.save_for_backward(x, z, down, up)
        ctx.mark_dirty(h)
        h.view(*x.shape[:2], -1).baddbmm_(z, up)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h: Tensor) -> tuple[Tensor, ...]:
        x, z, down, up = ctx.saved_tensors
        grad = grad_h.reshape(*x.shape[:2], -1)  # (s, l, d_out)
        grad_z = grad @ up.mT
        return grad_h, grad_z @ down, grad_z.mT @ x, z.mT @ grad


def kaiming_(factor: nn.Parameter | Tensor, generator: torch.Generator | None = None) -> None:
    """Fill (..., inputs) uniformly within 1 / sqrt(inputs): kaiming with a = sqrt(5).

    The numbers are drawn on the CPU, so that a seed gives the same on every device.
    """
    if not factor.is_meta:
        bound = 1 / math.sqrt(factor.shape[-1])
        factor.data.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=generator))


# --- Where the layers go -----------------------------------------------------------------------------------

TARGETS = {  # which of the blocks' linear layers are adapted, by name
    "all": lambda name: True,
    "no-modulation": lambda name: "mod" not in name,
    "attention": lambda name: "attn" in name or "linear" in name,  # the single block fuses attention and MLP
}


def linear_names(model: Flux, targets: str = "all") -> Iterator[tuple[str, list[str]]]:
    """Yield each adapted linear layer's name and the diffusers names of its parts."""
    for kind in ("double_blocks", "single_blocks"):
        for i in range(len(getattr(model, kind))):
            for layer, parts in PARTS.items():
                if layer.startswith(kind) and TARGETS[targets](layer):
                    yield layer.replace("#", f"{i}"), [part.replace("#", f"{i}") for part in parts]


def inject(
    model: Flux,
    r1: int | None,
    r2: int,
    slots: int,
    targets: str = "all",
    generator: torch.Generator | None = None,
    reset: bool = True,
) -> Flux:
    """Put a `MetaLoRALinear` around each targeted linear layer of a Flux, in place; return the model.

    Nothing outside the blocks is adapted, and the base is frozen. r1 None makes plain LoRAs of rank r2. reset
    False leaves the factors to be filled by the caller.
    """
    model.requires_grad_(False)
    for name, parts in linear_names(model, targets):
        base = model.get_submodule(name)
        sizes = part_sizes(len(parts), base.out_features, base.in_features)
        layer = MetaLoRALinear(base, sizes, r1, r2, slots)
        if reset:
            layer.reset(generator)
        model.set_submodule(name, layer)
    return model


def eject(model: Flux) -> Flux:
    """Undo `inject`, in place: put the linear layers back and drop the factors."""
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.base)
    return model


def adapters(model: nn.Module) -> dict[str, MetaLoRALinear]:
    """Return the adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MetaLoRALinear)}


def factors(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """Return the parameters called `names` (meta_down, mid, up) of all adapted layers, layer by layer."""
    parameters = [getattr(layer, name) for layer in adapters(model).values() for name in names]
    return [parameter for parameter in parameters if parameter is not None]


def use_slots(model: nn.Module, slots: Tensor | None) -> None:
    """Say which identity each sample of the next batch is: (b,), or (1,) for all, on the model's device.

    The slots must stay set until backward has returned: blocks under activation checkpointing run forward
    again in backward, and would silently read the next batch's slots.
    """
    for layer in adapters(model).values():
        layer.slot = slots


# --- The optimizer of an identity --------------------------------------------------------------------------


class SlotAdamW:
    """AdamW (Loshchilov and Hutter 2019) for parameters (slots, ...), as if each slot had its own optimizer.

    Only the slots present in a batch move, decay and count a step.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float = 0.01):
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.count = torch.zeros(len(params[0]), device=params[0].device)  # steps of each slot
        self.mean = [torch.zeros_like(p) for p in params]  # of the gradient
        self.square = [torch.zeros_like(p) for p in params]  # mean of the squared gradient

    @torch.no_grad()
    def step(self, slots: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        """Update the given slots, (n,) long, once each even if named twice; drop the gradients."""
        self.count[slots] += 1
        for p, mean, square in zip(self.params, self.mean, self.square):
            grad = p.grad[slots]
            count = self.count[slots].view(-1, *[1] * (p.dim() - 1))
            # 1 - beta^count. Without expm1, float32 would lose three of its seven digits in the first steps.
            correct = [-torch.expm1(count * math.log(beta)) for beta in betas]
            mean[slots] = m = mean[slots].lerp(grad, 1 - betas[0])
            square[slots] = s = square[slots].lerp(grad.square(), 1 - betas[1])
            update = m / correct[0] / ((s / correct[1]).sqrt() + eps)
            p[slots] = p[slots] * (1 - self.lr * self.weight_decay) - self.lr * update
            p.grad = None

    def state_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict) -> None:
        self.count.copy_(state["count"])
        for name in ("mean", "square"):
            for moment, stored in zip(getattr(self, name), state[name], strict=True):
                moment.copy_(stored)


def clip_slots(params: list[nn.Parameter], most: float) -> None:
    """Scale each slot's gradient, over all parameters (slots, ...), to norm `most` if it is longer."""
    norms = torch.stack([p.grad.flatten(1).norm(dim=1) for p in params]).norm(dim=0)  # (slots,)
    factor = (most / (norms + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
    for p in params:
        p.grad.mul_(factor.view(-1, *[1] * (p.dim() - 1)))


# --- Conversion to a plain LoRA ----------------------------------------------------------------------------

VERSION = 1  # of the entries that we write into a LoRA file's header


@torch.no_grad()
def collapse(model: Flux, slot: int = 0) -> Lora:
    """Multiply one identity out to an ordinary LoRA (paper, section 3, end of stage 2).

    Returns lora_A (r2, d_in) and lora_B (d_out, r2) of each projection, by its diffusers name.
    """
    parts_of, lora = dict(linear_names(model)), {}
    for name, layer in adapters(model).items():
        ups = layer.up[slot].split(layer.parts)
        for part, a, b in zip(parts_of[name], layer.down(slot), ups):
            lora[part] = a, b
    return lora


def export_lora(model: Flux, path: Path, metadata: dict, slot: int = 0, form: str = "diffusers") -> None:
    """Write one identity as an ordinary rank-r2 LoRA in float16, with the names of diffusers or kohya.

    The header holds `metadata`, r1, r2 and the entries that other programs show. Raises UserError when a
    number is not finite: such a file would give black pictures.
    """
    lora = {part: (a.half().cpu(), b.half().cpu()) for part, (a, b) in collapse(model, slot).items()}
    layer = next(iter(adapters(model).values()))
    about = {"version": VERSION}
    if layer.meta_down is not None:
        about["r1"] = layer.meta_down.shape[1]
    about |= {"r2": layer.up.shape[-1], **metadata}
    spec = model_spec(about, guidance=model.sizes.guidance)
    write_tensors(name_tensors(lora, form), path, {**about, **spec})


# --- LoRA files in the model -------------------------------------------------------------------------------


def load_lora(model: Flux, path: Path, strength: float = 1.0) -> dict[str, str]:
    """Merge a LoRA file of any origin into the weights and return its metadata.

    Raises UserError as `read_lora` does; the model is then as before.
    """
    lora, metadata = read_lora(path, model)
    merge_loras(model, [(lora, strength)])
    return metadata


def inject_loras(model: Flux, slots: Sequence[Sequence[tuple[Lora, float]]]) -> Flux:
    """Put LoRAs, each with its strength, into the model unmerged; those of one slot add up.

    They may differ in rank and in what they adapt. `eject` undoes it. Raises UserError for layers outside the
    blocks, which have no slots: `split_loras` separates them.
    """
    parts_of = dict(linear_names(model))
    known = {part for parts in parts_of.values() for part in parts}
    sums = [add_up(loras) for loras in slots]
    outside = set().union(*sums) - known
    if outside:
        raise UserError(f"in no block: {', '.join(sorted(outside))}")
    rank = max((len(a) for lora in sums for a, _ in lora.values()), default=0)
    inject(model, None, rank, len(slots), reset=False)
    for name, layer in adapters(model).items():
        layer.mid.data.zero_()  # where a LoRA has nothing, the layer stays as it is
        layer.up.data.zero_()
        for slot, lora in enumerate(sums):
            ups = layer.up.data[slot].split(layer.parts)
            for part, mid, up in zip(parts_of[name], layer.mid.data[slot], ups):
                if part in lora:
                    a, b = lora[part]
                    mid[: len(a)] = a
                    up[:, : len(a)] = b
    return model


def split_loras(
    model: Flux, loras: Sequence[tuple[Lora, float]]
) -> tuple[list[tuple[Lora, float]], list[tuple[Lora, float]]]:
    """Return what LoRAs adapt within the blocks, and what outside of them; empty LoRAs are left out."""
    known = {part for _, parts in linear_names(model) for part in parts}
    inside, outside = [], []
    for lora, strength in loras:
        in_blocks = {part: pair for part, pair in lora.items() if part in known}
        elsewhere = {part: pair for part, pair in lora.items() if part not in known}
        if in_blocks:
            inside.append((in_blocks, strength))
        if elsewhere:
            outside.append((elsewhere, strength))
    return inside, outside


# --- The file of stage 1 -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prior:
    """A stage-1 file: tensors `<layer>.meta_down`, (parts, r1, d_in), and its header's metadata."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def r1(self) -> int:
        return int(self.metadata["r1"])

    @property
    def targets(self) -> str:
        return self.metadata["targets"]


def save_meta(model: nn.Module, path: Path, metadata: dict, meta_down: list[Tensor] | None = None) -> None:
    """Write all meta_down, the product of stage 1, in float16.

    The metadata must hold r1 and targets, which `inject` needs before the file can be used. meta_down: values
    to write instead of the model's own, such as their moving average.
    """
    names = [f"{name}.meta_down" for name in adapters(model)]
    values = [factor.detach().half().cpu() for factor in meta_down or factors(model, "meta_down")]
    write_tensors(dict(zip(names, values, strict=True)), path, metadata)


def load_meta(path: Path) -> Prior:
    """Read a stage-1 file; UserError when it is something else."""
    tensors, metadata = read_tensors(path)
    named = all(name.endswith(".meta_down") for name in tensors)
    if not tensors or not named or not {"r1", "targets"} <= metadata.keys():
        raise UserError(f"{path} is no file of stage 1 (python train_meta.py writes it as meta.safetensors)")
    if metadata["targets"] not in TARGETS:
        raise UserError(f"{path}: targets {clean(metadata['targets'])}, must be one of {', '.join(TARGETS)}")
    r1 = clean(metadata["r1"])
    problems = []
    for name, tensor in tensors.items():
        fits = tensor.ndim == 3 and str(tensor.shape[1]) == r1 and tensor.is_floating_point()
        if not fits or not tensor.float().isfinite().all():
            given = f"{tuple(tensor.shape)} of {tensor.dtype}"
            problems.append(f"{name} is {given}, must be (parts, {r1}, inputs) of finite floats")
    refuse(path, problems, "is damaged")
    return Prior(path, tensors, metadata)


def assign_meta(model: nn.Module, prior: Prior) -> None:
    """Copy a stage-1 file's tensors into the injected layers; UserError lists what does not fit."""
    expected = {f"{name}.meta_down": layer.meta_down for name, layer in adapters(model).items()}
    problems = [f"{name} is for no layer of this model" for name in prior.tensors if name not in expected]
    for name, meta_down in expected.items():
        stored = prior.tensors.get(name)
        if stored is None:
            problems.append(f"missing {name}")
        elif stored.shape != meta_down.shape:
            problems.append(f"{name} is {tuple(stored.shape)}, must be {tuple(meta_down.shape)}")
    refuse(prior.path, sorted(problems))
    for name, meta_down in expected.items():
        meta_down.data.copy_(prior.tensors[name])
