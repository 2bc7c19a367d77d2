"""Load weights exactly: read the header, map the file to memory, assign every tensor, strictly.

A checkpoint is a safetensors file, a folder of shards, or (for frozen evaluators) what `torch.save` wrote.
Tensors stored differently are converted: diffusers' q, k and v are joined, other dtypes cast.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux.errors import UserError, first_line, listed
from flux.formats import FLOATS, Header, Shape, Source, is_config_of, translate
from flux.pages import drop_pages, file_ranges
from flux.texts import read_text

PICKLED = (".bin", ".pt", ".pth")
WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # beside variants in 16 bit, perhaps
MAGIC = {
    b"PK\x03\x04": "it is a zip, as torch.save writes; safetensors of the same weights are needed",
    b"GGUF": "it is a GGUF file; safetensors in 8 bits or more are needed",
    b"version https://git-lfs": "it is a git-lfs pointer, not the file: run `git lfs pull`",
    b"<": "it is a web page, perhaps one that asks to log in",
}
LARGE = 2**24  # bytes from which a tensor is made in a file, not in memory
SAMPLE = 4096  # values at each end of a tensor that are checked to be finite


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """Open a safetensors file; UserError names it when it is damaged or of another kind."""
    try:
        with safe_open(file, "pt") as f:
            yield f
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file: {_damage(file) or error}") from error


def _damage(file: Path) -> str:
    """Say what is wrong with a file that safetensors refuses, or return ""."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(64)
        for magic, kind in MAGIC.items():
            if start.startswith(magic):
                return kind
        length = int.from_bytes(start[:8], "little")  # then a header of this length, then the tensors
        if size < 8:
            return f"it has {size} bytes"
        if size < 8 + length:
            return f"it has {size} bytes, and begins as if its header alone had {length}"
        try:
            f.seek(8)
            entries = json.loads(f.read(length))
            end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        # No JSON, or JSON of another shape.
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return ""
    described = 8 + length + end
    return "" if size == described else f"it has {size} bytes, its header describes {described} bytes"


def unpickle(file: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote, running none of its code; UserError when it is none."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    # zipfile, pickle, struct and torch raise a dozen types for a file that is damaged, cut short, of another
    # kind, or with code in it: RuntimeError, UnpicklingError, EOFError, BadZipFile, KeyError ...
    except Exception as error:
        raise UserError(f"{file} is not a whole PyTorch file of weights ({first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{file} holds something else than a dictionary of tensors")
    return state


def shards(path: Path) -> list[Path]:
    """Return the safetensors files of a folder that belong together, or the file itself.

    Raises FileNotFoundError when there is none, or when not all that belong together are there.
    """
    if path.is_file():
        return [path]
    names = shard_names(path)
    if not names:
        raise FileNotFoundError(f"{path}: no such safetensors file, or a folder without any")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} lacks {listed(missing)}, of {len(names)} files that belong together")
    return [path / name for name in names]


def shard_names(folder: Path) -> list[str]:
    """Return the files that a folder has, or should have, by its index or by their numbers."""
    indices = [file for file in folder.glob("*.index.json") if file.name.count(".") == 3]  # not a variant's
    if indices:
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
            raise UserError(f"{indices[0]} does not say which tensor is in which file")
        return sorted(set(weight_map.values()))
    for name in WHOLE:
        if (folder / name).is_file():
            return [name]
    names = {file.name for file in folder.glob("[!.]*.safetensors")}
    for name in sorted(names):
        match = re.fullmatch(r"(.*)-\d+-of-(\d+)(\..*)", name)
        if match:
            stem, count, suffix = match.groups()
            names |= {f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1)}
    return sorted(names)


def read_json(file: Path) -> dict:
    """Read a JSON object; UserError names a file that holds none."""
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content


@dataclass(frozen=True)
class Checkpoint:
    """The headers of one or several safetensors files, read as one; or a state dict of `torch.save`."""

    path: Path
    file_of: dict[str, Path]
    header: Header
    unpickled: dict[str, Tensor] = field(default_factory=dict)  # such a file has no header to read first

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read the headers of a file, or of all shards in a folder; UserError names a damaged file."""
        path = Path(path)
        if path.suffix in PICKLED and path.is_file():
            state = unpickle(path)
            header = {
                name: (tuple(tensor.shape), "F32" if tensor.is_floating_point() else "I64")
                for name, tensor in state.items()
            }
            return cls(path, dict.fromkeys(state, path), header, state)
        file_of, header = {}, {}
        for file in shards(path):
            with opened(file) as f:
                for name in f.keys():
                    if name in file_of:
                        raise UserError(f"{path}: {name} is in {file_of[name].name} and in {file.name}")
                    file_of[name], entry = file, f.get_slice(name)
                    header[name] = (tuple(entry.get_shape()), entry.get_dtype())
        return cls(path, file_of, header)

    @property
    def config(self) -> dict:
        """The `config.json` beside the weights, empty when there is none."""
        file = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        return read_json(file) if file.is_file() else {}

    def read(
        self, sources: dict[str, Source], device: str | torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Make tensors; on the CPU those that the file holds in `dtype` stay mapped to it, uncopied.

        Integers, such as BatchNorm's counters, keep their dtype. UserError lists the tensors that are not
        finite; only their two ends are checked, for a whole model would have to be read from the disk.
        """
        with ExitStack() as stack:
            handles = {}

            def get(name: str) -> Tensor:
                if self.unpickled:
                    return self.unpickled[name]
                file = self.file_of[name]
                if file not in handles:
                    handles[file] = stack.enter_context(opened(file))
                return handles[file].get_tensor(name)

            tensors = {name: make(source, get, device, dtype) for name, source in sources.items()}
        broken = [name for name, tensor in tensors.items() if not _ends_are_finite(tensor)]
        if broken:
            raise UserError(f"{self.path} is damaged: NaN or infinity in {listed(broken)}")
        return tensors


def make(
    source: Source, get: Callable[[str], Tensor], device: str | torch.device, dtype: torch.dtype
) -> Tensor:
    """Make one of our tensors of those in the file; `get` reads one of them by its name."""
    first = get(source.names[0])
    dtype = dtype if first.is_floating_point() else first.dtype
    if source.is_plain and first.dtype == dtype:
        tensor = first.to(device)
    else:
        shape = source.shape[:-2] if source.change == "1x1" else source.shape
        tensor = empty(shape, device, dtype)
        files = file_ranges() if tensor.nbytes >= LARGE else []
        rows = tensor.split([shape[0] for shape in source.shapes]) if first.ndim else [tensor]
        for part, name, scale in zip(rows, source.names, source.scales):
            stored = get(name)
            piece = stored.to(device)
            piece = piece if scale is None else piece.float() * get(scale).to(device).float()
            part.copy_(torch.cat(piece.chunk(2)[::-1]) if source.change == "swap" else piece)
            drop_pages(stored, files)
        drop_pages(tensor, files)
    return tensor[..., None, None] if source.change == "1x1" else tensor


def empty(shape: Shape, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor; a large one on the CPU is mapped to a temporary file without a name.

    The kernel can then write it to that file when memory is short, as it can drop what is mapped to the
    checkpoint: 7.2 GB of FLUX.1-dev in diffusers' layout. Where TMPDIR has no room, with a warning, and on
    systems other than Linux, it is in memory.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type == "cpu" and size >= LARGE and hasattr(os, "posix_fallocate"):  # Linux
        try:
            with NamedTemporaryFile(prefix="flux") as file:  # its name goes, what is mapped stays
                os.posix_fallocate(file.fileno(), 0, size)  # writing to a full disk would kill the process
                return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        except OSError as error:
            warnings.warn(f"weights lie in memory, not in TMPDIR's folder ({error})", stacklevel=2)
    return torch.empty(shape, device=device, dtype=dtype)


def _ends_are_finite(tensor: Tensor) -> bool:
    flat = tensor.flatten()
    return bool(flat[:SAMPLE].isfinite().all() and flat[-SAMPLE:].isfinite().all())


def load(
    kind: type[nn.Module],
    sizes_kind: type,
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Build `kind` on the meta device with the sizes that the header tells, then assign the weights.

    On the device "meta" no weights are read. Raises UserError that names the file and lists every tensor
    that is missing, unexpected, misshapen or of a wrong dtype.
    """
    checkpoint = Checkpoint.open(path)
    model, sources = fit(kind, sizes_kind, checkpoint, dtype)
    if torch.device(device).type != "meta":
        model.load_state_dict(checkpoint.read(sources, device, dtype), assign=True, strict=True)
    return model.requires_grad_(False).eval()


def fit(
    kind: type[nn.Module], sizes_kind: type, checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Source]]:
    """Return the model on the meta device, and what each of its tensors is made of; UserError as `load`."""
    path = checkpoint.path
    try:
        sources, problems = translate(kind, checkpoint.header)
        shapes = {name: source.shape for name, source in sources.items()}
        config = checkpoint.config
        sizes = sizes_kind.from_shapes(shapes, config if is_config_of(kind, config) else {})
        with torch.device("meta"):
            model = kind(sizes)
    except UserError as error:
        first = ", ".join(sorted(checkpoint.header)[:3]) or "no tensor"
        message = f"{path} is not a {kind.__name__} checkpoint: {error}; it begins with {first}"
        raise UserError(message) from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    problems += [f"missing {name} {shape}" for name, shape in expected.items() if name not in sources]
    for name, source in sources.items():
        called = name if source.names == (name,) else f"{name}, made of {', '.join(source.names)},"
        if name not in expected:
            problems.append(f"unexpected {called} {source.shape}")
            continue
        if source.shape != expected[name]:
            problems.append(f"{called} is {source.shape}, must be {expected[name]}")
        if name in floats and not {*source.dtypes} <= {*FLOATS}:
            problems.append(f"{called} is {', '.join(source.dtypes)}, must be {', '.join(FLOATS)}")
    if problems:
        raise UserError(f"{path} does not fit {sizes}:\n  " + listed(problems, "\n  "))
    return model.to(dtype), sources


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a small safetensors file whole, with its metadata; UserError names a file that is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with opened(path) as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}


def read_header(path: Path) -> tuple[dict, int]:
    """Return a safetensors file's header, and where its data begin; UserError when it is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with opened(path), path.open("rb") as file:  # `opened` checks lengths and offsets
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length
