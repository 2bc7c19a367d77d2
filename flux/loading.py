"""Find the files of a model and load them exactly: header first, then memory-mapped, assigned, strict.

A model is a folder in the layout of black-forest-labs/FLUX.1-dev: `flux1-*.safetensors`, `ae.safetensors`,
`text_encoder/`, `text_encoder_2/` (sharded or not), `tokenizer/`, `tokenizer_2/`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.clip import CLIPSizes, CLIPText
from flux.model import Flux, FluxSizes
from flux.t5 import T5, T5Sizes

HUB_MODELS = {"flux-dev": ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors")}
LOCAL_MODELS = {"tiny": Path(__file__).parents[1] / "tiny" / "weights"}
HUB_FILES = (
    "ae.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
)


def find_model(name: str) -> Path:
    """Return the folder of a model: a name from the tables above, or a folder on disk.

    Hub models are taken from the hub's cache, and what is missing there is downloaded. Raises
    FileNotFoundError, saying what to do, when the folder is no model or the hub refuses.
    """
    if name in HUB_MODELS:
        repo, transformer = HUB_MODELS[name]
        return Path(_from_hub(repo, transformer, *HUB_FILES)).parent
    folder = LOCAL_MODELS.get(name, Path(name))
    if not folder.is_dir():
        known = ", ".join([*HUB_MODELS, *LOCAL_MODELS])
        raise FileNotFoundError(f"--model {name}: neither a folder nor one of the known models ({known})")
    find_transformer(folder)
    parts = ("ae.safetensors", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    if missing := [part for part in parts if not (folder / part).exists()]:
        raise FileNotFoundError(f"{folder} is not a whole FLUX.1 model: it lacks {', '.join(missing)}")
    return folder


def find_transformer(folder: Path) -> Path:
    """Return the one `flux1-*.safetensors` in a model folder; FileNotFoundError when there is none or several."""
    files = sorted(folder.glob("flux1-*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise FileNotFoundError(f"{folder} must hold exactly one flux1-*.safetensors; found {found}")
    return files[0]


def _from_hub(repo: str, *files: str) -> str:
    """Download what the cache lacks and return the path of the first file."""
    try:
        paths = [try_to_load_from_cache(repo, file) or hf_hub_download(repo, file) for file in files]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (
            "the hub refuses without a licence"
            if isinstance(error, GatedRepoError)
            else "it cannot be downloaded"
        )
        raise FileNotFoundError(
            f"{repo} is not in the hub cache, and {reason} ({type(error).__name__}).\n"
            f"Accept its licence at https://huggingface.co/{repo}, then run `hf auth login` with a read token "
            "or set HF_TOKEN;\nor name a folder that holds the files already: --model FOLDER "
            "(flux1-dev.safetensors, ae.safetensors, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/);\n"
            "or try everything on the small model that comes along: --model tiny"
        ) from error
    return paths[0]


@dataclass(frozen=True)
class Checkpoint:
    """The headers of one or several safetensors files, read as one."""

    path: Path
    file_of: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Read the headers of a file, or of all shards in a folder; ValueError names a file that is damaged."""
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{path}: no such safetensors file, or a folder without any")
        file_of, shapes = {}, {}
        for file in files:
            try:
                with safe_open(file, "pt") as f:
                    for name in f.keys():
                        if name in file_of:
                            raise ValueError(f"{path}: {name} is in {file_of[name].name} and in {file.name}")
                        file_of[name] = file
                        shapes[name] = tuple(f.get_slice(name).get_shape())
            except SafetensorError as error:
                raise ValueError(f"{file} is not a whole safetensors file ({error})") from error
        return cls(path, file_of, shapes)

    @property
    def config(self) -> dict:
        """The `config.json` beside the weights, empty when there is none."""
        file = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def read(
        self, names: list[str], device: str | torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Read tensors; on the CPU and in the file's own dtype they stay mapped to the file, uncopied."""
        tensors = {}
        for file in {self.file_of[name]: None for name in names}:
            with safe_open(file, "pt") as f:
                for name in names:
                    if self.file_of[name] == file:
                        tensors[name] = f.get_tensor(name).to(device, dtype)
        return tensors


def load(
    kind: type[nn.Module], sizes_kind: type, path: Path | str, device="cpu", dtype=torch.bfloat16
) -> nn.Module:
    """Build `kind` on the meta device with the sizes the header tells, then assign the weights.

    Raises ValueError that lists every missing, unexpected and misshapen tensor and names the file.
    """
    checkpoint = Checkpoint.open(path)
    shapes = {
        name: shape for name, shape in checkpoint.shapes.items() if name not in getattr(kind, "IGNORED", ())
    }
    try:
        sizes = sizes_kind.from_shapes(shapes, checkpoint.config)
    except (KeyError, ValueError, IndexError) as error:
        some = ", ".join(sorted(shapes)[:3])
        raise ValueError(
            f"{path} is not a {kind.__name__} checkpoint: {error} (it begins with {some})"
        ) from error
    with torch.device("meta"):
        model = kind(sizes)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in shapes]
    problems += [f"unexpected {name} {shape}" for name, shape in shapes.items() if name not in expected]
    problems += [
        f"{name} is {shapes[name]}, must be {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit {sizes}:\n  " + "\n  ".join(problems))
    model.load_state_dict(checkpoint.read(list(expected), device, dtype), assign=True, strict=True)
    return model.requires_grad_(False).eval()


def load_flux(path: Path | str, device="cpu", dtype=torch.bfloat16) -> Flux:
    """Load the transformer from a file, or a folder of shards; frozen."""
    return load(Flux, FluxSizes, path, device, dtype)


def load_autoencoder(path: Path | str, device="cpu", dtype=torch.bfloat16) -> AutoEncoder:
    """Load the autoencoder; frozen."""
    return load(AutoEncoder, AutoEncoderSizes, path, device, dtype)


def load_t5(path: Path | str, device="cpu", dtype=torch.bfloat16) -> T5:
    """Load the T5 encoder; frozen."""
    return load(T5, T5Sizes, path, device, dtype)


def load_clip(path: Path | str, device="cpu", dtype=torch.bfloat16) -> CLIPText:
    """Load the CLIP text encoder; frozen."""
    return load(CLIPText, CLIPSizes, path, device, dtype)
