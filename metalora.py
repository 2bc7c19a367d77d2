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
from torch.utils.checkpoint import checkpoint

from flux.checkpoint import read_tensors
from flux.errors import UserError, listed
from flux.streaming import bring, multiply, multiply_back
from flux.transformer import Transformer
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

    The three are kept, and multiplied for all layers at once, by `Factors`. What is left to do here is
    h = W0 x + up (down x), with the small products of the samples' identities:

    down:      (s, parts * r2, d_in)     mid meta_down; s is the batch size, or 1: one identity for all
    up:        (s, parts * r2, d_out)    transposed and block-diagonal: each part's r2 channels reach its rows
    """

    def __init__(self, base: nn.Linear, parts: list[int]):
        super().__init__()
        assert sum(parts) == base.out_features, (parts, base)
        self.base, self.parts = base, parts
        self.down = self.up = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, ..., d_in) -> (b, ..., d_out); modulation layers have no token axis.

        Raises ValueError when the identities are neither those of b samples nor one for all.
        """
        s = len(self.down)
        if s not in (1, len(x)):
            raise ValueError(f"slots are ({s},), must be ({len(x)},), or (1,) for all samples")
        tokens = x.reshape(s, -1, x.shape[-1])  # (s, l, d_in)
        if torch.compiler.is_compiling():  # it fuses this by itself
            h = self.base(tokens.flatten(0, 1)).unflatten(0, (s, -1))
            h = torch.baddbmm(h, tokens @ self.down.mT, self.up)
        else:
            bring(self.base)
            h = _AdaptedLinear.apply(tokens, self.base, self.down, self.up)
        return h.view(*x.shape[:-1], -1)


class _AdaptedLinear(torch.autograd.Function):
    """Compute W0 x + up (down x) in as few operations as it takes. It has no second derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, base: nn.Linear, down: Tensor, up: Tensor) -> Tensor:
        z = x @ down.mT  # (s, l, parts * r2)
        ctx.save_for_backward(x, z, down, up)
        ctx.base = base
        h = multiply(base, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return h.baddbmm_(z, up)  # (s, l, d_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, down, up = ctx.saved_tensors
        grad_z, grad_x = grad @ up.mT, None
        if ctx.needs_input_grad[0]:
            grad_x = multiply_back(ctx.base, grad.flatten(0, 1)).view_as(x).baddbmm_(grad_z, down)
        return grad_x, None, grad_z.mT @ x, z.mT @ grad


class Factors(nn.Module):
    """The factors of all layers. Layers of one shape are stacked (n), so that a few operations serve all.

    meta_down: of each shape (n, parts, r1, d_in)
    personal:  (slots, size): an identity is a row, of each shape mid (n, parts, r2, r1) and up (n, d_out, r2)

    With r1 None they are plain LoRAs: there is no meta_down, and mid is their lora_A (n, parts, r2, d_in).
    """

    def __init__(
        self,
        layers: dict[str, MetaLoRALinear],
        r1: int | None,
        r2: int,
        slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.layers, self.r1, self.r2 = layers, r1, r2
        self.batch_slots: Tensor | int = 0  # of the next batch: (b,), or one for all
        self.stacks: dict[tuple, list[str]] = {}  # names of the layers of one shape
        for name, layer in layers.items():
            self.stacks.setdefault((layer.base.in_features, *layer.parts), []).append(name)
        meta_down, self.shapes = [], []
        for (d_in, *parts), names in self.stacks.items():
            n, p = len(names), len(parts)
            meta_down.append((n, p, r1, d_in))
            self.shapes += [(n, p, r2, r1 or d_in), (n, sum(parts), r2)]
        options = {"device": device, "dtype": dtype}
        empty = [nn.Parameter(torch.empty(shape, **options)) for shape in meta_down if r1]
        self.meta_down = nn.ParameterList(empty)
        self.personal = nn.Parameter(torch.empty(slots, sum(map(math.prod, self.shapes)), **options))

    def multiply(self, dtype: torch.dtype) -> None:
        """Give every layer `down` and `up` of the slots, in the dtype of its input.

        The small matrices come first, so that no token ever has r1 channels. This is done once for a batch,
        in front of the blocks: one that is recomputed finds the products in its layers.
        """
        slots = self.batch_slots
        rows = self.personal[slots : slots + 1] if isinstance(slots, int) else self.personal[slots]
        mids_and_ups = self.split(rows)
        meta_downs = self.meta_down or [None] * len(self.stacks)
        for shape, mid, up, meta_down in zip(self.stacks, mids_and_ups[::2], mids_and_ups[1::2], meta_downs):
            _, *parts = shape
            down = mid if meta_down is None else times_meta_down(mid, meta_down)
            down = down.to(dtype).flatten(2, 3)  # (s, n, parts * r2, d_in)
            up = up.mT.to(dtype)  # (s, n, r2, d_out)
            if len(parts) > 1:
                ones = [torch.ones(1, size, dtype=dtype, device=up.device) for size in parts]
                mask = torch.block_diag(*ones)[:, None]  # (parts, 1, d_out)
                up = (up[:, :, None] * mask).flatten(2, 3)  # (s, n, parts * r2, d_out)
            for name, *products in zip(self.stacks[shape], down.unbind(1), up.unbind(1)):
                self.layers[name].down, self.layers[name].up = products

    def split(self, rows: Tensor) -> list[Tensor]:
        """Split rows of `personal`, (s, size): of each shape mid (s, n, ...) and up (s, n, ...), in turns."""
        pieces = rows.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [piece.unflatten(1, shape) for piece, shape in zip(pieces, self.shapes)]

    def by_layer(self, rows: Tensor | None = None) -> dict[str, tuple[Tensor | None, Tensor, Tensor]]:
        """Return meta_down, mid and up of each layer, by name: views, to read and to write.

        rows: (s, size), from which mid and up are taken instead of `personal`.
        """
        split, factors = self.split(self.personal.data if rows is None else rows), {}
        for k, names in enumerate(self.stacks.values()):
            meta_down = self.meta_down[k].data if self.r1 else [None] * len(names)
            factors |= dict(zip(names, zip(meta_down, split[2 * k].unbind(1), split[2 * k + 1].unbind(1))))
        return {name: factors[name] for name in self.layers}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Fill meta_down and mid as LoRA does, kaiming-uniform with a = sqrt(5), and up with zeros."""
        for meta_down, mid, up in self.by_layer().values():
            if meta_down is not None:
                kaiming_(meta_down, generator)
            kaiming_(mid, generator)
            up.zero_()


def times_meta_down(mid: Tensor, meta_down: Tensor) -> Tensor:
    """Multiply mid (s, n, parts, r2, r1) by meta_down (n, parts, r1, d_in) -> (s, n, parts, r2, d_in)."""

    def product(mid: Tensor, meta_down: Tensor) -> Tensor:
        return torch.einsum("snpri,npid->snprd", mid, meta_down.to(mid.dtype))

    if meta_down.dtype == mid.dtype:
        return product(mid, meta_down)
    # Stage 2 keeps it as it is in the file, in half precision; backward makes the wide copy again.
    return checkpoint(product, mid, meta_down, use_reentrant=False, preserve_rng_state=False)


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


def linear_names(model: Transformer, targets: str = "all") -> Iterator[tuple[str, list[str]]]:
    """Yield each adapted linear layer's name and the diffusers names of its parts."""
    for kind in ("double_blocks", "single_blocks"):
        for i in range(len(getattr(model, kind))):
            for layer, parts in PARTS[model.kind].items():
                if layer.startswith(kind) and TARGETS[targets](layer):
                    yield layer.replace("#", f"{i}"), [part.replace("#", f"{i}") for part in parts]


def inject(
    model: Transformer,
    r1: int | None,
    r2: int,
    slots: int,
    targets: str = "all",
    generator: torch.Generator | None = None,
    reset: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Put a `MetaLoRALinear` around each targeted linear layer of a transformer, in place; return the model.

    Nothing outside the blocks is adapted, and the base is frozen. `model.factors` holds all factors, in
    `dtype`. r1 None makes plain LoRAs of rank r2. reset False leaves the factors to be filled by the caller.
    """
    model.requires_grad_(False)
    layers = {}
    for name, parts in linear_names(model, targets):
        base = model.get_submodule(name)
        sizes = part_sizes(len(parts), base.out_features, base.in_features)
        layers[name] = MetaLoRALinear(base, sizes)
        model.set_submodule(name, layers[name])
    device = model.img_in.weight.device  # the blocks' weights may be streamed from another one
    model.factors = Factors(layers, r1, r2, slots, dtype, device)
    if reset:
        model.factors.reset(generator)
    model.factors.hook = model.register_forward_pre_hook(_multiply_factors)
    return model


def _multiply_factors(model: Transformer, args: tuple) -> None:
    model.factors.multiply(model.img_in.weight.dtype)


def eject(model: Transformer) -> Transformer:
    """Undo `inject`, in place: put the linear layers back and drop the factors."""
    if adapters(model):
        for name, layer in adapters(model).items():
            model.set_submodule(name, layer.base)
        model.factors.hook.remove()
        del model.factors
    return model


def adapters(model: Transformer) -> dict[str, MetaLoRALinear]:
    """Return the adapted layers by name; none if there are none."""
    return model.factors.layers if hasattr(model, "factors") else {}


def use_slots(model: Transformer, slots: Tensor | int) -> None:
    """Say which identity each sample of the next batch is: (b,) on the model's device, or a number for all.

    There must be no forward pass of other identities before this one's backward has returned: recomputed
    blocks would use their factors. A model without adapters is left as it is.
    """
    if adapters(model):
        model.factors.batch_slots = slots


# --- The optimizer of an identity --------------------------------------------------------------------------


class SlotAdamW:
    """AdamW (Loshchilov and Hutter 2019) for `Factors.personal`, as if each slot had its own optimizer.

    Only the slots present in a batch move, decay and count a step.
    """

    def __init__(self, personal: Tensor, lr: float, weight_decay: float = 0.01):
        self.personal, self.lr, self.weight_decay = personal, lr, weight_decay
        self.count = torch.zeros(len(personal), 1, device=personal.device)  # steps of each slot
        self.mean = torch.zeros_like(personal)  # of the gradient
        self.square = torch.zeros_like(personal)  # mean of the squared gradient

    @torch.no_grad()
    def step(
        self,
        slots: Tensor,
        finite: Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Update the given slots, (n,) long, once each even if named twice.

        finite: a bool on the device; if it is False, everything stays as it is.
        """
        grad = self.personal.grad[slots]
        count = self.count[slots] + 1
        mean = self.mean[slots].lerp(grad, 1 - betas[0])
        square = self.square[slots].lerp(grad.square(), 1 - betas[1])
        # 1 - beta^count. Without expm1, float32 would lose three of its seven digits in the first steps.
        correct = [-torch.expm1(count * math.log(beta)) for beta in betas]
        update = mean / correct[0] / ((square / correct[1]).sqrt() + eps)
        personal = self.personal[slots] * (1 - self.lr * self.weight_decay) - self.lr * update
        # A slot that is named twice gets the same values twice.
        for tensor, value in (
            (self.count, count),
            (self.mean, mean),
            (self.square, square),
            (self.personal.data, personal),
        ):
            tensor[slots] = value if finite is None else torch.where(finite, value, tensor[slots])

    def state_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict) -> None:
        for name, stored in state.items():
            getattr(self, name).copy_(stored)


def clip_slots(personal: Tensor, most: float) -> None:
    """Scale each slot's gradient, a row of (slots, size), to norm `most` if it is longer."""
    norms = personal.grad.norm(dim=1, keepdim=True)  # (slots, 1)
    personal.grad.mul_((most / (norms + 1e-6)).clamp(max=1))  # as torch.nn.utils.clip_grad_norm_


# --- Conversion to a plain LoRA ----------------------------------------------------------------------------

VERSION = 1  # of the entries that we write into a LoRA file's header


@torch.no_grad()
def collapse(model: Transformer, slot: int = 0) -> Lora:
    """Multiply one identity out to an ordinary LoRA (paper, section 3, end of stage 2).

    Returns lora_A (r2, d_in) and lora_B (d_out, r2) of each projection, by its diffusers name.
    """
    parts_of, lora = dict(linear_names(model)), {}
    for name, (meta_down, mid, up) in model.factors.by_layer().items():
        a = mid[slot]  # (parts, r2, r1)
        if meta_down is not None:
            a = a @ meta_down.to(a.dtype)
        b = up[slot].split(adapters(model)[name].parts)
        lora |= zip(parts_of[name], zip(a, b))
    return lora


def export_lora(
    model: Transformer, path: Path, metadata: dict, slot: int = 0, form: str = "diffusers"
) -> None:
    """Write one identity as an ordinary rank-r2 LoRA in float16, named as one of `lora.names.FORMATS`.

    The header holds `metadata`, r1, r2 and the entries that other programs show. Raises UserError when a
    number is not finite: such a file would give black pictures.
    """
    lora = {part: (a.half().cpu(), b.half().cpu()) for part, (a, b) in collapse(model, slot).items()}
    about = {"version": VERSION}
    if model.factors.r1:
        about["r1"] = model.factors.r1
    about |= {"r2": model.factors.r2, **metadata}
    write_tensors(name_tensors(lora, form), path, {**about, **model_spec(about, model)})


# --- LoRA files in the model -------------------------------------------------------------------------------


def load_lora(model: Transformer, path: Path, strength: float = 1.0) -> dict[str, str]:
    """Merge a LoRA file of any origin into the weights and return its metadata.

    Raises UserError as `read_lora` does; the model is then as before.
    """
    lora, metadata = read_lora(path, model)
    merge_loras(model, [(lora, strength)])
    return metadata


def inject_loras(model: Transformer, slots: Sequence[Sequence[tuple[Lora, float]]]) -> Transformer:
    """Put LoRAs, each with its strength, into the model unmerged; those of one slot add up.

    They may differ in rank and in what they adapt. `eject` undoes it. Raises UserError for layers outside the
    blocks, which have no slots: `split_loras` separates them.
    """
    parts_of = dict(linear_names(model))
    known = {part for parts in parts_of.values() for part in parts}
    sums = [add_up(loras) for loras in slots]
    outside = set().union(*sums) - known
    if outside:
        raise UserError(f"layers outside the blocks have no slots: {listed(sorted(outside))}")
    rank = max((len(a) for lora in sums for a, _ in lora.values()), default=0)
    inject(model, None, rank, len(slots), reset=False, dtype=model.img_in.weight.dtype)
    model.factors.personal.data.zero_()  # where a LoRA has nothing, the layer stays as it is
    for name, (_, mids, ups) in model.factors.by_layer().items():
        for slot, lora in enumerate(sums):
            ups_of_parts = ups[slot].split(adapters(model)[name].parts)
            for part, mid, up in zip(parts_of[name], mids[slot], ups_of_parts):
                if part in lora:
                    a, b = lora[part]
                    mid[: len(a)] = a
                    up[:, : len(a)] = b
    return model


def split_loras(
    model: Transformer, loras: Sequence[tuple[Lora, float]]
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


def save_meta(model: Transformer, path: Path, metadata: dict) -> None:
    """Write all meta_down, the product of stage 1, in float16.

    The metadata must hold r1 and targets, which `inject` needs before the file can be used.
    """
    by_layer = model.factors.by_layer().items()
    tensors = {f"{name}.meta_down": meta_down.half().cpu() for name, (meta_down, _, _) in by_layer}
    write_tensors(tensors, path, metadata)


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


def assign_meta(model: Transformer, prior: Prior, freeze: bool = True) -> None:
    """Copy a stage-1 file's tensors into the injected layers; UserError lists what does not fit.

    freeze: meta_down is not trained, and kept in the file's half precision.
    """
    by_layer = model.factors.by_layer().items()
    expected = {f"{name}.meta_down": meta_down for name, (meta_down, _, _) in by_layer}
    problems = [f"{name} is for no layer of this model" for name in prior.tensors if name not in expected]
    for name, meta_down in expected.items():
        stored = prior.tensors.get(name)
        if stored is None:
            problems.append(f"missing {name}")
        elif stored.shape != meta_down.shape:
            problems.append(f"{name} is {tuple(stored.shape)}, must be {tuple(meta_down.shape)}")
    refuse(prior.path, sorted(problems))
    for names, meta_down in zip(model.factors.stacks.values(), model.factors.meta_down):
        stored = torch.stack([prior.tensors[f"{name}.meta_down"] for name in names])
        if freeze:
            meta_down.data = stored.to(meta_down.device)
            meta_down.requires_grad_(False)
        else:
            meta_down.data.copy_(stored)
