"""Meta-LoRA: the layer (paper, eq. 1), where it goes in FLUX, its optimiser, and its files.

While training there are three factors, meta_down shared, mid and up per identity; the exported file is an
ordinary LoRA. What LoRA files look like, ours and other programs', is in `lora/`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flux.checkpoint import read_tensors
from flux.errors import UserError
from lora.merging import layer_updates, merged
from lora.names import PARTS, Lora, clean, linear_shapes, part_sizes, refuse
from lora.reading import read_lora
from lora.writing import name_tensors, write_tensors


class MetaLoRALinear(nn.Module):
    """A frozen linear layer with the Meta-LoRA update added (paper, eq. 1).

        h = W0 x + up[i] mid[i] meta_down x        i: the identity slot of each sample

    The layer may hold several projections of the same input, fused (q, k, v and the single block's MLP): each
    of these parts has its own three factors and its own rows of the output.

    meta_down: (parts, r1, d_in)         LoMD, shared by all identities
    mid:       (slots, parts, r2, r1)    LoM, one per identity
    up:        (slots, d_out, r2)        LoU, one per identity; zero at the start, so h = W0 x
    slot:      (b,) or (1,) long         the identity of each sample or of all; None: slot 0 for all

    Without r1 it is a plain LoRA: there is no meta_down, and mid, as wide as the input, is its lora_A.
    """

    def __init__(self, base: nn.Linear, parts: list[int], r1: int | None, r2: int, slots: int):
        super().__init__()
        assert sum(parts) == base.out_features, (parts, base)
        self.base, self.parts, self.slot = base, parts, None
        new = {"device": base.bias.device, "dtype": torch.float32}  # not the weight's: it may be streamed
        shared = nn.Parameter(torch.empty(len(parts), r1, base.in_features, **new)) if r1 else None
        self.register_parameter("meta_down", shared)
        self.mid = nn.Parameter(torch.empty(slots, len(parts), r2, r1 or base.in_features, **new))
        self.up = nn.Parameter(torch.empty(slots, base.out_features, r2, **new))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Start afresh: meta_down and mid kaiming-uniform with a = sqrt(5), as in LoRA, and up zero."""
        if self.meta_down is not None:
            kaiming_(self.meta_down, generator)
        kaiming_(self.mid, generator)
        self.up.data.zero_()

    def down(self, slot: Tensor | slice | int) -> Tensor:
        """Return lora_A of the given slots, (..., parts, r2, d_in)."""
        if self.meta_down is None:
            return self.mid[slot]
        # Not `@`, which would copy meta_down, and its gradient, for each slot.
        return torch.einsum("...pri,pid->...prd", self.mid[slot], self.meta_down)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, ..., d_in) -> (b, ..., d_out); modulation layers have no token axis."""
        slot = slice(1) if self.slot is None else self.slot
        if self.slot is not None and slot.shape not in ((1,), x.shape[:1]):
            raise ValueError(f"slots {tuple(slot.shape)} for a batch of {len(x)}: (b,), or (1,) for all")
        # Multiply the small matrices first: r1 never meets the tokens.
        down = self.down(slot).flatten(1, 2).to(x.dtype)  # (s, parts * r2, d_in); s: b, or 1 slot for all
        # Each part's rows of the output see its own z alone: (s, parts * r2, d_out), block-diagonal.
        up = torch.stack([torch.block_diag(*own.split(self.parts, dim=1)) for own in self.up[slot].mT])
        tokens = x.reshape(len(down), -1, x.shape[-1])  # (s, l, d_in)
        h = self.base(tokens.flatten(0, 1))  # (s * l, d_out)
        add = add_update if torch.compiler.is_compiling() else _AddUpdate.apply
        return add(h, tokens, down, up.to(x.dtype)).view(*x.shape[:-1], -1)


def add_update(h: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return h + x down^T up, slot by slot: (s * l, d_out), (s, l, d_in), (s, r, d_in), (s, r, d_out).

    What `_AddUpdate` computes, for torch.compile, which does not know `mark_dirty` and finds out by itself
    what can be done in place.
    """
    return torch.baddbmm(h.view(*x.shape[:2], -1), x @ down.mT, up).flatten(0, 1)


class _AddUpdate(torch.autograd.Function):
    """h += x down^T up, in place and slot by slot; autograd left to itself would make copies of h."""

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
    """Fill (..., inputs) uniformly up to 1 / sqrt(inputs), drawn on the CPU: the same on every device."""
    if not factor.is_meta:
        bound = 1 / math.sqrt(factor.shape[-1])
        factor.data.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=generator))


# --- Where the layers go -----------------------------------------------------------------------------------

TARGETS = {
    "all": lambda name: True,
    "no-modulation": lambda name: "mod" not in name,
    "attention": lambda name: "attn" in name or "linear" in name,  # the single block fuses attention and MLP
}


def linear_names(model: nn.Module, targets: str = "all") -> Iterator[tuple[str, list[str]]]:
    """Yield each adapted linear layer's name and the diffusers names of its parts."""
    for kind in ("double_blocks", "single_blocks"):
        layers = [name for name in PARTS if name.startswith(kind) and TARGETS[targets](name)]
        for i in range(len(getattr(model, kind))):
            for name in layers:
                yield name.replace("#", f"{i}"), [part.replace("#", f"{i}") for part in PARTS[name]]


def inject(
    model: nn.Module,
    r1: int | None,
    r2: int,
    slots: int,
    targets: str = "all",
    generator: torch.Generator | None = None,
    reset: bool = True,
) -> nn.Module:
    """Replace the targeted linear layers of a Flux, in place, by `MetaLoRALinear` around them; return it.

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
        _replace(model, name, layer)
    return model


def eject(model: nn.Module) -> nn.Module:
    """Undo `inject`, in place: put the linear layers back and forget the factors."""
    for name, layer in adapters(model).items():
        _replace(model, name, layer.base)
    return model


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def adapters(model: nn.Module) -> dict[str, MetaLoRALinear]:
    """Return the adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MetaLoRALinear)}


def factors(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """Return the parameters called `names` (meta_down, mid, up) of all adapted layers, layer by layer."""
    found = [getattr(layer, name) for layer in adapters(model).values() for name in names]
    return [factor for factor in found if factor is not None]


def use_slots(model: nn.Module, slots: Tensor | None) -> None:
    """Say which identity each sample of the next batch is: (b,), or (1,) for all, on the model's device.

    The slots must stay set until backward has returned: checkpointed blocks run forward again and would
    silently read the next batch's slots.
    """
    for layer in adapters(model).values():
        layer.slot = slots


class SlotAdamW:
    """AdamW for parameters (slots, ...) in which every slot lives as if it had an optimizer of its own.

    Only the slots present in a batch move, decay and count a step; Loshchilov and Hutter 2019 otherwise.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float = 0.01):
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.count = torch.zeros(len(params[0]), device=params[0].device)
        self.mean, self.square = ([torch.zeros_like(p) for p in params] for _ in range(2))

    @torch.no_grad()
    def step(self, slots: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        """Update the given slots, (n,) long, once each however often they are named; drop the gradients."""
        self.count[slots] += 1
        for p, mean, square in zip(self.params, self.mean, self.square):
            grad = p.grad[slots]
            count = self.count[slots].view(-1, *[1] * (p.dim() - 1))
            # 1 - beta^count; written so, float32 would lose three of its seven digits in the first steps.
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
            for own, stored in zip(getattr(self, name), state[name], strict=True):
                own.copy_(stored)


def clip_slots(params: list[nn.Parameter], most: float) -> None:
    """Shorten the gradient of each slot of parameters (slots, ...) to norm `most`, as if it were alone."""
    norms = torch.stack([p.grad.flatten(1).norm(dim=1) for p in params]).norm(dim=0)  # (slots,)
    factor = (most / (norms + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
    for p in params:
        p.grad.mul_(factor.view(-1, *[1] * (p.dim() - 1)))


# --- Files -------------------------------------------------------------------------------------------------

VERSION = 1  # of what we write into a LoRA's header


@torch.no_grad()
def collapse(model: nn.Module, slot: int = 0) -> Lora:
    """Multiply one identity out to an ordinary LoRA (paper, section 3, end of stage 2).

    Returns by the diffusers name of the projection lora_A (r2, d_in) and lora_B (d_out, r2).
    """
    parts_of, lora = dict(linear_names(model)), {}
    for name, layer in adapters(model).items():
        for part, a, b in zip(parts_of[name], layer.down(slot), layer.up[slot].split(layer.parts)):
            lora[part] = a, b
    return lora


def export_lora(model: nn.Module, path: Path, metadata: dict, slot: int = 0, form: str = "diffusers") -> None:
    """Write one identity as an ordinary rank-r2 LoRA in float16, in the words of diffusers or kohya.

    The header says what the file is: in our words, in those of `metadata`, and in those that others show.
    Raises ValueError when the weights are not finite: such a file would give black pictures elsewhere.
    """
    lora = {part: (a.half().cpu(), b.half().cpu()) for part, (a, b) in collapse(model, slot).items()}
    layer = next(iter(adapters(model).values()))
    r1 = {} if layer.meta_down is None else {"r1": layer.meta_down.shape[1]}
    about = {"version": VERSION, **r1, "r2": layer.up.shape[-1], **metadata}
    write_tensors(name_tensors(lora, form), path, {**about, **model_spec(model, about)})


def model_spec(model: nn.Module, about: dict) -> dict[str, str]:
    """Return the header's entries that other programs show: Stability AI's ModelSpec 1.0.0, kohya's base.

    about: the file's own entries; `resolution` is in pixels, the side of the training pictures, or missing.
    """
    kind = "flux-1-dev" if model.sizes.guidance else "flux-1-schnell"
    caption = about.get("caption", "")
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{kind}/lora",
        "implementation": "https://github.com/black-forest-labs/flux",
        "title": f"{'Meta-LoRA' if 'r1' in about else 'LoRA'}: {caption}".rstrip(": "),
        "date": date.today().isoformat(),
        "trigger_phrase": caption,
        **({"resolution": "{0}x{0}".format(about["resolution"])} if about.get("resolution") else {}),
    }
    return {"ss_base_model_version": "flux1", **{f"modelspec.{key}": value for key, value in spec.items()}}


def load_lora(model: nn.Module, path: Path, strength: float = 1.0) -> dict[str, str]:
    """Merge a LoRA file of any origin into the weights and return its metadata.

    Raises ValueError as `read_lora`; the model is then as before.
    """
    lora, metadata = read_lora(path, model)
    merge_loras(model, [(lora, strength)])
    return metadata


def merge_loras(model: nn.Module, loras: Sequence[tuple[Lora, float]]) -> None:
    """Merge LoRAs that `read_lora` found to fit, each with its strength: in float32, rounded once for all."""
    for name, updates in layer_updates(loras, linear_shapes(model)).items():
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(merged(layer.weight, updates), requires_grad=False)


def inject_loras(model: nn.Module, slots: Sequence[Sequence[tuple[Lora, float]]]) -> nn.Module:
    """Put LoRAs, each with its strength, into the model unmerged; those of a slot add up. `eject` undoes it.

    They may differ in rank and in what they adapt. Raises ValueError for layers outside the blocks, which
    have no slots: `split_loras` separates them.
    """
    known = dict(linear_names(model))
    parts = [part for own in known.values() for part in own]
    if outside := {part for own in slots for lora, _ in own for part in lora}.difference(parts):
        raise UserError(f"in no block: {', '.join(sorted(outside))}")
    rank = max(sum(len(lora[part][0]) for lora, _ in own if part in lora) for own in slots for part in parts)
    inject(model, None, rank, len(slots), reset=False)
    for name, layer in adapters(model).items():
        layer.mid.data.zero_()  # where a file has nothing, the layer stays as it is
        layer.up.data.zero_()
        for k, (part, end) in enumerate(zip(known[name], accumulate(layer.parts))):
            for slot, loras in enumerate(slots):
                first = 0
                for (a, b), strength in ((lora[part], strength) for lora, strength in loras if part in lora):
                    columns = slice(first, first := first + len(a))
                    layer.mid.data[slot, k, columns] = a.to(layer.mid)
                    layer.up.data[slot, end - len(b) : end, columns] = strength * b.to(layer.up)
    return model


def split_loras(
    model: nn.Module, loras: Sequence[tuple[Lora, float]]
) -> tuple[list[tuple[Lora, float]], list[tuple[Lora, float]]]:
    """Return what LoRAs adapt within the blocks, and what outside of them; empty LoRAs are left out."""
    known = {part for _, parts in linear_names(model) for part in parts}
    pick = lambda lora, inside: {part: lora[part] for part in lora if (part in known) == inside}
    split = [[(pick(lora, side), strength) for lora, strength in loras] for side in (True, False)]
    inside, outside = ([pair for pair in pairs if pair[0]] for pairs in split)
    return inside, outside


def save_meta(model: nn.Module, path: Path, metadata: dict, meta_down: list[Tensor] | None = None) -> None:
    """Write all meta_down, the product of stage 1, in float16; `meta_down` stands in for the model's own.

    The metadata must hold r1 and targets, which `inject` needs before the file can be used.
    """
    names = [f"{name}.meta_down" for name in adapters(model)]
    values = [factor.detach().half().cpu() for factor in meta_down or factors(model, "meta_down")]
    write_tensors(dict(zip(names, values, strict=True)), path, metadata)


@dataclass(frozen=True)
class Prior:
    """A stage-1 file: tensors `<layer>.meta_down`, (parts, r1, d_in), and what its header says."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def r1(self) -> int:
        return int(self.metadata["r1"])

    @property
    def targets(self) -> str:
        return self.metadata["targets"]


def load_meta(path: Path) -> Prior:
    """Read a stage-1 file; UserError when it is something else."""
    tensors, metadata = read_tensors(path)
    named = all(name.endswith(".meta_down") for name in tensors)
    if not tensors or not named or not {"r1", "targets"} <= metadata.keys():
        raise UserError(f"{path} is no file of stage 1 (python train_meta.py writes it as meta.safetensors)")
    if metadata["targets"] not in TARGETS:
        raise UserError(f"{path}: targets {clean(metadata['targets'])}, must be one of {', '.join(TARGETS)}")
    r1 = clean(metadata["r1"])
    fits = lambda t: t.ndim == 3 and str(t.shape[1]) == r1 and t.is_floating_point()
    problems = [
        f"{name} is {tuple(t.shape)} of {t.dtype}, must be (parts, {r1}, inputs) of finite floats"
        for name, t in tensors.items()
        if not (fits(t) and t.float().isfinite().all())
    ]
    refuse(path, problems)
    return Prior(path, tensors, metadata)


def assign_meta(model: nn.Module, prior: Prior) -> None:
    """Copy a stage-1 file's tensors into the injected layers; UserError lists what does not fit."""
    expected, tensors = (
        {f"{name}.meta_down": x.meta_down for name, x in adapters(model).items()},
        prior.tensors,
    )
    problems = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is for no layer of this model" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, must be {tuple(meta_down.shape)}"
        for name, meta_down in expected.items()
        if name in tensors and tensors[name].shape != meta_down.shape
    ]
    refuse(prior.path, sorted(problems))
    for name, meta_down in expected.items():
        meta_down.data.copy_(tensors[name])
