"""Read a model's sizes from a checkpoint's header, and from a config.json what the header does not tell."""

import math

from flux.errors import UserError

Shapes = dict[str, tuple[int, ...]]  # of a checkpoint's tensors, by name


def shape_of(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """Return a tensor's shape; UserError when it is missing, empty or has another number of axes."""
    if name not in shapes:
        raise UserError(f"it lacks {name}")
    shape = shapes[name]
    if len(shape) != axes or 0 in shape:
        raise UserError(f"{name} is {shape}, must have {axes} axes, none of them empty")
    return shape


def count_names(shapes: Shapes, prefix: str) -> int:
    """Return how many different words follow a prefix, such as the numbers of blocks."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def heads_of(shapes: Shapes, hidden_size: int) -> tuple[int, int]:
    """Return a transformer's number of heads and the channels of each; UserError when they do not fit."""
    (head_dim,) = shape_of(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    if hidden_size % head_dim:
        raise UserError(f"its width {hidden_size} is no multiple of the head size {head_dim}")
    return hidden_size // head_dim, head_dim


def config_axes(config: dict, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return the channels of a head that each axis rotates, in a config `axes_dims_rope`, or the default."""
    axes = config.get("axes_dims_rope", [*default])
    if not isinstance(axes, list) or len(axes) != len(default) or any(type(axis) is not int for axis in axes):
        raise UserError(f"its config.json has axes_dims_rope {axes!r}, must be {len(default)} whole numbers")
    return tuple(axes)


def config_number(config: dict, key: str, default: float) -> float:
    """Return a finite number of a config; UserError when it is something else."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"its config.json has {key} {value!r}, must be a number")
    return value


def config_count(config: dict, key: str, default: int) -> int:
    """Return a whole number above 0 of a config; UserError when it is something else."""
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"its config.json has {key} {value!r}, must be a whole number above 0")
    return value
